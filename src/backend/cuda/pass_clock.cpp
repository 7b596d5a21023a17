// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/pass_clock.hpp"

#include <algorithm>

#include "base/check.hpp"

namespace sluice::backend::cuda {

// Commands run one behind the other, so an operation takes from the end of the one before it to its own: to the stamp
// of that, or to the beginning of the next that has one.
//
//   kernels     norm     q (awaited)          rope      attention      o (resident)     norm
//   stamps      b   e       b            e    b         b        e                      b   e
//   run        |----|      |-------------|---|---------|--------|----------------------|----|
//   wait             |-----|
void PassClock::read(std::span<const sluice::cuda::Stamp> stamps) {
  SLUICE_CHECK(stamps.size() == marks_.size() && stamps.size() >= 2);
  times_.clear();
  const size_t last = stamps.size() - 1;
  const auto end_of = [&](size_t i) -> uint64_t {
    if (marks_[i].end) return stamps[i].end_ns;
    size_t next = i + 1;
    while (next < last && !marks_[next].begin) ++next;
    return stamps[next].begin_ns;
  };
  uint64_t before = end_of(0);
  for (size_t i = 1; i < last; ++i) {
    const uint64_t begin = marks_[i].awaited ? std::max<uint64_t>(before, stamps[i].begin_ns) : before;
    const uint64_t end = std::max(begin, end_of(i));
    times_.push_back({.begin_ns = before, .ready_ns = begin, .end_ns = end});
    before = end;
  }
}

}  // namespace sluice::backend::cuda
