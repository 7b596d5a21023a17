// SPDX-License-Identifier: Apache-2.0
// Where the time of a pass goes on a device that works through its queue by itself.
#include "catch.hpp"
#include "exec/device_stages.hpp"

using namespace sluice;
using namespace sluice::exec;
using backend::OpKind;
using backend::OpTime;

namespace {

std::vector<Step> two_layers() {
  std::vector<Step> steps;
  const auto add = [&](Stage stage, int32_t item = -1, bool for_logits = false) {
    steps.push_back({.op = {}, .stage = stage, .stream_item = item, .for_logits = for_logits});
  };
  add(Stage::norm);
  add(Stage::matmul, 0);
  add(Stage::attention);
  add(Stage::matmul, 1);
  add(Stage::lm_head, -1, true);
  add(Stage::lm_head, 2, true);
  return steps;
}

plan::Plan plan_of_three() {
  plan::Plan plan;
  plan.stream = {{.tensor = 0, .tier = plan::Tier::disk}, {.tensor = 1, .tier = plan::Tier::host},
                 {.tensor = 2, .tier = plan::Tier::disk}};
  return plan;
}

// Operations behind each other, of these waits and runs, on a clock that began some time ago.
std::vector<OpTime> ops_of(const std::vector<std::pair<uint64_t, uint64_t>>& waits_and_runs) {
  std::vector<OpTime> ops;
  uint64_t at = 7000;
  for (const auto& [wait, run] : waits_and_runs) {
    ops.push_back({.begin_ns = at, .ready_ns = at + wait, .end_ns = at + wait + run});
    at += wait + run;
  }
  return ops;
}

}  // namespace

TEST_CASE("a pass's time is divided by what the device says, and what that leaves belongs to its end") {
  const std::vector<OpTime> ops = ops_of({{0, 5}, {100, 50}, {0, 20}, {30, 60}, {0, 2}, {7, 9}});
  const StageTimes times = device_stages(two_layers(), plan_of_three(), true, ops, 1000);
  CHECK(times[Stage::norm] == 5);
  CHECK(times[Stage::matmul] == 110);
  CHECK(times[Stage::attention] == 20);
  CHECK(times[Stage::disk_wait] == 107);
  CHECK(times[Stage::copy_wait] == 30);
  CHECK(times[Stage::lm_head] == 11 + (1000 - 283));
  CHECK(times.total() == 1000);
}

TEST_CASE("a pass without logits has no lm_head, and never more time than it took where clocks differ") {
  const std::vector<OpTime> ops = ops_of({{0, 5}, {0, 50}, {0, 20}, {0, 60}});
  const StageTimes times = device_stages(two_layers(), plan_of_three(), false, ops, 140);
  CHECK(times[Stage::lm_head] == 0);
  CHECK(times[Stage::embed] == 5);
  CHECK(times.total() == 140);
  CHECK(device_stages(two_layers(), plan_of_three(), false, ops, 100).total() == 135);
}
