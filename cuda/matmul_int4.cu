// SPDX-License-Identifier: Apache-2.0
// INT4 weights, any number of rows of activations, on mma.sync. The kernel and its table are in matmul.cuh.
#include "cuda/matmul.cuh"

namespace sluice::cuda {

cudaError_t matmul_int4(MatmulArgs& args, const MatmulCall& call, cudaStream_t stream) {
  return launch_matmul<WeightFormat::int4>(args, call, stream);
}

}  // namespace sluice::cuda
