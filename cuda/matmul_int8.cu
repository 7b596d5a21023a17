// SPDX-License-Identifier: Apache-2.0
// INT8 weights, as an lm_head has them. The kernels and their tables are in matvec.cuh and matmul.cuh; a byte's place
// in docs/container.md.
#include "cuda/matmul.cuh"
#include "cuda/matvec_launch.cuh"

namespace sluice::cuda {

cudaError_t matvec_int8(MatvecArgs& args, uint32_t fold, const MatmulCall& call, cudaStream_t stream) {
  switch (fold) {
    case 32:
      return launch_matvec<WeightFormat::int8, 32>(args, call, stream);
    case 64:
      return launch_matvec<WeightFormat::int8, 64>(args, call, stream);
    default:
      return launch_matvec<WeightFormat::int8, 128>(args, call, stream);
  }
}

cudaError_t matmul_int8(MatmulArgs& args, const MatmulCall& call, cudaStream_t stream) {
  return launch_matmul<WeightFormat::int8>(args, call, stream);
}

}  // namespace sluice::cuda
