// SPDX-License-Identifier: Apache-2.0
#include "calibrate/quantize_layer.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "base/check.hpp"
#include "base/units.hpp"
#include "import/encode.hpp"
#include "import/slabs.hpp"
#include "import/text.hpp"
#include "quant/gptq.hpp"
#include "quant/layout.hpp"

namespace sluice::calibrate {
namespace {

using import::SourceTensor;
using storage::PlaneKind;
using storage::Role;
using storage::Scheme;
using storage::Tensor;
using Json = nlohmann::ordered_json;

// The first matrix with the same inputs: whose name the tap gives them under.
Role first_of_input(Role role) {
  switch (role) {
    case Role::k:
    case Role::v:
      return Role::q;
    case Role::up:
      return Role::gate;
    default:
      return role;
  }
}

void append(quant::Planes& to, const quant::Planes& from) {
  const auto add = [](std::vector<std::byte>& a, const std::vector<std::byte>& b) {
    a.insert(a.end(), b.begin(), b.end());
  };
  add(to.values, from.values);
  add(to.scales, from.scales);
  add(to.zeros, from.zeros);
  add(to.bias, from.bias);
  add(to.residual, from.residual);
  add(to.residual_scales, from.residual_scales);
}

class LayerWork {
 public:
  LayerWork(const LayerContext& context, uint32_t layer) : context_(context), layer_(layer) {
    const std::vector<SourceTensor>& tensors = context.checkpoint.tensors;
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (tensors[i].layer == static_cast<int32_t>(layer)) members_.push_back(i);
    }
  }

  Status run(WorkFolder& work) {
    SLUICE_TRY_ASSIGN(backend, context_.options.make_backend(context_.backend, {}));
    const backend::Shape shape = layer_shape(context_.checkpoint.manifest, context_.window);
    SLUICE_TRY(backend->prepare(shape));
    SLUICE_TRY(encode_as_it_is());
    {
      SLUICE_TRY_ASSIGN(runner, LayerRunner::create(*backend, shape, as_it_is_));
      SLUICE_TRY(measure_inputs(*backend, runner, work));
    }
    std::vector<EncodedTensor> rounded;
    SLUICE_TRY(round_matrices(backend->calibration(), rounded));
    if (layer_ + 1 < context_.checkpoint.manifest.hyper.layers) {
      SLUICE_TRY_ASSIGN(runner, LayerRunner::create(*backend, shape, rounded));
      SLUICE_TRY(write_states(runner, work));
    }
    std::erase_if(rounded, [&](const EncodedTensor& one) {
      const std::optional<Choice>* choice = choice_of(one.tensor.role);
      return choice != nullptr && *choice && !(*choice)->scheme;
    });
    return work.finish_layer(layer_, rounded, notes_);
  }

 private:
  const SourceTensor& source(size_t member) const { return context_.checkpoint.tensors[member]; }
  const import::SourceFile& file(size_t member) const { return context_.checkpoint.files[source(member).file]; }
  uint32_t threads() const { return context_.options.threads; }
  const std::optional<Choice>* choice_of(Role role) const {
    for (const size_t i : members_) {
      if (source(i).role == role) return &context_.choices[i];
    }
    return nullptr;
  }
  void say(uint64_t steps, const std::string& what) const {
    context_.advance(steps, fmt::format("layer {}: {}", layer_, what));
  }

  // `encode`: Result<quant::Planes>(first row, rows as floats) of rows that are a multiple of 64.
  template <class Encode>
  Result<quant::Planes> encode_rows(size_t member, const Encode& encode) const {
    constexpr uint32_t kRowsEach = 256;
    const SourceTensor& from = source(member);
    const auto work = [&](uint64_t slab) -> Result<quant::Planes> {
      const auto first = static_cast<uint32_t>(slab * kRowsEach);
      const uint32_t rows = std::min(kRowsEach, from.rows - first);
      SLUICE_TRY_ASSIGN(weights, import::read_matrix_rows(file(member), from, first, rows));
      return encode(slab, rows, weights);
    };
    quant::Planes all;
    SLUICE_TRY(
        import::in_order(ceil_div(from.rows, kRowsEach), threads(), work, [&](const quant::Planes& part) -> Status {
          append(all, part);
          return {};
        }));
    return all;
  }

  static Tensor rows_of(const Tensor& whole, uint32_t rows) {
    Tensor part = whole;
    part.rows = rows;
    return part;
  }

  // Every tensor of the layer without loss.
  Status encode_as_it_is() {
    for (const size_t i : members_) {
      EncodedTensor encoded;
      if (source(i).vector) {
        SLUICE_TRY_ASSIGN(values, import::read_vector(file(i), source(i)));
        encoded.tensor = import::tensor_of(source(i), Scheme::f32, 0);
        encoded.planes = quant::lay_out_floats(encoded.tensor, values);
      } else {
        SLUICE_TRY_ASSIGN(extent, import::measure_matrix(file(i), source(i),
                                                         import::tensor_of(source(i), Scheme::f16, 0), threads()));
        encoded.tensor = import::narrowest_tensor(source(i), extent);
        SLUICE_TRY_ASSIGN(
            planes,
            encode_rows(i, [&](uint64_t, uint32_t rows, std::span<const float> weights) -> Result<quant::Planes> {
              return quant::round_rows(rows_of(encoded.tensor, rows), weights);
            }));
        encoded.planes = std::move(planes);
      }
      place_planes(encoded);
      as_it_is_.push_back(std::move(encoded));
    }
    return {};
  }

  // By the backend, where it can, else here.
  Status measure_inputs(backend::Backend& backend, LayerRunner& runner, const WorkFolder& work) {
    std::map<Role, uint32_t> cols;
    for (const size_t i : members_) {
      if (!context_.choices[i] || context_.choices[i]->method != Method::gptq) continue;
      cols.try_emplace(first_of_input(source(i).role), source(i).cols);
    }
    backend::Calibration* device = backend.calibration();
    std::map<Role, uint32_t> sums;  // of the device
    for (const auto& [first, width] : cols) {
      if (device == nullptr) {
        moments_.try_emplace(first, width);
        continue;
      }
      SLUICE_TRY_ASSIGN(sum, device->create_sum(width));
      sums[first] = sum;
    }
    std::vector<float> inputs;
    const LayerRunner::Tap tap = [&](Role first, backend::Slot slot, uint32_t count) -> Status {
      const auto found = cols.find(first);
      if (found == cols.end()) return {};
      if (device != nullptr) return device->add(sums.at(first), slot);
      inputs.resize(size_t{count} * found->second);
      SLUICE_TRY(backend.read_slot(slot, inputs));
      moments_.at(first).add(inputs, count, threads());
      return {};
    };
    SLUICE_TRY_ASSIGN(states, work.open_states(layer_));
    std::vector<float> sequence(context_.states_floats());
    for (uint32_t w = 0; w < context_.windows; ++w) {
      if (!cols.empty()) {
        SLUICE_TRY(work.read_states(states, layer_, w, sequence));
        SLUICE_TRY(runner.run(sequence, tap));
      }
      say(1, "measuring inputs");
    }
    for (const auto& [first, sum] : sums) {
      const uint32_t width = cols.at(first);
      std::vector<float> total(size_t{width} * width);
      SLUICE_TRY(device->take(sum, total));
      moments_.try_emplace(first, width, uint64_t{context_.windows} * context_.window, std::move(total));
    }
    return {};
  }

  // In the order of the checkpoint; consumes the moments.
  Status round_matrices(backend::Calibration* device, std::vector<EncodedTensor>& rounded) {
    quant::InvertFactor invert = quant::invert_on_host(threads());
    if (device != nullptr) {
      invert = [device](std::span<float> matrix, std::span<float>, uint32_t n) {
        return device->invert_factor(matrix, n);
      };
    }
    std::map<Role, quant::GptqFactor> factors;
    uint64_t left = context_.windows;  // steps
    for (size_t m = 0; m < members_.size(); ++m) {
      const size_t i = members_[m];
      const std::optional<Choice>& choice = context_.choices[i];
      if (!choice || !choice->scheme) {
        rounded.push_back(std::move(as_it_is_[m]));
        place_planes(rounded.back());
        continue;
      }
      as_it_is_[m] = {};
      const Role first = first_of_input(source(i).role);
      if (choice->method == Method::gptq && !factors.contains(first)) {
        factors.clear();  // of an input whose matrices are done
        const auto moments = moments_.extract(first);
        const std::string what =
            fmt::format("{}: tensor {}", file(i).path, import::in_quotes(source(i).source_name));
        SLUICE_TRY_ASSIGN(factor, quant::GptqFactor::create(std::move(moments.mapped()), context_.options.damp, what,
                                                            invert));
        factors.emplace(first, std::move(factor));
      }
      const quant::GptqFactor* factor = choice->method == Method::gptq ? &factors.at(first) : nullptr;
      SLUICE_TRY_ASSIGN(encoded, round_matrix(i, *choice, factor));
      rounded.push_back(std::move(encoded));
      const uint64_t steps = std::min<uint64_t>(left, ceil_div(context_.windows, members_.size()));
      left -= steps;
      say(steps, "rounding " + source(i).name);
    }
    say(left, "rounded");
    return {};
  }

  Result<EncodedTensor> round_matrix(size_t member, const Choice& choice, const quant::GptqFactor* factor) {
    const bool quantized = choice.scheme == Scheme::int4 || choice.scheme == Scheme::int8;
    EncodedTensor encoded;
    Tensor& tensor = encoded.tensor;
    tensor = import::tensor_of(source(member), *choice.scheme, quantized ? choice.group_elems : 0);
    if (context_.options.residual && tensor.scheme == Scheme::int4) tensor.residual_group_elems = quant::kResidualGroup;
    SLUICE_TRY_ASSIGN(extent, import::measure_matrix(file(member), source(member), tensor, threads()));
    tensor.scale_exponent = quant::choose_scale_exponent(tensor, extent);
    std::vector<quant::RoundingLoss> losses(source(member).rows);  // more than slabs
    SLUICE_TRY_ASSIGN(
        planes,
        encode_rows(member, [&](uint64_t slab, uint32_t rows, std::span<const float> weights) -> Result<quant::Planes> {
          const Tensor part = rows_of(tensor, rows);
          quant::Planes rounded;
          if (factor != nullptr) {
            rounded = quant::round_by_gptq(part, weights, *factor, choice.symmetric, losses[slab]);
          } else {
            rounded = quant::round_rows(part, weights);
            losses[slab] = quant::loss_of(part, weights, rounded);
          }
          if (context_.options.residual && part.scheme == Scheme::int4) {
            losses[slab].fine_squares = factor != nullptr
                                            ? quant::add_residual_by_gptq(part, weights, *factor, rounded)
                                            : quant::add_residual(part, weights, rounded);
          }
          return rounded;
        }));
    encoded.planes = std::move(planes);
    place_planes(encoded);
    quant::RoundingLoss loss;
    for (const quant::RoundingLoss& part : losses) loss.merge(part);
    notes_.push_back(matrix_notes(tensor, choice, loss, factor != nullptr ? factor->damp() : -1.0f));
    return encoded;
  }

  Status write_states(LayerRunner& runner, const WorkFolder& work) {
    SLUICE_TRY_ASSIGN(from, work.open_states(layer_));
    SLUICE_TRY_ASSIGN(to, work.begin_states(layer_ + 1));
    std::vector<float> sequence(context_.states_floats());
    for (uint32_t w = 0; w < context_.windows; ++w) {
      SLUICE_TRY(work.read_states(from, layer_, w, sequence));
      SLUICE_TRY(runner.run(sequence, {}));
      SLUICE_TRY(work.append_states(to, layer_ + 1, sequence));
      say(1, "computing outputs");
    }
    return work.finish_states(std::move(to), layer_ + 1);
  }

  const LayerContext& context_;
  const uint32_t layer_;
  std::vector<size_t> members_;          // tensors of the checkpoint
  std::vector<EncodedTensor> as_it_is_;  // in that order
  std::map<Role, quant::SecondMoments> moments_;
  Json notes_ = Json::array();
};

}  // namespace

Status quantize_layer(const LayerContext& context, uint32_t layer, WorkFolder& work) {
  return LayerWork(context, layer).run(work);
}

Json matrix_notes(Tensor tensor, const Choice& choice, const quant::RoundingLoss& loss, float damp) {
  const auto bits_of = [&](PlaneKind kind) {
    return 8.0 * static_cast<double>(storage::expected_plane_bytes(tensor, kind)) /
           (double{1} * tensor.rows * tensor.cols);
  };
  Json json = {{"name", tensor.name}, {"scheme", storage::name_of(tensor.scheme)}};
  if (tensor.group_elems != 0) json["group"] = tensor.group_elems;
  json["method"] = damp >= 0 ? "gptq" : "rtn";
  if (!choice.symmetric) json["symmetric"] = false;
  json["bits_per_weight"] = bits_of(PlaneKind::values) + bits_of(PlaneKind::scales) +
                            (choice.symmetric ? 0.0 : bits_of(PlaneKind::zeros));
  json["relative_error"] = loss.relative(loss.error_squares);
  if (loss.fine_squares) {
    tensor.residual_group_elems = quant::kResidualGroup;
    json["residual_bits_per_weight"] = bits_of(PlaneKind::residual) + bits_of(PlaneKind::residual_scales);
    json["fine_relative_error"] = loss.relative(*loss.fine_squares);
  }
  if (damp >= 0) {
    json["output_error"] = std::sqrt(loss.output_squares / tensor.rows) * std::ldexp(1.0, tensor.scale_exponent);
    json["damp"] = damp;
  }
  return json;
}

}  // namespace sluice::calibrate
