// SPDX-License-Identifier: Apache-2.0
// Time stamps for the recorder: the processor's time-stamp counter where it is invariant, else the steady clock.
//
// rdtsc takes 10 ns where clock_gettime through the vDSO takes 23 ns (a virtual machine on Zen 4), and a span has two
// of them. Ticks become nanoseconds only when a trace is written or read, from pairs of both clocks taken far apart.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#include <x86intrin.h>
#endif

#include "base/steady_ns.hpp"

namespace sluice::trace {

using sluice::steady_ns;

// The counter runs at one rate whatever the core's clock does, also while it sleeps (CPUID 8000_0007h, EDX bit 8; AMD
// Architecture Programmer's Manual volume 3, Intel SDM volume 3 section 18.17.1).
inline bool has_invariant_tsc() {
#if defined(__x86_64__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(0x80000007u, &eax, &ebx, &ecx, &edx) != 0 && (edx & (1u << 8)) != 0;
#else
  return false;
#endif
}

inline const bool kTicksAreTsc = has_invariant_tsc();

// Now, in ticks. Stamps of all threads of a process are comparable to within the synchronisation of the cores' counters
// (below 100 ns where the kernel itself trusts them).
inline uint64_t ticks() {
#if defined(__x86_64__)
  if (kTicksAreTsc) [[likely]] return __rdtsc();
#endif
  return steady_ns();
}

// The same moment on both clocks. Their readings lie between the two of the pair that was closest of eight, so the
// error is below `error_ns`.
struct ClockPair {
  uint64_t ticks = 0;
  uint64_t steady_ns = 0;
  uint64_t error_ns = 0;
};
ClockPair read_clocks();

// Ticks to nanoseconds, a straight line through two pairs.
class TickScale {
 public:
  TickScale() = default;
  // `later` at least some milliseconds after `first`; the rate's error is (error_ns of both) / (time between them).
  TickScale(const ClockPair& first, const ClockPair& later);

  // Nanoseconds of the steady clock; negative for what was before the clock began.
  double steady_ns(uint64_t at_ticks) const {
    return base_ns_ + static_cast<double>(static_cast<int64_t>(at_ticks - base_ticks_)) * ns_per_tick_;
  }
  double ns_per_tick() const { return ns_per_tick_; }

 private:
  uint64_t base_ticks_ = 0;
  double base_ns_ = 0;
  double ns_per_tick_ = 1;
};

// Ticks at a moment of the steady clock a short while ago: what a kernel or a queue stamped.
inline uint64_t ticks_at(uint64_t at_steady_ns, double ns_per_tick) {
  if (!kTicksAreTsc) return at_steady_ns;
  const uint64_t now = ticks();
  const auto ago_ns = static_cast<double>(static_cast<int64_t>(steady_ns() - at_steady_ns));
  return now - static_cast<uint64_t>(static_cast<int64_t>(ago_ns / ns_per_tick));
}

}  // namespace sluice::trace
