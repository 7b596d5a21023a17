// SPDX-License-Identifier: Apache-2.0
// Weights that are not quantized: f16 and bf16 in tile16x16 by the kernels of matvec.cuh and matmul.cuh, and f32.
//
// f32 is rare (a checkpoint's odd matrix) and gets a plain kernel: W [N][K] row-major, 4 B aligned; x, out as there.
// A warp makes one row of W x eight rows of x at a time, lanes along K, then a fixed tree of shuffles.
// Geometry: ceil(N/4) blocks of 128 threads. Bytes moved: W ceil(M/8) times.
#include "cuda/matmul.cuh"
#include "cuda/matvec_launch.cuh"

namespace sluice::cuda {
namespace {

struct FloatArgs {
  const float* weight;
  const __half* x;
  const float* row_scale;
  const float* vector;
  float* out;
  uint32_t rows, cols, ldx, ldo, x_rows;
  float scale;
  bool accumulate;
};

__global__ void __launch_bounds__(128) matmul_float_kernel(const __grid_constant__ FloatArgs a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const uint32_t lane = threadIdx.x & 31, row = blockIdx.x * 4 + (threadIdx.x >> 5);
  if (row >= a.rows) return;
  const float* weight = a.weight + uint64_t{row} * a.cols;
  for (uint32_t first = 0; first < a.x_rows; first += 8) {
    float sum[8] = {};
    for (uint32_t k = lane; k < a.cols; k += 32) {
      const float w = __ldg(weight + k);
#pragma unroll
      for (uint32_t m = 0; m < 8; ++m) {
        if (first + m < a.x_rows) sum[m] = fmaf(w, __half2float(a.x[uint64_t{first + m} * a.ldx + k]), sum[m]);
      }
    }
#pragma unroll
    for (uint32_t m = 0; m < 8; ++m) {
      for (uint32_t step = 16; step != 0; step /= 2) sum[m] += __shfl_xor_sync(0xffffffffu, sum[m], step);
      if (lane != m || first + m >= a.x_rows) continue;
      float value = sum[m] * a.scale;
      if (a.row_scale != nullptr) value *= a.row_scale[first + m];
      if (a.vector != nullptr) value += a.vector[row];
      float* out = a.out + uint64_t{first + m} * a.ldo + row;
      *out = a.accumulate ? *out + value : value;
    }
    __syncwarp();
  }
}

}  // namespace

cudaError_t matvec_half(MatvecArgs& args, bool bf16, const MatmulCall& call, cudaStream_t stream) {
  return bf16 ? launch_matvec<WeightFormat::bf16, 64>(args, call, stream)
              : launch_matvec<WeightFormat::f16, 64>(args, call, stream);
}

cudaError_t matmul_half(MatmulArgs& args, bool bf16, const MatmulCall& call, cudaStream_t stream) {
  return bf16 ? launch_matmul<WeightFormat::bf16>(args, call, stream)
              : launch_matmul<WeightFormat::f16>(args, call, stream);
}

cudaError_t matmul_float(const MatmulCall& call, const MatmulPart& part, cudaStream_t stream) {
  FloatArgs args = {};
  args.weight = static_cast<const float*>(part.weight.values);
  args.x = call.x;
  args.row_scale = call.row_scale;
  args.vector = part.vector;
  args.out = part.out;
  args.rows = part.weight.rows;
  args.cols = part.weight.cols;
  args.ldx = call.ldx;
  args.ldo = part.ldo;
  args.x_rows = call.rows;
  args.scale = part.weight.scale;
  args.accumulate = call.accumulate;
  return launch_grid(matmul_float_kernel, args, dim3((args.rows + 3) / 4), 128, 0, call, stream);
}

}  // namespace sluice::cuda
