// SPDX-License-Identifier: Apache-2.0
// INT4 weights, 9 to 2048 rows of activations, on sm_90a: wgmma with the weights in registers.
//
// argument    shape                              type      layout, alignment
// values      N x K                              int4      tile16x64, 16 B
// scales      [ceil(N/16)][ceil(K/group)][16]    FP16      16 B;  zeros u8 the same, optional
// x           [M][ldx]                           FP16      row-major, 16 B
// out         [M][ldo]                           FP32
// partial     [splits][tiles][128][kRows]        FP32      workspace, only if splits > 1
//
// wgmma.m64nNk16 takes A from the registers of four warps, each with 16 rows in the very fragments that tile16x64
// holds, so a warp unpacks its nibbles as for mma.sync. B is x, K-major in shared memory with the 128-byte swizzle,
// where the tensor copy engine puts it. A block makes tiles of 128 rows of W x kRows rows of x:
//
//     warpgroup 0: one thread asks for stages of 128 columns:   x 2 x [kRows][64], values 8 row tiles x 1 KiB, scales
//                  (of x one half, for itself and its neighbour: a cluster of two blocks with the same rows of x,
//                  which halves what x costs the L2 cache)
//     warpgroups 1, 2: 64 rows of W each; per group of columns: unpack, wgmma into a fresh sum, total += scale * sum
//
// While one of the two scales a sum, the other keeps the tensor cores busy. Blocks stay and take every gridDim-th tile,
// the row blocks of x fastest, so that weights come out of L2 but once. Where there are fewer tiles than
// multiprocessors, K is split; the last to come adds the parts in order.
//
// Geometry: min(tiles x splits, multiprocessors) blocks of 384 threads, in pairs; an odd tile's partner works on zeros.
// Bytes moved: values + scales once from memory.
// Compiled: kRows 32, 64, 128 with groups of 32, 64, 128. Weights with a bias go to matmul.cuh.
// Source: PTX ISA, "Asynchronous warpgroup level matrix instructions" (fragments, descriptors, swizzle).
#include <cuda.h>

#include "cuda/matmul_launch.hpp"
#include "cuda/tile_fragments.cuh"

// Clusters of two blocks; the attribute is an error on architectures that have none.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define SLUICE_PAIRS
#else
#define SLUICE_PAIRS __cluster_dims__(2, 1, 1)
#endif

namespace sluice::cuda {

struct WgmmaArgs {
  struct Part {
    CUtensorMap values, scales, zeros;
    float* out;
    const float* vector;
    uint32_t ldo, rows, first_block;
    float scale;
    bool has_zeros;
  } part[kMatmulParts];
  CUtensorMap x;
  const float* row_scale;
  float* partial;
  uint32_t* counters;
  uint32_t rows, parts, row_blocks, pairs, splits, stages_of_k;  // row_blocks: of x; pairs of tiles
  bool accumulate;
};

namespace {

constexpr uint32_t kBlockRows = 128;
constexpr uint32_t kStageCols = 128;
constexpr uint32_t kValueBytes = 8 * 1024;

template <uint32_t kRows, uint32_t kGroup>
struct Stage {
  static constexpr uint32_t kGroups = kStageCols / kGroup;
  static constexpr uint32_t kX = kRows * kStageCols * 2;
  static constexpr uint32_t kScales = 8 * kGroups * 32, kZeros = 8 * kGroups * 16;
  static constexpr uint32_t kBytes = (kX + kValueBytes + kScales + kZeros + 1023) / 1024 * 1024;
  static constexpr uint32_t kCount = 200 * 1024 / kBytes < 8 ? 200 * 1024 / kBytes : 8;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// d (+)= A * x, one warpgroup, asynchronous; `x` describes 16 columns of the stage.
__device__ __forceinline__ void wgmma_step(float (&d)[16], const Fragment& f, uint64_t x, bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15 "
      "}, {%16, %17, %18, %19}, %20, add, 1, 1, 0;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
      : "r"(f.a[0]), "r"(f.a[1]), "r"(f.a[2]), "r"(f.a[3]), "l"(x), "r"(int32_t{add}));
}
__device__ __forceinline__ void wgmma_step(float (&d)[32], const Fragment& f, uint64_t x, bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31 "
      "}, {%32, %33, %34, %35}, %36, add, 1, 1, 0;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(f.a[0]), "r"(f.a[1]), "r"(f.a[2]), "r"(f.a[3]), "l"(x), "r"(int32_t{add}));
}
__device__ __forceinline__ void wgmma_step(float (&d)[64], const Fragment& f, uint64_t x, bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63 "
      "}, {%64, %65, %66, %67}, %68, add, 1, 1, 0;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),
        "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),
        "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
        "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
      : "r"(f.a[0]), "r"(f.a[1]), "r"(f.a[2]), "r"(f.a[3]), "l"(x), "r"(int32_t{add}));
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// Rows of 128 bytes, swizzled in eights: 1024 bytes from one eight to the next.
__device__ __forceinline__ uint64_t x_descriptor(uint32_t address) {
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{1} << 16 | uint64_t{64} << 32 | uint64_t{1} << 62;
}

// The same to the same place in both blocks of the cluster, told to both their barriers.
__device__ __forceinline__ void tensor_copy_both(uint32_t to, const CUtensorMap* map, uint32_t column, uint32_t row,
                                                 uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(uint16_t{3})
      : "memory");
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Arrives at the barrier at this place in block `rank` of the cluster. Spelled with release at cluster scope it would
// be a fence of all memory, half a microsecond each; what it orders here are reads that are over.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

__device__ __forceinline__ void tensor_copy(uint32_t to, const CUtensorMap* map, uint32_t column, uint32_t row,
                                            uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// Which tile, and which stages of K, an item of work is.
struct Item {
  uint32_t part, block, x_row, tile, split, first, end;
};

__device__ __forceinline__ Item item_of(const WgmmaArgs& a, uint32_t index, uint32_t rank, uint32_t rows_of_x) {
  Item item;
  const uint32_t pair = index / a.splits;
  item.split = index - pair * a.splits;
  item.tile = pair * 2 + rank;
  const uint32_t row = pair / a.row_blocks, block = row * 2 + rank;
  item.x_row = (pair - row * a.row_blocks) * rows_of_x;
  item.part = 0;
  while (item.part + 1 < a.parts && block >= a.part[item.part + 1].first_block) ++item.part;
  item.block = block - a.part[item.part].first_block;
  item.first = item.split * a.stages_of_k / a.splits;
  item.end = (item.split + 1) * a.stages_of_k / a.splits;
  return item;
}

template <uint32_t kRows, uint32_t kGroup>
__device__ void produce(const WgmmaArgs& a, uint32_t stages, uint32_t full, uint32_t empty) {
  using S = Stage<kRows, kGroup>;
  const uint32_t rank = cluster_rank();
  uint32_t slot = 0, parity = 1;
  for (uint32_t index = blockIdx.x / 2; index < a.pairs * a.splits; index += gridDim.x / 2) {
    const Item item = item_of(a, index, rank, kRows);
    const WgmmaArgs::Part& p = a.part[item.part];
    for (uint32_t k = item.first; k < item.end; ++k) {
      const uint32_t to = stages + slot * S::kBytes, barrier = full + slot * 8;
      barrier_wait(empty + slot * 8, parity);
      barrier_expect(barrier, S::kX + kValueBytes + S::kScales + (p.has_zeros ? S::kZeros : 0));
      tensor_copy(to + S::kX, &p.values, k * 256, item.block * 8, barrier);
      tensor_copy_both(to + rank * (S::kX / 2), &a.x, k * kStageCols + rank * 64, item.x_row, barrier);
      tensor_copy(to + S::kX + kValueBytes, &p.scales, k * S::kGroups * 16, item.block * 8, barrier);
      if (p.has_zeros)
        tensor_copy(to + S::kX + kValueBytes + S::kScales, &p.zeros, k * S::kGroups * 16, item.block * 8, barrier);
      if (++slot == S::kCount) {
        slot = 0;
        parity ^= 1;
      }
    }
  }
}

// The two warpgroups issue their products in turns: issued together they would share the tensor cores evenly, end
// together, and leave them idle while both scale and unpack.
__device__ __forceinline__ void wait_turn(uint32_t half) {
  asm volatile("bar.sync %0, 256;" ::"r"(3 + half) : "memory");
}
__device__ __forceinline__ void pass_turn(uint32_t half) {
  asm volatile("bar.arrive %0, 256;" ::"r"(4 - half) : "memory");
}

// One group of a warp's row tile, ready for the tensor cores.
template <uint32_t kGroup>
struct Unpacked {
  Fragment f[kGroup / 16];
  float s0, s8;  // scales of rows g and g + 8
};

template <uint32_t kRows, uint32_t kGroup>
__device__ __forceinline__ void unpack(const uint8_t* stage, uint32_t group, uint32_t tile, uint32_t lane,
                                       bool has_zeros, Unpacked<kGroup>& out) {
  using S = Stage<kRows, kGroup>;
  const uint32_t g = lane >> 2, at = (tile * S::kGroups + group) * 16 + g;
  const uint8_t* planes = stage + S::kX + kValueBytes;
  const __half* scales = reinterpret_cast<const __half*>(planes) + at;
  out.s0 = __half2float(scales[0]);
  out.s8 = __half2float(scales[8]);
  Int4Zero zero = int4_zero(8, 8);
  if (has_zeros) zero = int4_zero(planes[S::kScales + at], planes[S::kScales + at + 8]);
  uint4 w = {};
#pragma unroll
  for (uint32_t k = 0; k < kGroup / 16; ++k) {
    const uint32_t k16 = group * (kGroup / 16) + k;
    if (k == 0 || k16 % 4 == 0)
      w = load_shared16(shared_address(stage) + S::kX + tile * 1024 + k16 / 4 * 512 + lane * 16);
    out.f[k] = fragment_int4(k16 % 4 == 0 ? w.x : k16 % 4 == 1 ? w.y : k16 % 4 == 2 ? w.z : w.w, zero);
  }
}

// A warp's place in the ring of stages.
template <uint32_t kCount>
struct Place {
  uint32_t slot = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++slot == kCount) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// What a warp's walk through the stages needs at each group.
template <uint32_t kRows, uint32_t kGroup>
struct Walk {
  const uint8_t* stages;
  uint32_t full, empty;
  uint32_t half, tile, lane;
  bool has_zeros;
  uint32_t left;  // stages of this item, the present one included
  Place<Stage<kRows, kGroup>::kCount>& place;
};

// total += scale * (group's weights * x). Meanwhile the group behind it, if any, is unpacked into `next`.
template <uint32_t kRows, uint32_t kGroup, uint32_t kIndex>
__device__ __forceinline__ void multiply_group(Walk<kRows, kGroup>& w, const Unpacked<kGroup>& now,
                                               Unpacked<kGroup>& next, float (&total)[kRows / 2]) {
  using S = Stage<kRows, kGroup>;
  constexpr bool kLast = kIndex + 1 == S::kGroups;
  const uint8_t* stage = w.stages + w.place.slot * S::kBytes;
  const uint32_t x = shared_address(stage), done = w.empty + w.place.slot * 8;
  float sum[kRows / 2];
  wait_turn(w.half);
  wgmma_fence();
#pragma unroll
  for (uint32_t k = 0; k < kGroup / 16; ++k) {
    constexpr uint32_t kFirst = kIndex * (kGroup / 16);
    wgmma_step(sum, now.f[k], x_descriptor(x + (kFirst + k) / 4 * (S::kX / 2) + (kFirst + k) % 4 * 32), k != 0);
  }
  wgmma_commit();
  pass_turn(w.half);
  if constexpr (!kLast) {
    unpack<kRows, kGroup>(stage, kIndex + 1, w.tile, w.lane, w.has_zeros, next);
  } else {
    w.place.next();
    if (--w.left != 0) {
      barrier_wait(w.full + w.place.slot * 8, w.place.parity);
      unpack<kRows, kGroup>(w.stages + w.place.slot * S::kBytes, 0, w.tile, w.lane, w.has_zeros, next);
    }
  }
  wgmma_wait();
  if (kLast && w.lane < 2) barrier_arrive_at(done, w.lane);
#pragma unroll
  for (uint32_t i = 0; i < kRows / 8; ++i) {
    total[4 * i] = fmaf(now.s0, sum[4 * i], total[4 * i]);
    total[4 * i + 1] = fmaf(now.s0, sum[4 * i + 1], total[4 * i + 1]);
    total[4 * i + 2] = fmaf(now.s8, sum[4 * i + 2], total[4 * i + 2]);
    total[4 * i + 3] = fmaf(now.s8, sum[4 * i + 3], total[4 * i + 3]);
  }
}

// All stages of an item. Two sets of unpacked weights take turns by name: copied from one to the other, registers that
// a wgmma in flight reads would be written, and the compiler serializes all of them.
template <uint32_t kRows, uint32_t kGroup>
__device__ __forceinline__ void multiply_item(Walk<kRows, kGroup>& w, float (&total)[kRows / 2]) {
  using S = Stage<kRows, kGroup>;
  Unpacked<kGroup> even, odd;
  barrier_wait(w.full + w.place.slot * 8, w.place.parity);
  unpack<kRows, kGroup>(w.stages + w.place.slot * S::kBytes, 0, w.tile, w.lane, w.has_zeros, even);
#pragma unroll 1
  while (true) {
    multiply_group<kRows, kGroup, 0>(w, even, odd, total);
    if constexpr (S::kGroups == 1) {
      if (w.left == 0) break;
      multiply_group<kRows, kGroup, 0>(w, odd, even, total);
    } else {
      multiply_group<kRows, kGroup, 1>(w, odd, even, total);
      if constexpr (S::kGroups == 4) {
        multiply_group<kRows, kGroup, 2>(w, even, odd, total);
        multiply_group<kRows, kGroup, 3>(w, odd, even, total);
      }
    }
    if (w.left == 0) break;
  }
}

// Leaves this split's totals in the workspace; true for the last of the tile's splits, whose `total` is then the sum.
template <uint32_t kRows>
__device__ __forceinline__ bool join_splits(const WgmmaArgs& a, const Item& item, uint32_t half, uint32_t thread,
                                            uint32_t* last, float (&total)[kRows / 2]) {
  constexpr uint32_t kCount = kRows / 2;
  float* partial = a.partial + uint64_t{item.tile * 2 + half} * a.splits * 128 * kCount + thread;
#pragma unroll
  for (uint32_t i = 0; i < kCount; ++i) partial[(item.split * kCount + i) * 128] = total[i];
  fence_device();
  asm volatile("bar.sync %0, 128;" ::"r"(1 + half) : "memory");
  if (thread == 0) {
    uint32_t* counter = a.counters + item.tile * 2 + half;
    last[half] = atomicAdd(counter, 1) == a.splits - 1;
    if (last[half]) *counter = 0;
    fence_device();
  }
  asm volatile("bar.sync %0, 128;" ::"r"(1 + half) : "memory");
  const bool is_last = last[half] != 0;
  if (is_last) {
    for (uint32_t i = 0; i < kCount; ++i) total[i] = 0;
    for (uint32_t split = 0; split < a.splits; ++split) {
#pragma unroll
      for (uint32_t i = 0; i < kCount; ++i) total[i] += __ldcg(partial + (split * kCount + i) * 128);
    }
  }
  return is_last;
}

template <uint32_t kRows>
__device__ __forceinline__ void write_tile(const WgmmaArgs& a, const Item& item, uint32_t row, uint32_t lane,
                                           const float (&total)[kRows / 2]) {
  const WgmmaArgs::Part& p = a.part[item.part];
  const uint32_t g = lane >> 2, t = lane & 3;
#pragma unroll
  for (uint32_t i = 0; i < kRows / 2; ++i) {
    const uint32_t m = item.x_row + i / 4 * 8 + 2 * t + (i & 1), n = row + g + 8 * (i / 2 % 2);
    if (m >= a.rows || n >= p.rows) continue;
    float value = total[i] * p.scale;
    if (a.row_scale != nullptr) value *= a.row_scale[m];
    if (p.vector != nullptr) value += p.vector[n];
    float* out = p.out + uint64_t{m} * p.ldo + n;
    *out = a.accumulate ? *out + value : value;
  }
}

#endif

template <uint32_t kRows, uint32_t kGroup>
__global__ void SLUICE_PAIRS __launch_bounds__(384, 1) matmul_int4_wgmma_kernel(const __grid_constant__ WgmmaArgs a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Stage<kRows, kGroup>;
  extern __shared__ uint8_t shared[];
  __shared__ uint64_t barriers[2 * S::kCount];
  __shared__ uint32_t last[2];
  uint8_t* stages = shared + (1024 - shared_address(shared) % 1024) % 1024;
  const uint32_t full = shared_address(barriers), empty = full + S::kCount * 8;
  let_next_kernel_start();
  if (threadIdx.x == 0) {
    for (uint32_t i = 0; i < S::kCount; ++i) {
      barrier_init(full + i * 8, 1);
      barrier_init(empty + i * 8, 16);  // warps of both blocks
    }
    barrier_init_fence();
    async_proxy_fence();
  }
  cluster_sync();
  wait_for_previous_kernel();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) produce<kRows, kGroup>(a, shared_address(stages), full, empty);
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const uint32_t half = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    Place<S::kCount> place;
    if (half == 1) pass_turn(half);
    for (uint32_t index = blockIdx.x / 2; index < a.pairs * a.splits; index += gridDim.x / 2) {
      const Item item = item_of(a, index, cluster_rank(), kRows);
      const bool has_zeros = a.part[item.part].has_zeros;
      float total[kRows / 2];
#pragma unroll
      for (uint32_t i = 0; i < kRows / 2; ++i) total[i] = 0;
      Walk<kRows, kGroup> walk = {stages, full, empty, half, half * 4 + warp, lane, has_zeros, item.end - item.first,
                                  place};
      multiply_item<kRows, kGroup>(walk, total);
      if (a.splits > 1 && !join_splits<kRows>(a, item, half, threadIdx.x % 128, last, total)) continue;
      write_tile<kRows>(a, item, item.block * kBlockRows + half * 64 + warp * 16, lane, total);
    }
    if (half == 0) wait_turn(half);  // the turn that is left over
  }
  cluster_sync();  // neither leaves while the other may still write to it
#else
  __trap();  // the dispatcher calls this on compute capability 9.0 only, where the build has sm_90a
#endif
}

// cuTensorMapEncodeTiled, which lives in the driver: found at run time, so that nothing links to it.
using EncodeTiled = decltype(&cuTensorMapEncodeTiled);
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = {};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(found)
                                                                         : nullptr;
  }();
  return function;
}

struct Plane {
  CUtensorMapDataType type;
  const void* at;
  uint64_t width, height, row_bytes;  // elements, rows
  uint32_t box_width, box_height;
  CUtensorMapSwizzle swizzle;
};

bool encode(CUtensorMap& map, const Plane& plane) {
  const cuuint64_t sizes[2] = {plane.width, plane.height}, strides[1] = {plane.row_bytes};
  const cuuint32_t box[2] = {plane.box_width, plane.box_height}, steps[2] = {1, 1};
  return encode_tiled()(&map, plane.type, 2, const_cast<void*>(plane.at), sizes, strides, box, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, plane.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <uint32_t kRows, uint32_t kGroup>
cudaError_t launch(WgmmaArgs& args, const MatmulCall& call, cudaStream_t stream) {
  using S = Stage<kRows, kGroup>;
  static std::atomic<uint64_t> seen{0};
  const uint32_t shared = S::kCount * S::kBytes + 1024;
  uint32_t processors = 0;
  cudaError_t error = multiprocessors(processors);
  if (error == cudaSuccess) error = allow_shared(matmul_int4_wgmma_kernel<kRows, kGroup>, shared, seen);
  if (error != cudaSuccess) return error;
  return launch_grid(matmul_int4_wgmma_kernel<kRows, kGroup>, args,
                     dim3(std::min(args.pairs * args.splits, processors / 2) * 2), 384, shared, call, stream);
}

template <uint32_t kRows>
cudaError_t launch_rows(WgmmaArgs& args, const MatmulCall& call, cudaStream_t stream) {
  switch (call.part[0].weight.group_elems) {
    case 32:
      return launch<kRows, 32>(args, call, stream);
    case 64:
      return launch<kRows, 64>(args, call, stream);
    default:
      return launch<kRows, 128>(args, call, stream);
  }
}

uint32_t rows_of_tile(uint32_t rows) { return rows <= 32 ? 32 : rows <= 64 ? 64 : 128; }

// Pairs count for two.
uint32_t tiles_of(const MatmulCall& call) {
  uint32_t blocks = 0;
  for (uint32_t i = 0; i < call.parts; ++i) blocks += (call.part[i].weight.rows + kBlockRows - 1) / kBlockRows;
  const uint32_t tile_rows = rows_of_tile(call.rows);
  return (blocks + 1) / 2 * 2 * ((call.rows + tile_rows - 1) / tile_rows);
}

uint32_t splits_of(const MatmulCall& call, uint32_t processors) {
  const uint32_t stages = (call.part[0].weight.cols + kStageCols - 1) / kStageCols;
  return std::max(1u, std::min({processors / tiles_of(call), stages / 4, 8u}));
}

}  // namespace

bool wgmma_serves(const MatmulCall& call) {
  for (uint32_t i = 0; i < call.parts; ++i) {
    if (call.part[i].weight.format != WeightFormat::int4 || call.part[i].weight.bias != nullptr) return false;
  }
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) return false;
  return major == 9 && minor == 0 && encode_tiled() != nullptr;
}

uint64_t wgmma_partial_bytes(const MatmulCall& call) {
  uint32_t processors = 0;
  if (multiprocessors(processors) != cudaSuccess) return 0;
  const uint32_t splits = splits_of(call, processors);
  return splits == 1 ? 0 : uint64_t{splits} * tiles_of(call) * kBlockRows * rows_of_tile(call.rows) * sizeof(float);
}

cudaError_t matmul_int4_wgmma(const MatmulCall& call, cudaStream_t stream) {
  const MatmulWeight& first = call.part[0].weight;
  const uint64_t tiles64 = (first.cols + 63) / 64, groups = (first.cols + first.group_elems - 1) / first.group_elems;
  const uint32_t stage_groups = kStageCols / first.group_elems, tile_rows = rows_of_tile(call.rows);
  uint32_t processors = 0;
  const cudaError_t error = multiprocessors(processors);
  if (error != cudaSuccess) return error;
  WgmmaArgs args = {};
  uint32_t blocks = 0;
  bool good = encode(args.x, {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, call.x, tiles64 * 64, call.rows, uint64_t{call.ldx} * 2,
                              64, tile_rows, CU_TENSOR_MAP_SWIZZLE_128B});
  for (uint32_t i = 0; i < call.parts; ++i) {
    const MatmulWeight& w = call.part[i].weight;
    WgmmaArgs::Part& part = args.part[i];
    const uint64_t row_tiles = (w.rows + 15) / 16;
    good = good && encode(part.values, {CU_TENSOR_MAP_DATA_TYPE_UINT32, w.values, tiles64 * 128, row_tiles,
                                        tiles64 * 512, 256, 8, CU_TENSOR_MAP_SWIZZLE_NONE});
    good = good && encode(part.scales, {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, w.scales, groups * 16, row_tiles, groups * 32,
                                        stage_groups * 16, 8, CU_TENSOR_MAP_SWIZZLE_NONE});
    part.has_zeros = w.zeros != nullptr;
    if (part.has_zeros) {
      good = good && encode(part.zeros, {CU_TENSOR_MAP_DATA_TYPE_UINT8, w.zeros, groups * 16, row_tiles, groups * 16,
                                         stage_groups * 16, 8, CU_TENSOR_MAP_SWIZZLE_NONE});
    }
    part.out = call.part[i].out;
    part.vector = call.part[i].vector;
    part.ldo = call.part[i].ldo;
    part.rows = w.rows;
    part.first_block = blocks;
    part.scale = w.scale;
    blocks += (w.rows + kBlockRows - 1) / kBlockRows;
  }
  if (!good) return cudaErrorInvalidValue;
  args.row_scale = call.row_scale;
  args.counters = static_cast<uint32_t*>(call.workspace);
  args.partial = reinterpret_cast<float*>(static_cast<uint8_t*>(call.workspace) + kMatmulCounterBytes);
  args.rows = call.rows;
  args.parts = call.parts;
  args.row_blocks = (call.rows + tile_rows - 1) / tile_rows;
  args.pairs = (blocks + 1) / 2 * args.row_blocks;
  args.splits = splits_of(call, processors);
  args.stages_of_k = (first.cols + kStageCols - 1) / kStageCols;
  args.accumulate = call.accumulate;
  if (tile_rows == 32) return launch_rows<32>(args, call, stream);
  return tile_rows == 64 ? launch_rows<64>(args, call, stream) : launch_rows<128>(args, call, stream);
}

}  // namespace sluice::cuda
