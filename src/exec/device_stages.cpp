// SPDX-License-Identifier: Apache-2.0
#include "exec/device_stages.hpp"

#include <algorithm>
#include <numeric>

#include "base/check.hpp"

namespace sluice::exec {

uint64_t StageTimes::total() const { return std::accumulate(ns.begin(), ns.end(), uint64_t{0}); }

Stage wait_of(const Step& step, const plan::Plan& plan) {
  const bool host_tier = step.stream_item >= 0 &&
                         plan.stream[static_cast<size_t>(step.stream_item)].tier == plan::Tier::host;
  return host_tier ? Stage::copy_wait : Stage::disk_wait;
}

StageTimes device_stages(std::span<const Step> program, const plan::Plan& plan, bool wants_logits,
                         std::span<const backend::OpTime> ops, uint64_t wall_ns) {
  StageTimes times;
  size_t op = 0;
  for (const Step& step : program) {
    if (step.for_logits && !wants_logits) continue;
    SLUICE_CHECK(op < ops.size());
    times[wait_of(step, plan)] += ops[op].wait_ns();
    times[step.stage] += ops[op].run_ns();
    ++op;
  }
  SLUICE_CHECK(op == ops.size());
  const uint64_t known = times.total();
  times[wants_logits ? Stage::lm_head : Stage::embed] += wall_ns - std::min(wall_ns, known);
  return times;
}

}  // namespace sluice::exec
