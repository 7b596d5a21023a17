// SPDX-License-Identifier: Apache-2.0
// INT4 weights, 1 to 8 rows of activations. The kernel, its schedule and its table are in matvec.cuh; the nibbles'
// places are drawn in docs/container.md.
#include "cuda/matvec_launch.cuh"

namespace sluice::cuda {

namespace {

template <GroupForm kForm>
cudaError_t launch_form(MatvecArgs& args, uint32_t fold, const MatmulCall& call, cudaStream_t stream) {
  switch (fold) {
    case 32:
      return launch_matvec<WeightFormat::int4, 32, kForm>(args, call, stream);
    case 64:
      return launch_matvec<WeightFormat::int4, 64, kForm>(args, call, stream);
    default:
      return launch_matvec<WeightFormat::int4, 128, kForm>(args, call, stream);
  }
}

}  // namespace

cudaError_t matvec_int4(MatvecArgs& args, uint32_t fold, const MatmulCall& call, cudaStream_t stream) {
  const MatmulWeight& weight = call.part[0].weight;
  if (weight.zeros != nullptr) return launch_form<GroupForm::zeros>(args, fold, call, stream);
  if (weight.bias != nullptr) return launch_form<GroupForm::bias>(args, fold, call, stream);
  return launch_form<GroupForm::symmetric>(args, fold, call, stream);
}

}  // namespace sluice::cuda
