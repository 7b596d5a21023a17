// SPDX-License-Identifier: Apache-2.0
// Matrix products with the container's weights: out[r][n] = sum over k of x[r][k] * W[n][k], on a CUDA device.
//
// One call multiplies the same activations by up to three matrices (q, k, v; gate, up). Where they share a format it is
// one launch (on sm_90, with a bias and 9 rows or more, two). All pointers are device memory; nothing is allocated,
// nothing is synchronised, every call can be captured.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace sluice::cuda {

enum class WeightFormat : uint8_t { int4, int8, f16, bf16, f32 };

// A weight matrix W[rows][cols] as the container holds it (docs/container.md): int4 and int8 in tile16x64, f16 and bf16
// in tile16x16, f32 row-major. Every plane starts on a multiple of 16 bytes (f32: 4).
struct MatmulWeight {
  WeightFormat format = WeightFormat::f32;
  uint32_t rows = 0;         // N, outputs
  uint32_t cols = 0;         // K, inputs
  uint32_t group_elems = 0;  // int4 and int8: 32, 64 or 128
  float scale = 1.0f;        // 2^scale_exponent
  const void* values = nullptr;
  const __half* scales = nullptr;  // [ceil(rows/16)][ceil(cols/group)][16], int4 and int8
  const uint8_t* zeros = nullptr;  // the same shape, or null
  const __half* bias = nullptr;    // the same shape, or null
};

struct MatmulPart {
  MatmulWeight weight;
  float* out = nullptr;           // [call.rows][ldo]
  uint32_t ldo = 0;               // floats, >= weight.rows
  const float* vector = nullptr;  // [weight.rows], added to every row, or null
};

inline constexpr uint32_t kMatmulParts = 3;
inline constexpr uint32_t kMatmulMaxRows = 2048;

struct MatmulCall {
  const __half* x = nullptr;         // [rows][ldx], 16-byte aligned; columns cols..ldx-1 are zero and finite
  uint32_t ldx = 0;                  // halves: cols rounded up to a multiple of 64, or a larger multiple of 64
  // 1 or 2 rows: so many times the same x, a power of two, x_copy_elems apart. Blocks of the matvec spread over them:
  // hundreds of them ask for the same lines at once.
  uint32_t x_copies = 1;
  uint64_t x_copy_elems = 0;
  const float* row_scale = nullptr;  // [rows] powers of two: the activations are x * row_scale; null: all 1
  uint32_t rows = 0;                 // 1..kMatmulMaxRows
  uint32_t parts = 0;                // 1..kMatmulParts; all have the same cols
  MatmulPart part[kMatmulParts];
  bool accumulate = false;  // out += instead of out =

  // Programmatic dependent launch. `programmatic`: launch before the kernel in front of this one in the stream has
  // ended (it must call cudaTriggerProgrammaticLaunchCompletion or end; x, out and the workspace are touched only
  // behind griddepcontrol.wait). `weights_early`: weights may also be read before that point: they were complete in
  // device memory before the kernel in front started, as resident weights are. Ignored before sm_90.
  bool programmatic = false;
  bool weights_early = false;

  void* workspace = nullptr;  // matmul_workspace_bytes, 256-byte aligned, used by one stream at a time
  uint64_t workspace_bytes = 0;
};

// What one or several calls of these shapes need: the maximum over the calls. Before its first use the caller sets the
// first kMatmulCounterBytes of the workspace to zero; every call leaves them zero. Thread-safe. Uses the current
// device.
inline constexpr uint64_t kMatmulCounterBytes = 256 * 1024;
uint64_t matmul_workspace_bytes(const MatmulCall& call);

// Enqueues the product on `stream` of the current device. A row's result has the same bits in every call of 1 to 8
// rows, and in every run; from 9 rows on its last bits may depend on what else is in the call. int4 and int8: FP16
// products, FP32 sums per group, times the group's scale, FP32 sum of groups. f16 and bf16: exact products, FP32 sums.
// f32: FP32 throughout.
// Errors: cudaErrorInvalidValue (a shape, alignment or workspace that the comments above rule out: nothing enqueued);
// those of a launch.
cudaError_t matmul(const MatmulCall& call, cudaStream_t stream);

}  // namespace sluice::cuda
