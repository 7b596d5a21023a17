// SPDX-License-Identifier: Apache-2.0
// The KV cache on a CUDA device: FP16 blocks of 64 positions that hold all layers, so that a session's past is saved,
// forked and restored block by block. Host and device code share this header.
//
//   cache    [blocks] of block
//   block    [layers][kv_heads][K, V][64 positions][head_dim]   FP16
//   table    [sessions][blocks_per_session]                     uint32, number of the physical block
//
// One position of one head is head_dim * 2 bytes in a row (head_dim is a multiple of 16: rows are 32-byte aligned), and
// the 64 positions of a block follow each other: 16 KiB in one piece at head_dim 128. So a warp's 16-byte loads are
// coalesced whichever way it cuts a block, `cp.async` copies it row by row, K is the B operand of `mma` in Q K^T as it
// lies (`ldmatrix`), and V is it in P V (`ldmatrix.trans`). The positions of a block past a session's end are whatever
// was there before: no kernel reads them.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#if defined(__CUDACC__)
#define SLUICE_HOST_DEVICE __host__ __device__
#else
#define SLUICE_HOST_DEVICE
#endif

namespace sluice::cuda {

inline constexpr uint32_t kKvBlockPositions = 64;  // backend::kKvBlockTokens

struct KvCacheView {
  __half* memory = nullptr;         // device, [blocks][block_elems()], 16-byte aligned
  const uint32_t* table = nullptr;  // device, [sessions][blocks_per_session]
  uint32_t blocks_per_session = 0;
  uint32_t layers = 0;
  uint32_t kv_heads = 0;
  uint32_t head_dim = 0;            // a multiple of 16, at most 256

  // K or V of one head in one block.
  SLUICE_HOST_DEVICE uint64_t head_elems() const { return uint64_t{kKvBlockPositions} * head_dim; }
  SLUICE_HOST_DEVICE uint64_t block_elems() const { return uint64_t{layers} * kv_heads * 2 * head_elems(); }
  // Where K of (layer, kv_head) begins in every block; V follows at + head_elems().
  SLUICE_HOST_DEVICE uint64_t head_offset(uint32_t layer, uint32_t kv_head) const {
    return (uint64_t{layer} * kv_heads + kv_head) * 2 * head_elems();
  }
};

}  // namespace sluice::cuda
