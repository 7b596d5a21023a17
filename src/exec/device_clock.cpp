// SPDX-License-Identifier: Apache-2.0
#include "exec/device_clock.hpp"

#include <algorithm>

namespace sluice::exec {

void DeviceClock::bound(int64_t begun_ns, int64_t done_ns, uint64_t first_ns, uint64_t last_ns) {
  const int64_t low = begun_ns - static_cast<int64_t>(first_ns);
  const int64_t high = std::max(low, done_ns - static_cast<int64_t>(last_ns));
  const auto drift = static_cast<int64_t>(kDrift * static_cast<double>(std::max<int64_t>(0, done_ns - at_ns_)));
  const int64_t low_before = low_ - drift, high_before = high_ + drift;
  // Bounds that exclude each other are of a clock that jumped: the newer ones hold.
  const bool together = bounded_ && low_before <= high && low <= high_before;
  low_ = together ? std::max(low, low_before) : low;
  high_ = together ? std::min(high, high_before) : high;
  at_ns_ = done_ns;
  bounded_ = true;
}

}  // namespace sluice::exec
