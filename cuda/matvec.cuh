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
// Schedule. K is cut into `slabs` of 8 slices, a slice is at most 512 columns and belongs to one warp of a block for
// good, so that its activations stay in registers (B fragments, 64 of them; rows that are not there are zero, which is
// why a row has the same bits in every company). A unit of work is 16 rows of W x one slab: at most 32 KiB of int4.
//
//             slab 0                          slab 1
//      +---+---+---+---+- -+---+      +---+---+---+- -+---+
//      |w0 |w1 |w2 |w3 |   |w7 |      |w0 |w1 |w2 |   |w7 |     row tile 0
//      +---+---+---+---+- -+---+      +---+---+---+- -+---+
//      |   |   |   |   |   |   |      |   |   |   |   |   |     row tile 1
//      +---+---+---+---+- -+---+      +---+---+---+- -+---+
//
// Mostly a block owns rows: it walks down its row tiles once for each slab and nobody else is asked. Where blocks would
// read more of x than that is worth (few row tiles, many slabs, 8 rows of x), block b instead walks the units
// [b U/G, (b+1) U/G), slab by slab, and leaves its sums in the workspace; the block that comes last to a row tile adds
// the slabs in order: no float atomics, the same bits in every run.
//
// The first slab's activations are loaded when the kernel in front is done; those of later slabs come through the
// rings. Each warp has its own ring of kDepth steps of 4 KiB and their scales in shared memory, which lane 0 keeps full
// with the bulk copy engine (sm_80 to sm_89: every lane copies with cp.async the 16 bytes that it will read). So about
// 70 KiB are on their way per multiprocessor, across units, with no register and no block-wide barrier in the way of
// the loads, and the ring fills while the kernel in front is still running: weights do not depend on activations. The
// eight warps' sums of a unit meet in shared memory, one block-wide barrier per unit.
//
// Geometry: min(row tiles or U, multiprocessors) blocks of 256 threads, two fit on a multiprocessor: this kernel's and
// the next one's.
// Bytes moved: values + scales, once; x once per block and slab, out of L2.
// Compiled: int4 (symmetric, zeros, bias) and int8 with folds of 32, 64, 128 columns (64 also serves groups of 128
// where slices are odd), f16, bf16.
#pragma once

#include <type_traits>

#include "cuda/matmul_launch.hpp"
#include "cuda/tile_fragments.cuh"

namespace sluice::cuda {

inline constexpr uint32_t kMatvecWarps = 8;
inline constexpr uint32_t kSliceTiles = 8;    // of 64 columns, in a warp's registers
inline constexpr uint32_t kStepBytes = 4096;  // of values in one slot of a ring
inline constexpr uint32_t kDepth = 3;
inline constexpr uint32_t kXRows = 4, kXStride = 1040;  // of x in one slot: rows of 512 columns, padded off the banks
inline constexpr uint32_t kStageStride = 144;  // bytes per row of a staged tile of x: 128, padded off the banks

template <WeightFormat kFormat>
struct TileOf;
template <>
struct TileOf<WeightFormat::int4> {
  static constexpr uint32_t kBytes = 512;  // of 16 rows x 64 columns
};
template <>
struct TileOf<WeightFormat::int8> {
  static constexpr uint32_t kBytes = 1024;
};
template <>
struct TileOf<WeightFormat::f16> {
  static constexpr uint32_t kBytes = 2048;
};
template <>
struct TileOf<WeightFormat::bf16> {
  static constexpr uint32_t kBytes = 2048;
};

// What belongs to a group besides its scale. Branches on it inside a step would keep groups from overlapping, and a
// warp alone with one group's chain of sums runs at half the speed.
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
  const float* row_scale;
  float* partial;
  uint32_t* counters;  // one per row tile
  uint32_t ldx, rows, parts, row_tiles, slabs, units;
  uint32_t col_tiles, slice_tiles;  // of 64 columns: of K, of one slice
  uint32_t value_row_bytes;         // of one row tile
  uint32_t groups, group_shift;     // per row; log2(group)
  SlotLayout slot;
  uint32_t depth;  // slots of a ring
  bool owns_rows, accumulate, weights_early, clear_ring;
};

namespace matvec {

// What one step of a slice covers, in bytes of a row tile's values and in groups.
template <WeightFormat kFormat>
struct Slice {
  static constexpr uint32_t kTile = TileOf<kFormat>::kBytes;
  static constexpr uint32_t kStepTiles = kStepBytes / kTile;
  static constexpr uint32_t kSteps = kSliceTiles / kStepTiles;
#if __CUDA_ARCH__ >= 900
  static constexpr bool kRingHoldsX = true;
#else
  static constexpr bool kRingHoldsX = false;
#endif

  static __device__ __forceinline__ uint32_t first_tile(const MatvecArgs& a, uint32_t slab, uint32_t warp) {
    return min(a.col_tiles, (slab * kMatvecWarps + warp) * a.slice_tiles);
  }
  static __device__ __forceinline__ uint32_t end_tile(const MatvecArgs& a, uint32_t first) {
    return min(a.col_tiles, first + a.slice_tiles);
  }
};

__device__ __forceinline__ uint32_t part_of(const MatvecArgs& a, uint32_t row_tile) {
  uint32_t part = 0;
  while (part + 1 < a.parts && row_tile >= a.part[part + 1].first_tile) ++part;
  return part;
}

// What a warp fetches next: the steps of its slice, row tile by row tile, slab by slab. The pointers walk; divisions
// and products are only where a slab or a part begins.
template <WeightFormat kFormat, GroupForm kForm>
struct Producer {
  using S = Slice<kFormat>;
  static constexpr bool kGrouped = kFormat == WeightFormat::int4 || kFormat == WeightFormat::int8;
  const uint8_t *values, *scales, *zeros_or_bias;
  uint32_t left;  // steps
  uint32_t row_tile, slab, boundary, step;
  uint32_t wrap_to, wrap_at;  // row tiles where a slab's walk begins and ends
  uint32_t x_steps = 0;       // sm_90: of the slab's activations, to be fetched before its weights
  uint32_t slice_bytes, first;

  __device__ __forceinline__ void begin_run(const MatvecArgs& a, uint32_t warp) {
    const uint32_t part = part_of(a, row_tile);
    const MatvecArgs::Part& p = a.part[part];
    boundary = min(wrap_at, part + 1 < a.parts ? a.part[part + 1].first_tile : a.row_tiles);
    first = S::first_tile(a, slab, warp);
    const uint32_t tile = row_tile - p.first_tile;
    const uint32_t begin = first * S::kTile, end = min(S::end_tile(a, first) * S::kTile, a.value_row_bytes);
    slice_bytes = end > begin ? end - begin : 0;
    values = p.values + uint64_t{tile} * a.value_row_bytes + begin;
    if constexpr (kGrouped) {
      const uint64_t group = uint64_t{tile} * a.groups;
      scales = p.scales + group * 32;
      if constexpr (kForm == GroupForm::zeros) zeros_or_bias = p.zeros + group * 16;
      if constexpr (kForm == GroupForm::bias) zeros_or_bias = p.bias + group * 32;
    }
  }

  __device__ __forceinline__ void advance(const MatvecArgs& a, uint32_t warp) {
    --left;
    if (S::kSteps > 1 && ++step < S::kSteps) return;
    step = 0;
    values += a.value_row_bytes;
    if constexpr (kGrouped) {
      scales += a.groups * 32;
      if constexpr (kForm == GroupForm::zeros) zeros_or_bias += a.groups * 16;
      if constexpr (kForm == GroupForm::bias) zeros_or_bias += a.groups * 32;
    }
    if (++row_tile < boundary) return;
    if (row_tile == wrap_at) {
      row_tile = wrap_to;
      ++slab;
      if (left != 0) x_steps = (a.rows + kXRows - 1) / kXRows;
    }
    begin_run(a, warp);
  }

#if __CUDA_ARCH__ >= 900
  // Four rows of the warp's slice of x, kXStride bytes apart.
  __device__ __forceinline__ void fetch_activations(const MatvecArgs& a, uint32_t warp, uint32_t lane, uint32_t slot,
                                                    uint32_t barrier) {
    const uint32_t bytes = (S::end_tile(a, first) - first) * 128;
    const uint32_t row = ((a.rows + kXRows - 1) / kXRows - x_steps) * kXRows, rows = min(a.rows - row, kXRows);
    if (lane == 0) barrier_expect(barrier, bytes * rows);
    __syncwarp();
    if (lane < rows && bytes != 0) {
      bulk_copy(slot + lane * kXStride, a.x + uint64_t{row + lane} * a.ldx + first * 64, bytes, barrier,
                evict_last_policy());
    }
  }
#endif

  // Starts the fetch of the next step into `slot`, and goes on to the one behind it.
  __device__ __forceinline__ void fetch(const MatvecArgs& a, uint32_t warp, uint32_t lane, uint32_t slot,
                                        uint32_t barrier, uint64_t policy) {
    if (left == 0) return copy_commit();
#if __CUDA_ARCH__ >= 900
    if (x_steps != 0) {
      fetch_activations(a, warp, lane, slot, barrier);
      --x_steps;
      return;
    }
#endif
    const uint32_t at = step * kStepBytes;
    const uint32_t bytes = slice_bytes > at ? min(slice_bytes - at, kStepBytes) : 0;
    uint32_t group = 0, groups = 0;
    if (kGrouped && bytes != 0) {
      const uint32_t tile = first + step * S::kStepTiles;
      group = tile << 6 >> a.group_shift;
      groups = min(a.groups, (((tile << 6) + bytes / S::kTile * 64 - 1) >> a.group_shift) + 1) - group;
    }
    const uint32_t extra = kForm == GroupForm::zeros ? 16 : kForm == GroupForm::bias ? 32 : 0;
    const uint32_t extra_at = kForm == GroupForm::zeros ? a.slot.zeros : a.slot.bias;
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
      barrier_expect(barrier, bytes + groups * (32 + extra));
      if (bytes != 0) {
        bulk_copy(slot, values + at, bytes, barrier, policy);
        if (kGrouped) bulk_copy(slot + a.slot.scales, scales + group * 32, groups * 32, barrier, policy);
        if (extra != 0) bulk_copy(slot + extra_at, zeros_or_bias + group * extra, groups * extra, barrier, policy);
      }
    }
#else
#pragma unroll
    for (uint32_t i = 0; i < kStepBytes; i += 512) {
      if (i < bytes) copy16(slot + i + lane * 16, values + at + i + lane * 16, true);
    }
    for (uint32_t i = lane * 16; i < groups * 32; i += 512)
      copy16(slot + a.slot.scales + i, scales + group * 32 + i, true);
    for (uint32_t i = lane * 16; i < groups * extra; i += 512) {
      copy16(slot + extra_at + i, zeros_or_bias + group * extra + i, true);
    }
    copy_commit();
#endif
    advance(a, warp);
  }
};

// The warp's activations: x[tile][word][half], rows from a.rows on and tiles past the slice zero.
struct Activations {
  uint32_t b[kSliceTiles][4][2];
};

__device__ __forceinline__ void load_activations(const MatvecArgs& a, uint32_t first, uint32_t end, uint32_t lane,
                                                 uint8_t* stage, Activations& x) {
  const uint32_t g = lane >> 2, t = lane & 3;
  const uint64_t policy = evict_last_policy();
  uint4 raw[kSliceTiles][2];
  const __half* row = a.x + uint64_t{min(g, a.rows - 1)} * a.ldx + first * 64 + t * 8;
#pragma unroll
  for (uint32_t i = 0; i < kSliceTiles; ++i) {
    const bool there = g < a.rows && first + i < end;
    raw[i][0] = there ? load_kept(row + i * 64, policy) : make_uint4(0, 0, 0, 0);
    raw[i][1] = there ? load_kept(row + i * 64 + 32, policy) : make_uint4(0, 0, 0, 0);
  }
  const uint32_t from = shared_address(stage) + (lane & 7) * kStageStride + (lane >> 3) * 16;
#pragma unroll
  for (uint32_t i = 0; i < kSliceTiles; ++i) {
    *reinterpret_cast<uint4*>(stage + g * kStageStride + t * 16) = raw[i][0];
    *reinterpret_cast<uint4*>(stage + g * kStageStride + 64 + t * 16) = raw[i][1];
    __syncwarp();
    uint32_t low[4], high[4];
    load_matrices(low, from);
    load_matrices(high, from + 64);
#pragma unroll
    for (uint32_t c = 0; c < 4; ++c) {
      x.b[i][c / 2][c % 2] = low[c];
      x.b[i][2 + c / 2][c % 2] = high[c];
    }
    __syncwarp();
  }
}

// Rows row..row+3 of the slice out of a slot of the ring into the fragments, whose other rows stay. Lanes g of those
// rows alone take what ldmatrix gives; the addresses of the others repeat them.
__device__ __forceinline__ void take_activations(const uint8_t* slot, uint32_t row, uint32_t rows, uint32_t tiles,
                                                 uint32_t lane, Activations& x) {
  const uint32_t g = lane >> 2;
  const bool mine = g >= row && g < row + kXRows;
  const uint32_t from = shared_address(slot) + (lane & 3) * kXStride + (lane >> 3) * 16;
#pragma unroll
  for (uint32_t i = 0; i < kSliceTiles; ++i) {
    uint32_t low[4], high[4];
    load_matrices(low, from + i * 128);
    load_matrices(high, from + i * 128 + 64);
    const bool there = g < rows && i < tiles;
#pragma unroll
    for (uint32_t c = 0; c < 4; ++c) {
      if (mine) x.b[i][c / 2][c % 2] = there ? low[c] : 0;
      if (mine) x.b[i][2 + c / 2][c % 2] = there ? high[c] : 0;
    }
  }
}

// Sums of x over each group of the slice (fold width kFold), for weights with a bias: sums[fold][row of x].
template <uint32_t kFold>
__device__ __forceinline__ void sum_activations(const Activations& x, uint32_t lane, float* sums) {
  const Fragment ones = {{0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u}};
  float c[4] = {0, 0, 0, 0};
#pragma unroll
  for (uint32_t i = 0; i < kSliceTiles * 4; ++i) {
    mma_f16(c, ones, x.b[i / 4][i % 4][0], x.b[i / 4][i % 4][1]);
    if ((i + 1) * 16 % kFold == 0) {
      if (lane < 4)
        *reinterpret_cast<float2*>(sums + ((i + 1) * 16 / kFold - 1) * 8 + lane * 2) = make_float2(c[0], c[1]);
      c[0] = c[1] = c[2] = c[3] = 0;
    }
  }
  __syncwarp();
}

// Group parameters of a slot: what one fold multiplies and adds.
template <GroupForm kForm>
struct GroupPlanes {
  const uint8_t* slot;
  const SlotLayout& layout;

  __device__ __forceinline__ float2 scales(uint32_t group, uint32_t g) const {
    const __half* s = reinterpret_cast<const __half*>(slot + layout.scales) + group * 16 + g;
    return {__half2float(s[0]), __half2float(s[8])};
  }
  __device__ __forceinline__ Int4Zero zero(uint32_t group, uint32_t g) const {
    if constexpr (kForm == GroupForm::zeros) {
      const uint8_t* z = slot + layout.zeros + group * 16 + g;
      return int4_zero(z[0], z[8]);
    }
    return kForm == GroupForm::bias ? int4_zero(0, 0) : int4_zero(8, 8);
  }
  __device__ __forceinline__ void fold(float (&total)[4], const float (&sum)[4], uint32_t group, uint32_t g, uint32_t t,
                                       const float* x_sums) const {
    const float2 s = scales(group, g);
    total[0] = fmaf(s.x, sum[0], total[0]);
    total[1] = fmaf(s.x, sum[1], total[1]);
    total[2] = fmaf(s.y, sum[2], total[2]);
    total[3] = fmaf(s.y, sum[3], total[3]);
    if constexpr (kForm == GroupForm::bias) {
      const __half* b = reinterpret_cast<const __half*>(slot + layout.bias) + group * 16 + g;
      const float b0 = __half2float(b[0]), b8 = __half2float(b[8]);
      const float2 x = *reinterpret_cast<const float2*>(x_sums + t * 2);
      total[0] = fmaf(b0, x.x, total[0]);
      total[1] = fmaf(b0, x.y, total[1]);
      total[2] = fmaf(b8, x.x, total[2]);
      total[3] = fmaf(b8, x.y, total[3]);
    }
  }
};

// One step: adds its tiles to `total`. kStep is the step's number in the slice, which says what part of x it meets.
template <WeightFormat kFormat, uint32_t kFold, GroupForm kForm, uint32_t kStep>
__device__ __forceinline__ void multiply_step(const MatvecArgs& a, const Activations& x, const uint8_t* slot,
                                              const GroupPlanes<kForm>& planes, uint32_t first_tile, uint32_t lane,
                                              const float* x_sums, float (&total)[4]) {
  constexpr uint32_t kTiles = Slice<kFormat>::kStepTiles;
  const uint32_t g = lane >> 2, t = lane & 3;
  // One wide load per tile by name: left to itself the compiler loads word by word where it needs them, lanes 16 bytes
  // apart, which is four bank conflicts each time.
  const uint32_t q = shared_address(slot) + lane * 16;
  if constexpr (kFormat == WeightFormat::f16 || kFormat == WeightFormat::bf16) {
#pragma unroll
    for (uint32_t i = 0; i < kTiles * 4; ++i) {
      const uint4 w = load_shared16(q + i * 512);
      const Fragment f = {{w.x, w.y, w.z, w.w}};
      const uint32_t(&b)[2] = x.b[kStep * kTiles + i / 4][i % 4];
      if constexpr (kFormat == WeightFormat::f16) mma_f16(total, f, b[0], b[1]);
      else mma_bf16(total, f, b[0], b[1]);
    }
  } else {
    const uint32_t base = (first_tile << 6) >> a.group_shift;  // group of the slot's first
#pragma unroll
    for (uint32_t fold = 0; fold < kTiles * 64 / kFold; ++fold) {
      const uint32_t group = (kFold == 64 ? (((first_tile + fold) << 6) >> a.group_shift) - base : fold);
      float sum[4] = {0, 0, 0, 0};
      const Int4Zero zero = kFormat == WeightFormat::int4 ? planes.zero(group, g) : Int4Zero{};
      constexpr uint32_t kWide = kFormat == WeightFormat::int4 ? 64 : 32;  // columns of a lane's 16 bytes
      uint4 w = {};
#pragma unroll
      for (uint32_t k16 = fold * kFold / 16; k16 < (fold + 1) * kFold / 16; ++k16) {
        const uint32_t(&b)[2] = x.b[kStep * kTiles + k16 / 4][k16 % 4];
        if (k16 * 16 % kWide == 0 || k16 * 16 == fold * kFold) w = load_shared16(q + k16 * 16 / kWide * 512);
        if constexpr (kFormat == WeightFormat::int4) {
          const uint32_t word = k16 % 4 == 0 ? w.x : k16 % 4 == 1 ? w.y : k16 % 4 == 2 ? w.z : w.w;
          mma_f16(sum, fragment_int4(word, zero), b[0], b[1]);
        } else {
          mma_f16(sum, k16 % 2 == 0 ? fragment_int8(w.x, w.y) : fragment_int8(w.z, w.w), b[0], b[1]);
        }
      }
      planes.fold(total, sum, group, g, t, x_sums + (kStep * kTiles * 64 / kFold + fold) * 8);
    }
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
  for (uint32_t base = first_unit; base < end_unit; base += blockDim.x) {
    if (threadIdx.x == 0) listed = 0;
    __syncthreads();
    const uint32_t unit = base + threadIdx.x;
    if (unit < end_unit) {
      const uint32_t row_tile = unit % a.row_tiles;
      if (atomicAdd(a.counters + row_tile, 1) == a.slabs - 1) {
        a.counters[row_tile] = 0;
        last_list[atomicAdd(&listed, 1)] = row_tile;
      }
    }
    fence_device();
    __syncthreads();
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
    __syncthreads();
  }
}

inline constexpr uint32_t kStageBytes = kMatvecWarps * 8 * kStageStride;  // also two sets of the warps' sums
inline constexpr uint32_t kSumsBytes = kMatvecWarps * 16 * 8 * 4;         // sums of x, only where weights have a bias
inline constexpr uint32_t kListBytes = 256 * 4;
static_assert(kStageBytes >= 2 * kMatvecWarps * 512, "");

template <WeightFormat kFormat, uint32_t kFold, uint32_t kStep = 0, class Step>
__device__ __forceinline__ void for_each_step(const Step& step) {
  step(std::integral_constant<uint32_t, kStep>{});
  if constexpr (kStep + 1 < Slice<kFormat>::kSteps) for_each_step<kFormat, kFold, kStep + 1>(step);
}

template <WeightFormat kFormat, uint32_t kFold, GroupForm kForm>
__global__ void __launch_bounds__(kMatvecWarps * 32, 2) matvec_kernel(const __grid_constant__ MatvecArgs a) {
  using S = Slice<kFormat>;
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ uint64_t barriers[kMatvecWarps * kDepth];
  // Broadcast, so that the compiler knows it is one for all lanes and keeps addresses in uniform registers.
  const uint32_t warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  uint8_t* stage = shared;
  float* x_sums = reinterpret_cast<float*>(shared + kStageBytes) + warp * 128;
  constexpr uint32_t kListAt = kStageBytes + (kForm == GroupForm::bias ? kSumsBytes : 0);
  uint32_t* last_list = reinterpret_cast<uint32_t*>(shared + kListAt);
#if __CUDA_ARCH__ >= 900
  const uint32_t depth = a.depth;
#else
  constexpr uint32_t depth = kDepth;
#endif
  uint8_t* ring = shared + kListAt + kListBytes + warp * depth * a.slot.bytes;
  const uint32_t ring_address = shared_address(ring), barrier = shared_address(barriers + warp * kDepth);

  const uint32_t walked = a.owns_rows ? a.row_tiles : a.units;
  const uint32_t begin = static_cast<uint32_t>(uint64_t{blockIdx.x} * walked / gridDim.x);
  const uint32_t end = static_cast<uint32_t>(uint64_t{blockIdx.x + 1} * walked / gridDim.x);
  const uint32_t units = (end - begin) * (a.owns_rows ? a.slabs : 1);
  let_next_kernel_start();
  if (a.clear_ring) {
    // Parts of a slot that no fetch fills meet zero activations; they must not be NaN for that.
    for (uint32_t at = lane * 16; at < depth * a.slot.bytes; at += 512)
      *reinterpret_cast<uint4*>(ring + at) = make_uint4(0, 0, 0, 0);
  }
  uint64_t policy = 0;
#if __CUDA_ARCH__ >= 900
  policy = evict_first_policy();
  if (lane == 0) {
    for (uint32_t i = 0; i < depth; ++i) barrier_init(barrier + i * 8, 1);
    barrier_init_fence();
  }
  async_proxy_fence();
#endif
  __syncwarp();

  Producer<kFormat, kForm> next;
  next.left = units * S::kSteps;
  next.slab = a.owns_rows ? 0 : begin / a.row_tiles;
  next.row_tile = begin - next.slab * a.row_tiles;
  next.wrap_to = a.owns_rows ? begin : 0;
  next.wrap_at = a.owns_rows ? end : a.row_tiles;
  next.step = 0;
  next.begin_run(a, warp);
  uint32_t row_tile = next.row_tile, slab = next.slab;
  if (!a.weights_early) wait_for_previous_kernel();
  uint32_t filled = 0;
#pragma unroll 1
  for (; filled < depth && next.x_steps == 0; ++filled) {  // weights alone, so far
    next.fetch(a, warp, lane, ring_address + filled * a.slot.bytes, barrier + filled * 8, policy);
  }
  if (a.weights_early) wait_for_previous_kernel();
#pragma unroll 1
  for (; filled < depth; ++filled) {
    next.fetch(a, warp, lane, ring_address + filled * a.slot.bytes, barrier + filled * 8, policy);
  }

  Activations x;
  uint32_t loaded_slab = ~0u, slot_index = 0, parity = 0, buffer = 0;
  const auto wait_slot = [&] {
#if __CUDA_ARCH__ >= 900
    barrier_wait(barrier + slot_index * 8, parity);
#else
    copy_wait<kDepth - 1>();
    __syncwarp();
#endif
  };
  const auto refill_slot = [&] {
    __syncwarp();
    next.fetch(a, warp, lane, ring_address + slot_index * a.slot.bytes, barrier + slot_index * 8, policy);
    if (++slot_index == depth) {
      slot_index = 0;
      parity ^= 1;
    }
  };
#pragma unroll 1
  for (uint32_t unit = 0; unit < units; ++unit) {
    const uint32_t first = S::first_tile(a, slab, warp);
    if (slab != loaded_slab && loaded_slab != ~0u && S::kRingHoldsX) {
      const uint32_t end_tile = S::end_tile(a, first);
      for (uint32_t row = 0; row < a.rows; row += kXRows) {
        wait_slot();
        take_activations(ring + slot_index * a.slot.bytes, row, a.rows, end_tile - first, lane, x);
        refill_slot();
      }
      if (kForm == GroupForm::bias) sum_activations<kFold>(x, lane, x_sums);
      loaded_slab = slab;
    } else if (slab != loaded_slab) {
      __syncthreads();  // the stage is where sums were
      load_activations(a, first, S::end_tile(a, first), lane, stage + warp * 8 * kStageStride, x);
      if (kForm == GroupForm::bias) sum_activations<kFold>(x, lane, x_sums);
      __syncthreads();
      loaded_slab = slab;
    }
    // This thread's output of the unit, if any, and what the slab before left of it: left by this very thread, since
    // which half of the block adds up goes by the row tile.
    const uint32_t at = threadIdx.x & 127;
    const bool mine = (threadIdx.x >> 7) == (row_tile & 1) && 2 * ((at >> 2) & 3) + (at & 1) < a.rows;
    float before = 0;
    if (a.owns_rows && slab > 0 && mine) before = __ldcg(a.partial + uint64_t{row_tile} * 128 + at);
    float total[4] = {0, 0, 0, 0};
    for_each_step<kFormat, kFold>([&](auto step) {
      constexpr uint32_t kStep = decltype(step)::value;
      wait_slot();
      const uint8_t* slot = ring + slot_index * a.slot.bytes;
      const GroupPlanes<kForm> planes = {slot, a.slot};
      multiply_step<kFormat, kFold, kForm, kStep>(a, x, slot, planes, first + kStep * S::kStepTiles, lane, x_sums,
                                                  total);
      refill_slot();
    });

    float* sums = reinterpret_cast<float*>(stage) + buffer * kMatvecWarps * 128;
    *reinterpret_cast<float4*>(sums + warp * 128 + lane * 4) = make_float4(total[0], total[1], total[2], total[3]);
    __syncthreads();
    if (mine) {
      float sum = 0;
#pragma unroll
      for (uint32_t w = 0; w < kMatvecWarps; ++w) sum += sums[w * 128 + at];
      sum += before;
      if (a.owns_rows && slab + 1 == a.slabs) {
        write_out(a, row_tile, at, sum);
      } else {
        a.partial[(uint64_t{a.owns_rows ? 0 : slab} * a.row_tiles + row_tile) * 128 + at] = sum;
      }
    }
    buffer ^= 1;
    if (++row_tile == next.wrap_at) {
      row_tile = next.wrap_to;
      ++slab;
    }
  }
  if (!a.owns_rows) finish_row_tiles(a, begin, end, last_list);
}

}  // namespace matvec

// Fills in the arguments that depend on the format and launches.
template <WeightFormat kFormat, uint32_t kFold, GroupForm kForm = GroupForm::symmetric>
cudaError_t launch_matvec(MatvecArgs& args, const MatmulCall& call, cudaStream_t stream) {
  using S = matvec::Slice<kFormat>;
  constexpr bool kGrouped = kFormat == WeightFormat::int4 || kFormat == WeightFormat::int8;
  constexpr uint32_t kColTiles = kFormat == WeightFormat::f16 || kFormat == WeightFormat::bf16 ? 16 : 64;
  const uint32_t cols = call.part[0].weight.cols;
  args.value_row_bytes = (cols + kColTiles - 1) / kColTiles * (S::kTile * kColTiles / 64);
  uint32_t step_groups = 0;
  if (kGrouped) step_groups = kFold == 64 && args.group_shift == 7 ? S::kStepTiles / 2 + 1 : S::kStepTiles * 64 / kFold;
  args.slot.scales = kStepBytes;
  args.slot.zeros = args.slot.scales + step_groups * 32;
  args.slot.bias = args.slot.zeros + (kForm == GroupForm::zeros ? step_groups * 16 : 0);
  args.slot.bytes = args.slot.bias + (kForm == GroupForm::bias ? step_groups * 32 : 0);
  args.slot.bytes = (std::max(args.slot.bytes, args.slabs > 1 ? kXRows * kXStride : 0) + 127) / 128 * 128;
  const bool whole = args.col_tiles == args.slabs * kMatvecWarps * kSliceTiles && args.slice_tiles == kSliceTiles;
  args.clear_ring = !whole || cols % 64 != 0;
  args.depth = kDepth;
  const uint32_t shared = matvec::kStageBytes + (kForm == GroupForm::bias ? matvec::kSumsBytes : 0) +
                          matvec::kListBytes + kMatvecWarps * args.depth * args.slot.bytes;
  static std::atomic<uint64_t> seen{0};
  uint32_t processors = 0;
  cudaError_t error = multiprocessors(processors);
  if (error == cudaSuccess) error = allow_shared(matvec::matvec_kernel<kFormat, kFold, kForm>, shared, seen);
  if (error != cudaSuccess) return error;
  return launch_grid(matvec::matvec_kernel<kFormat, kFold, kForm>, args,
                     dim3(std::min(args.owns_rows ? args.row_tiles : args.units, processors)), kMatvecWarps * 32,
                     shared, call, stream);
}

}  // namespace sluice::cuda
