// SPDX-License-Identifier: Apache-2.0
#include "calibrate/layer_runner.hpp"

#include <algorithm>
#include <initializer_list>
#include <map>
#include <utility>

#include "base/check.hpp"
#include "base/units.hpp"
#include "exec/engine.hpp"
#include "exec/layer_walk.hpp"
#include "exec/program.hpp"

namespace sluice::calibrate {

using backend::DeviceAddress;
using backend::Op;
using backend::OpKind;
using backend::Slot;
using storage::PlaneKind;
using storage::Role;

namespace {

constexpr uint32_t kMostRows = 512;  // of a pass: as in a prefill

}  // namespace

std::vector<std::pair<PlaneKind, const std::vector<std::byte>*>> planes_of(const quant::Planes& planes) {
  const std::pair<PlaneKind, const std::vector<std::byte>*> all[] = {
      {PlaneKind::values, &planes.values},     {PlaneKind::scales, &planes.scales},
      {PlaneKind::zeros, &planes.zeros},       {PlaneKind::bias, &planes.bias},
      {PlaneKind::residual, &planes.residual}, {PlaneKind::residual_scales, &planes.residual_scales},
      {PlaneKind::row_sums, &planes.row_sums}};
  std::vector<std::pair<PlaneKind, const std::vector<std::byte>*>> present;
  std::copy_if(std::begin(all), std::end(all), std::back_inserter(present),
               [](const auto& plane) { return !plane.second->empty(); });
  return present;
}

void place_planes(EncodedTensor& encoded) {
  encoded.tensor.planes.clear();
  uint64_t offset = 0;
  for (const auto& [kind, bytes] : planes_of(encoded.planes)) {
    encoded.tensor.planes.push_back(
        {.kind = kind, .part = 0, .offset = offset, .bytes = bytes->size(), .block_sums = {}});
    offset += encoded.tensor.planes.back().padded_bytes();
  }
}

backend::Shape layer_shape(const storage::Manifest& manifest, uint32_t window) {
  backend::Shape shape = exec::Engine::shape_of(manifest);
  shape.layers = 1;
  shape.vocab = 1;  // no logits
  shape.context = static_cast<uint32_t>(align_up(window, backend::kKvBlockTokens));
  shape.max_rows = std::min(window, kMostRows);
  shape.max_logit_rows = 1;
  return shape;
}

// The sink of exec::walk_layer.
class LayerRunner::Builder {
 public:
  explicit Builder(std::vector<Step>& steps) : steps_(steps) {}

  Status upload(backend::Backend& backend, const EncodedTensor& encoded) {
    const storage::Tensor& tensor = encoded.tensor;
    SLUICE_TRY_ASSIGN(at, backend.allocate(tensor.padded_bytes(), tensor.name));
    SLUICE_TRY_ASSIGN(copied, backend.create_event());
    for (const auto& [kind, bytes] : planes_of(encoded.planes)) {
      SLUICE_TRY(backend.copy_to_device(at + tensor.plane(kind)->offset, *bytes));
    }
    backend.record_copy(copied);
    SLUICE_TRY(backend.host_wait(copied));
    places_[tensor.role] = {&tensor, at};
    return {};
  }

  void norm(Role role) {
    Op& op = add(OpKind::rms_norm);
    op.in = Slot::residual;
    op.out[0] = Slot::normed;
    set_vector(op, 0, role);
  }
  void rope() {
    Op& op = add(OpKind::head_norm_rope);
    set_vector(op, 0, Role::q_norm);
    set_vector(op, 1, Role::k_norm);
  }
  void attention() { add(OpKind::attention); }
  void swiglu() { add(OpKind::swiglu); }
  void matmul(Slot in, bool accumulate, std::initializer_list<exec::Product> products) {
    Op& op = add(OpKind::matmul);
    steps_.back().first = products.begin()->matrix;
    op.in = in;
    op.accumulate = accumulate;
    for (const exec::Product& product : products) {
      const int slot = op.weight_count++;
      const auto& [tensor, at] = places_.at(product.matrix);
      op.weights[slot] = exec::weight_at(*tensor, at);
      op.out[slot] = product.out;
      if (product.bias != exec::kNoBias) set_vector(op, slot, product.bias);
    }
  }

 private:
  Op& add(OpKind kind) {
    steps_.push_back({});
    steps_.back().op.kind = kind;
    return steps_.back().op;
  }
  void set_vector(Op& op, int slot, Role role) const {
    const auto found = places_.find(role);
    if (found == places_.end()) return;
    op.has_vector[slot] = true;
    op.vectors[slot] = found->second.second;
  }

  std::vector<Step>& steps_;
  std::map<Role, std::pair<const storage::Tensor*, DeviceAddress>> places_;
};

Result<LayerRunner> LayerRunner::create(backend::Backend& backend, const backend::Shape& shape,
                                        const std::vector<EncodedTensor>& layer) {
  LayerRunner self(backend, shape);
  Builder builder(self.steps_);
  for (const EncodedTensor& encoded : layer) SLUICE_TRY(builder.upload(backend, encoded));
  exec::walk_layer(builder);
  return self;
}

Status LayerRunner::run(std::span<float> states, const Tap& tap) {
  const auto tokens = static_cast<uint32_t>(states.size() / shape_.hidden);
  SLUICE_CHECK(tokens > 0 && tokens <= shape_.context && states.size() == size_t{tokens} * shape_.hidden);
  for (uint32_t first = 0; first < tokens; first += shape_.max_rows) {
    const uint32_t count = std::min(shape_.max_rows, tokens - first);
    SLUICE_TRY(run_rows(states.subspan(size_t{first} * shape_.hidden, size_t{count} * shape_.hidden), first, tap));
  }
  return {};
}

Status LayerRunner::run_rows(std::span<float> states, uint32_t first, const Tap& tap) {
  const auto count = static_cast<uint32_t>(states.size() / shape_.hidden);
  std::vector<backend::Row> rows(count);
  for (uint32_t r = 0; r < count; ++r) rows[r].position = first + r;
  SLUICE_TRY(backend_->begin_pass(rows, states));
  for (const Step& step : steps_) {
    if (step.op.kind == OpKind::matmul && tap) SLUICE_TRY(tap(step.first, step.op.in, count));
    SLUICE_TRY(backend_->run(step.op));
  }
  SLUICE_TRY(backend_->read_slot(Slot::residual, states));
  return backend_->finish_pass({});
}

}  // namespace sluice::calibrate
