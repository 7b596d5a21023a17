// SPDX-License-Identifier: Apache-2.0
// How fast threads read memory: the ceiling of a pass whose weights are resident.
#pragma once

#include <cstdint>

namespace sluice {

// The best of `rounds` readings of `bytes` by `threads` threads (0: one per core) at once, in bytes per second; 0 where
// the memory or the threads are not to be had. Takes `bytes` of memory meanwhile: several times the caches, or it is
// they that are measured.
double memory_read_rate(uint32_t threads, uint64_t bytes, int rounds);

}  // namespace sluice
