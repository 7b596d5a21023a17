// SPDX-License-Identifier: Apache-2.0
// From the container's tiles to operands of the matrix units, and the PTX that moves them.
//
// Every tile of 16 rows x 16 columns becomes the A operand of mma.m16n8k16 (row-major, four registers of two halves):
//   lane = 4g + t:   a0 = (g, 2t..2t+1)   a1 = (g+8, 2t..2t+1)   a2 = (g, 2t+8..2t+9)   a3 = (g+8, 2t+8..2t+9)
// The activations are the B operand: b0 = x[g][2t..2t+1], b1 = x[g][2t+8..2t+9], g the row of x.
// The sums are c0, c1 = (row g, x rows 2t, 2t+1) and c2, c3 = (row g+8, the same).
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace sluice::cuda {

struct Fragment {
  uint32_t a[4];
};

// (a & b) | c and (a & b) ^ c as the one instruction they are.
template <uint32_t kTable>
__device__ __forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
}
inline constexpr uint32_t kAndOr = 0xea, kAndXor = 0x6a;

__device__ __forceinline__ uint32_t bits_of(__half2 h) { return *reinterpret_cast<const uint32_t*>(&h); }
__device__ __forceinline__ __half2 half2_of(uint32_t u) { return *reinterpret_cast<const __half2*>(&u); }

// What is subtracted from the nibbles of one group: low nibbles appear as 1024 + q, high ones as 64 + q once they are
// multiplied by 1/16. All of it is exact in FP16 for zeros of 0..255.
struct Int4Zero {
  __half2 low;   // 1024 + z of row g
  __half2 high;  // -(64 + z) of row g + 8
};

__device__ __forceinline__ Int4Zero int4_zero(uint32_t z_row, uint32_t z_row8) {
  const uint32_t low = 0x6400u + z_row;  // 1024 + z
  const __half high = __hneg(__hadd(__ushort_as_half(uint16_t(0x6400u + z_row8)), __float2half(-960.0f)));
  return {half2_of(low | (low << 16)), __half2half2(high)};
}

// Word j of a lane: nibbles 0 and 4 are a0, 1 and 5 a1, 2 and 6 a2, 3 and 7 a3.
__device__ __forceinline__ Fragment fragment_int4(uint32_t q, const Int4Zero& zero) {
  const __half2 sixteenth = half2_of(0x2c002c00u);
  const uint32_t r = q >> 8;
  Fragment f;
  f.a[0] = bits_of(__hsub2(half2_of(lop3<kAndOr>(q, 0x000f000fu, 0x64006400u)), zero.low));
  f.a[1] = bits_of(__hfma2(half2_of(lop3<kAndOr>(q, 0x00f000f0u, 0x64006400u)), sixteenth, zero.high));
  f.a[2] = bits_of(__hsub2(half2_of(lop3<kAndOr>(r, 0x000f000fu, 0x64006400u)), zero.low));
  f.a[3] = bits_of(__hfma2(half2_of(lop3<kAndOr>(r, 0x00f000f0u, 0x64006400u)), sixteenth, zero.high));
  return f;
}

// The eight bytes of a word: bytes 0 and 4 are a0, 1 and 5 a1, ...; q + 128 sits in the mantissa of 1024.
__device__ __forceinline__ Fragment fragment_int8(uint32_t low, uint32_t high) {
  Fragment f;
  const __half2 bias = half2_of(0x64806480u);  // 1152
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t pair = __byte_perm(low, high, uint32_t(i) | uint32_t(4 + i) << 8);
    f.a[i] = bits_of(__hsub2(half2_of(lop3<kAndXor>(pair, 0x00ff00ffu, 0x64806480u)), bias));
  }
  return f;
}

// c += a * b, FP16 in, FP32 sums.
__device__ __forceinline__ void mma_f16(float (&c)[4], const Fragment& f, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(f.a[0]), "r"(f.a[1]), "r"(f.a[2]), "r"(f.a[3]), "r"(b0), "r"(b1));
#elif defined(__CUDA_ARCH__)
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(f.a[0]), "r"(f.a[1]), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(f.a[2]), "r"(f.a[3]), "r"(b1));
#endif
}

#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ void mma_bf16_once(float (&c)[4], const Fragment& f, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(f.a[0]), "r"(f.a[1]), "r"(f.a[2]), "r"(f.a[3]), "r"(b0), "r"(b1));
}
#endif

// Two bfloat16 of `pair` as floats.
__device__ __forceinline__ float2 floats_of_bf16(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

// A half has 11 significant bits, a bfloat16 8: the upper part is cut off, the rest has 3 bits and is a bfloat16 too,
// so the sum of the two is the half exactly.
__device__ __forceinline__ void split_for_bf16(uint32_t halves, uint32_t& upper, uint32_t& rest) {
  const float2 x = __half22float2(half2_of(halves));
  const uint32_t u0 = __float_as_uint(x.x) & 0xffff0000u, u1 = __float_as_uint(x.y) & 0xffff0000u;
  const uint32_t r0 = __float_as_uint(x.x - __uint_as_float(u0)), r1 = __float_as_uint(x.y - __uint_as_float(u1));
  upper = __byte_perm(u0, u1, 0x7632);
  rest = __byte_perm(r0, r1, 0x7632);
}

// c += a * b, bfloat16 weights times FP16 activations.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const Fragment& f, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  uint32_t upper0, rest0, upper1, rest1;
  split_for_bf16(b0, upper0, rest0);
  split_for_bf16(b1, upper1, rest1);
  mma_bf16_once(c, f, upper0, upper1);
  mma_bf16_once(c, f, rest0, rest1);
#elif defined(__CUDA_ARCH__)
  // sm_75 has no bfloat16: sums in FP32, operands by shuffles. Rare weights on old cards, so plain.
  const uint32_t lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int half_k = 0; half_k < 2; ++half_k) {
    for (uint32_t s = 0; s < 4; ++s) {
      const float2 w0 = floats_of_bf16(__shfl_sync(0xffffffffu, f.a[2 * half_k], 4 * g + s));
      const float2 w8 = floats_of_bf16(__shfl_sync(0xffffffffu, f.a[2 * half_k + 1], 4 * g + s));
      const uint32_t b = half_k == 0 ? b0 : b1;
      const float2 x0 = __half22float2(half2_of(__shfl_sync(0xffffffffu, b, 8 * t + s)));
      const float2 x1 = __half22float2(half2_of(__shfl_sync(0xffffffffu, b, 8 * t + 4 + s)));
      c[0] += w0.x * x0.x + w0.y * x0.y;
      c[1] += w0.x * x1.x + w0.y * x1.y;
      c[2] += w8.x * x0.x + w8.y * x0.y;
      c[3] += w8.x * x1.x + w8.y * x1.y;
    }
  }
#endif
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8x8 matrices of halves; lane l gives the address of row l % 8 of matrix l / 8 and gets its (g, 2t..2t+1) of
// each.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Keep their place among barriers and copies (volatile), but not among ordinary accesses.
__device__ __forceinline__ void load_operands(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
__device__ __forceinline__ uint4 load_shared16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

__device__ __forceinline__ uint32_t load_shared1(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}
__device__ __forceinline__ float load_shared_half(uint32_t address) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
  return __half2float(__ushort_as_half(v));
}

// 16 bytes of activations: out of L2, which is asked to keep them while weights stream through it.
#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ uint64_t evict_last_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint4 load_kept(const void* p, uint64_t policy) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p), "l"(policy)
               : "memory");
  return v;
}
#else
__device__ __forceinline__ uint64_t evict_last_policy() { return 0; }
__device__ __forceinline__ uint4 load_kept(const void* p, uint64_t) { return __ldcg(static_cast<const uint4*>(p)); }
#endif

__device__ __forceinline__ void store_shared16(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// 16 bytes to shared memory behind the thread's back; before sm_80 at once. `valid` false: zeros.
__device__ __forceinline__ void copy16(uint32_t to, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
  const uint32_t bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
#else
  store_shared16(to, valid ? __ldcg(static_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0));
#endif
}

__device__ __forceinline__ void copy_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `kPending` of this thread's newest groups are on their way.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Orders this thread's accesses for all threads of the device; __threadfence() is sequentially consistent and slower.
__device__ __forceinline__ void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Programmatic dependent launch; nothing before sm_90.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// mbarriers and the bulk copy engine (sm_90): one thread asks for a run of bytes, the barrier counts them in.
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Ordinary writes to shared memory become visible to the copy engine and the tensor cores.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finish;\nbra again;\nfinish:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier,
                                          uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}
#endif

}  // namespace sluice::cuda
