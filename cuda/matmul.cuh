// SPDX-License-Identifier: Apache-2.0
// Products for any number of rows of activations on mma.sync. The kernel behind matmul_int4.cu, matmul_int8.cu and
// matmul_f16.cu where matvec.cuh (8 rows at most) and, on sm_90a, matmul_int4_wgmma.cu do not serve.
//
// argument    shape                              type      layout, alignment
// values      N x K                              int4 ...  tile16x64 or tile16x16, 16 B
// scales      [ceil(N/16)][ceil(K/group)][16]    FP16      zeros u8 and bias FP16 the same, optional
// x           [M][ldx]                           FP16      row-major, 16 B, zero behind K
// out         [M][ldo]                           FP32
//
// A block of 4 warps makes 128 rows of W x kRows rows of x; a warp has two row tiles, so that a fragment of x serves
// twice. Weights go from memory to registers a tile ahead; x goes through shared memory, three tiles of 64 columns
// deep. A group's sum starts at zero in the matrix units and is scaled into FP32 totals.
//
// Geometry: (sum over parts of ceil(N/128), ceil(M/kRows)) blocks of 128 threads.
// Bytes moved: values and scales ceil(M/kRows) times, mostly out of L2; x ceil(N/128) times out of L2.
// Compiled: int4, int8, f16, bf16; kRows 16 and 64; the group is an argument.
#pragma once

#include "cuda/matmul_launch.hpp"
#include "cuda/tile_fragments.cuh"

namespace sluice::cuda {

struct MatmulArgs {
  struct Part {
    const uint8_t* values;
    const __half* scales;
    const uint8_t* zeros;
    const __half* bias;
    float* out;
    const float* vector;
    uint32_t ldo, rows, first_block;  // first_block: where its blocks begin in x of the grid
    float scale;
  } part[kMatmulParts];
  const __half* x;
  const float* row_scale;
  uint32_t ldx, rows, parts, blocks;
  uint32_t col_tiles, groups, group_elems;
  uint32_t value_row_bytes;
  bool accumulate, weights_early;
};

inline constexpr uint32_t kMatmulBlockRows = 128;

namespace matmul_sync {

inline constexpr uint32_t kStages = 3;
inline constexpr uint32_t kRowStride = 144;  // bytes of a row of 64 halves, padded off the banks

template <WeightFormat kFormat>
inline constexpr uint32_t kTileBytes = kFormat == WeightFormat::int4   ? 512
                                       : kFormat == WeightFormat::int8 ? 1024
                                                                       : 2048;

// One lane's share of 16 rows x 64 columns.
template <WeightFormat kFormat>
struct LaneTile {
  uint4 q[kTileBytes<kFormat> / 512];

  __device__ __forceinline__ void load(const uint8_t* row, uint32_t tile, uint32_t row_bytes, bool there,
                                       uint32_t lane) {
#pragma unroll
    for (uint32_t i = 0; i < kTileBytes<kFormat> / 512; ++i) {
      const uint32_t at = tile * kTileBytes<kFormat> + i * 512;
      q[i] = there && at < row_bytes ? __ldg(reinterpret_cast<const uint4*>(row + at) + lane) : make_uint4(0, 0, 0, 0);
    }
  }
  __device__ __forceinline__ Fragment fragment(uint32_t j, const Int4Zero& zero) const {
    if constexpr (kFormat == WeightFormat::int4) {
      return fragment_int4(j == 0 ? q[0].x : j == 1 ? q[0].y : j == 2 ? q[0].z : q[0].w, zero);
    } else if constexpr (kFormat == WeightFormat::int8) {
      const uint4& w = q[j / 2];
      return j % 2 == 0 ? fragment_int8(w.x, w.y) : fragment_int8(w.z, w.w);
    } else {
      return {{q[j].x, q[j].y, q[j].z, q[j].w}};
    }
  }
};

// Scales and biases of the two halves of a tile's columns; the same twice unless groups have 32 columns.
struct TileGroups {
  float2 scale[2], bias[2];
  Int4Zero zero[2];
};

__device__ __forceinline__ void load_groups(const MatmulArgs& a, const MatmulArgs::Part& p, uint32_t row_tile,
                                            uint32_t tile, bool there, uint32_t g, TileGroups& out) {
#pragma unroll
  for (uint32_t h = 0; h < 2; ++h) {
    const uint32_t group = min((tile * 64 + h * 32) / a.group_elems, a.groups - 1);
    const uint64_t at = there ? (uint64_t{row_tile} * a.groups + group) * 16 + g : g;
    out.scale[h] = {__half2float(p.scales[at]), __half2float(p.scales[at + 8])};
    out.bias[h] =
        p.bias != nullptr ? make_float2(__half2float(p.bias[at]), __half2float(p.bias[at + 8])) : make_float2(0, 0);
    const uint32_t none = p.bias != nullptr ? 0 : 8;
    out.zero[h] = p.zeros != nullptr ? int4_zero(p.zeros[at], p.zeros[at + 8]) : int4_zero(none, none);
  }
}

__device__ __forceinline__ void scale_in(float (&total)[4], float (&sum)[4], float2 s) {
  total[0] = fmaf(s.x, sum[0], total[0]);
  total[1] = fmaf(s.x, sum[1], total[1]);
  total[2] = fmaf(s.y, sum[2], total[2]);
  total[3] = fmaf(s.y, sum[3], total[3]);
  sum[0] = sum[1] = sum[2] = sum[3] = 0;
}

// 16 columns' activations of 8 rows from the two matrices quadruples of a row block: words j = 0, 1 and 2, 3.
struct RowFragments {
  uint32_t low[4], high[4];
  __device__ __forceinline__ uint32_t b(uint32_t j, uint32_t h) const {
    return j < 2 ? low[2 * j + h] : high[2 * (j - 2) + h];
  }
};

template <WeightFormat kFormat, uint32_t kRows>
__global__ void __launch_bounds__(128) matmul_kernel(const __grid_constant__ MatmulArgs a) {
  constexpr bool kGrouped = kFormat == WeightFormat::int4 || kFormat == WeightFormat::int8;
  constexpr uint32_t kStageBytes = kRows * kRowStride;
  __shared__ __align__(16) uint8_t stages[kStages * kStageBytes];
  const uint32_t warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  uint32_t part = 0;
  while (part + 1 < a.parts && blockIdx.x >= a.part[part + 1].first_block) ++part;
  const MatmulArgs::Part& p = a.part[part];
  const uint32_t row_tile = (blockIdx.x - p.first_block) * (kMatmulBlockRows / 16) + warp * 2;
  const uint32_t x_row = blockIdx.y * kRows;
  const uint8_t* values = p.values + uint64_t{row_tile} * a.value_row_bytes;
  const bool there[2] = {row_tile * 16 < p.rows, (row_tile + 1) * 16 < p.rows};

  let_next_kernel_start();
  wait_for_previous_kernel();
  const auto fetch = [&](uint32_t tile) {
    if (tile < a.col_tiles) {
#pragma unroll
      for (uint32_t i = 0; i < kRows / 16; ++i) {
        const uint32_t row = i * 16 + threadIdx.x / 8, chunk = threadIdx.x % 8;
        const bool valid = x_row + row < a.rows;
        const __half* from = a.x + uint64_t{valid ? x_row + row : x_row} * a.ldx + tile * 64 + chunk * 8;
        copy16(shared_address(stages) + tile % kStages * kStageBytes + row * kRowStride + chunk * 16, from, valid);
      }
    }
    copy_commit();
  };
  for (uint32_t i = 0; i + 1 < kStages; ++i) fetch(i);

  float total[kRows / 8][2][4] = {};
  LaneTile<kFormat> next[2];
  for (uint32_t i = 0; i < 2; ++i)
    next[i].load(values + i * uint64_t{a.value_row_bytes}, 0, a.value_row_bytes, there[i], lane);
#pragma unroll 1
  for (uint32_t tile = 0; tile < a.col_tiles; ++tile) {
    TileGroups groups[2] = {};
    bool folds_twice = false, has_bias = false;
    if constexpr (kGrouped) {
      load_groups(a, p, row_tile, tile, there[0], g, groups[0]);
      load_groups(a, p, row_tile + 1, tile, there[1], g, groups[1]);
      folds_twice = a.group_elems == 32;
      has_bias = p.bias != nullptr;
    }
    Fragment f[2][4];
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
      f[0][j] = next[0].fragment(j, groups[0].zero[j / 2]);
      f[1][j] = next[1].fragment(j, groups[1].zero[j / 2]);
    }
    for (uint32_t i = 0; i < 2; ++i) {
      next[i].load(values + i * uint64_t{a.value_row_bytes}, tile + 1, a.value_row_bytes,
                   there[i] && tile + 1 < a.col_tiles, lane);
    }
    copy_wait<kStages - 2>();
    __syncthreads();
    fetch(tile + kStages - 1);
    const uint32_t stage =
        shared_address(stages) + tile % kStages * kStageBytes + (lane & 7) * kRowStride + (lane >> 3) * 16;
#pragma unroll
    for (uint32_t n = 0; n < kRows / 8; ++n) {
      RowFragments x;
      load_matrices(x.low, stage + n * 8 * kRowStride);
      load_matrices(x.high, stage + n * 8 * kRowStride + 64);
      if constexpr (!kGrouped) {
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) {
#pragma unroll
          for (uint32_t i = 0; i < 2; ++i) {
            if constexpr (kFormat == WeightFormat::f16) mma_f16(total[n][i], f[i][j], x.b(j, 0), x.b(j, 1));
            else mma_bf16(total[n][i], f[i][j], x.b(j, 0), x.b(j, 1));
          }
        }
      } else {
        const Fragment ones = {{0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u}};
        float sum[2][4] = {}, x_sum[4] = {};
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) {
          mma_f16(sum[0], f[0][j], x.b(j, 0), x.b(j, 1));
          mma_f16(sum[1], f[1][j], x.b(j, 0), x.b(j, 1));
          if (has_bias) mma_f16(x_sum, ones, x.b(j, 0), x.b(j, 1));
          if (j == 3 || (j == 1 && folds_twice)) {
            scale_in(total[n][0], sum[0], groups[0].scale[j / 2]);
            scale_in(total[n][1], sum[1], groups[1].scale[j / 2]);
            if (has_bias) {
              float again[4] = {x_sum[0], x_sum[1], x_sum[2], x_sum[3]};
              scale_in(total[n][0], again, groups[0].bias[j / 2]);
              scale_in(total[n][1], x_sum, groups[1].bias[j / 2]);
            }
          }
        }
      }
    }
  }

#pragma unroll
  for (uint32_t n = 0; n < kRows / 8; ++n) {
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
#pragma unroll
      for (uint32_t c = 0; c < 4; ++c) {
        const uint32_t m = x_row + n * 8 + 2 * t + (c & 1), row = (row_tile + i) * 16 + g + 8 * (c >> 1);
        if (m >= a.rows || row >= p.rows) continue;
        float value = total[n][i][c] * p.scale;
        if (a.row_scale != nullptr) value *= a.row_scale[m];
        if (p.vector != nullptr) value += p.vector[row];
        float* out = p.out + uint64_t{m} * p.ldo + row;
        *out = a.accumulate ? *out + value : value;
      }
    }
  }
}

}  // namespace matmul_sync

template <WeightFormat kFormat>
cudaError_t launch_matmul(MatmulArgs& args, const MatmulCall& call, cudaStream_t stream) {
  constexpr uint32_t kColTiles = kFormat == WeightFormat::f16 || kFormat == WeightFormat::bf16 ? 16 : 64;
  args.value_row_bytes =
      (call.part[0].weight.cols + kColTiles - 1) / kColTiles * (matmul_sync::kTileBytes<kFormat> * kColTiles / 64);
  if (args.rows <= 16)
    return launch_grid(matmul_sync::matmul_kernel<kFormat, 16>, args, dim3(args.blocks), 128, 0, call, stream);
  return launch_grid(matmul_sync::matmul_kernel<kFormat, 64>, args, dim3(args.blocks, (args.rows + 63) / 64), 128, 0,
                     call, stream);
}

}  // namespace sluice::cuda
