// SPDX-License-Identifier: Apache-2.0
// A CUDA error that ends the context: everything of the model says so, nothing hangs, and a new process works. Exits
// with 77 where there is no GPU. A program of its own: the GPU is lost to this process.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <filesystem>

#include "cuda/elementwise.hpp"
#include "golden_model.hpp"
#include "tiny_container.hpp"

namespace {

using namespace sluice;
using namespace sluice::test;

struct Fixture {
  Fixture() : path(folder.file("tiny.sluice")) {
    REQUIRE(on_gpu());  // the suite sets SLUICE_TEST_BACKEND
    TinyOptions options;
    options.hyper = tiny_hyper();
    options.hyper.hidden = 256;
    options.hyper.heads = 4;
    options.hyper.kv_heads = 2;
    options.hyper.head_dim = 64;
    REQUIRE(write_tiny_container(path, options));
  }
  TempFolder folder;
  std::string path;
};

Result<StopReason> generate(Session& session, uint32_t tokens) {
  return session.generate({.max_tokens = tokens, .sampling = {.temperature = 0}, .stop = {}, .ignore_eos = true},
                          [](const Token&) { return true; });
}

// A kernel of ours with an address that is nobody's.
void lose_the_gpu() {
  auto* nobody = reinterpret_cast<float*>(uintptr_t{0x7000});
  REQUIRE(cuda::launch_rms_norm({.in = nobody, .rows = 1, .width = 64, .out = reinterpret_cast<__half*>(nobody),
                                 .row_scale = nobody}, nullptr) == cudaSuccess);
  REQUIRE(cudaDeviceSynchronize() != cudaSuccess);
}

}  // namespace

// Run by the other test in a process of its own, after it lost the GPU in its.
TEST_CASE("a fresh process generates", "[.fresh]") {
  const Fixture fixture;
  const Model model = open_or_fail(fixture.path, {.context = 128});
  Result<Session> session = model.new_session();
  REQUIRE(session);
  REQUIRE(session->append(std::vector<int32_t>{3, 141, 59}));
  REQUIRE(generate(*session, 10));
}

TEST_CASE("a lost GPU is a typed error of every later call, and a new process works") {
  const Fixture fixture;
  {
    const Model model = open_or_fail(fixture.path, {.context = 128, .sessions = 2});
    Result<Session> session = model.new_session();
    REQUIRE(session);
    REQUIRE(session->append(std::vector<int32_t>{3, 141, 59}));
    REQUIRE(generate(*session, 5));
    lose_the_gpu();
    for (int i = 0; i < 3; ++i) {
      const Result<StopReason> refused = generate(*session, 5);
      REQUIRE(!refused);
      INFO(refused.error().message);
      CHECK(refused.error().code == ErrorCode::device);
      CHECK(refused.error().message.find("start a new one") != std::string::npos);
    }
    CHECK(!session->fork());
  }   // which gives back what it can, and waits for nothing
  const Result<Model> again = Model::open(fixture.path, under_test({.context = 128}));
  REQUIRE(!again);
  CHECK(again.error().code == ErrorCode::device);
  const std::string self = std::filesystem::read_symlink("/proc/self/exe").string();
  CHECK(std::system(("'" + self + "' '[.fresh]'").c_str()) == 0);
}
