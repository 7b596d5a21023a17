// SPDX-License-Identifier: Apache-2.0
// QK norm, RoPE and the store into the KV cache, in one launch.
//
//   argument   shape                        type    layout                     alignment
//   q          [rows][heads * head_dim]     float   row-major, q_stride        8 B; read and written
//   k, v       [rows][kv_heads * head_dim]  float   row-major, k_, v_stride    8 B; read
//   q_norm...  [head_dim]                   float                              8 B; may be null
//   angles     [rows][pairs]                float2  {cos, sin} * factor        8 B
//   cache      kv_cache.hpp                 FP16    written: one position of K and V per row and KV head
//
// Geometry: a warp takes one head of q, k or v of one row; four warps a block, grid (heads + 2 kv_heads over 4, rows).
// Lane l holds dims 2l, 2l+1, 2l+64, 2l+65, ...; RoPE pairs dims i and i + pairs of different lanes, so the head passes
// through shared memory once.
// Bytes per call: rows * (2 heads + 2 kv_heads) * head_dim * 4 + rows * 2 kv_heads * head_dim * 2.
// RoPE: Su et al., arXiv 2104.09864, in the half-split pairing of the GPT-NeoX code.
#include "cuda/attention.hpp"
#include "cuda/attention_mma.cuh"
#include "cuda/stamps.cuh"

namespace sluice::cuda {

namespace {

constexpr uint32_t kWarps = 4;
constexpr uint32_t kMaxHeadDim = 256;
constexpr uint32_t kPairsPerLane = kMaxHeadDim / 64;

__device__ float warp_sum(float x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}

// x[j] holds dims 64j + 2 * lane and the next one; `head` is this warp's shared memory.
__device__ void norm_and_turn(float2 (&x)[kPairsPerLane], const float* norm, const float2* angles, float* head,
                              uint32_t dim, const HeadNormRopeStore& args) {
  const uint32_t lane = threadIdx.x % 32;
  if (norm != nullptr) {
    float sum = 0;
#pragma unroll
    for (uint32_t j = 0; j < kPairsPerLane; ++j) sum += x[j].x * x[j].x + x[j].y * x[j].y;
    const float factor = 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(dim) + args.eps);
#pragma unroll
    for (uint32_t j = 0; j < kPairsPerLane; ++j) {
      const uint32_t i = 64 * j + 2 * lane;
      if (i >= dim) break;
      const float2 weight = *reinterpret_cast<const float2*>(norm + i);
      x[j] = {x[j].x * factor * weight.x, x[j].y * factor * weight.y};
    }
  }
#pragma unroll
  for (uint32_t j = 0; j < kPairsPerLane; ++j) *reinterpret_cast<float2*>(head + 64 * j + 2 * lane) = x[j];
  __syncwarp();
  const auto turned = [&](uint32_t i, float own) {
    const bool first = i < args.pairs;
    if (i >= 2 * args.pairs) return own;
    const float2 angle = angles[first ? i : i - args.pairs];
    return first ? own * angle.x - head[i + args.pairs] * angle.y : own * angle.x + head[i - args.pairs] * angle.y;
  };
#pragma unroll
  for (uint32_t j = 0; j < kPairsPerLane; ++j) {
    const uint32_t i = 64 * j + 2 * lane;
    if (i >= dim) break;
    x[j] = {turned(i, x[j].x), turned(i + 1, x[j].y)};
  }
}

__global__ void __launch_bounds__(kWarps * 32) head_norm_rope_store_f32(HeadNormRopeStore args) {
  __shared__ __align__(16) float heads[kWarps][kMaxHeadDim];
  wait_for_previous_grid();
  let_next_grid_start();
  stamp_begin(args.stamp);
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.y;
  const uint32_t dim = args.cache.head_dim, kv_heads = args.cache.kv_heads;
  uint32_t head = blockIdx.x * kWarps + warp;
  if (head >= args.heads + 2 * kv_heads) return;
  const bool is_q = head < args.heads, is_k = !is_q && head < args.heads + kv_heads;
  if (!is_q) head -= args.heads + (is_k ? 0 : kv_heads);

  const float* from = is_q ? args.q + size_t{row} * args.q_stride
                           : is_k ? args.k + size_t{row} * args.k_stride : args.v + size_t{row} * args.v_stride;
  from += size_t{head} * dim;
  float2 x[kPairsPerLane];
#pragma unroll
  for (uint32_t j = 0; j < kPairsPerLane; ++j) {
    const uint32_t i = 64 * j + 2 * lane;
    x[j] = i < dim ? *reinterpret_cast<const float2*>(from + i) : float2{0, 0};
  }
  if (is_q || is_k) {
    norm_and_turn(x, is_q ? args.q_norm : args.k_norm, args.angles + size_t{row} * args.pairs, heads[warp], dim, args);
  }
  if (is_q) {
    float* to = args.q + size_t{row} * args.q_stride + size_t{head} * dim;
#pragma unroll
    for (uint32_t j = 0; j < kPairsPerLane; ++j) {
      const uint32_t i = 64 * j + 2 * lane;
      if (i < dim) *reinterpret_cast<float2*>(to + i) = x[j];
    }
    return;
  }
  const uint32_t position = args.positions[row];
  const uint32_t block =
      args.cache.table[size_t{args.sessions[row]} * args.cache.blocks_per_session + position / kKvBlockPositions];
  __half* to = args.cache.memory + block * args.cache.block_elems() + args.cache.head_offset(args.layer, head) +
               (is_k ? 0 : args.cache.head_elems()) + size_t{position % kKvBlockPositions} * dim;
#pragma unroll
  for (uint32_t j = 0; j < kPairsPerLane; ++j) {
    const uint32_t i = 64 * j + 2 * lane;
    if (i < dim) *reinterpret_cast<__half2*>(to + i) = to_half2(x[j].x, x[j].y);
  }
}

}  // namespace

cudaError_t launch_head_norm_rope_store(const HeadNormRopeStore& args, cudaStream_t stream) {
  const uint32_t heads = args.heads + 2 * args.cache.kv_heads;
  if (args.row_count == 0) return cudaSuccess;
  if (!attention_supported(args.heads, args.cache.kv_heads, args.cache.head_dim) || args.row_count > 65535 ||
      2 * args.pairs > args.cache.head_dim || args.q_stride % 2 != 0 || args.k_stride % 2 != 0 ||
      args.v_stride % 2 != 0) {
    return cudaErrorInvalidValue;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3((heads + kWarps - 1) / kWarps, args.row_count);
  config.blockDim = dim3(kWarps * 32);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = args.programmatic ? 1 : 0;
  return cudaLaunchKernelEx(&config, head_norm_rope_store_f32, args);
}

}  // namespace sluice::cuda
