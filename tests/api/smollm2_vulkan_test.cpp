// SPDX-License-Identifier: Apache-2.0
// SmolLM2 on Vulkan with two thirds of its matrices read from disk in every pass: the tokens that it gives resident.
// Skipped where tools/fetch-smollm2 has not been.
#include <filesystem>

#include "golden_model.hpp"
#include "tiny_container.hpp"

namespace {

using namespace sluice;
using namespace sluice::test;

std::vector<int32_t> answer(const Model& model) {
  Result<Session> session = model.new_session();
  REQUIRE(session);
  REQUIRE(session->append(model.tokenize("Write one sentence about rivers.")));
  std::vector<int32_t> tokens;
  REQUIRE(session->generate({.max_tokens = 8, .sampling = {.temperature = 0}, .stop = {}, .ignore_eos = true},
                            [&](const Token& token) {
                              tokens.push_back(token.id);
                              return true;
                            }));
  return tokens;
}

}  // namespace

TEST_CASE("SmolLM2 gives the same tokens with two thirds of it streamed from disk") {
  const std::string source = golden_folder("../../models") + "/SmolLM2-135M-Instruct.Q4_1.gguf";
  if (!std::filesystem::exists(source)) {
    std::printf("skipped: %s is not there (tools/fetch-smollm2)\n", source.c_str());
    std::fflush(stdout);
    std::_Exit(77);
  }
  const TempFolder folder;
  ImportOptions import;
  import.source = source;
  import.output = folder.file("smollm2.sluice");
  REQUIRE(import_model(import));
  const ModelOptions resident{.context = 128, .max_rows = 8};
  const auto all = plan_model(import.output, under_test(resident), {});
  REQUIRE(all);
  ModelOptions streamed = resident;
  streamed.device_memory_bytes = all->device_bytes - all->resident_bytes * 2 / 3;
  const auto plan = plan_model(import.output, under_test(streamed), {});
  REQUIRE(plan);
  CHECK(static_cast<double>(plan->disk_tier_bytes) / static_cast<double>(all->resident_bytes) == Approx(0.67).margin(0.05));
  const std::vector<int32_t> expected = answer(open_or_fail(import.output, resident));
  CHECK(answer(open_or_fail(import.output, streamed)) == expected);
}
