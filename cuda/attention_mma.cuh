// SPDX-License-Identifier: Apache-2.0
// The few PTX instructions that the attention kernels are made of, each with the plain form for sm_75 (no cp.async, and
// half the depth of mma).
//
// Fragments of mma.m16n8k16, for lane = 4 * g + t (g = 0..7, t = 0..3), two halves a register, the lower k first:
//   A [16][16]   a0 = (g, 2t..2t+1)   a1 = (g+8, 2t..)   a2 = (g, 2t+8..)   a3 = (g+8, 2t+8..)
//   B [16][8]    b0 = (2t..2t+1, g)   b1 = (2t+8.., g)
//   C [16][8]    c0, c1 = (g, 2t..2t+1)   c2, c3 = (g+8, 2t..2t+1)
// Two steps of m16n8k8 take the same registers: (a0, a1, b0), then (a2, a3, b1).
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace sluice::cuda {

__device__ inline void mma_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                               uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a2), "r"(a3), "r"(b1));
#endif
}

// Four 8x8 matrices of halves; lane 8i..8i+7 points at the rows of matrix i, which lands in out[i] as (g, 2t..2t+1), or
// transposed as (2t..2t+1, g).
__device__ inline void load_matrices(uint32_t (&out)[4], const __half* row) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(at)
               : "memory");
}

__device__ inline void load_matrices_transposed(uint32_t (&out)[4], const __half* row) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(at)
               : "memory");
}

// 16 bytes from device to shared memory, zeros if not `valid` (then `from` is not read).
__device__ inline void copy_async_16(__half* to, const __half* from, bool valid) {
#if __CUDA_ARCH__ >= 800
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(valid ? 16 : 0) : "memory");
#else
  *reinterpret_cast<uint4*>(to) = valid ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
#endif
}

__device__ inline void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kPending of this thread's latest groups are under way.
template <int kPending>
__device__ inline void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Programmatic dependent launch: the grid before this one is complete and visible. Nothing in an ordinary launch.
__device__ inline void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next grid may be scheduled. Called after the wait by a grid whose next one reads, before its own wait, what was
// written before this one: then the grid before the previous one is complete.
__device__ inline void let_next_grid_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline uint32_t bits_of(__half2 pair) { return *reinterpret_cast<const uint32_t*>(&pair); }

// Finite values beyond FP16 become its largest, infinities and NaN stay.
__device__ inline float clamp_to_half(float x) {
  return fabsf(x) <= 3.4028234e38f ? fminf(fmaxf(x, -65504.0f), 65504.0f) : x;
}

__device__ inline __half2 to_half2(float x, float y) {
  return __floats2half2_rn(clamp_to_half(x), clamp_to_half(y));
}

// A pair of floats as halves and what the halves lose, also as halves: together 22 bits of each.
struct SplitPair {
  uint32_t high, low;
};
__device__ inline SplitPair split_pair(float x, float y) {
  const __half2 high = __floats2half2_rn(x, y);
  const float2 rounded = __half22float2(high);
  return {bits_of(high), bits_of(__floats2half2_rn(x - rounded.x, y - rounded.y))};
}

// The power of two that brings `largest` to [128, 256), and its inverse: the halves of a query then neither overflow
// nor sink among the subnormals. Zero, infinity and NaN get a power of two as well.
struct QueryScale {
  float scale, inverse;
};
__device__ inline QueryScale query_scale(float largest) {
  int exponent = static_cast<int>(__float_as_uint(largest) >> 23 & 0xff) - 127;
  exponent = max(-100, min(100, exponent)) - 7;
  return {__uint_as_float(static_cast<uint32_t>(127 - exponent) << 23),
          __uint_as_float(static_cast<uint32_t>(127 + exponent) << 23)};
}

}  // namespace sluice::cuda
