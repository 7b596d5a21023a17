// SPDX-License-Identifier: Apache-2.0
// Attention of single rows over the KV cache: split along the positions, one launch, deterministic.
//
//   argument    shape                       type     layout                       alignment
//   q           [rows][heads * head_dim]    float    row-major, q_stride          16 B
//   sessions    [rows]                      uint32                                4 B
//   positions   [rows]                      uint32                                4 B
//   cache       kv_cache.hpp                FP16     blocks of 64 positions       16 B
//   out_x       [rows][x_stride]            FP16     row-major, zero-padded       8 B
//   out         [rows][heads * head_dim]    float    row-major                    16 B
//   workspace   counters [8][kv_heads * 2]           uint32, zero between launches
//               maxima and sums [8][heads][splits]   float2
//               partial outputs [8][heads][splits][head_dim] float                256 B
//
// A block takes one row, up to 8 query heads of one KV head, and one split of the positions; its four warps take 16 of
// every 64 positions each and never meet before the end. Both products run on `mma` with FP32 accumulators, and lose
// next to nothing to FP16, because the tile's 16 rows hold 8 heads twice: row g the FP16 value of head g's query (or
// probability), row g + 8 what that rounding lost. The sums of both rows land in one lane:
//
//   S [16][8 positions]   score of head g = c0 + c2 (position 2t), c1 + c3 (position 2t+1)
//   P [16][16 positions]  a0, a2 = half(p) of head g; a1, a3 = half(p - half(p)):  C fragments of S become A fragments
//   O [16][8 dims]        output of head g = c0 + c2, c1 + c3
//
// K and V go from the cache to B fragments with no shared memory. The sum over dims in S may run in any order, so lane
// (g, t) loads 16 bytes of position g, dims 32j + 8t .. 32j + 8t + 7, and calls them k = {2t, 2t+1, 2t+8, 2t+9} of two
// steps; the query fragments are laid out to match. The columns of O may be any dims, so lane (g, t) loads 16 bytes,
// dims 64i + 8g .., of its four positions 2t, 2t+1, 2t+8, 2t+9, and pairs them byte-wise (PRMT) into eight B fragments.
//
// Splits: of 64 positions until a row has max_splits() of them, then longer. That depends on the row's own position and
// the model's shape only, so a row's bits do not depend on its company. Each block leaves maximum, sum and unnormalised
// output; the last of a row's blocks (an integer counter tells) adds them in the order of the splits. That saves the
// second launch, and no float is ever added in an order of chance.
//
// Geometry: grid (kv_heads * ceil(group / 8), splits, rows), 128 threads. Blocks past a row's last split return; they
// come last, so that a bound far beyond the position costs little.
// Bytes per call: per row (position + 1) * kv_heads * head_dim * 4, read once (twice for more than 8 heads to one KV
// head, the second time from L2), and 8 * heads * splits * head_dim of partial outputs, through L2.
// Compiled: head_dim 32, 64, 80, 96, 128, 256. Source: split-KV after Flash-Decoding (Dao et al., 2023), online softmax
// after Milakov and Gimelshein, arXiv 1805.02867.
#include <algorithm>

#include "cuda/attention.hpp"
#include "cuda/attention_mma.cuh"
#include "cuda/stamps.cuh"

namespace sluice::cuda {

namespace {

constexpr uint32_t kThreads = 128;
constexpr uint32_t kWarps = kThreads / 32;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr uint32_t kSmallBlocksPerSm = 2;  // three would spill registers there
#else
constexpr uint32_t kSmallBlocksPerSm = 3;
#endif
constexpr uint32_t kTileHeads = 8;
constexpr uint32_t kMostSplits = 64;
constexpr uint32_t kWarpPositions = kKvBlockPositions / kWarps;
// Probabilities are held times 2^15, which FP16 still has: what FP16 loses of a small one starts at 2^-40, not 2^-25.
constexpr float kLift = 15;

uint32_t head_tiles(uint32_t heads, uint32_t kv_heads) { return (heads / kv_heads + kTileHeads - 1) / kTileHeads; }

// About 256 blocks a row at long contexts: two on each SM of the largest GPUs.
uint32_t max_splits(uint32_t heads, uint32_t kv_heads) {
  return std::clamp(256 / (kv_heads * head_tiles(heads, kv_heads)), 16u, kMostSplits);
}

uint64_t aligned(uint64_t bytes) { return (bytes + 255) / 256 * 256; }

struct Workspace {
  uint64_t counters = 0, states = 0, partials = 0, bytes = 0;  // offsets and the whole
};

Workspace workspace_of(uint32_t heads, uint32_t kv_heads, uint32_t head_dim, uint32_t splits) {
  Workspace w;
  w.states = aligned(uint64_t{kDecodeRows} * kv_heads * head_tiles(heads, kv_heads) * sizeof(uint32_t));
  w.partials = w.states + aligned(uint64_t{kDecodeRows} * heads * splits * sizeof(float2));
  w.bytes = w.partials + aligned(uint64_t{kDecodeRows} * heads * splits * head_dim * sizeof(float));
  return w;
}

struct DecodeParams {
  Attention args;
  uint32_t* counters = nullptr;  // [rows][kv_heads * head_tiles]
  float2* states = nullptr;      // [rows][heads][grid splits]: maximum (of exponents to base 2), sum
  float* partials = nullptr;     // [rows][heads][grid splits][head_dim]
  uint32_t max_splits = 0;
  uint32_t head_tiles = 0;
  uint32_t x_stride = 0;
  float score_scale = 0;         // log2(e) / sqrt(head_dim)
  Stamp* begin_stamp = nullptr;  // args.stamp, of the first launch of several
};

// Where this block works.
struct Place {
  uint32_t row, kv_head, first_head, head_count, position, splits, first_tile, last_tile;
  const uint32_t* table;
};

template <int kHeadDim>
struct DecodeShape {
  static constexpr int kSteps = kHeadDim / 16;            // k steps of Q K^T
  static constexpr int kChunks = kHeadDim / 32;           // of 16-byte K loads; 16 dims left over take 8-byte ones
  static constexpr int kWide = kHeadDim / 64;             // 64-dim groups of V
  static constexpr int kRest = kHeadDim % 64;             // dims in the last, narrower group: 0, 16 or 32
  static constexpr int kTiles = kHeadDim / 8;             // n tiles of P V
  static constexpr int kPad = 4;                          // floats between heads, against bank conflicts
};

template <int kHeadDim>
struct Shared {
  uint4 query[DecodeShape<kHeadDim>::kSteps][32];         // A fragments
  float score_factor[kTileHeads];
  float maxima[kWarps][kTileHeads];
  float sums[kWarps][kTileHeads];
  float weights[kTileHeads][kMostSplits];
  float output[kWarps][kTileHeads][kHeadDim + DecodeShape<kHeadDim>::kPad];
  bool last;
};

// Queries of the block's heads as A fragments; heads past head_count are zero.
template <int kHeadDim>
__device__ void load_queries(Shared<kHeadDim>& shared, const DecodeParams& params, const Place& place) {
  constexpr int kQuads = kHeadDim / 4, kPerThread = (kQuads + 15) / 16;
  const uint32_t head = threadIdx.x / 16, thread = threadIdx.x % 16;
  const float* q =
      params.args.q + size_t{place.row} * params.args.q_stride + size_t{place.first_head + head} * kHeadDim;
  float4 quads[kPerThread];
  float largest = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const uint32_t quad = thread + 16 * i;
    const bool there = head < place.head_count && quad < kQuads;
    quads[i] = there ? *reinterpret_cast<const float4*>(q + 4 * quad) : float4{0, 0, 0, 0};
    largest = fmaxf(largest, fmaxf(fmaxf(fabsf(quads[i].x), fabsf(quads[i].y)),
                                   fmaxf(fabsf(quads[i].z), fabsf(quads[i].w))));
  }
#pragma unroll
  for (int lane = 8; lane > 0; lane /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, lane));
  const QueryScale scale = query_scale(largest);
  if (thread == 0) shared.score_factor[head] = scale.inverse * params.score_scale;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const uint32_t quad = thread + 16 * i;
    if (quad >= kQuads) break;
    const uint32_t chunk = quad / 8, within = quad % 8;
    const bool whole = chunk < DecodeShape<kHeadDim>::kChunks;
    const uint32_t step = 2 * chunk + (whole ? within % 2 : 0), t = whole ? within / 2 : within;
    const SplitPair front = split_pair(quads[i].x * scale.scale, quads[i].y * scale.scale);
    const SplitPair back = split_pair(quads[i].z * scale.scale, quads[i].w * scale.scale);
    shared.query[step][4 * head + t] = make_uint4(front.high, front.low, back.high, back.low);
  }
}

// K of 16 positions from `k` on as B fragments; positions at `visible` and past it are zero.
template <int kHeadDim>
__device__ void load_keys(uint32_t (&keys)[2][DecodeShape<kHeadDim>::kSteps][2], const __half* k, uint32_t visible) {
  using Dims = DecodeShape<kHeadDim>;
  const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    const bool there = 8 * tile + g < visible;
    const __half* at = k + (8 * tile + g) * kHeadDim;
#pragma unroll
    for (int j = 0; j < Dims::kChunks; ++j) {
      const uint4 x = there ? *reinterpret_cast<const uint4*>(at + 32 * j + 8 * t) : make_uint4(0, 0, 0, 0);
      keys[tile][2 * j][0] = x.x;
      keys[tile][2 * j][1] = x.y;
      keys[tile][2 * j + 1][0] = x.z;
      keys[tile][2 * j + 1][1] = x.w;
    }
    if constexpr (kHeadDim % 32 != 0) {
      const uint2 x = there ? *reinterpret_cast<const uint2*>(at + 32 * Dims::kChunks + 4 * t) : make_uint2(0, 0);
      keys[tile][Dims::kSteps - 1][0] = x.x;
      keys[tile][Dims::kSteps - 1][1] = x.y;
    }
  }
}

// V of this lane's positions 2t, 2t+1, 2t+8, 2t+9 of 16. Zero past `visible`: what lies there may be NaN.
template <int kHeadDim>
__device__ void load_values(uint32_t (&values)[4][kHeadDim / 16], const __half* v, uint32_t visible) {
  using Dims = DecodeShape<kHeadDim>;
  const uint32_t g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t position = 2 * t + (i & 1) + (i >> 1) * 8;
    const bool there = position < visible;
    const __half* at = v + position * kHeadDim;
#pragma unroll
    for (int j = 0; j < Dims::kWide; ++j) {
      const uint4 x = there ? *reinterpret_cast<const uint4*>(at + 64 * j + 8 * g) : make_uint4(0, 0, 0, 0);
      values[i][4 * j] = x.x;
      values[i][4 * j + 1] = x.y;
      values[i][4 * j + 2] = x.z;
      values[i][4 * j + 3] = x.w;
    }
    if constexpr (Dims::kRest == 32) {
      const uint2 x = there ? *reinterpret_cast<const uint2*>(at + 64 * Dims::kWide + 4 * g) : make_uint2(0, 0);
      values[i][4 * Dims::kWide] = x.x;
      values[i][4 * Dims::kWide + 1] = x.y;
    } else if constexpr (Dims::kRest == 16) {
      values[i][4 * Dims::kWide] = there ? *reinterpret_cast<const uint32_t*>(at + 64 * Dims::kWide + 2 * g) : 0;
    }
  }
}

// What a warp knows of its positions: for head g, lane (g, t).
template <int kHeadDim>
struct WarpState {
  float maximum = -INFINITY;  // of the scores, to base 2
  float sum = 0;              // this lane's share
  float output[DecodeShape<kHeadDim>::kTiles][4] = {};
};

// K and V of 16 positions on their way from the cache.
template <int kHeadDim>
struct Tile {
  static constexpr bool kEarlyValues = kHeadDim <= 128;  // all loads in flight at once, as far as registers go
  uint32_t keys[2][DecodeShape<kHeadDim>::kSteps][2];
  uint32_t values[4][kHeadDim / 16];
};

// Scores of one tile as exponents to base 2, for this lane's positions 2t, 2t+1, 2t+8, 2t+9; the first `visible` count.
template <int kHeadDim>
__device__ void score_tile(float (&scores)[4], const Tile<kHeadDim>& tile, const Shared<kHeadDim>& shared,
                           uint32_t visible, float score_factor) {
  const uint32_t lane = threadIdx.x % 32, t = lane % 4;
  float sums[2][4] = {};
#pragma unroll
  for (int step = 0; step < DecodeShape<kHeadDim>::kSteps; ++step) {
    const uint4 a = shared.query[step][lane];
    mma_f16(sums[0], a.x, a.y, a.z, a.w, tile.keys[0][step][0], tile.keys[0][step][1]);
    mma_f16(sums[1], a.x, a.y, a.z, a.w, tile.keys[1][step][0], tile.keys[1][step][1]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t position = 2 * t + (i & 1) + (i >> 1) * 8;
    scores[i] = position < visible ? (sums[i >> 1][i & 1] + sums[i >> 1][(i & 1) + 2]) * score_factor : -INFINITY;
  }
}

// Takes the scores (one of a head's 16 is finite at least) and values of one tile into the state.
template <int kHeadDim>
__device__ void add_tile(WarpState<kHeadDim>& state, float (&p)[4], const Tile<kHeadDim>& tile) {
  float maximum = fmaxf(fmaxf(state.maximum, fmaxf(p[0], p[1])), fmaxf(p[2], p[3]));
  maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 1));
  maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 2));
  const float shrink = exp2f(state.maximum - maximum);
  state.maximum = maximum;
  state.sum *= shrink;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    p[i] = exp2f(p[i] - (maximum - kLift));
    state.sum += p[i];
  }
  const SplitPair first = split_pair(p[0], p[1]), second = split_pair(p[2], p[3]);
#pragma unroll
  for (int i = 0; i < DecodeShape<kHeadDim>::kTiles; ++i) {
    float(&o)[4] = state.output[i];
#pragma unroll
    for (int j = 0; j < 4; ++j) o[j] *= shrink;
    const int word = i / 2, select = i % 2 == 0 ? 0x5410 : 0x7632;  // 8 halves a wide group: 4 words, 8 tiles
    const uint32_t b0 = __byte_perm(tile.values[0][word], tile.values[1][word], select);
    const uint32_t b1 = __byte_perm(tile.values[2][word], tile.values[3][word], select);
    mma_f16(o, first.high, first.low, second.high, second.low, b0, b1);
  }
}

// First of the dims that column 2t of `tile` is; column 2t + 1 is `width` dims further.
template <int kHeadDim>
__device__ uint32_t dim_of(int tile, uint32_t t, uint32_t& width) {
  using Dims = DecodeShape<kHeadDim>;
  const bool wide = tile < 8 * Dims::kWide;
  width = wide ? 8 : Dims::kRest / 8;
  return wide ? 64 * (tile / 8) + 16 * t + tile % 8 : 64 * Dims::kWide + 2 * width * t + (tile - 8 * Dims::kWide);
}

template <int kHeadDim>
__device__ void share_state(Shared<kHeadDim>& shared, const WarpState<kHeadDim>& state) {
  const uint32_t warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  float sum = state.sum;
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  if (t == 0) {
    shared.maxima[warp][g] = state.maximum;
    shared.sums[warp][g] = sum;
  }
#pragma unroll
  for (int tile = 0; tile < DecodeShape<kHeadDim>::kTiles; ++tile) {
    const float(&o)[4] = state.output[tile];
    uint32_t width;
    const uint32_t dim = dim_of<kHeadDim>(tile, t, width);
    shared.output[warp][g][dim] = o[0] + o[2];
    shared.output[warp][g][dim + width] = o[1] + o[3];
  }
}

// The four warps' shares of 4 dims of a head, relative to `maximum`; sum gets the sum of the weights.
template <int kHeadDim>
__device__ float4 join_warps(const Shared<kHeadDim>& shared, uint32_t head, uint32_t dim, float& maximum, float& sum) {
  maximum = shared.maxima[0][head];
#pragma unroll
  for (uint32_t warp = 1; warp < kWarps; ++warp) maximum = fmaxf(maximum, shared.maxima[warp][head]);
  sum = 0;
  float4 out{0, 0, 0, 0};
#pragma unroll
  for (uint32_t warp = 0; warp < kWarps; ++warp) {
    const float weight = exp2f(shared.maxima[warp][head] - maximum);
    const float4 x = *reinterpret_cast<const float4*>(&shared.output[warp][head][dim]);
    sum += weight * shared.sums[warp][head];
    out = {out.x + weight * x.x, out.y + weight * x.y, out.z + weight * x.z, out.w + weight * x.w};
  }
  return out;
}

__device__ void write_output(const DecodeParams& params, const Place& place, uint32_t head, uint32_t dim, float4 x) {
  const uint32_t column = (place.first_head + head) * params.args.cache.head_dim + dim;
  if (params.args.out != nullptr) {
    const size_t width = size_t{params.args.heads} * params.args.cache.head_dim;
    *reinterpret_cast<float4*>(params.args.out + place.row * width + column) = x;
  }
  if (params.args.out_x != nullptr) {
    const uint2 halves = make_uint2(bits_of(to_half2(x.x, x.y)), bits_of(to_half2(x.z, x.w)));
    *reinterpret_cast<uint2*>(params.args.out_x + size_t{place.row} * params.x_stride + column) = halves;
  }
}

// Weights of the row's splits for every head of the block, their sum divided out.
template <int kHeadDim>
__device__ void weigh_splits(Shared<kHeadDim>& shared, const float2* states, uint32_t stride, const Place& place) {
  const uint32_t head = threadIdx.x / 16, thread = threadIdx.x % 16;
  float2 own[kMostSplits / 16];
  float maximum = -INFINITY, sum = 0;
#pragma unroll
  for (uint32_t i = 0; i < kMostSplits / 16; ++i) {
    const uint32_t split = thread + 16 * i;
    const bool there = head < place.head_count && split < place.splits;
    own[i] = there ? __ldcg(states + size_t{head} * stride + split) : float2{-INFINITY, 0};
    maximum = fmaxf(maximum, own[i].x);
  }
#pragma unroll
  for (int lane = 8; lane > 0; lane /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, lane));
#pragma unroll
  for (uint32_t i = 0; i < kMostSplits / 16; ++i) sum += exp2f(own[i].x - maximum) * own[i].y;
#pragma unroll
  for (int lane = 8; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
#pragma unroll
  for (uint32_t i = 0; i < kMostSplits / 16; ++i) {
    shared.weights[head][thread + 16 * i] = exp2f(own[i].x - maximum) / sum;
  }
}

// The row's last block adds what all of them left. A thread takes 4 dims of two heads at a time, 8 splits of each in
// flight; the first of them while the weights are still on their way.
template <int kHeadDim>
__device__ void join_splits(Shared<kHeadDim>& shared, const DecodeParams& params, const Place& place) {
  constexpr uint32_t kQuads = kHeadDim / 4;
  constexpr uint32_t kColumns = 2, kInFlight = 8;
  const uint32_t stride = gridDim.y, columns = place.head_count * kQuads;
  const size_t first = (size_t{place.row} * params.args.heads + place.first_head) * stride;
  float4 x[kColumns][kInFlight];
  const auto load = [&](uint32_t column, uint32_t begin) {
#pragma unroll
    for (uint32_t c = 0; c < kColumns; ++c) {
      const uint32_t at = column + c * kThreads;
      const float* from = params.partials + (first + size_t{at / kQuads} * stride) * kHeadDim + at % kQuads * 4;
#pragma unroll
      for (uint32_t j = 0; j < kInFlight; ++j) {
        const bool there = at < columns && begin + j < place.splits;
        const auto* quad = reinterpret_cast<const float4*>(from + size_t{begin + j} * kHeadDim);
        x[c][j] = there ? __ldcg(quad) : float4{0, 0, 0, 0};
      }
    }
  };
  load(threadIdx.x, 0);
  weigh_splits<kHeadDim>(shared, params.states + first, stride, place);
  __syncthreads();
  for (uint32_t column = threadIdx.x; column < columns; column += kColumns * kThreads) {
    float4 sums[kColumns] = {};
    if (column != threadIdx.x) load(column, 0);
    for (uint32_t begin = 0; begin < place.splits; begin += kInFlight) {
      if (begin != 0) load(column, begin);
#pragma unroll
      for (uint32_t c = 0; c < kColumns; ++c) {
        const uint32_t head = min((column + c * kThreads) / kQuads, kTileHeads - 1);
        float4& sum = sums[c];
#pragma unroll
        for (uint32_t j = 0; j < kInFlight; ++j) {
          if (begin + j >= place.splits) break;
          const float weight = shared.weights[head][begin + j];
          sum = {sum.x + weight * x[c][j].x, sum.y + weight * x[c][j].y, sum.z + weight * x[c][j].z,
                 sum.w + weight * x[c][j].w};
        }
      }
    }
#pragma unroll
    for (uint32_t c = 0; c < kColumns; ++c) {
      const uint32_t at = column + c * kThreads;
      if (at < columns) write_output(params, place, at / kQuads, at % kQuads * 4, sums[c]);
    }
  }
}

__device__ Place find_place(const DecodeParams& params) {
  const Attention& args = params.args;
  Place place;
  place.row = blockIdx.z;
  place.kv_head = blockIdx.x / params.head_tiles;
  const uint32_t group = args.heads / args.cache.kv_heads, tile = blockIdx.x % params.head_tiles;
  place.first_head = place.kv_head * group + tile * kTileHeads;
  place.head_count = min(kTileHeads, group - tile * kTileHeads);
  place.position = args.positions[place.row];
  place.table = args.cache.table + size_t{args.sessions[place.row]} * args.cache.blocks_per_session;
  const uint32_t tiles = place.position / kKvBlockPositions + 1;
  const uint32_t per_split = (tiles + params.max_splits - 1) / params.max_splits;
  place.splits = (tiles + per_split - 1) / per_split;
  place.first_tile = blockIdx.y * per_split;
  place.last_tile = min(tiles, place.first_tile + per_split);
  return place;
}

// The warp's share of the block's positions. Loads run ahead: the first tile's before the queries are ready, the next
// tile's keys while the values of this one are multiplied.
template <int kHeadDim>
__device__ void attend(WarpState<kHeadDim>& state, Shared<kHeadDim>& shared, const DecodeParams& params,
                       const Place& place) {
  using Loads = Tile<kHeadDim>;
  const KvCacheView& cache = params.args.cache;
  const uint32_t warp = threadIdx.x / 32;
  const uint64_t block_elems = cache.block_elems(), to_values = cache.head_elems();
  const __half* base =
      cache.memory + cache.head_offset(params.args.layer, place.kv_head) + warp * kWarpPositions * kHeadDim;
  // Positions of a tile that the row sees, of this warp's 16 on; none past the split.
  const auto visible_in = [&](uint32_t tile) {
    const uint32_t first = tile * kKvBlockPositions + warp * kWarpPositions;
    return tile < place.last_tile && first <= place.position ? place.position + 1 - first : 0;
  };
  const auto block_of = [&](uint32_t tile) { return tile < place.last_tile ? place.table[tile] : 0; };

  Loads tile;
  uint32_t visible = visible_in(place.first_tile), next_block = block_of(place.first_tile + 1);
  const __half* k = base + place.table[place.first_tile] * block_elems;
  load_keys<kHeadDim>(tile.keys, k, visible);
  if constexpr (Loads::kEarlyValues) load_values<kHeadDim>(tile.values, k + to_values, visible);
  load_queries<kHeadDim>(shared, params, place);
  __syncthreads();

  const float score_factor = shared.score_factor[threadIdx.x % 32 / 4];
  for (uint32_t i = place.first_tile; visible != 0; ++i) {
    float scores[4];
    score_tile<kHeadDim>(scores, tile, shared, visible, score_factor);
    if constexpr (!Loads::kEarlyValues) load_values<kHeadDim>(tile.values, k + to_values, visible);
    visible = visible_in(i + 1);
    k = base + next_block * block_elems;
    next_block = block_of(i + 2);
    load_keys<kHeadDim>(tile.keys, k, visible);
    add_tile<kHeadDim>(state, scores, tile);
    if constexpr (Loads::kEarlyValues) load_values<kHeadDim>(tile.values, k + to_values, visible);
  }
}

// Keys and values of the block's first tile, into L2: all but the newest position's were there before this pass.
template <int kHeadDim>
__device__ void prefetch_tile(const DecodeParams& params, const Place& place) {
  constexpr uint32_t kLine = 64;  // elements
  const KvCacheView& cache = params.args.cache;
  const __half* keys = cache.memory + place.table[place.first_tile] * cache.block_elems() +
                       cache.head_offset(params.args.layer, place.kv_head);
  for (uint32_t i = threadIdx.x * kLine; i < kKvBlockPositions * kHeadDim; i += kThreads * kLine) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(keys + i));
    asm volatile("prefetch.global.L2 [%0];" ::"l"(keys + cache.head_elems() + i));
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, kHeadDim <= 128 ? kSmallBlocksPerSm : 2)
    attention_decode_f16(const DecodeParams params) {
  __shared__ __align__(16) Shared<kHeadDim> shared;
  const Place place = find_place(params);  // the rows of a pass were uploaded before the previous grid began
  // The next one reads, until this one is complete, weights, what was uploaded for the pass, or earlier passes' cache.
  let_next_grid_start();
  if (blockIdx.y < place.splits) prefetch_tile<kHeadDim>(params, place);
  wait_for_previous_grid();
  stamp_begin(params.begin_stamp);
  if (blockIdx.y >= place.splits) return;
  WarpState<kHeadDim> state;
  attend<kHeadDim>(state, shared, params, place);
  share_state<kHeadDim>(shared, state);
  __syncthreads();

  if (params.args.out_x != nullptr && blockIdx.y == 0 && blockIdx.x == 0) {
    const uint32_t column = params.args.heads * kHeadDim + threadIdx.x;
    if (column < params.x_stride) params.args.out_x[size_t{place.row} * params.x_stride + column] = __half(0.0f);
  }
  constexpr uint32_t kQuads = kHeadDim / 4;
  for (uint32_t i = threadIdx.x; i < place.head_count * kQuads; i += kThreads) {
    const uint32_t head = i / kQuads, dim = i % kQuads * 4;
    float maximum, sum;
    const float4 x = join_warps<kHeadDim>(shared, head, dim, maximum, sum);
    if (place.splits == 1) {
      write_output(params, place, head, dim, {x.x / sum, x.y / sum, x.z / sum, x.w / sum});
      continue;
    }
    const size_t at = (size_t{place.row} * params.args.heads + place.first_head + head) * gridDim.y + blockIdx.y;
    *reinterpret_cast<float4*>(params.partials + at * kHeadDim + dim) = x;
    if (dim == 0) params.states[at] = {maximum, sum};
  }
  if (place.splits == 1) {
    if (threadIdx.x == 0) stamp_end(params.args.stamp);
    return;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t* counter = params.counters + place.row * gridDim.x + blockIdx.x;
    shared.last = atomicAdd(counter, 1u) == place.splits - 1;
    if (shared.last) *counter = 0;
  }
  __syncthreads();
  if (!shared.last) return;
  __threadfence();
  join_splits<kHeadDim>(shared, params, place);
  if (threadIdx.x == 0) stamp_end(params.args.stamp);
}

template <int kHeadDim>
cudaError_t launch(const DecodeParams& params, dim3 grid, cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = params.args.programmatic ? 1 : 0;
  return cudaLaunchKernelEx(&config, attention_decode_f16<kHeadDim>, params);
}

cudaError_t launch_run(const DecodeParams& params, dim3 grid, cudaStream_t stream) {
  switch (params.args.cache.head_dim) {
#ifndef SLUICE_ATTENTION_ONLY_128
    case 32: return launch<32>(params, grid, stream);
    case 64: return launch<64>(params, grid, stream);
    case 80: return launch<80>(params, grid, stream);
    case 96: return launch<96>(params, grid, stream);
    case 256: return launch<256>(params, grid, stream);
#endif
    case 128: return launch<128>(params, grid, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

bool attention_supported(uint32_t heads, uint32_t kv_heads, uint32_t head_dim) {
  const bool dim = head_dim == 32 || head_dim == 64 || head_dim == 80 || head_dim == 96 || head_dim == 128 ||
                   head_dim == 256;
  return dim && kv_heads != 0 && heads != 0 && heads % kv_heads == 0 && heads / kv_heads <= 2 * kTileHeads;
}

uint32_t attention_bound(uint32_t heads, uint32_t kv_heads, uint32_t positions, uint32_t context) {
  const uint32_t most = max_splits(heads, kv_heads) * kKvBlockPositions;
  uint32_t bound = kKvBlockPositions;
  while (bound < positions && bound < most) bound *= 2;
  return bound >= most || bound >= context ? context : bound;
}

size_t attention_workspace_bytes(uint32_t heads, uint32_t kv_heads, uint32_t head_dim, uint32_t context) {
  const uint32_t blocks = (context + kKvBlockPositions - 1) / kKvBlockPositions;
  return workspace_of(heads, kv_heads, head_dim, std::min(blocks, max_splits(heads, kv_heads))).bytes;
}

cudaError_t launch_attention_decode(const Attention& args, cudaStream_t stream) {
  const KvCacheView& cache = args.cache;
  if (args.row_count == 0) return cudaSuccess;
  if (!attention_supported(args.heads, cache.kv_heads, cache.head_dim) || args.q_stride % 4 != 0 ||
      args.position_bound == 0 || args.position_bound > uint64_t{cache.blocks_per_session} * kKvBlockPositions) {
    return cudaErrorInvalidValue;
  }
  DecodeParams params;
  params.args = args;
  params.max_splits = max_splits(args.heads, cache.kv_heads);
  params.head_tiles = head_tiles(args.heads, cache.kv_heads);
  params.x_stride = (args.heads * cache.head_dim + 63) / 64 * 64;
  params.score_scale = static_cast<float>(1.4426950408889634 / sqrt(static_cast<double>(cache.head_dim)));
  const uint32_t splits =
      std::min((args.position_bound + kKvBlockPositions - 1) / kKvBlockPositions, params.max_splits);
  const Workspace workspace = workspace_of(args.heads, cache.kv_heads, cache.head_dim, splits);
  if (args.workspace == nullptr || args.workspace_bytes < workspace.bytes) return cudaErrorInvalidValue;
  auto* memory = static_cast<uint8_t*>(args.workspace);
  params.counters = reinterpret_cast<uint32_t*>(memory + workspace.counters);
  params.states = reinterpret_cast<float2*>(memory + workspace.states);
  params.partials = reinterpret_cast<float*>(memory + workspace.partials);

  const size_t width = size_t{args.heads} * cache.head_dim;
  for (uint32_t row = 0; row < args.row_count; row += kDecodeRows) {
    params.args.q = args.q + size_t{row} * args.q_stride;
    params.args.sessions = args.sessions + row;
    params.args.positions = args.positions + row;
    if (args.out != nullptr) params.args.out = args.out + row * width;
    if (args.out_x != nullptr) params.args.out_x = args.out_x + size_t{row} * params.x_stride;
    params.begin_stamp = row == 0 ? args.stamp : nullptr;
    const dim3 grid(cache.kv_heads * params.head_tiles, splits, std::min(kDecodeRows, args.row_count - row));
    if (const cudaError_t error = launch_run(params, grid, stream); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace sluice::cuda
