// SPDX-License-Identifier: Apache-2.0
#include "backend/vulkan/pass_clock.hpp"

#include "base/check.hpp"

namespace sluice::backend::vulkan {

PassClock::PassClock(TickKind kind, uint32_t commands) {
  if (kind.valid_bits == 0) return;
  mask_ = UINT64_MAX >> (64 - kind.valid_bits);
  tick_ns_ = kind.ns;
  awaited_.reserve(commands);
  ticks_.resize(size_t{2} * commands);
  times_.reserve(commands);
}

void PassClock::begin(bool timed) {
  awaited_.clear();
  times_.clear();
  used_ = 0;
  complete_ = timed && !ticks_.empty();
}

uint32_t PassClock::add(bool awaited) {
  complete_ = complete_ && awaited_.size() < ticks_.size() / 2;
  if (!complete_) return kNoQuery;
  const uint32_t first = used_;
  awaited_.push_back(awaited);
  used_ += awaited ? 2 : 1;
  return first;
}

std::span<uint64_t> PassClock::ticks() { return std::span(ticks_).first(complete_ ? used_ : 0); }

// In steps from tick to tick, which a wrap of the clock leaves as they are: a step of more than half the clock's range
// goes back. A wait that ended before its operation's turn came does that, and is none.
void PassClock::read() {
  SLUICE_CHECK(complete_ && !awaited_.empty());
  const uint64_t first = ticks_[0] & mask_;
  // A clock that counts nanoseconds since 1970 has more digits than a double.
  const long double exact_ns = static_cast<long double>(first) * static_cast<long double>(tick_ns_);
  const auto begin_ns = static_cast<uint64_t>(exact_ns + 0.5L);
  uint64_t gone = 0, at_ns = begin_ns;
  const auto go_to = [&](uint64_t tick) {
    const uint64_t step = (tick - first - gone) & mask_;
    if (step <= mask_ / 2) gone += step;
    return at_ns = begin_ns + static_cast<uint64_t>(static_cast<double>(gone) * tick_ns_ + 0.5);
  };
  times_.clear();
  const uint64_t* tick = ticks_.data() + 1;
  for (size_t command = 1; command < awaited_.size(); ++command) {
    OpTime time{.begin_ns = at_ns, .ready_ns = at_ns};
    if (awaited_[command]) time.ready_ns = go_to(*tick++);
    time.end_ns = go_to(*tick++);
    times_.push_back(time);
  }
}

}  // namespace sluice::backend::vulkan
