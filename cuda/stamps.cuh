// SPDX-License-Identifier: Apache-2.0
// When a kernel began and ended, on the GPU's own clock, written by the kernel: events between kernels would keep the
// next one from starting early, and a pass is several hundred kernels of a few microseconds.
//
// One thread of the grid writes the beginning, behind the wait for the kernel in front: what that one did is complete
// then. The threads that finish the grid's blocks write the end, of which the latest stays (the clock only ever
// rises, so nothing needs clearing). Both are stores that nobody waits for.
#pragma once

#include "cuda/stamps.hpp"

namespace sluice::cuda {

__device__ __forceinline__ unsigned long long gpu_clock_ns() {
  unsigned long long ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

// By every thread; the first of the grid writes.
__device__ __forceinline__ void stamp_begin(Stamp* stamp) {
  if (stamp != nullptr && threadIdx.x == 0 && blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0) {
    stamp->begin_ns = gpu_clock_ns();
  }
}

// By one thread of each block that may be the last to end.
__device__ __forceinline__ void stamp_end(Stamp* stamp) {
  if (stamp != nullptr) atomicMax(&stamp->end_ns, gpu_clock_ns());
}

}  // namespace sluice::cuda
