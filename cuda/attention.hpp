// SPDX-License-Identifier: Apache-2.0
// Launches for everything between the QKV matmul and the output matmul: RoPE with optional QK norm, fused with the
// store into the KV cache (kv_store.cu; nobody else writes k and v to the cache), decode attention
// (attention_decode.cu), prefill attention (attention_prefill.cu).
//
// Per layer: launch_head_norm_rope_store, then launch_attention_decode or launch_attention_prefill.
//
// Attention writes its result as X of the next matmul, or as float, or both. No row scale is needed for X: the output
// is a weighted mean of V, which the cache holds as FP16, so |output| <= 65504; pass that matmul a null row_scale.
//
// Every function only enqueues: no allocation, no synchronisation; safe to capture in a graph. What changes from pass
// to pass at the same number of rows (sessions, positions) is read from device memory, so a captured graph stays valid;
// see `position_bound`. Errors: what the launch returned, or cudaErrorInvalidValue for a shape or alignment without a
// kernel (attention_supported() tells before). All pointers are device memory, borrowed until the work is done.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/kv_cache.hpp"
#include "cuda/stamps.hpp"

namespace sluice::cuda {

// Rows that share one decode launch. More rows are taken in runs of this many, one after the other.
inline constexpr uint32_t kDecodeRows = 8;

// True for head_dim 32, 64, 80, 96, 128, 256 and heads a multiple of kv_heads, at most 16 to one.
bool attention_supported(uint32_t heads, uint32_t kv_heads, uint32_t head_dim);

// q in place, k and v into the cache: per-head RMSNorm where there is a weight, then RoPE of the first 2 * pairs
// dimensions, paired as (i, i + pairs). Finite k and v beyond 65504 are stored as +-65504, infinities and NaN stay.
struct HeadNormRopeStore {
  float* q = nullptr;                  // [row_count][q_stride], heads * head_dim used
  const float* k = nullptr;            // [row_count][k_stride], kv_heads * head_dim used; not changed
  const float* v = nullptr;            // [row_count][v_stride]
  uint32_t q_stride = 0, k_stride = 0, v_stride = 0;
  const float* q_norm = nullptr;       // [head_dim] or null
  const float* k_norm = nullptr;       // [head_dim] or null
  float eps = 0;
  const float2* angles = nullptr;      // [row_count][pairs]: {cos, sin} * attention factor (launch_begin_pass)
  uint32_t pairs = 0;                  // rotary_dims / 2, at most head_dim / 2
  const uint32_t* sessions = nullptr;  // [row_count]: row of the block table
  const uint32_t* positions = nullptr; // [row_count], < blocks_per_session * 64
  uint32_t row_count = 0, heads = 0;
  KvCacheView cache;                   // brings kv_heads and head_dim
  uint32_t layer = 0;
  Stamp* stamp = nullptr;              // or null: its beginning is written
  bool programmatic = false;           // launch with programmatic stream serialization (sm_90 and later only)
};
cudaError_t launch_head_norm_rope_store(const HeadNormRopeStore& args, cudaStream_t stream);

// out = softmax(q K^T / sqrt(head_dim)) V over positions 0..own of the row's session, which are all in the cache.
struct Attention {
  const float* q = nullptr;            // [row_count][q_stride], heads * head_dim used; 16-byte aligned, stride % 4 == 0
  uint32_t q_stride = 0;
  __half* out_x = nullptr;             // [row_count][x_stride(heads * head_dim)] or null; the last columns become 0
  float* out = nullptr;                // [row_count][heads * head_dim] or null
  const uint32_t* sessions = nullptr;  // [row_count]
  const uint32_t* positions = nullptr; // [row_count]; ascending within a session
  uint32_t row_count = 0, heads = 0;
  // At least 1 + the largest position of any row; it sizes the grid of decode, never the result. A graph that is
  // replayed while positions grow is captured with the bound it will reach: attention_bound(), or the context length.
  uint32_t position_bound = 0;
  KvCacheView cache;
  uint32_t layer = 0;
  // Decode only: attention_workspace_bytes() long, 256-byte aligned, zeroed once at open (cudaMemset); each launch
  // leaves it ready for the next one. Launches that share it must be in one stream.
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
  Stamp* stamp = nullptr;              // or null: its beginning and end are written
  bool programmatic = false;           // as above; decode only
};

// A bound for `positions` (1..context) that changes seldom as they grow: twice as many splits each time, and
// `context` once a larger bound would make no larger grid. So a graph serves from some bound to the next, and short
// contexts launch few blocks: of the 32 splits of 64 heads on 8, 31 would return at once while a sequence is short.
uint32_t attention_bound(uint32_t heads, uint32_t kv_heads, uint32_t positions, uint32_t context);

// Workspace of decode attention for up to `context` positions; it does not grow with the rows of a pass.
size_t attention_workspace_bytes(uint32_t heads, uint32_t kv_heads, uint32_t head_dim, uint32_t context);

// For passes whose rows mostly have a session of their own: 1 to 8 rows always, more as well (64 users decoding). A
// row's result depends bit for bit on nothing but its q, its position and the cache: not on other rows, nor the bound.
cudaError_t launch_attention_decode(const Attention& args, cudaStream_t stream);

// For chunks: neighbouring rows belong to one session mostly. Any mix is computed correctly. Deterministic.
cudaError_t launch_attention_prefill(const Attention& args, cudaStream_t stream);

// Which of the two a pass should take. `session_runs`: how often the session changes along the rows, plus one.
inline bool attention_wants_prefill(uint32_t row_count, uint32_t session_runs) {
  return row_count > kDecodeRows && row_count >= 8 * session_runs;
}

}  // namespace sluice::cuda
