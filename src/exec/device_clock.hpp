// SPDX-License-Identifier: Apache-2.0
// A device's clock on the host's: how far apart they are, and how well that is known.
//
// The two are never read at the same moment. But a pass's first stamp lies behind the moment at which the host handed the
// pass over, and its last one before the moment at which the host saw it done, so each pass bounds the offset from both
// sides:
//
//   host      begun --------------------------------- done          begun - first <= offset <= done - last
//   device            first ================ last
//
// Bounds of all passes hold at once, but for the drift of the clocks between them.
#pragma once

#include <cstdint>

namespace sluice::exec {

class DeviceClock {
 public:
  // A crystal is good to 50 ppm or better; the host's clock is slewed besides when it is set.
  static constexpr double kDrift = 200e-6;

  // One pass, in nanoseconds of the host's clock and of the device's.
  void bound(int64_t begun_ns, int64_t done_ns, uint64_t first_ns, uint64_t last_ns);

  // A moment of the device's clock on the host's, once bounded; off by at most error_ns().
  int64_t host_ns(uint64_t device_ns) const { return static_cast<int64_t>(device_ns) + low_ + (high_ - low_) / 2; }
  uint64_t error_ns() const { return static_cast<uint64_t>(high_ - low_) / 2; }

 private:
  bool bounded_ = false;
  int64_t low_ = 0, high_ = 0;   // of host - device
  int64_t at_ns_ = 0;            // when: of the host's clock
};

}  // namespace sluice::exec
