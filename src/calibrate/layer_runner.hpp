// SPDX-License-Identifier: Apache-2.0
// One decoder layer on a backend, with its weights in memory: calibration walks a model layer by layer, so a layer is
// all that must fit.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "backend/backend.hpp"
#include "quant/rounding.hpp"
#include "sluice/result.hpp"
#include "storage/manifest.hpp"

namespace sluice::calibrate {

// A tensor with its planes in memory. `tensor.planes` say where each plane lies behind the first, as in a container.
struct EncodedTensor {
  storage::Tensor tensor;
  quant::Planes planes;
};

// The planes that are there, in a container's order.
std::vector<std::pair<storage::PlaneKind, const std::vector<std::byte>*>> planes_of(const quant::Planes& planes);
// Fills tensor.planes (kind, offset, bytes).
void place_planes(EncodedTensor& encoded);

// The shape of one layer for sequences of `window` tokens; `inverse_frequencies` borrows from the manifest.
backend::Shape layer_shape(const storage::Manifest& manifest, uint32_t window);

class LayerRunner {
 public:
  // Copies the tensors of one layer into the backend, which is prepared for layer_shape and outlives the object.
  // Errors: out_of_memory, device.
  static Result<LayerRunner> create(backend::Backend& backend, const backend::Shape& shape,
                                    const std::vector<EncodedTensor>& layer);

  // Called in front of a matrix product, `count` rows of whose inputs the backend holds in `slot`: `first` is the role
  // of the first matrix that has them (q, o, gate, down).
  using Tap = std::function<Status(storage::Role first, backend::Slot slot, uint32_t count)>;

  // states: FP32 [tokens][hidden], the layer's input of one sequence, replaced by its output. `tap` may be empty.
  Status run(std::span<float> states, const Tap& tap);

 private:
  struct Step {
    backend::Op op;
    storage::Role first = storage::Role::q;  // of a matmul
  };
  class Builder;

  LayerRunner(backend::Backend& backend, const backend::Shape& shape) : backend_(&backend), shape_(shape) {}
  Status run_rows(std::span<float> states, uint32_t first, const Tap& tap);

  backend::Backend* backend_;
  backend::Shape shape_;
  std::vector<Step> steps_;
};

}  // namespace sluice::calibrate
