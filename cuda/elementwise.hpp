// SPDX-License-Identifier: Apache-2.0
// What runs between the matrices besides attention: the start of a pass, RMSNorm, SwiGLU, rows that want logits. Launch
// functions; the kernels are in elementwise.cu.
//
// An activation that a matmul reads ("X") is half [rows][ldx], ldx = x_stride(width), columns width..ldx-1 zero, with
// row_scale float [rows], a power of two: the true value is half * row_scale. The scale is 1 unless the row holds a
// magnitude that FP16 does not. All other activations are float, row-major, without padding.
//
// Every function enqueues on `stream`, allocates nothing, and returns the launch's error. All pointers are device
// memory but where `host` is in the name: pinned memory that the device reads in place. Rows are independent: what a
// row gives does not depend on the others. `programmatic`: launch with programmatic stream serialization (sm_90 and later
// only). `stamp`, or null: the kernel writes when it began, RMSNorm and SwiGLU also when they ended.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/stamps.hpp"

#if defined(__CUDACC__)
#define SLUICE_HOST_DEVICE __host__ __device__
#else
#define SLUICE_HOST_DEVICE
#endif

namespace sluice::cuda {

// Elements from one row of X to the next.
SLUICE_HOST_DEVICE constexpr uint32_t x_stride(uint32_t width) { return (width + 63) / 64 * 64; }

// The rows of a pass, as the kernels see them. One array of each, [rows] but for `selected`.
struct RowTable {
  uint32_t* sessions = nullptr;
  uint32_t* positions = nullptr;
  uint32_t* selected = nullptr;         // [rows that want logits]: their numbers, ascending
};

// Copies embeddings and row table out of pinned memory, and computes cos and sin of every row's angles:
// angle = inverse_frequency * position, in double.
struct BeginPass {
  const float* host_embeddings = nullptr;     // [rows][hidden]
  const uint32_t* host_table = nullptr;       // [3][table_stride]: sessions, positions, selected
  uint32_t table_stride = 0;
  const float* inverse_frequencies = nullptr; // [pairs]
  float attention_factor = 1.0f;
  uint32_t rows = 0, hidden = 0, pairs = 0;
  float* residual = nullptr;                  // [rows][hidden]
  RowTable table;
  float2* angles = nullptr;                   // [rows][pairs]: {cos, sin} * attention_factor
  Stamp* stamp = nullptr;
  bool programmatic = false;
};
cudaError_t launch_begin_pass(const BeginPass& args, cudaStream_t stream);

// out = X of in / sqrt(mean(in^2) + eps) * weight
struct RmsNorm {
  const float* in = nullptr;                  // [rows][width]
  const float* weight = nullptr;              // [width]; null: 1
  float eps = 0;
  uint32_t rows = 0, width = 0;
  __half* out = nullptr;                      // [copies][rows][x_stride(width)]
  uint32_t copies = 1;                        // of all rows, the same each time (MatmulCall::x_copies)
  float* row_scale = nullptr;                 // [rows]
  Stamp* stamp = nullptr;
  bool programmatic = false;
};
cudaError_t launch_rms_norm(const RmsNorm& args, cudaStream_t stream);

// out = X of silu(gate) * up. `sync` is swiglu_sync_bytes(max rows) that are zero before the first launch; every launch
// leaves them zero.
struct Swiglu {
  const float* gate = nullptr;                // [rows][width]
  const float* up = nullptr;                  // [rows][width]
  uint32_t rows = 0, width = 0;
  __half* out = nullptr;                      // [rows][x_stride(width)]
  float* row_scale = nullptr;                 // [rows]
  uint2* sync = nullptr;                      // [rows]
  Stamp* stamp = nullptr;
  bool programmatic = false;
};
cudaError_t launch_swiglu(const Swiglu& args, cudaStream_t stream);
constexpr uint64_t swiglu_sync_bytes(uint32_t rows) { return uint64_t{rows} * 8; }

// Moves the rows that `selected` names to the front, in place.
struct SelectRows {
  float* rows = nullptr;                      // [at least selected_rows][width]
  const uint32_t* selected = nullptr;         // [selected_rows], ascending
  uint32_t selected_rows = 0, width = 0;
  Stamp* stamp = nullptr;
  bool programmatic = false;
};
cudaError_t launch_select_rows(const SelectRows& args, cudaStream_t stream);

// out = x with its columns in another order: column k is column perm[k] of x, both X of the same width.
struct GatherColumns {
  const __half* x = nullptr;                  // [rows][x_stride(width)]
  const uint32_t* perm = nullptr;             // [width]; entries beyond the width count as the last column
  uint32_t rows = 0, width = 0;
  __half* out = nullptr;                      // [rows][x_stride(width)]
  bool programmatic = false;
};
cudaError_t launch_gather_columns(const GatherColumns& args, cudaStream_t stream);

// Hands a pass over to the host: logits and stamps into pinned memory, which the host reads behind the queue's end.
// Where `stamp_count` is 0, no stamps; where `logit_count` is 0, no logits.
struct FinishPass {
  const float* logits = nullptr;              // [logit_count]
  float* host_logits = nullptr;               // 16-byte aligned, as `logits`
  uint64_t logit_count = 0;
  Stamp* stamps = nullptr;                    // [stamp_count], the last of them this kernel's own
  Stamp* host_stamps = nullptr;
  uint32_t stamp_count = 0;
  bool programmatic = false;
};
cudaError_t launch_finish_pass(const FinishPass& args, cudaStream_t stream);

// Writes the time into stamp->begin_ns or, with `end`, stamp->end_ns: around products whose weights had to be waited
// for.
cudaError_t launch_stamp(Stamp* stamp, bool end, cudaStream_t stream);

// Success if this library holds kernels that the current device can run; else cudaErrorNoKernelImageForDevice or its like.
cudaError_t probe_kernels();

}  // namespace sluice::cuda
