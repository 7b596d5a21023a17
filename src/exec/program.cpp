// SPDX-License-Identifier: Apache-2.0
#include "exec/program.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <initializer_list>

#include "base/check.hpp"
#include "exec/layer_walk.hpp"

namespace sluice::exec {

namespace {

using backend::DeviceAddress;
using backend::Op;
using backend::OpKind;
using backend::Slot;
using storage::PlaneKind;
using storage::Role;
using storage::Tensor;

class Builder {
 public:
  Builder(const storage::Container& container, const plan::Plan& plan, const AddressOf& address_of)
      : container_(container), plan_(plan), address_of_(address_of) {
    item_of_.assign(container.manifest().tensors.size(), -1);
    for (size_t i = 0; i < plan.stream.size(); ++i) item_of_[plan.stream[i].tensor] = static_cast<int32_t>(i);
  }

  Result<std::vector<Step>> build() {
    const int32_t layers = static_cast<int32_t>(container_.manifest().hyper.layers);
    for (layer_ = 0; layer_ < layers; ++layer_) walk_layer(*this);
    layer_ = -1;
    const size_t body = steps_.size();
    steps_.push_back({.op = op(OpKind::select_rows), .stage = Stage::lm_head});
    norm(Role::output_norm);
    matmul(Slot::normed, false, {{Role::lm_head, Slot::logits, kNoBias}});
    for (size_t i = body; i < steps_.size(); ++i) {
      steps_[i].stage = Stage::lm_head;
      steps_[i].for_logits = true;
    }

    int32_t item = 0;
    for (const Step& step : steps_) {
      if (step.stream_item < 0) continue;
      if (step.stream_item != item) {
        const Tensor& tensor = container_.manifest().tensors[plan_.stream[static_cast<size_t>(item)].tensor];
        return fail(ErrorCode::corrupt,
                    fmt::format("{}: tensor {} is out of execution order, so it cannot be streamed; import the model "
                                "again", container_.path(), tensor.name));
      }
      ++item;
    }
    SLUICE_CHECK(static_cast<size_t>(item) == plan_.stream.size());
    return std::move(steps_);
  }

  // What walk_layer calls.
  void attention() { steps_.push_back({.op = op(OpKind::attention), .stage = Stage::attention}); }
  void swiglu() { steps_.push_back({.op = op(OpKind::swiglu), .stage = Stage::activation}); }

  void norm(Role role) {
    Op norm = op(OpKind::rms_norm);
    norm.in = Slot::residual;
    norm.out[0] = Slot::normed;
    set_vector(norm, 0, role);
    steps_.push_back({.op = norm, .stage = Stage::norm});
  }

  void rope() {
    Op turn = op(OpKind::head_norm_rope);
    set_vector(turn, 0, Role::q_norm);
    set_vector(turn, 1, Role::k_norm);
    steps_.push_back({.op = turn, .stage = Stage::rope});
  }

  void matmul(Slot in, bool accumulate, std::initializer_list<Product> products) {
    const std::vector<Tensor>& tensors = container_.manifest().tensors;
    std::vector<Part> parts;
    bool streams = false;
    for (const Product& product : products) {
      const Tensor* tensor = container_.find(product.matrix, layer_);
      SLUICE_CHECK(tensor != nullptr);  // completeness is checked at open
      const uint32_t index = index_of(tensor);
      parts.push_back({index, product.out, product.bias, false});
      if (index + 1 < tensors.size() && tensors[index + 1].is_residual) {
        parts.push_back({index + 1, product.out, kNoBias, true});
      }
    }
    for (const Part& part : parts) streams = streams || item_of_[part.tensor] >= 0;
    // The stream has its order; without it, all bases share an operation, then all residuals.
    if (!streams) std::stable_partition(parts.begin(), parts.end(), [](const Part& part) { return !part.residual; });

    const Part* open = nullptr;  // the last step is a resident matmul of this input that may take more of its kind
    for (const Part& part : parts) {
      const int32_t item = item_of_[part.tensor];
      if (open == nullptr || item >= 0 || open->residual != part.residual) {
        Op first = op(OpKind::matmul);
        first.in = in;
        first.accumulate = accumulate || part.residual;  // onto what the base gave
        steps_.push_back({.op = first, .stage = Stage::matmul, .stream_item = item});
      }
      open = item < 0 ? &part : nullptr;
      Op& target = steps_.back().op;
      const int slot = target.weight_count++;
      target.weights[slot] = weight_at(tensors[part.tensor], address_of_(part.tensor));
      target.out[slot] = part.out;
      if (part.bias != kNoBias) set_vector(target, slot, part.bias);
    }
  }

 private:
  // One matrix of a product: itself, or its residual.
  struct Part {
    uint32_t tensor = 0;
    Slot out = Slot::q;
    Role bias = kNoBias;
    bool residual = false;
  };

  uint32_t index_of(const Tensor* tensor) const {
    return static_cast<uint32_t>(tensor - container_.manifest().tensors.data());
  }

  Op op(OpKind kind) const {
    Op op;
    op.kind = kind;
    op.layer = layer_ < 0 ? 0 : static_cast<uint32_t>(layer_);
    return op;
  }

  // Vectors are always resident.
  void set_vector(Op& op, int slot, Role role) const {
    const Tensor* tensor = container_.find(role, layer_);
    if (tensor == nullptr) return;
    op.has_vector[slot] = true;
    op.vectors[slot] = address_of_(index_of(tensor));
  }

  const storage::Container& container_;
  const plan::Plan& plan_;
  const AddressOf& address_of_;
  std::vector<int32_t> item_of_;   // by tensor
  int32_t layer_ = 0;
  std::vector<Step> steps_;
};

}  // namespace

backend::Weight weight_at(const Tensor& tensor, DeviceAddress at) {
  backend::Weight weight{.scheme = tensor.scheme, .layout = tensor.layout, .rows = tensor.rows, .cols = tensor.cols,
                         .group_elems = tensor.group_elems, .scale = std::ldexp(1.0f, tensor.scale_exponent)};
  for (const storage::Plane& plane : tensor.planes) {
    const DeviceAddress address = at + (plane.offset - tensor.offset());
    switch (plane.kind) {
      case PlaneKind::values: weight.values = address; break;
      case PlaneKind::scales: weight.scales = address; break;
      case PlaneKind::zeros: weight.zeros = address; weight.has_zeros = true; break;
      case PlaneKind::bias: weight.bias = address; weight.has_bias = true; break;
      case PlaneKind::perm:
        weight.perm = address;
        weight.has_perm = true;
        for (const uint64_t sum : plane.block_sums) weight.perm_sum = std::rotl(weight.perm_sum, 1) ^ sum;
        break;
      default: break;  // a residual is a tensor of its own (Container::set_precision)
    }
  }
  return weight;
}

Result<std::vector<Step>> build_program(const storage::Container& container, const plan::Plan& plan,
                                        const AddressOf& address_of) {
  return Builder(container, plan, address_of).build();
}

}  // namespace sluice::exec
