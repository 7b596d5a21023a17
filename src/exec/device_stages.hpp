// SPDX-License-Identifier: Apache-2.0
// Where the time of a pass went, on a device that works through its queue by itself: there the executor's clock only
// tells how long submitting took.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "backend/backend.hpp"
#include "exec/program.hpp"
#include "plan/planner.hpp"

namespace sluice::exec {

// Nanoseconds of one or more passes, by stage.
struct StageTimes {
  std::array<uint64_t, static_cast<size_t>(Stage::count)> ns{};
  uint64_t& operator[](Stage stage) { return ns[static_cast<size_t>(stage)]; }
  uint64_t operator[](Stage stage) const { return ns[static_cast<size_t>(stage)]; }
  uint64_t total() const;
};

// What a step waits for when it waits for its weights: their read, or their copy out of host memory.
Stage wait_of(const Step& step, const plan::Plan& plan);

// The times of a pass that took the executor `wall_ns` from the first operation to the end, divided by what the
// device says of its operations: `ops`, one per step that ran, in order. What they leave (the first kernel's start,
// fetching the logits) goes to lm_head, or in a pass without logits to embed.
StageTimes device_stages(std::span<const Step> program, const plan::Plan& plan, bool wants_logits,
                         std::span<const backend::OpTime> ops, uint64_t wall_ns);

}  // namespace sluice::exec
