// SPDX-License-Identifier: Apache-2.0
// What each operation of a pass took, out of the device's clock as it stood behind each command. No Vulkan calls.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/backend.hpp"

namespace sluice::backend::vulkan {

// Steps of a clock, as a driver describes it.
struct TickKind {
  uint32_t valid_bits = 0;            // of a timestamp, the lowest; 0: the queue has no clock
  double ns = 0;                      // that a step takes
};

// The queries of one pass: each command leaves a tick where it ends; one whose weights are waited for another in front
// of it, where the wait ended. A query's number depends on the commands in front of it alone, so that what was recorded
// with it stays right in every pass that has the same ones.
//
//   commands    begin   norm     q (awaited)         rope    attention
//   queries         0      1     2             3        4            5
//   run             |------|     |-------------|--------|------------|
//   wait                   |-----|
//
// Allocates nothing after its making. Thread: the executor's.
class PassClock {
 public:
  static constexpr uint32_t kNoQuery = UINT32_MAX;

  PassClock() = default;
  // Of passes of up to `commands` commands: a longer one has no times.
  PassClock(TickKind kind, uint32_t commands);

  // Those a pass can need; 0 without a clock.
  uint32_t queries() const { return static_cast<uint32_t>(ticks_.size()); }
  // A pass that is not `timed` gets no queries and has no times.
  void begin(bool timed);
  // The first query of the next command: where it ends, or, if it is `awaited`, where its wait does, and the end has
  // the query behind it. kNoQuery: it has none. The first command of a pass is no operation.
  uint32_t add(bool awaited);
  // One for each query since `begin`, in their order, for the caller to fill. Empty: the pass has no times.
  std::span<uint64_t> ticks();
  // Turns the ticks into times.
  void read();
  // Of all commands but the first, once read.
  std::span<const OpTime> times() const { return times_; }

 private:
  uint64_t mask_ = 0;                 // of a tick's valid bits
  double tick_ns_ = 0;
  bool complete_ = false;             // every command got its queries
  uint32_t used_ = 0;                 // queries
  std::vector<bool> awaited_;         // by command
  std::vector<uint64_t> ticks_;
  std::vector<OpTime> times_;
};

}  // namespace sluice::backend::vulkan
