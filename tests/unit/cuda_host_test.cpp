// SPDX-License-Identifier: Apache-2.0
// What of the CUDA backend needs no GPU.
#include "backend/cuda/cuda_error.hpp"
#include "backend/cuda/pass_clock.hpp"
#include "catch.hpp"
#include "cuda/attention.hpp"

using namespace sluice;
using namespace sluice::backend;
using namespace sluice::backend::cuda;
using sluice::cuda::Stamp;

namespace {

constexpr Marks kBegin{.begin = true}, kBoth{.begin = true, .end = true}, kNone{};
constexpr Marks kAwaited{.begin = true, .end = true, .awaited = true};

// Run and wait of each operation, with the given stamps.
std::vector<std::pair<uint64_t, uint64_t>> times_of(const std::vector<std::pair<Marks, Stamp>>& commands) {
  PassClock clock;
  std::vector<Stamp> stamps;
  for (const auto& [marks, stamp] : commands) {
    clock.add(marks);
    stamps.push_back(stamp);
  }
  clock.read(stamps);
  std::vector<std::pair<uint64_t, uint64_t>> times;
  for (const OpTime& time : clock.times()) times.emplace_back(time.run_ns(), time.wait_ns());
  return times;
}
using Times = std::vector<std::pair<uint64_t, uint64_t>>;

}  // namespace

TEST_CASE("an operation runs from the end of the one before it to its own end, or to the next one's beginning") {
  // begin_pass, norm, qkv, rope, attention, o, norm, finish_pass. What stands where nothing is written is old.
  const Times times = times_of({{kBegin, {100, 9}}, {kBoth, {110, 114}}, {kNone, {7, 8}}, {kBegin, {150, 3}},
                                {kBoth, {153, 160}}, {kNone, {5, 6}}, {kBoth, {190, 195}}, {kBegin, {200, 1}}});
  CHECK(times == Times{{4, 0}, {36, 0}, {3, 0}, {7, 0}, {30, 0}, {5, 0}});
}

TEST_CASE("idle time in front of awaited weights is a wait, and a product's neighbour does not get it") {
  // norm, q awaited, k resident, v awaited: k's end was marked when v was waited for.
  const Times times = times_of({{kBegin, {0, 0}}, {kBoth, {10, 20}}, {kAwaited, {50, 90}}, {{.end = true}, {1, 95}},
                                {kAwaited, {99, 120}}, {kBegin, {125, 0}}, {kBegin, {130, 0}}});
  CHECK(times == Times{{10, 0}, {40, 30}, {5, 0}, {21, 4}, {10, 0}});
}

TEST_CASE("products behind each other share the time to the next stamp, and a clock in steps gives nothing negative") {
  const Times times = times_of({{kBegin, {32, 0}}, {kBoth, {32, 32}}, {kNone, {}}, {kNone, {}}, {kBoth, {32, 64}},
                                {kAwaited, {60, 60}}, {kBegin, {64, 0}}});
  CHECK(times == Times{{0, 0}, {0, 0}, {0, 0}, {32, 0}, {0, 0}});
  CHECK(times_of({{kBegin, {1, 0}}, {kBegin, {2, 0}}}).empty());
}

TEST_CASE("each way in which there is no GPU to work with has a sentence of its own") {
  struct Case {
    cudaError_t code;
    Surroundings around;
    ErrorCode error;
    const char* says;
  };
  const Case cases[] = {
      {cudaErrorInsufficientDriver, {.driver = 0, .runtime = 13000}, ErrorCode::not_found,
       "no NVIDIA driver is installed (libcuda.so.1 was not found); --backend cpu runs without a GPU"},
      {cudaErrorInsufficientDriver, {.driver = 11040, .runtime = 13000}, ErrorCode::not_found,
       "the NVIDIA driver is too old: it supports CUDA 11.4, and this build needs 13.0; update the driver; --backend cpu "
       "runs without a GPU"},
      {cudaErrorNoDevice, {}, ErrorCode::not_found,
       "the NVIDIA driver finds no device; see nvidia-smi and CUDA_VISIBLE_DEVICES; --backend cpu runs without a GPU"},
      {cudaErrorNoKernelImageForDevice, {.architecture = "sm_70"}, ErrorCode::not_found,
       "this build has no kernels for the device's architecture, sm_70; build with -Dgpu_archs=sm_70 or "
       "-Dgpu_archs=all; --backend cpu runs without a GPU"},
      {cudaErrorMemoryAllocation, {}, ErrorCode::out_of_memory, "starting GPU 0: the GPU has not enough free memory"},
  };
  for (const Case& c : cases) {
    const Error error = error_of(c.code, "starting GPU 0", c.around);
    CHECK(error.code == c.error);
    CHECK(error.message == c.says);
    CHECK(error.os_code == static_cast<int>(c.code));
  }
}

TEST_CASE("an error that ends the context says so, and refusals do not") {
  for (const cudaError_t code : {cudaErrorIllegalAddress, cudaErrorLaunchFailure, cudaErrorECCUncorrectable,
                                 cudaErrorAssert, cudaErrorMisalignedAddress, cudaErrorHardwareStackError}) {
    CHECK(is_sticky(code));
    const Error error = error_of(code, "computing a pass");
    CHECK(error.code == ErrorCode::device);
    CHECK(error.message.find("computing a pass: ") == 0);
    CHECK(error.message.find("the GPU cannot be used again by this process, start a new one") != std::string::npos);
  }
  for (const cudaError_t code : {cudaErrorMemoryAllocation, cudaErrorHostMemoryAlreadyRegistered, cudaErrorNotSupported,
                                 cudaErrorInvalidValue}) {
    CHECK_FALSE(is_sticky(code));
  }
}

TEST_CASE("the bound of decode attention covers the positions and changes seldom") {
  for (const uint32_t context : {64u, 448u, 4096u, 131072u}) {
    for (const uint32_t kv_heads : {1u, 5u, 8u}) {
      uint32_t last = 0, changes = 0;
      for (uint32_t positions = 1; positions <= context; ++positions) {
        const uint32_t bound = sluice::cuda::attention_bound(8 * kv_heads, kv_heads, positions, context);
        REQUIRE(bound >= positions);
        REQUIRE(bound <= context);
        REQUIRE(bound >= last);
        changes += bound != last ? 1 : 0;
        last = bound;
      }
      CHECK(last == context);
      CHECK(changes <= 8);
    }
  }
}
