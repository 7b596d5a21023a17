// SPDX-License-Identifier: Apache-2.0
// Attention of chunks of rows over the KV cache, which holds the chunk itself already: causal, online softmax.
//
//   argument    shape                       type     layout                       alignment
//   q           [rows][heads * head_dim]    float    row-major, q_stride          8 B
//   sessions    [rows]                      uint32                                4 B
//   positions   [rows]                      uint32   ascending within a session   4 B
//   cache       kv_cache.hpp                FP16     blocks of 64 positions       16 B
//   out_x       [rows][x_stride]            FP16     row-major, zero-padded       4 B
//   out         [rows][heads * head_dim]    float    row-major                    8 B
//
// A block takes one query head and kRows rows of the pass, 16 a warp, and walks the positions in tiles of kPositions:
//
//   Q (registers, A fragments, as halves and what they lose: the scores keep 22 bits of q)
//   K, V tiles -- cp.async --> shared memory, two stages where they fit --ldmatrix--> B fragments
//   S = Q K^T [16][kPositions] FP32, mask, online softmax, P as half (A fragments out of C fragments), O += P V, FP32
//
// A row of a tile in shared memory is head_dim + 8 halves: an odd number of 16-byte units, so the 8 rows of an ldmatrix
// matrix lie in 8 different bank groups. The sum that divides O is taken over the rounded P, so the output is a true
// weighted mean of V.
//
// Rows of several sessions may meet in a block; each run of one session is walked by itself, the other rows masked.
// Positions past the run's last are zero-filled, never read. Between those, a NaN in V at a later position of the same
// chunk reaches earlier rows (0 * NaN): the pass has failed with a non-finite value anyway.
//
// Geometry: grid (heads, rows / kRows, the last rows first: they see most positions); heads of one KV head run side by
// side and share K and V through L2. Operations: 6 * head_dim per row, head and visible position (Q K^T runs twice, for
// the two parts of q). Bytes: q and the output once, K and V once per block, nearly all from L2.
// Compiled: head_dim 32, 64, 80, 96, 128 (64 rows, tiles of 64) and 256 (32 rows, tiles of 16).
// Source: FlashAttention-2, Dao, arXiv 2307.08691.
#include "cuda/attention.hpp"
#include "cuda/attention_mma.cuh"
#include "cuda/stamps.cuh"

namespace sluice::cuda {

namespace {

// Probabilities are held times 2^15, which FP16 still has: what FP16 loses of a small one starts at 2^-40, not 2^-25.
constexpr float kLift = 15;

template <int kHeadDim>
struct PrefillShape {
  static constexpr bool kLarge = kHeadDim > 128;  // registers end: fewer rows, and queries in shared memory
  static constexpr int kWarps = kLarge ? 2 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kPositions = kLarge ? 16 : 64;
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr int kStride = kHeadDim + 8;             // halves between rows of a tile
  static constexpr int kTileElems = kPositions * kStride;  // of K or V
  static constexpr size_t kQueryBytes = kLarge ? size_t{kWarps} * kSteps * 32 * 2 * sizeof(uint4) : 0;
  static constexpr size_t shared_bytes(int stages) { return kQueryBytes + size_t(stages) * 2 * kTileElems * 2; }
};

struct PrefillParams {
  Attention args;
  uint32_t x_stride = 0;
  uint32_t row_tiles = 0;
  int stages = 2;
  float score_scale = 0;  // log2(e) / sqrt(head_dim)
};

// Loads this lane's part of rows row_a = g and row_b = g + 8 of the warp (null: zeros) as A fragments: what FP16
// holds, and the rest. `store(step, high, low)` takes them; factor_a and factor_b turn raw scores into
// exponents to base 2.
template <int kHeadDim, typename Store>
__device__ void load_queries(const float* row_a, const float* row_b, float score_scale, float& factor_a,
                             float& factor_b, Store store) {
  const uint32_t t = threadIdx.x % 4;
  const auto pair = [&](const float* row, int column) {
    return row != nullptr ? *reinterpret_cast<const float2*>(row + column + 2 * t) : float2{0, 0};
  };
  const auto scale_of = [&](const float* row, float& factor) {
    float largest = 0;
#pragma unroll
    for (int column = 0; column < kHeadDim; column += 8) {
      const float2 x = pair(row, column);
      largest = fmaxf(largest, fmaxf(fabsf(x.x), fabsf(x.y)));
    }
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    const QueryScale scale = query_scale(largest);
    factor = scale.inverse * score_scale;
    return scale.scale;
  };
  const float scale_a = scale_of(row_a, factor_a), scale_b = scale_of(row_b, factor_b);
  const auto split = [&](const float* row, int column, float scale) {
    const float2 x = pair(row, column);
    return split_pair(x.x * scale, x.y * scale);
  };
#pragma unroll
  for (int step = 0; step < PrefillShape<kHeadDim>::kSteps; ++step) {
    const SplitPair a0 = split(row_a, 16 * step, scale_a), a1 = split(row_b, 16 * step, scale_b);
    const SplitPair a2 = split(row_a, 16 * step + 8, scale_a), a3 = split(row_b, 16 * step + 8, scale_b);
    store(step, make_uint4(a0.high, a1.high, a2.high, a3.high), make_uint4(a0.low, a1.low, a2.low, a3.low));
  }
}

// What a lane knows of its rows g and g + 8.
template <int kHeadDim>
struct RowState {
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};  // this lane's share
  float output[kHeadDim / 8][4] = {};
};

// Copies positions [first, first + kPositions) of K and V, zeros past `count` positions of the session.
template <int kHeadDim>
__device__ void load_tile(__half* to, const PrefillParams& params, const uint32_t* table, uint32_t kv_head,
                          uint32_t first, uint32_t count) {
  using Shape = PrefillShape<kHeadDim>;
  constexpr int kUnits = kHeadDim / 8;
  const KvCacheView& cache = params.args.cache;
  const __half* k = cache.memory + table[first / kKvBlockPositions] * cache.block_elems() +
                    cache.head_offset(params.args.layer, kv_head) + size_t{first % kKvBlockPositions} * kHeadDim;
  const __half* v = k + cache.head_elems();
  static_assert(Shape::kPositions * kUnits % Shape::kThreads == 0, "every thread copies as much");
#pragma unroll
  for (int i = 0; i < Shape::kPositions * kUnits / Shape::kThreads; ++i) {
    const int unit = i * Shape::kThreads + static_cast<int>(threadIdx.x);
    const int position = unit / kUnits, column = unit % kUnits * 8;
    const bool there = first + position < count;
    const int from = there ? position * kHeadDim + column : 0;
    copy_async_16(to + position * Shape::kStride + column, k + from, there);
    copy_async_16(to + Shape::kTileElems + position * Shape::kStride + column, v + from, there);
  }
}

// S = Q K^T for one tile of positions.
template <int kHeadDim, typename Query>
__device__ void score_tile(float (&scores)[PrefillShape<kHeadDim>::kPositions / 8][4], const __half* k, Query query) {
  using Shape = PrefillShape<kHeadDim>;
  const uint32_t lane = threadIdx.x % 32;
  // Matrices: positions 0-7 k 0-7, positions 0-7 k 8-15, positions 8-15 k 0-7, positions 8-15 k 8-15.
  const __half* at = k + (lane % 8 + lane / 16 * 8) * Shape::kStride + lane / 8 % 2 * 8;
#pragma unroll
  for (int step = 0; step < Shape::kSteps; ++step) {
    uint4 high, low;
    query(step, high, low);
#pragma unroll
    for (int tile = 0; tile < Shape::kPositions / 8; tile += 2) {
      uint32_t b[4];
      load_matrices(b, at + tile * 8 * Shape::kStride + 16 * step);
      mma_f16(scores[tile], high.x, high.y, high.z, high.w, b[0], b[1]);
      mma_f16(scores[tile + 1], high.x, high.y, high.z, high.w, b[2], b[3]);
      mma_f16(scores[tile], low.x, low.y, low.z, low.w, b[0], b[1]);
      mma_f16(scores[tile + 1], low.x, low.y, low.z, low.w, b[2], b[3]);
    }
  }
}

// Scores become probabilities relative to the rows' new maxima, as A fragments; the rows' sums and outputs follow.
// limit[i]: the last position that row i sees, -1 for none.
template <int kHeadDim>
__device__ void soften(RowState<kHeadDim>& state, float (&scores)[PrefillShape<kHeadDim>::kPositions / 8][4],
                       uint32_t (&p)[PrefillShape<kHeadDim>::kPositions / 8][2], const float (&factor)[2],
                       const int (&limit)[2], int first, bool masked) {
  constexpr int kTiles = PrefillShape<kHeadDim>::kPositions / 8;
  const int t = static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float maximum = state.maximum[row];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& score = scores[tile][2 * row + i];
        score *= factor[row];
        if (masked && first + 8 * tile + 2 * t + i > limit[row]) score = -INFINITY;
        maximum = fmaxf(maximum, score);
      }
    }
    maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 1));
    maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 2));
    const float seen = maximum == -INFINITY ? 0.0f : maximum;  // a row that sees nothing here
    const float shrink = exp2f(state.maximum[row] - seen), base = seen - kLift;
    state.maximum[row] = maximum;
    float sum = 0;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const __half2 pair =
          __floats2half2_rn(exp2f(scores[tile][2 * row] - base), exp2f(scores[tile][2 * row + 1] - base));
      p[tile][row] = bits_of(pair);
      const float2 rounded = __half22float2(pair);
      sum += rounded.x + rounded.y;
    }
    state.sum[row] = state.sum[row] * shrink + sum;
#pragma unroll
    for (int tile = 0; tile < kHeadDim / 8; ++tile) {
      state.output[tile][2 * row] *= shrink;
      state.output[tile][2 * row + 1] *= shrink;
    }
  }
}

// O += P V for one tile of positions.
template <int kHeadDim>
__device__ void add_values(RowState<kHeadDim>& state, const uint32_t (&p)[PrefillShape<kHeadDim>::kPositions / 8][2],
                           const __half* v) {
  using Shape = PrefillShape<kHeadDim>;
  const uint32_t lane = threadIdx.x % 32;
  // Matrices: positions 0-7 dims 0-7, positions 8-15 dims 0-7, positions 0-7 dims 8-15, positions 8-15 dims 8-15.
  const __half* at = v + lane % 16 * Shape::kStride + lane / 16 * 8;
#pragma unroll
  for (int step = 0; step < Shape::kPositions / 16; ++step) {
#pragma unroll
    for (int tile = 0; tile < kHeadDim / 8; tile += 2) {
      uint32_t b[4];
      load_matrices_transposed(b, at + step * 16 * Shape::kStride + 8 * tile);
      const uint32_t a0 = p[2 * step][0], a1 = p[2 * step][1], a2 = p[2 * step + 1][0], a3 = p[2 * step + 1][1];
      mma_f16(state.output[tile], a0, a1, a2, a3, b[0], b[1]);
      mma_f16(state.output[tile + 1], a0, a1, a2, a3, b[2], b[3]);
    }
  }
}

// The end of the run of one session that begins at row `first` of the block's `count`.
__device__ uint32_t run_end(const uint32_t* sessions, uint32_t first, uint32_t count) {
  for (uint32_t base = first; base < count; base += 32) {
    const uint32_t row = base + threadIdx.x % 32;
    const uint32_t others = __ballot_sync(0xffffffffu, row >= count || sessions[row] != sessions[first]);
    if (others != 0) return base + __ffs(static_cast<int>(others)) - 1;
  }
  return count;
}

// All tiles of positions that the rows of one run see.
template <int kHeadDim, typename Query>
__device__ void attend_run(RowState<kHeadDim>& state, __half* tiles, const PrefillParams& params, const uint32_t* table,
                           uint32_t kv_head, uint32_t count, const int (&limit)[2], const float (&factor)[2],
                           Query query) {
  using Shape = PrefillShape<kHeadDim>;
  const uint32_t tile_count = (count + Shape::kPositions - 1) / Shape::kPositions;
  // The furthest and nearest any row of this warp sees.
  int furthest = max(limit[0], limit[1]), nearest = min(limit[0], limit[1]);
#pragma unroll
  for (int lane = 16; lane > 2; lane /= 2) {  // the four lanes of a row agree
    furthest = max(furthest, __shfl_xor_sync(0xffffffffu, furthest, lane));
    nearest = min(nearest, __shfl_xor_sync(0xffffffffu, nearest, lane));
  }
  const bool two = params.stages == 2;
  load_tile<kHeadDim>(tiles, params, table, kv_head, 0, count);
  commit_copies();
  for (uint32_t i = 0; i < tile_count; ++i) {
    __half* k = tiles + (two ? i % 2 : 0) * 2 * Shape::kTileElems;
    if (two) {
      if (i + 1 < tile_count) {
        load_tile<kHeadDim>(tiles + (i + 1) % 2 * 2 * Shape::kTileElems, params, table, kv_head,
                            (i + 1) * Shape::kPositions, count);
      }
      commit_copies();
      wait_for_copies<1>();
    } else {
      if (i != 0) load_tile<kHeadDim>(tiles, params, table, kv_head, i * Shape::kPositions, count);
      commit_copies();
      wait_for_copies<0>();
    }
    __syncthreads();
    const int first = static_cast<int>(i * Shape::kPositions);
    if (first <= furthest) {
      float scores[Shape::kPositions / 8][4] = {};
      uint32_t p[Shape::kPositions / 8][2];
      score_tile<kHeadDim>(scores, k, query);
      soften<kHeadDim>(state, scores, p, factor, limit, first, first + Shape::kPositions - 1 > nearest);
      add_values<kHeadDim>(state, p, k + Shape::kTileElems);
    }
    __syncthreads();
  }
}

template <int kHeadDim>
__device__ void write_rows(const RowState<kHeadDim>& state, const PrefillParams& params, uint32_t first_row,
                           uint32_t row_count, uint32_t head) {
  const uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const size_t width = size_t{params.args.heads} * kHeadDim;
#pragma unroll
  for (uint32_t i = 0; i < 2; ++i) {
    float sum = state.sum[i];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const uint32_t row = 16 * warp + 8 * i + g;
    if (row >= row_count) continue;
    const float inverse = 1.0f / sum;
#pragma unroll
    for (int tile = 0; tile < kHeadDim / 8; ++tile) {
      const uint32_t column = head * kHeadDim + 8 * tile + 2 * t;
      const float2 x{state.output[tile][2 * i] * inverse, state.output[tile][2 * i + 1] * inverse};
      if (params.args.out != nullptr) {
        *reinterpret_cast<float2*>(params.args.out + (first_row + row) * width + column) = x;
      }
      if (params.args.out_x != nullptr) {
        __half* to = params.args.out_x + size_t{first_row + row} * params.x_stride + column;
        *reinterpret_cast<__half2*>(to) = to_half2(x.x, x.y);
      }
    }
  }
  if (params.args.out_x == nullptr || head + 1 != params.args.heads) return;
  const uint32_t padding = params.x_stride - static_cast<uint32_t>(width);
  for (uint32_t i = threadIdx.x; i < padding * row_count; i += blockDim.x) {
    params.args.out_x[size_t{first_row + i / padding} * params.x_stride + width + i % padding] = __half(0.0f);
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(PrefillShape<kHeadDim>::kThreads) attention_prefill_f16(const PrefillParams params) {
  using Shape = PrefillShape<kHeadDim>;
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ uint32_t sessions[Shape::kRows], positions[Shape::kRows];
  stamp_begin(params.args.stamp);
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
  const uint32_t head = blockIdx.x, kv_head = head / (params.args.heads / params.args.cache.kv_heads);
  const uint32_t first_row = (params.row_tiles - 1 - blockIdx.y) * Shape::kRows;
  const uint32_t row_count = min(static_cast<uint32_t>(Shape::kRows), params.args.row_count - first_row);
  if (threadIdx.x < row_count) {
    sessions[threadIdx.x] = params.args.sessions[first_row + threadIdx.x];
    positions[threadIdx.x] = params.args.positions[first_row + threadIdx.x];
  }
  auto* tiles = reinterpret_cast<__half*>(shared + Shape::kQueryBytes);
  auto* fragments = reinterpret_cast<uint4*>(shared) + size_t{warp} * Shape::kSteps * 64 + lane;

  const uint32_t rows[2] = {16 * warp + g, 16 * warp + g + 8};
  const auto query_row = [&](uint32_t row) {
    return row < row_count ? params.args.q + size_t{first_row + row} * params.args.q_stride + head * kHeadDim : nullptr;
  };
  float factor[2];
  constexpr int kKept = Shape::kLarge ? 1 : Shape::kSteps;
  uint4 queries_high[kKept], queries_low[kKept];
  load_queries<kHeadDim>(query_row(rows[0]), query_row(rows[1]), params.score_scale, factor[0], factor[1],
                         [&](int step, uint4 high, uint4 low) {
                           if constexpr (Shape::kLarge) {
                             fragments[64 * step] = high;  // read back by this lane alone
                             fragments[64 * step + 32] = low;
                           } else {
                             queries_high[step] = high;
                             queries_low[step] = low;
                           }
                         });
  const auto query = [&](int step, uint4& high, uint4& low) {
    if constexpr (Shape::kLarge) {
      high = fragments[64 * step];
      low = fragments[64 * step + 32];
    } else {
      high = queries_high[step];
      low = queries_low[step];
    }
  };
  __syncthreads();

  RowState<kHeadDim> state;
  for (uint32_t first = 0, last = 0; first < row_count; first = last) {
    last = run_end(sessions, first, row_count);
    const auto limit_of = [&](uint32_t row) {
      return row >= first && row < last ? static_cast<int>(positions[row]) : -1;
    };
    const int limit[2] = {limit_of(rows[0]), limit_of(rows[1])};
    const uint32_t* table =
        params.args.cache.table + size_t{sessions[first]} * params.args.cache.blocks_per_session;
    attend_run<kHeadDim>(state, tiles, params, table, kv_head, positions[last - 1] + 1, limit, factor, query);
  }
  write_rows<kHeadDim>(state, params, first_row, row_count, head);
  if (threadIdx.x == 0) stamp_end(params.args.stamp);
}

template <int kHeadDim>
cudaError_t launch(PrefillParams params, cudaStream_t stream) {
  using Shape = PrefillShape<kHeadDim>;
  int device = 0, allowed = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&allowed, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      error != cudaSuccess) {
    return error;
  }
  const size_t fixed = 2 * Shape::kRows * sizeof(uint32_t);
  params.stages = Shape::shared_bytes(2) + fixed <= static_cast<size_t>(allowed) ? 2 : 1;
  params.row_tiles = (params.args.row_count + Shape::kRows - 1) / Shape::kRows;
  const size_t bytes = Shape::shared_bytes(params.stages);
  if (const cudaError_t error = cudaFuncSetAttribute(
          attention_prefill_f16<kHeadDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
      error != cudaSuccess) {
    return error;
  }
  attention_prefill_f16<kHeadDim>
      <<<dim3(params.args.heads, params.row_tiles), Shape::kThreads, bytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_attention_prefill(const Attention& args, cudaStream_t stream) {
  if (args.row_count == 0) return cudaSuccess;
  if (!attention_supported(args.heads, args.cache.kv_heads, args.cache.head_dim) || args.q_stride % 4 != 0) {
    return cudaErrorInvalidValue;
  }
  PrefillParams params;
  params.args = args;
  params.x_stride = (args.heads * args.cache.head_dim + 63) / 64 * 64;
  params.score_scale = static_cast<float>(1.4426950408889634 / sqrt(static_cast<double>(args.cache.head_dim)));
  switch (args.cache.head_dim) {
    case 32: return launch<32>(params, stream);
    case 64: return launch<64>(params, stream);
    case 80: return launch<80>(params, stream);
    case 96: return launch<96>(params, stream);
    case 128: return launch<128>(params, stream);
    case 256: return launch<256>(params, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace sluice::cuda
