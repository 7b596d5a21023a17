// SPDX-License-Identifier: Apache-2.0
// Products for 1 to 8 rows of activations, at the speed of memory. The kernel behind matvec_int4.cu, matmul_int8.cu and
// matmul_f16.cu.
//
// argument    shape                              type      layout, alignment
// values      N x K                              int4 ...  tile16x64 or tile16x16, 16 B
// scales      [ceil(N/16)][ceil(K/group)][16]    FP16      16 B;  zeros u8 and bias FP16 the same, optional
// x           [M][ldx], M = 1..8                 FP16      row-major, 16 B, zero behind K
// out         [M][ldo]                           FP32
// partial     [slabs][ceil(N/16)][128]           FP32      workspace; [ceil(N/16)][128] where blocks own rows
//
// Schedule. K is cut into `slabs` of at most 4096 columns. A unit of work is 16 rows of W x one slab. A warp, one of
// sixteen, takes four tiles of it, the same columns in every unit of a slab. Units come in steps, in each of which warp
// w has tiles 2w and 2w + 1 (f16: w) of 32 (16); on sm_75 to sm_89 an int4 unit is one step, with tiles 4w to 4w + 3.
// What a row of x gives does not depend on the rows beside it: the columns of a product with 8 are independent.
//
// x lies in registers (B fragments, 32 of them; rows that are not there are zero), one block on a multiprocessor, and a
// slot of the ring holds all of an int4 unit (32 KiB). Four warps a scheduler are what it takes: unpacking and
// multiplying a warp's share is one chain of some hundred instructions, and with two the chain was the bound on an H200,
// at 60% of the memory's rate. For 1 and 2 rows of int4 on sm_90 there is matvec_few.cuh, with another schedule.
//
//             slab 0                          slab 1
//      +---+---+---+---+- -+---+      +---+---+---+- -+---+
//      |w0 |w1 |w2 |w3 |   |w15|      |w0 |w1 |w2 |   |w15|     row tile 0
//      +---+---+---+---+- -+---+      +---+---+---+- -+---+
//      |   |   |   |   |   |   |      |   |   |   |   |   |     row tile 1
//      +---+---+---+---+- -+---+      +---+---+---+- -+---+
//
// Mostly a block owns rows: it walks down its row tiles once for each slab and nobody else is asked. Where blocks would
// read more of x than that is worth (few row tiles, many slabs, 8 rows of x), block b instead walks the units
// [b U/G, (b+1) U/G), slab by slab, and leaves its sums in the workspace; the block that comes last to a row tile adds
// the slabs in order: no float atomics, the same bits in every run.
//
// Steps go through a ring in shared memory. On sm_90 a warp of its own asks the bulk copy engine for each step, which
// is one run of memory for values and one for scales; the ring fills while the kernel in front is still running,
// because weights do not depend on activations. A slab's activations come into a place of their own. The ring is three
// units deep, of which two are on their way at most: what the kernel in front stores last, and the first activations,
// wait behind all that was asked for.
// On sm_80 to sm_89 every warp copies its own share with cp.async.
//
// The sixteen warps' sums of a unit meet in shared memory. Four warps add them, a quarter of the block for each unit in
// turn, and only they wait for the others, who go on: barrier u % 4 is for unit u of a slab, and sums lie in one of
// five places. A warp waits once in four units, for all warps to have come that far; so when it arrives at unit u + 4,
// unit u's barrier is over, and when it writes unit u + 5's sums, those of u have been read.
//
// Geometry: min(row tiles or U, multiprocessors) blocks of 544 threads.
// Bytes moved: values + scales, once; x once per block and slab, out of L2.
// Compiled: int4 (symmetric, zeros, bias) and int8 with folds of 32, 64, 128 columns (64 also serves groups of 128
// where shares are odd), f16, bf16.
#pragma once

#include <type_traits>

#include "cuda/matmul_launch.hpp"
#include "cuda/tile_fragments.cuh"

namespace sluice::cuda {

inline constexpr uint32_t kMatvecWarps = 16;
inline constexpr uint32_t kMatvecThreads = kMatvecWarps * 32;
inline constexpr uint32_t kSliceTiles = 4;            // of 64 columns, a warp's share of a slab
inline constexpr uint32_t kMostRingBytes = 96 << 10;  // of values
inline constexpr uint32_t kMostDepth = 6;             // slots in the ring

inline constexpr uint32_t kWindow = 2;                // steps on their way at most (sm_90)

// kBytes: of 16 rows x 64 columns. kShareTiles: a warp's in a step (share_tiles() of matmul.cu).
template <WeightFormat kFormat>
struct TileOf;
template <>
struct TileOf<WeightFormat::int4> {
  static constexpr uint32_t kBytes = 512;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr uint32_t kShareTiles = 4;
#else
  static constexpr uint32_t kShareTiles = 2;
#endif
};
template <>
struct TileOf<WeightFormat::int8> {
  static constexpr uint32_t kBytes = 1024, kShareTiles = 2;
};
template <>
struct TileOf<WeightFormat::f16> {
  static constexpr uint32_t kBytes = 2048, kShareTiles = 1;
};
template <>
struct TileOf<WeightFormat::bf16> {
  static constexpr uint32_t kBytes = 2048, kShareTiles = 1;
};

// What belongs to a group besides its scale. Branches on it inside a step would keep groups from overlapping.
enum class GroupForm : uint8_t { symmetric, zeros, bias };

// Where a slot holds what; the planes behind the values are as long as a step's groups.
struct SlotLayout {
  uint32_t scales, zeros, bias, bytes;  // offsets and the whole, multiples of 16
};

struct MatvecArgs {
  struct Part {
    const uint8_t* values;
    const uint8_t* scales;
    const uint8_t* zeros;
    const uint8_t* bias;
    float* out;
    const float* vector;
    uint32_t ldo, rows, first_tile;  // first_tile: row tile of the call
    float scale;
  } part[kMatmulParts];
  const __half* x;
  uint64_t x_copy_elems;  // from one copy of x to the next
  const float* row_scale;
  float* partial;
  uint32_t* counters;  // one per row tile
  uint32_t x_copies, ldx, rows, parts, row_tiles, slabs, units;
  uint32_t col_tiles;          // of 64 columns
  uint32_t steps, step_tiles;  // of a unit; of a warp's share of a step
  uint32_t value_row_bytes;    // of one row tile
  uint32_t groups, group_shift;  // per row; log2(group)
  uint32_t x_bytes;            // of a slab's x in shared memory (sm_90)
  SlotLayout slot;
  uint32_t share, longer;  // row tiles or units of a block; blocks that have one more, the first ones
  uint32_t depth;          // slots of the ring
  uint32_t window;         // sm_90: steps on their way at most
  uint32_t kept;           // matvec_few.cuh: row tiles that sums so far are kept of
  bool owns_rows, accumulate, weights_early, clear_ring;
};

namespace matvec {

inline constexpr uint32_t kThreads = kMatvecThreads + 32;  // and the producer, idle before sm_90
inline constexpr uint32_t kRegisters = 80;  // of a thread: beside a block there is room for one of attention
inline constexpr uint32_t kQuarters = 4, kQuarterWarps = kMatvecWarps / kQuarters;
// Places for sums. Before sm_90 one will do: all warps meet in every step.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr uint32_t kSumSets = 1;
#else
inline constexpr uint32_t kSumSets = 5;
#endif
inline constexpr uint32_t kSumBytes = kMatvecWarps * 128 * 4;       // of one
inline constexpr uint32_t kXSumBytes = kMatvecWarps * 8 * 8 * 4;    // sums of x, only where weights have a bias
inline constexpr uint32_t kListBytes = kMatvecThreads * 4;

// All warps that multiply.
__device__ __forceinline__ void sync_warps() { asm volatile("bar.sync 1, %0;" ::"n"(kMatvecThreads) : "memory"); }
// Of one unit: this warp's sums are there; all warps' are.
__device__ __forceinline__ void sums_arrive(uint32_t quarter) {
  asm volatile("bar.arrive %0, %1;" ::"r"(2 + quarter), "n"(kMatvecThreads) : "memory");
}
__device__ __forceinline__ void sums_wait(uint32_t quarter) {
  asm volatile("bar.sync %0, %1;" ::"r"(2 + quarter), "n"(kMatvecThreads) : "memory");
}

// Out of the compiler's sight: left to itself it asks special registers anew in every unit to save one register.
__device__ __forceinline__ uint32_t in_register(uint32_t value) {
  return __shfl_sync(0xffffffffu, value, threadIdx.x & 31);
}

// what(0) to what(kCount - 1), the numbers known to the compiler.
template <uint32_t kCount, uint32_t kNumber = 0, class Do>
__device__ __forceinline__ void for_each(const Do& what) {
  what(std::integral_constant<uint32_t, kNumber>{});
  if constexpr (kNumber + 1 < kCount) for_each<kCount, kNumber + 1>(what);
}

__device__ __forceinline__ uint32_t part_of(const MatvecArgs& a, uint32_t row_tile) {
  uint32_t part = 0;
  while (part + 1 < a.parts && row_tile >= a.part[part + 1].first_tile) ++part;
  return part;
}

// A block's walk through its units.
struct Walk {
  uint32_t row_tile, slab, left;  // left: units, this one included
  uint32_t first, end;            // row tiles where a slab's walk begins and ends

  explicit __device__ __forceinline__ Walk(const MatvecArgs& a) {
    const uint32_t from = blockIdx.x * a.share + min(blockIdx.x, a.longer);
    const uint32_t to = from + a.share + (blockIdx.x < a.longer ? 1 : 0);
    slab = a.owns_rows ? 0 : from / a.row_tiles;
    row_tile = from - slab * a.row_tiles;
    left = (to - from) * (a.owns_rows ? a.slabs : 1);
    first = a.owns_rows ? from : 0;
    end = a.owns_rows ? to : a.row_tiles;
  }
  // True where another slab begins.
  __device__ __forceinline__ bool next() {
    --left;
    if (++row_tile != end) return false;
    row_tile = first;
    ++slab;
    return left != 0;
  }
};

// The run of memory that is a step of a unit. of_call: the row tile, counted through all parts.
// kMerged: both steps of a unit in one.
template <WeightFormat kFormat, GroupForm kForm, bool kMerged>
struct Step {
  static constexpr bool kGrouped = kFormat == WeightFormat::int4 || kFormat == WeightFormat::int8;
  static constexpr uint32_t kTile = TileOf<kFormat>::kBytes;
  const uint8_t *values, *scales, *extra;  // extra: zeros or bias
  uint32_t bytes, groups;

  __device__ __forceinline__ Step(const MatvecArgs& a, uint32_t of_call, uint32_t slab, uint32_t step) {
    const MatvecArgs::Part& p = a.part[part_of(a, of_call)];
    const uint32_t tiles = kMatvecWarps * a.step_tiles * (kMerged ? a.steps : 1);
    const uint32_t first = min(a.col_tiles, (slab * (kMerged ? 1 : a.steps) + step) * tiles);
    const uint32_t last = min(a.col_tiles, first + tiles);
    const uint64_t row_tile = of_call - p.first_tile;
    bytes = min(last * kTile, a.value_row_bytes) - min(first * kTile, a.value_row_bytes);
    values = p.values + row_tile * a.value_row_bytes + first * kTile;
    groups = 0;
    scales = extra = nullptr;
    if (kGrouped && bytes != 0) {
      const uint32_t group = (first << 6) >> a.group_shift;
      groups = min(a.groups, (((last << 6) - 1) >> a.group_shift) + 1) - group;
      const uint64_t at_group = row_tile * a.groups + group;
      scales = p.scales + at_group * 32;
      if constexpr (kForm == GroupForm::zeros) extra = p.zeros + at_group * 16;
      if constexpr (kForm == GroupForm::bias) extra = p.bias + at_group * 32;
    }
  }
  static constexpr uint32_t kExtraBytes = kForm == GroupForm::zeros ? 16 : kForm == GroupForm::bias ? 32 : 0;
  static __device__ __forceinline__ uint32_t extra_at(const MatvecArgs& a) {
    return kForm == GroupForm::zeros ? a.slot.zeros : a.slot.bias;
  }
};

// Bytes from one row of a slab's x to the next in shared memory: padded off the banks.
__device__ __forceinline__ uint32_t x_stride(const MatvecArgs& a) {
  return a.steps * a.step_tiles * kMatvecWarps * 128 + 16;
}

// A place in the ring.
struct Place {
  uint32_t slot = 0, parity = 0;
  __device__ __forceinline__ void next(uint32_t depth) {
    if (++slot == depth) {
      slot = 0;
      parity ^= 1;
    }
  }
};

#if __CUDA_ARCH__ >= 900
// Asks for a slab's activations. Blocks begin with different rows: they all ask at once.
__device__ __forceinline__ void ask_activations(const MatvecArgs& a, uint32_t slab, uint32_t x, uint32_t x_full) {
  const uint32_t tiles = a.steps * a.step_tiles * kMatvecWarps, first = slab * tiles;
  const uint32_t bytes = (min(a.col_tiles, first + tiles) - first) * 128;
  barrier_expect(x_full, bytes * a.rows);
  uint32_t row = blockIdx.x % a.rows;
  for (uint32_t i = 0; i < a.rows; ++i) {
    bulk_copy(x + row * x_stride(a), a.x + uint64_t{row} * a.ldx + first * 64, bytes, x_full, evict_last_policy());
    row = row + 1 == a.rows ? 0 : row + 1;
  }
}

// The producer's whole life, by one thread: every step of every unit, at most `window` on their way, and activations
// of each slab but the first as soon as those of the slab before have been taken.
template <WeightFormat kFormat, GroupForm kForm, bool kMerged>
__device__ __forceinline__ void produce(const MatvecArgs& a, uint32_t ring, uint32_t full, uint32_t empty, uint32_t x,
                                        uint32_t x_full, uint32_t x_empty) {
  using S = Step<kFormat, kForm, kMerged>;
  const uint64_t policy = evict_first_policy();
  Place place, here;  // here: what must have come before the next is asked for
  uint32_t filled = 0, slabs_taken = 0;
  Walk walk(a);
  if (!a.weights_early) wait_for_previous_kernel();
  while (walk.left != 0) {
#pragma unroll 1
    for (uint32_t step = 0; step < (kMerged ? 1 : a.steps); ++step) {
      const S s(a, walk.row_tile, walk.slab, step);
      if (filled >= a.window) {
        barrier_wait(full + here.slot * 8, here.parity);
        here.next(a.depth);
      }
      if (filled++ >= a.depth) barrier_wait(empty + place.slot * 8, place.parity ^ 1);
      const uint32_t slot = ring + place.slot * a.slot.bytes, barrier = full + place.slot * 8;
      barrier_expect(barrier, s.bytes + s.groups * (32 + S::kExtraBytes));
      if (s.bytes != 0) bulk_copy(slot, s.values, s.bytes, barrier, policy);
      if (s.groups != 0) bulk_copy(slot + a.slot.scales, s.scales, s.groups * 32, barrier, policy);
      if (S::kExtraBytes != 0 && s.groups != 0) {
        bulk_copy(slot + S::extra_at(a), s.extra, s.groups * S::kExtraBytes, barrier, policy);
      }
      place.next(a.depth);
    }
    if (!walk.next()) continue;
    barrier_wait(x_empty, slabs_taken++ & 1);
    ask_activations(a, walk.slab, x, x_full);
  }
}
#else
// A warp's share of a step, on its way into the slot. Groups that two warps share are copied by both.
template <WeightFormat kFormat, GroupForm kForm>
__device__ __forceinline__ void copy_share(const MatvecArgs& a, const Walk& at, uint32_t step, uint8_t* slot,
                                           uint32_t warp, uint32_t lane) {
  using S = Step<kFormat, kForm, false>;
  const S s(a, at.row_tile, at.slab, step);
  const uint32_t share = a.step_tiles * S::kTile, begin = warp * share, end = min(s.bytes, begin + share);
  for (uint32_t i = begin + lane * 16; i < end; i += 512) copy16(shared_address(slot + i), s.values + i, true);
  if constexpr (S::kGrouped) {
    const uint32_t tile = warp * a.step_tiles, first = (tile << 6) >> a.group_shift;
    const uint32_t last = min(s.groups, ((((tile + a.step_tiles) << 6) - 1) >> a.group_shift) + 1);
    for (uint32_t i = first * 32 + lane * 16; i < last * 32; i += 512) {
      copy16(shared_address(slot + a.slot.scales + i), s.scales + i, true);
    }
    constexpr uint32_t kExtra = S::kExtraBytes;
    for (uint32_t i = first * kExtra + lane * 16; i < last * kExtra; i += 512) {
      copy16(shared_address(slot + S::extra_at(a) + i), s.extra + i, true);
    }
  }
}

// Until at most `pending` of this thread's newest groups of copies are on their way.
__device__ __forceinline__ void copy_wait_but(uint32_t pending) {
  switch (pending) {
    case 0: return copy_wait<0>();
    case 1: return copy_wait<1>();
    default: return copy_wait<2>();   // kMostRingBytes are three steps there
  }
}
#endif

// Where tile i of the warp's share lies in a slab, in tiles; past it for tiles that the share does not have.
template <WeightFormat kFormat>
__device__ __forceinline__ uint32_t tile_in_slab(const MatvecArgs& a, uint32_t warp, uint32_t i) {
  constexpr uint32_t kStepTiles = TileOf<kFormat>::kShareTiles;
  const uint32_t step = i / kStepTiles, within = i % kStepTiles;
  if (step >= a.steps || within >= a.step_tiles) return ~0u;
  return (step * kMatvecWarps + warp) * a.step_tiles + within;
}

__device__ __forceinline__ uint32_t first_tile_of(const MatvecArgs& a, uint32_t slab) {
  return slab * a.steps * a.step_tiles * kMatvecWarps;
}

// A warp's activations of a slab in its registers: tile i is of step i / (tiles of a share); rows from a.rows on and
// tiles past K are zero.
template <WeightFormat kFormat>
class XInRegisters {
 public:
  __device__ __forceinline__ void load(const MatvecArgs& a, uint32_t slab, uint32_t warp, uint32_t lane) {
    const uint32_t g = lane >> 2, t = lane & 3, first = first_tile_of(a, slab);
    const __half* row = a.x + uint64_t{min(g, a.rows - 1)} * a.ldx + t * 2;
#pragma unroll
    for (uint32_t i = 0; i < kSliceTiles; ++i) {
      const uint32_t tile = tile_in_slab<kFormat>(a, warp, i);
      const bool there = g < a.rows && tile != ~0u && first + tile < a.col_tiles;
#pragma unroll
      for (uint32_t c = 0; c < 8; ++c) {
        const uint32_t* from = reinterpret_cast<const uint32_t*>(row + uint64_t{first + tile} * 64 + c * 8);
        b_[i][c / 2][c % 2] = there ? __ldcg(from) : 0;
      }
    }
  }

  // The slab's x out of shared memory.
  __device__ __forceinline__ void take(const MatvecArgs& a, uint32_t slab, uint32_t memory, uint32_t warp,
                                       uint32_t lane) {
    const uint32_t g = lane >> 2, first = first_tile_of(a, slab);
    const uint32_t from = memory + min(lane & 7, a.rows - 1) * x_stride(a) + (lane >> 3) * 16;
#pragma unroll
    for (uint32_t i = 0; i < kSliceTiles; ++i) {
      const uint32_t tile = tile_in_slab<kFormat>(a, warp, i);
      const bool there = tile != ~0u && first + tile < a.col_tiles;
      uint32_t low[4] = {}, high[4] = {};
      if (there) {
        load_matrices(low, from + tile * 128);
        load_matrices(high, from + tile * 128 + 64);
      }
#pragma unroll
      for (uint32_t c = 0; c < 4; ++c) {
        b_[i][c / 2][c % 2] = g < a.rows ? low[c] : 0;
        b_[i][2 + c / 2][c % 2] = g < a.rows ? high[c] : 0;
      }
    }
  }

  // The B operands of 32 columns: b0, b1 of the first 16, then of the others.
  template <uint32_t kTile, uint32_t kHalf>
  __device__ __forceinline__ void get(uint32_t (&b)[4]) const {
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) b[i] = b_[kTile][kHalf * 2 + i / 2][i % 2];
  }

 private:
  uint32_t b_[kSliceTiles][4][2];
};

// Sums of x over each fold of the share: sums[fold][row of x].
template <uint32_t kFold, class X>
__device__ __forceinline__ void sum_activations(const X& x, uint32_t lane, float* sums) {
  const Fragment ones = {{0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u}};
  constexpr uint32_t kHalves = kFold / 32;  // of a fold, each 32 columns
  float2 fold_sum = {0, 0};
  for_each<kSliceTiles * 2>([&](auto half) {
    constexpr uint32_t i = decltype(half)::value;
    uint32_t b[4];
    x.template get<i / 2, i % 2>(b);
    float c[4] = {0, 0, 0, 0};  // apart, so that nobody waits for the one before
    mma_f16(c, ones, b[0], b[1]);
    mma_f16(c, ones, b[2], b[3]);
    fold_sum.x += c[0];
    fold_sum.y += c[1];
    if ((i + 1) % kHalves != 0) return;
    if (lane < 4) *reinterpret_cast<float2*>(sums + i / kHalves * 8 + lane * 2) = fold_sum;
    fold_sum = {0, 0};
  });
  __syncwarp();
}

// Group parameters of a slot: what one fold multiplies and adds.
template <GroupForm kForm>
struct GroupPlanes {
  const uint8_t* slot;
  const SlotLayout& layout;

  __device__ __forceinline__ Int4Zero zero(uint32_t group, uint32_t g) const {
    if constexpr (kForm == GroupForm::zeros) {
      const uint8_t* z = slot + layout.zeros + group * 16 + g;
      return int4_zero(z[0], z[8]);
    }
    return kForm == GroupForm::bias ? int4_zero(0, 0) : int4_zero(8, 8);
  }
  // x_sums: of the fold, by row of x; only with a bias.
  __device__ __forceinline__ void fold(float (&total)[4], const float (&sum)[4], uint32_t group, uint32_t g, uint32_t t,
                                       const float* x_sums) const {
    const __half* s = reinterpret_cast<const __half*>(slot + layout.scales) + group * 16 + g;
    const float s0 = __half2float(s[0]), s8 = __half2float(s[8]);
    total[0] = fmaf(s0, sum[0], total[0]);
    total[1] = fmaf(s0, sum[1], total[1]);
    total[2] = fmaf(s8, sum[2], total[2]);
    total[3] = fmaf(s8, sum[3], total[3]);
    if constexpr (kForm == GroupForm::bias) {
      const __half* b = reinterpret_cast<const __half*>(slot + layout.bias) + group * 16 + g;
      const float b0 = __half2float(b[0]), b8 = __half2float(b[8]);
      const float2 x = *reinterpret_cast<const float2*>(x_sums + 2 * t);
      total[0] = fmaf(b0, x.x, total[0]);
      total[1] = fmaf(b0, x.y, total[1]);
      total[2] = fmaf(b8, x.x, total[2]);
      total[3] = fmaf(b8, x.y, total[3]);
    }
  }
};

// One step: adds the warp's share of it to `total`. kStep is the step's number in the unit, which says what part of x
// it meets; `kInSlot` its number in the slot.
template <WeightFormat kFormat, uint32_t kFold, GroupForm kForm, uint32_t kStep, uint32_t kInSlot, class X>
__device__ __forceinline__ void multiply_step(const MatvecArgs& a, const X& x, const uint8_t* slot, uint32_t warp,
                                              uint32_t lane, const float* x_sums, float (&total)[4]) {
  constexpr uint32_t kTiles = TileOf<kFormat>::kShareTiles;
  const uint32_t g = lane >> 2, t = lane & 3, first_tile = (kInSlot * kMatvecWarps + warp) * a.step_tiles;
  // One wide load per tile by name: left to itself the compiler loads word by word where it needs them, lanes 16 bytes
  // apart, which is four bank conflicts each time.
  const uint32_t q = shared_address(slot) + first_tile * TileOf<kFormat>::kBytes + lane * 16;
  if constexpr (kFormat == WeightFormat::f16 || kFormat == WeightFormat::bf16) {
    for_each<kTiles * 2>([&](auto half) {
      constexpr uint32_t i = decltype(half)::value;
      uint32_t b[4];
      x.template get<kStep * kTiles + i / 2, i % 2>(b);
#pragma unroll
      for (uint32_t k = 0; k < 2; ++k) {
        const uint4 w = load_shared16(q + (i * 2 + k) * 512);
        const Fragment f = {{w.x, w.y, w.z, w.w}};
        if constexpr (kFormat == WeightFormat::f16) mma_f16(total, f, b[2 * k], b[2 * k + 1]);
        else mma_bf16(total, f, b[2 * k], b[2 * k + 1]);
      }
    });
  } else {
    const GroupPlanes<kForm> planes = {slot, a.slot};
    const uint32_t base = (first_tile << 6) >> a.group_shift;  // group of the share's first tile, in the step
    for_each<kTiles * 64 / kFold>([&](auto fold_number) {
      constexpr uint32_t fold = decltype(fold_number)::value;
      const uint32_t group = kFold == 64 ? ((first_tile + fold) << 6) >> a.group_shift : base + fold;
      float sum[4] = {0, 0, 0, 0};
      const Int4Zero zero = kFormat == WeightFormat::int4 ? planes.zero(group, g) : Int4Zero{};
      uint4 w = {};
      for_each<kFold / 32>([&](auto half) {
        constexpr uint32_t i = fold * (kFold / 32) + decltype(half)::value;  // of 32 columns
        uint32_t b[4];
        x.template get<kStep * kTiles + i / 2, i % 2>(b);
        if constexpr (kFormat == WeightFormat::int4) {
          if (i % 2 == 0 || decltype(half)::value == 0) w = load_shared16(q + i / 2 * 512);
          mma_f16(sum, fragment_int4(i % 2 == 0 ? w.x : w.z, zero), b[0], b[1]);
          mma_f16(sum, fragment_int4(i % 2 == 0 ? w.y : w.w, zero), b[2], b[3]);
        } else {
          w = load_shared16(q + i * 512);
          mma_f16(sum, fragment_int8(w.x, w.y), b[0], b[1]);
          mma_f16(sum, fragment_int8(w.z, w.w), b[2], b[3]);
        }
      });
      planes.fold(total, sum, group, g, t, x_sums + (kStep * kTiles * 64 / kFold + fold) * 8);
    });
  }
}

// One output: position `at` of a unit's 128 sums, which is lane at / 4, register at % 4 of the accumulators.
__device__ __forceinline__ void write_out(const MatvecArgs& a, uint32_t row_tile, uint32_t at, float sum) {
  const uint32_t lane = at >> 2, c = at & 3;
  const uint32_t n = 2 * (lane & 3) + (c & 1);
  const MatvecArgs::Part& p = a.part[part_of(a, row_tile)];
  const uint32_t row = (row_tile - p.first_tile) * 16 + (lane >> 2) + 8 * (c >> 1);
  if (n >= a.rows || row >= p.rows) return;
  float value = sum * p.scale;
  if (a.row_scale != nullptr) value *= a.row_scale[n];
  if (p.vector != nullptr) value += p.vector[row];
  float* out = p.out + uint64_t{n} * p.ldo + row;
  *out = a.accumulate ? *out + value : value;
}

// Behind a block's last unit: tells of its partial sums, and adds the slabs of each row tile that it is the last one
// to.
__device__ __forceinline__ void finish_row_tiles(const MatvecArgs& a, uint32_t first_unit, uint32_t end_unit,
                                                 uint32_t* last_list) {
  __shared__ uint32_t listed;
  const uint32_t warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  fence_device();
  for (uint32_t base = first_unit; base < end_unit; base += kMatvecThreads) {
    if (threadIdx.x == 0) listed = 0;
    sync_warps();
    const uint32_t unit = base + threadIdx.x;
    if (unit < end_unit) {
      const uint32_t row_tile = unit % a.row_tiles;
      if (atomicAdd(a.counters + row_tile, 1) == a.slabs - 1) {
        a.counters[row_tile] = 0;
        last_list[atomicAdd(&listed, 1)] = row_tile;
      }
    }
    fence_device();
    sync_warps();
    for (uint32_t i = warp; i < listed; i += kMatvecWarps) {
      const uint32_t row_tile = last_list[i];
      const float4* from = reinterpret_cast<const float4*>(a.partial + uint64_t{row_tile} * 128) + lane;
      float4 sum = {0, 0, 0, 0};
      for (uint32_t first = 0; first < a.slabs; first += 8) {
        float4 s[8];  // all on their way before the first is added
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) {
          s[i] = first + i < a.slabs ? __ldcg(from + uint64_t{first + i} * a.row_tiles * 32) : make_float4(0, 0, 0, 0);
        }
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) {
          sum.x += s[i].x;
          sum.y += s[i].y;
          sum.z += s[i].z;
          sum.w += s[i].w;
        }
      }
      write_out(a, row_tile, lane * 4, sum.x);
      write_out(a, row_tile, lane * 4 + 1, sum.y);
      write_out(a, row_tile, lane * 4 + 2, sum.z);
      write_out(a, row_tile, lane * 4 + 3, sum.w);
    }
    sync_warps();
  }
}

// A slot holds all of a unit of int4: half as many waits.
template <WeightFormat kFormat>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr bool merges_steps = false;
#else
inline constexpr bool merges_steps = kFormat == WeightFormat::int4;
#endif

template <WeightFormat kFormat, uint32_t kFold, GroupForm kForm>
__global__ void __maxnreg__(kRegisters) matvec_kernel(const __grid_constant__ MatvecArgs a) {
  constexpr uint32_t kXSums = kForm == GroupForm::bias ? kXSumBytes : 0;
  constexpr bool kMerged = merges_steps<kFormat>;
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ uint64_t barriers[2 * kMostDepth + 2];
  // Broadcast, so that the compiler knows it is one for all lanes and keeps addresses in uniform registers.
  const uint32_t warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  float* sums = reinterpret_cast<float*>(shared);  // [set][warp][lane][4]
  uint32_t* last_list = reinterpret_cast<uint32_t*>(shared + kSumSets * kSumBytes);
  uint8_t* behind_list = shared + kSumSets * kSumBytes + kListBytes;
  float* x_sums = reinterpret_cast<float*>(behind_list) + warp * 64;
  uint8_t* x_memory = behind_list + kXSums;
  uint8_t* ring = x_memory + a.x_bytes;
  [[maybe_unused]] const uint32_t full = in_register(shared_address(barriers)), empty = full + kMostDepth * 8;
  [[maybe_unused]] const uint32_t x_full = empty + kMostDepth * 8, x_empty = x_full + 8;
  let_next_kernel_start();
  if (a.clear_ring) {
    // Parts of a slot that no step fills meet zero activations; they must not be NaN for that.
    for (uint32_t at = threadIdx.x * 16; at < a.depth * a.slot.bytes; at += kThreads * 16)
      *reinterpret_cast<uint4*>(ring + at) = make_uint4(0, 0, 0, 0);
  }
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) {
    for (uint32_t i = 0; i < a.depth; ++i) {
      barrier_init(full + i * 8, 1);
      barrier_init(empty + i * 8, kMatvecWarps);
    }
    barrier_init(x_full, 1);
    barrier_init(x_empty, kMatvecWarps);
    barrier_init_fence();
  }
  async_proxy_fence();
  __syncthreads();
  if (warp == kMatvecWarps) {
    if (lane == 0) {
      produce<kFormat, kForm, kMerged>(a, shared_address(ring), full, empty, shared_address(x_memory), x_full, x_empty);
    }
    return;
  }
#else
  __syncthreads();
  if (warp == kMatvecWarps) return;
  Walk ahead(a);
  uint32_t ahead_step = 0;
  const auto copy_next = [&](uint32_t slot) {
    if (ahead.left != 0) {
      copy_share<kFormat, kForm>(a, ahead, ahead_step, ring + slot * a.slot.bytes, warp, lane);
      if (++ahead_step == a.steps) {
        ahead_step = 0;
        ahead.next();
      }
    }
    copy_commit();
  };
  for (uint32_t slot = 0; slot < a.depth; ++slot) copy_next(slot);
#endif
  Walk walk(a);
  const uint32_t units = walk.left, first_unit = walk.slab * a.row_tiles + walk.row_tile;
  wait_for_previous_kernel();
#if __CUDA_ARCH__ >= 900
  // By this thread and not the producer, who may be waiting for weights.
  if (threadIdx.x == 0) ask_activations(a, walk.slab, shared_address(x_memory), x_full);
#endif

  Place place;
  const auto wait_slot = [&] {
#if __CUDA_ARCH__ >= 900
    barrier_wait(full + place.slot * 8, place.parity);
#else
    copy_wait_but(a.depth - 1);
    __syncwarp();
#endif
  };
  const auto release_slot = [&] {
#if __CUDA_ARCH__ >= 900
    __syncwarp();
    if (lane == 0) barrier_arrive(empty + place.slot * 8);
#else
    sync_warps();  // another warp may read groups that this one copies too
    copy_next(place.slot);
#endif
    place.next(a.depth);
  };
  XInRegisters<kFormat> x;
  [[maybe_unused]] uint32_t x_parity = 0;
  const auto take_x = [&] {
#if __CUDA_ARCH__ >= 900
    barrier_wait(x_full, x_parity);
    x_parity ^= 1;
    x.take(a, walk.slab, shared_address(x_memory), warp, lane);
    __syncwarp();
    if (lane == 0) barrier_arrive(x_empty);
#else
    x.load(a, walk.slab, warp, lane);
#endif
  };
  take_x();
  if (kForm == GroupForm::bias) sum_activations<kFold>(x, lane, x_sums);
  // This thread's output, if its quarter adds: at / 4 is the lane that had it, at % 4 which of the four.
  const uint32_t at = in_register(threadIdx.x & 127);
  const auto has_row = [&] { return 2 * ((at >> 2) & 3) + (at & 1) < a.rows; };
  uint32_t quarter = 0, set = 0;  // of the unit
#pragma unroll 1
  while (walk.left != 0) {
    // What the slab before left of this thread's output: left by this very thread, since quarters begin anew with each
    // slab.
    const bool adds = warp / kQuarterWarps == quarter;
    float before = 0;
    if (adds && walk.slab > 0 && a.owns_rows && has_row()) {
      before = __ldcg(a.partial + uint64_t{walk.row_tile} * 128 + at);
    }
    float total[4] = {0, 0, 0, 0};
    const auto multiply = [&](auto step) {
      constexpr uint32_t kStep = decltype(step)::value;
      const uint8_t* slot = ring + place.slot * a.slot.bytes;
      multiply_step<kFormat, kFold, kForm, kStep, kMerged ? kStep : 0>(a, x, slot, warp, lane, x_sums, total);
    };
    if constexpr (kMerged) {
      wait_slot();
      // In one piece, so that the chains of both steps run side by side.
      if (a.steps == 2) for_each<2>(multiply);
      else for_each<1>(multiply);
      release_slot();
    } else {
      for_each<kSliceTiles / TileOf<kFormat>::kShareTiles>([&](auto step) {
        constexpr uint32_t kStep = decltype(step)::value;
        if (kStep != 0 && kStep >= a.steps) return;
        wait_slot();
        multiply(step);
        release_slot();
      });
    }
    float* unit_sums = sums + set * kMatvecWarps * 128;
    *reinterpret_cast<float4*>(unit_sums + warp * 128 + lane * 4) = make_float4(total[0], total[1], total[2], total[3]);
    if (!adds) {
      sums_arrive(quarter);
    } else {
      sums_wait(quarter);
      float sum = 0;
#pragma unroll
      for (uint32_t w = 0; w < kMatvecWarps; ++w) sum += unit_sums[w * 128 + at];
      sum += before;
      if (a.owns_rows && walk.slab + 1 == a.slabs) {
        write_out(a, walk.row_tile, at, sum);
      } else if (has_row()) {
        a.partial[(uint64_t{a.owns_rows ? 0 : walk.slab} * a.row_tiles + walk.row_tile) * 128 + at] = sum;
      }
    }
    quarter = (quarter + 1) % kQuarters;
    set = set + 1 == kSumSets ? 0 : set + 1;
    if (walk.next()) {
      sync_warps();
      quarter = 0;
      take_x();
      if (kForm == GroupForm::bias) sum_activations<kFold>(x, lane, x_sums);
    }
  }
  if (!a.owns_rows) finish_row_tiles(a, first_unit, first_unit + units, last_list);
}

}  // namespace matvec

}  // namespace sluice::cuda
