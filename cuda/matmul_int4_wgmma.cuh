// SPDX-License-Identifier: Apache-2.0
// What the blocks of matmul_int4_wgmma.cu do between their barriers: who multiplies what, the ring of stages, and how
// unpacking and scaling hide behind products.
//
// A group of columns has a scale of its own for each row of W, so its products meet in a fresh sum of kRows/2 registers
// a thread, which is then scaled into the totals. Two ways to keep the tensor cores busy meanwhile:
//
//     in turns, kRows = 128 (sums and totals fill the registers, so two warpgroups multiply):
//       warpgroup 1   | products j | unpack, scale |  products j+1 | unpack, scale |
//       warpgroup 2   |   scale    |  products j   | unpack, scale |  products j+1 |
//     each alone, kRows = 32 and 64: four warpgroups, each unpacks, multiplies, waits and scales in order, and does
//     not know of the others. Some 200 instructions a group depend on each other; at two warps a scheduler (as with
//     128 rows) they, neither memory nor the tensor cores, would be the bound.
#pragma once

#include "cuda/matmul.hpp"
#include "cuda/wgmma.cuh"

namespace sluice::cuda {

struct WgmmaArgs {
  struct Part {
    CUtensorMap values, scales, extra;  // extra: zeros or bias
    float* out;
    const float* vector;
    uint32_t ldo, rows, first_block;
    float scale;
  } part[kMatmulParts];
  CUtensorMap x, x_sums;
  const float* row_scale;
  float* partial;
  uint32_t* counters;
  uint32_t rows, parts, row_blocks, pairs, stages;  // row_blocks: of x; pairs of tiles; stages: of K
  uint32_t split_pairs, split_clusters;             // the first pairs are cut, among so many clusters
  bool has_zeros, has_bias, accumulate, weights_early;
};

namespace wgmma {

inline constexpr uint32_t kStageCols = 128;

// Warpgroups of a block that multiply, 64 rows of W each.
template <uint32_t kRows>
inline constexpr uint32_t kMultipliers = kRows == 128 ? 2 : 4;

// Where a stage in shared memory holds what, in bytes.
template <uint32_t kRows, uint32_t kGroup>
struct Stage {
  static constexpr uint32_t kGroups = kStageCols / kGroup, kRowTiles = kMultipliers<kRows> * 4;
  static constexpr uint32_t kValueBytes = kRowTiles * 1024;
  static constexpr uint32_t kScaleBytes = kRowTiles * kGroups * 32, kSumBytes = kGroups * kRows * 4;
  static constexpr uint32_t kValues = kRows * kStageCols * 2;  // behind x
  static constexpr uint32_t kScales = kValues + kValueBytes, kExtra = kScales + kScaleBytes;
  static constexpr uint32_t kSums = kExtra + kScaleBytes;
  static constexpr uint32_t kBytes = (kSums + kSumBytes + 1023) / 1024 * 1024;
  static constexpr uint32_t kCount = 200 * 1024 / kBytes;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A pair of tiles, of which each block of the cluster makes one, and the stages of K that this cluster adds up.
struct Item {
  uint32_t pair, first, end;
};

// What a cluster does, in order: its share of the cut pairs, then whole pairs.
struct Work {
  uint32_t at, end;  // of the share, in stages of the cut pairs laid end to end
  uint32_t whole;    // next whole pair

  static __device__ __forceinline__ uint32_t share(const WgmmaArgs& a, uint32_t cluster) {
    return min(cluster, a.split_clusters) * (a.split_pairs * a.stages) / max(1u, a.split_clusters);
  }
  // The cluster that has this stage in its share.
  static __device__ __forceinline__ uint32_t owner(const WgmmaArgs& a, uint32_t stage) {
    uint32_t cluster = stage * a.split_clusters / (a.split_pairs * a.stages);
    while (share(a, cluster + 1) <= stage) ++cluster;
    return cluster;
  }
  explicit __device__ __forceinline__ Work(const WgmmaArgs& a) {
    const uint32_t cluster = blockIdx.x / 2;
    at = share(a, cluster);
    end = share(a, cluster + 1);
    whole = a.split_pairs + cluster;
  }
  __device__ __forceinline__ bool next(const WgmmaArgs& a, Item& item) {
    if (at < end) {
      item.pair = at / a.stages;
      item.first = at - item.pair * a.stages;
      item.end = min(end - item.pair * a.stages, a.stages);
      at += item.end - item.first;
      return true;
    }
    item = {whole, 0, a.stages};
    whole += gridDim.x / 2;
    return item.pair < a.pairs;
  }
};

// Where this block's tile of a pair lies.
struct Tile {
  uint32_t part, block, x_row;  // block: which tile of the part

  __device__ __forceinline__ Tile(const WgmmaArgs& a, uint32_t pair, uint32_t rows_of_x) {
    const uint32_t row = pair / a.row_blocks;
    block = row * 2 + cluster_rank();
    x_row = (pair - row * a.row_blocks) * rows_of_x;
    part = 0;
    while (part + 1 < a.parts && block >= a.part[part + 1].first_block) ++part;
    block -= a.part[part].first_block;
  }
};

// A place in the ring of stages.
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

// One thread's walk through all stages of all items, asking for what they need.
template <uint32_t kRows, uint32_t kGroup>
struct Producer {
  using S = Stage<kRows, kGroup>;
  const WgmmaArgs& a;
  uint32_t stages, full;
  Work work;
  Item item;
  Tile tile;
  Place<S::kCount> place;
  bool more;

  __device__ __forceinline__ Producer(const WgmmaArgs& args, uint32_t stages_at, uint32_t full_at)
      : a(args), stages(stages_at), full(full_at), work(args), item{}, tile(args, 0, kRows) {
    begin_item();
  }
  __device__ __forceinline__ void begin_item() {
    more = work.next(a, item);
    if (more) tile = Tile(a, item.pair, kRows);
  }
  __device__ __forceinline__ void advance() {
    place.next();
    if (++item.first == item.end) begin_item();
  }
  __device__ __forceinline__ void ask_weights() const {
    const WgmmaArgs::Part& p = a.part[tile.part];
    const uint32_t to = stages + place.slot * S::kBytes, barrier = full + place.slot * 8;
    const uint32_t k = item.first, group_at = k * S::kGroups * 16, row = tile.block * S::kRowTiles;
    const uint32_t extra = a.has_bias ? S::kScaleBytes + S::kSumBytes : a.has_zeros ? S::kScaleBytes / 2 : 0;
    barrier_expect(barrier, S::kExtra + extra);
    tensor_copy(to + S::kValues, &p.values, k * 256, row, barrier);
    tensor_copy(to + S::kScales, &p.scales, group_at, row, barrier);
    if (extra != 0) tensor_copy(to + S::kExtra, &p.extra, group_at, row, barrier);
  }
  __device__ __forceinline__ void ask_activations() const {
    const uint32_t to = stages + place.slot * S::kBytes, barrier = full + place.slot * 8, rank = cluster_rank();
    const uint32_t k = item.first;
    tensor_copy_both(to + rank * (S::kValues / 2), &a.x, k * kStageCols + rank * 64, tile.x_row, barrier);
    if (a.has_bias) tensor_copy(to + S::kSums, &a.x_sums, tile.x_row, k * S::kGroups, barrier);
  }
};

// Weights that were complete before the kernel in front started fill the ring while that one ends.
template <uint32_t kRows, uint32_t kGroup>
__device__ __forceinline__ void produce(const WgmmaArgs& a, uint32_t stages, uint32_t full, uint32_t empty) {
  constexpr uint32_t kCount = Stage<kRows, kGroup>::kCount;
  Producer<kRows, kGroup> producer(a, stages, full);
  uint32_t early = 0;
  if (a.weights_early) {
    Producer<kRows, kGroup> weights = producer;
    for (; early < kCount && weights.more; ++early, weights.advance()) weights.ask_weights();
  }
  wait_for_previous_kernel();
#pragma unroll 1
  for (uint32_t i = 0; producer.more; ++i, producer.advance()) {
    if (i >= kCount) barrier_wait(empty + producer.place.slot * 8, producer.place.parity ^ 1);
    if (i >= early) producer.ask_weights();
    producer.ask_activations();
  }
}

// A warp's walk through the stages of an item.
template <uint32_t kRows, uint32_t kGroup>
struct Walk {
  const uint8_t* stages;
  uint32_t full, empty;
  uint32_t warpgroup, tile, lane;  // warpgroup: of those that multiply; tile: row tile of the block
  bool has_zeros, has_bias;
  Int4Zero zero;  // where groups have none of their own
  Place<Stage<kRows, kGroup>::kCount> place;
  uint32_t left;  // stages of this item that are still to be entered, and the present one

  __device__ __forceinline__ const uint8_t* stage() const { return stages + place.slot * Stage<kRows, kGroup>::kBytes; }
  // For descriptors, in units of 16 bytes. Broadcast, so that the compiler knows it is one for all lanes and keeps
  // descriptors in uniform registers.
  __device__ __forceinline__ uint32_t x_address16() const {
    return __shfl_sync(0xffffffffu, shared_address(stage()) / 16, 0);
  }
};

// Parameters and words of one group of a warp's row tile. Words: 64 columns, the `part`-th of the group.
template <uint32_t kRows, uint32_t kGroup, uint32_t kIndex>
__device__ __forceinline__ float2 group_scales(const Walk<kRows, kGroup>& w, const uint8_t* stage) {
  using S = Stage<kRows, kGroup>;
  const __half* scales =
      reinterpret_cast<const __half*>(stage + S::kScales) + (w.tile * S::kGroups + kIndex) * 16 + w.lane / 4;
  return {__half2float(scales[0]), __half2float(scales[8])};
}

template <uint32_t kRows, uint32_t kGroup, uint32_t kIndex>
__device__ __forceinline__ Int4Zero group_zero(const Walk<kRows, kGroup>& w, const uint8_t* stage) {
  using S = Stage<kRows, kGroup>;
  if (!w.has_zeros) return w.zero;
  const uint8_t* zeros = stage + S::kExtra + (w.tile * S::kGroups + kIndex) * 16 + w.lane / 4;
  return int4_zero(zeros[0], zeros[8]);
}

template <uint32_t kRows, uint32_t kGroup, uint32_t kIndex>
__device__ __forceinline__ uint4 load_words(const Walk<kRows, kGroup>& w, const uint8_t* stage, uint32_t part) {
  return load_shared16(shared_address(stage) + Stage<kRows, kGroup>::kValues + w.tile * 1024 +
                       (kIndex * kGroup / 64 + part) * 512 + w.lane * 16);
}

// One of the words, chosen at compile time.
__device__ __forceinline__ uint32_t word_of(const uint4& w, uint32_t i) {
  return i == 0 ? w.x : i == 1 ? w.y : i == 2 ? w.z : w.w;
}

// One group as it is stored, in registers.
template <uint32_t kGroup>
struct Packed {
  uint4 words[(kGroup + 63) / 64];
  Int4Zero zero;
  float2 scales;  // of rows g and g + 8

  // 16 columns; `k16` counts them from the start of the words' first 64 columns.
  __device__ __forceinline__ Fragment fragment(uint32_t k16) const {
    return fragment_int4(word_of(words[k16 / 4], k16 % 4), zero);
  }
};

// Left to itself the compiler would unpack behind the next fence, where registers of a wgmma must not be written.
__device__ __forceinline__ void stay_here(Fragment& f) {
  asm volatile("" : "+r"(f.a[0]), "+r"(f.a[1]), "+r"(f.a[2]), "+r"(f.a[3]));
}

template <uint32_t kRows, uint32_t kGroup, uint32_t kIndex>
__device__ __forceinline__ void load_packed(const Walk<kRows, kGroup>& w, const uint8_t* stage, Packed<kGroup>& out) {
#pragma unroll
  for (uint32_t i = 0; i < (kGroup + 63) / 64; ++i) out.words[i] = load_words<kRows, kGroup, kIndex>(w, stage, i);
  out.scales = group_scales<kRows, kGroup, kIndex>(w, stage);
  out.zero = group_zero<kRows, kGroup, kIndex>(w, stage);
}

// total += bias * sum of x over the group.
template <uint32_t kRows, uint32_t kGroup, uint32_t kIndex>
__device__ __forceinline__ void add_bias(const Walk<kRows, kGroup>& w, const uint8_t* stage,
                                         float (&total)[kRows / 2]) {
  using S = Stage<kRows, kGroup>;
  const __half* bias =
      reinterpret_cast<const __half*>(stage + S::kExtra) + (w.tile * S::kGroups + kIndex) * 16 + w.lane / 4;
  const float b0 = __half2float(bias[0]), b8 = __half2float(bias[8]);
  const float2* sums = reinterpret_cast<const float2*>(stage + S::kSums) + kIndex * (kRows / 2) + w.lane % 4;
#pragma unroll
  for (uint32_t i = 0; i < kRows / 8; ++i) {
    const float2 x = sums[i * 4];
    total[4 * i] = fmaf(b0, x.x, total[4 * i]);
    total[4 * i + 1] = fmaf(b0, x.y, total[4 * i + 1]);
    total[4 * i + 2] = fmaf(b8, x.x, total[4 * i + 2]);
    total[4 * i + 3] = fmaf(b8, x.y, total[4 * i + 3]);
  }
}

// total += scale * sum.
template <uint32_t kRows>
__device__ __forceinline__ void scale_in(float2 scales, const float (&sum)[kRows / 2], float (&total)[kRows / 2]) {
#pragma unroll
  for (uint32_t i = 0; i < kRows / 2; ++i) total[i] = fmaf(i / 2 % 2 == 0 ? scales.x : scales.y, sum[i], total[i]);
}

// The two warpgroups issue their products in turns: issued together they would share the tensor cores evenly, end
// together, and leave them idle while both scale.
__device__ __forceinline__ void wait_turn(uint32_t warpgroup) {
  asm volatile("bar.sync %0, 256;" ::"r"(3 + warpgroup) : "memory");
}
__device__ __forceinline__ void pass_turn(uint32_t warpgroup) {
  asm volatile("bar.arrive %0, 256;" ::"r"(4 - warpgroup) : "memory");
}

// The same with the first half of it ready for the tensor cores.
template <uint32_t kGroup>
struct Ready {
  Fragment head[kGroup / 32];
  Packed<kGroup> packed;
};

// total += scale * (group's weights * x). The group's second half is unpacked between the products of its first, the
// first half of the group behind it, `next`, after them; behind an item's last group something is, for a branch between
// products would have them wait for each other.
template <uint32_t kRows, uint32_t kGroup, uint32_t kIndex>
__device__ __forceinline__ void multiply_group(Walk<kRows, kGroup>& w, const Ready<kGroup>& now, Ready<kGroup>& next,
                                               float (&total)[kRows / 2]) {
  using S = Stage<kRows, kGroup>;
  constexpr bool kLast = kIndex + 1 == S::kGroups;
  constexpr uint32_t kNext = kLast ? 0 : kIndex + 1, kSteps = kGroup / 16, kHead = kSteps / 2;
  const uint8_t *stage = w.stage(), *from = stage;
  const uint32_t x = w.x_address16(), done = w.empty + w.place.slot * 8;
  if constexpr (kLast) {
    w.place.next();
    if (--w.left != 0) {
      barrier_wait(w.full + w.place.slot * 8, w.place.parity);
      from = w.stage();
    }
  }
  load_packed<kRows, kGroup, kNext>(w, from, next.packed);
  float sum[kRows / 2];
  const auto multiply = [&](const Fragment& f, uint32_t k) {
    const uint32_t k16 = kIndex * kSteps + k;
    wgmma_step(sum, f, x_descriptor(x + (k16 / 4 * (S::kValues / 2) + k16 % 4 * 32) / 16), k != 0);
  };
  Fragment tail[kHead];
  wait_turn(w.warpgroup);
#pragma unroll
  for (uint32_t k = 0; k < kHead; ++k) {
    wgmma_fence();  // for the registers written behind the product before
    multiply(now.head[k], k);
    tail[k] = now.packed.fragment(kIndex * kSteps % 4 + kHead + k);
    stay_here(tail[k]);
  }
  wgmma_fence();
#pragma unroll
  for (uint32_t k = 0; k < kHead; ++k) multiply(tail[k], kHead + k);
  wgmma_commit();
  pass_turn(w.warpgroup);
#pragma unroll
  for (uint32_t k = 0; k < kHead; ++k) {
    next.head[k] = next.packed.fragment(kNext * kSteps % 4 + k);
    stay_here(next.head[k]);
  }
  wgmma_wait<0>();
  if (w.has_bias) add_bias<kRows, kGroup, kIndex>(w, stage, total);
  if (kLast && w.lane < 2) barrier_arrive_at(done, w.lane);
  scale_in<kRows>(now.packed.scales, sum, total);
}

// All stages of an item. Two sets of weights take turns by name: copied from one to the other, registers that a wgmma
// in flight reads would be written, and the compiler serializes all of them.
template <uint32_t kRows, uint32_t kGroup>
__device__ __forceinline__ void multiply_item_in_turns(Walk<kRows, kGroup>& w, float (&total)[kRows / 2]) {
  using S = Stage<kRows, kGroup>;
  Ready<kGroup> even, odd;
  barrier_wait(w.full + w.place.slot * 8, w.place.parity);
  load_packed<kRows, kGroup, 0>(w, w.stage(), even.packed);
#pragma unroll
  for (uint32_t k = 0; k < kGroup / 32; ++k) {
    even.head[k] = even.packed.fragment(k);
    stay_here(even.head[k]);
  }
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

// total += scale * (group's weights * x). The warpgroup waits for its own products; the others keep the tensor cores
// busy. 64 columns at a time, so that registers suffice. `words`: the group's first, and then those of the group behind
// it, which are loaded while products are on their way.
template <uint32_t kRows, uint32_t kGroup, uint32_t kIndex>
__device__ __forceinline__ void multiply_group_alone(Walk<kRows, kGroup>& w, uint4& words, float (&total)[kRows / 2]) {
  using S = Stage<kRows, kGroup>;
  constexpr uint32_t kSteps = kGroup / 16, kBatch = kSteps < 4 ? kSteps : 4;
  constexpr bool kLast = kIndex + 1 == S::kGroups;
  const uint8_t* stage = w.stage();
  const uint32_t x = w.x_address16(), done = w.empty + w.place.slot * 8;
  const Int4Zero zero = group_zero<kRows, kGroup, kIndex>(w, stage);
  float2 scales;
  float sum[kRows / 2];
#pragma unroll
  for (uint32_t first = 0; first < kSteps; first += kBatch) {
    Fragment f[kBatch];
#pragma unroll
    for (uint32_t k = 0; k < kBatch; ++k) {
      f[k] = fragment_int4(word_of(words, kIndex * kSteps % 4 + k), zero);
      stay_here(f[k]);
    }
    wgmma_fence();
#pragma unroll
    for (uint32_t k = 0; k < kBatch; ++k) {
      const uint32_t k16 = kIndex * kSteps + first + k;
      wgmma_step(sum, f[k], x_descriptor(x + (k16 / 4 * (S::kValues / 2) + k16 % 4 * 32) / 16), first + k != 0);
    }
    wgmma_commit();
    if (first + kBatch < kSteps) {
      words = load_words<kRows, kGroup, kIndex>(w, stage, 1);
    } else {
      scales = group_scales<kRows, kGroup, kIndex>(w, stage);
      if constexpr (kLast) {
        w.place.next();
        if (--w.left != 0) {
          barrier_wait(w.full + w.place.slot * 8, w.place.parity);
          words = load_words<kRows, kGroup, 0>(w, w.stage(), 0);
        }
      } else {
        words = load_words<kRows, kGroup, kIndex + 1>(w, stage, 0);
      }
    }
    wgmma_wait<0>();
  }
  if (w.has_bias) add_bias<kRows, kGroup, kIndex>(w, stage, total);
  if (kLast && w.lane < 2) barrier_arrive_at(done, w.lane);
  scale_in<kRows>(scales, sum, total);
}

// All stages of an item.
template <uint32_t kRows, uint32_t kGroup>
__device__ __forceinline__ void multiply_item_alone(Walk<kRows, kGroup>& w, float (&total)[kRows / 2]) {
  using S = Stage<kRows, kGroup>;
  barrier_wait(w.full + w.place.slot * 8, w.place.parity);
  uint4 words = load_words<kRows, kGroup, 0>(w, w.stage(), 0);
#pragma unroll 1
  while (w.left != 0) {
    multiply_group_alone<kRows, kGroup, 0>(w, words, total);
    if constexpr (S::kGroups >= 2) multiply_group_alone<kRows, kGroup, 1>(w, words, total);
    if constexpr (S::kGroups == 4) {
      multiply_group_alone<kRows, kGroup, 2>(w, words, total);
      multiply_group_alone<kRows, kGroup, 3>(w, words, total);
    }
  }
}

// What a warp adds up of an item: total = sum over its stages of scale * (weights * x), and bias.
template <uint32_t kRows, uint32_t kGroup>
__device__ __forceinline__ void multiply_item(Walk<kRows, kGroup>& w, float (&total)[kRows / 2]) {
#pragma unroll
  for (uint32_t i = 0; i < kRows / 2; ++i) total[i] = 0;
  if constexpr (kRows == 128) multiply_item_in_turns<kRows, kGroup>(w, total);
  else multiply_item_alone<kRows, kGroup>(w, total);
}

#endif

}  // namespace wgmma
}  // namespace sluice::cuda
