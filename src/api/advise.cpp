// SPDX-License-Identifier: Apache-2.0
// advise of sluice.hpp: every shipped recipe as a file that is not there yet, planned for a device.
#include <fmt/format.h>

#include <algorithm>
#include <filesystem>

#include "api/device_profile.hpp"
#include "api/state.hpp"
#include "base/available_memory.hpp"
#include "calibrate/recipe.hpp"
#include "import/checkpoint.hpp"
#include "import/encode.hpp"
#include "import/model_toml.hpp"
#include "import/text.hpp"
#include "plan/advice.hpp"

namespace sluice::api {
namespace {

using storage::PlaneKind;
using storage::Scheme;
using storage::Tensor;

constexpr uint64_t kMostBudget = uint64_t{1} << 60;

// A model without its weights.
struct Outline {
  storage::Manifest manifest;                 // no tensors
  std::vector<import::SourceTensor> tensors;  // BF16, bytes nowhere
};

Result<Outline> outline_of(const std::string& path, const LogHook& log) {
  Outline outline;
  bool bias = false;
  std::error_code ignored;
  if (path.ends_with(".toml")) {
    SLUICE_TRY_ASSIGN(shape, import::read_model_toml(path));
    outline.manifest.model_name = std::move(shape.name);
    outline.manifest.hyper = shape.hyper;
    outline.manifest.rope = std::move(shape.rope);
    bias = shape.hyper.architecture == storage::Architecture::qwen2;
  } else if (path.ends_with(".gguf") || std::filesystem::is_directory(path, ignored)) {
    SLUICE_TRY_ASSIGN(checkpoint, import::open_checkpoint(path, log));
    bias = std::any_of(checkpoint.tensors.begin(), checkpoint.tensors.end(),
                       [](const import::SourceTensor& tensor) { return tensor.role == storage::Role::q_bias; });
    outline.manifest = std::move(checkpoint.manifest);
  } else {
    SLUICE_TRY_ASSIGN(container, storage::Container::open(path));
    bias = container.find(storage::Role::q_bias, 0) != nullptr;
    outline.manifest = container.manifest();
    outline.manifest.tensors.clear();
  }
  for (import::WantedTensor& wanted : import::wanted_tensors(outline.manifest.hyper, bias)) {
    import::SourceTensor tensor;
    tensor.role = wanted.role;
    tensor.layer = wanted.layer;
    tensor.rows = wanted.rows;
    tensor.cols = wanted.cols;
    tensor.vector = wanted.vector;
    tensor.name = std::move(wanted.name);
    tensor.type = import::SourceType::bf16;
    outline.tensors.push_back(std::move(tensor));
  }
  return outline;
}

Tensor with_planes(Tensor tensor, bool zeros) {
  uint64_t offset = 0;
  for (const PlaneKind kind : {PlaneKind::values, PlaneKind::scales, PlaneKind::zeros, PlaneKind::row_sums}) {
    if (kind == PlaneKind::zeros && !zeros) continue;
    const uint64_t bytes = storage::expected_plane_bytes(tensor, kind);
    if (bytes == 0) continue;
    tensor.planes.push_back({.kind = kind, .part = 0, .offset = offset, .bytes = bytes, .block_sums = {}});
    offset += tensor.planes.back().padded_bytes();
  }
  return tensor;
}

// The tensors as `quantize` would write and `set_precision` would split them.
std::vector<Tensor> tensors_of(const Outline& outline, const std::vector<std::optional<calibrate::Choice>>& choices,
                               bool residuals) {
  std::vector<Tensor> tensors;
  for (size_t i = 0; i < outline.tensors.size(); ++i) {
    const import::SourceTensor& source = outline.tensors[i];
    if (!choices[i]) {
      tensors.push_back(with_planes(import::tensor_of(source, Scheme::f32, 0), false));
      continue;
    }
    const Scheme scheme = choices[i]->scheme.value_or(Scheme::bf16);
    const bool groups = scheme == Scheme::int4 || scheme == Scheme::int8;
    const Tensor tensor = import::tensor_of(source, scheme, groups ? choices[i]->group_elems : 0);
    tensors.push_back(with_planes(tensor, !choices[i]->symmetric));
    if (!residuals || scheme != Scheme::int4) continue;
    Tensor second = tensor;
    second.residual_group_elems = quant::kResidualGroup;
    tensors.push_back(with_planes(second.residual(), false));
  }
  return tensors;
}

// The machine that is planned for.
struct Target {
  std::string name;
  std::unique_ptr<backend::Backend> backend;  // whose needs are those of the machine, or stand in for them
  std::string backend_name;
  uint64_t device_bytes = 0, host_bytes = 0, overhead_bytes = 0;
  Bandwidths rates;
};

Result<Target> target_of(const AdviceOptions& options) {
  Target target;
  ModelOptions machine = options.machine;
  if (options.device.empty()) {
    SLUICE_TRY_ASSIGN(backend, make_backend(machine));
    const backend::DeviceMemory memory = backend->device_memory();
    target.backend_name = backend->name();
    target.name = backend->device_name();
    target.overhead_bytes = memory.overhead_bytes;
    target.device_bytes = free_to_take(memory);
    // Where the device's memory is the host's, all of it is the device's.
    if (memory.total_bytes != 0) {
      target.host_bytes = static_cast<uint64_t>(kShareOfFreeMemory * static_cast<double>(available_memory()));
    }
    target.backend = std::move(backend);
  } else {
    SLUICE_TRY_ASSIGN(profile, read_device_profile(options.device));
    // The CPU's KV cache is as large as every other backend's; its activations stand in for theirs.
    machine.backend = "cpu";
    SLUICE_TRY_ASSIGN(backend, make_backend(machine));
    target.name = profile.name;
    target.backend_name = profile.backend;
    target.overhead_bytes = profile.overhead_bytes();
    target.device_bytes = profile.device_budget_bytes();
    target.host_bytes = profile.host_budget_bytes();
    target.rates = profile.rates;
    target.backend = std::move(backend);
  }
  if (machine.device_memory_bytes) target.device_bytes = *machine.device_memory_bytes;
  if (machine.host_memory_bytes != 0) target.host_bytes = machine.host_memory_bytes;
  for (double Bandwidths::*rate : {&Bandwidths::disk, &Bandwidths::bus, &Bandwidths::device_memory}) {
    if (options.bandwidths.*rate > 0) target.rates.*rate = options.bandwidths.*rate;
  }
  return target;
}

Result<std::vector<calibrate::Recipe>> measured_recipes(const std::string& folder) {
  std::error_code error;
  std::vector<std::string> paths;
  for (std::filesystem::directory_iterator at(folder, error), end; !error && at != end; at.increment(error)) {
    if (at->path().extension() == ".toml") paths.push_back(at->path().string());
  }
  if (error) {
    return fail(
        ErrorCode::not_found,
        fmt::format("{}: the folder of recipes cannot be read: {}; name it with --recipes", folder, error.message()),
        error.value());
  }
  std::sort(paths.begin(), paths.end());
  std::vector<calibrate::Recipe> recipes;
  for (const std::string& path : paths) {
    SLUICE_TRY_ASSIGN(recipe, calibrate::read_recipe(path));
    if (!recipe.measured) continue;
    if (!recipes.empty() && recipes.front().measured->model != recipe.measured->model) {
      return fail(ErrorCode::usage,
                  fmt::format("{}: measured on {}, {} on {}; losses of different models do not compare", path,
                              import::in_quotes(recipe.measured->model), recipes.front().path,
                              import::in_quotes(recipes.front().measured->model)));
    }
    recipes.push_back(std::move(recipe));
  }
  if (recipes.empty()) {
    return fail(ErrorCode::usage, fmt::format("{}: no recipe in it has a [measured] table, so nothing is known of what "
                                              "they lose; run `sluice eval` and write down its KL",
                                              folder));
  }
  return recipes;
}

class Advisor {
 public:
  Advisor(const Outline& outline, const Target& target, const AdviceOptions& options, uint32_t context)
      : outline_(outline), target_(target), options_(options), context_(context) {}

  Result<std::vector<AdviceCandidate>> place(const calibrate::Recipe& recipe) const {
    SLUICE_TRY_ASSIGN(choices, calibrate::apply_recipe(recipe, outline_.tensors, std::nullopt));
    std::vector<AdviceCandidate> candidates(recipe.measured->kl_fine ? 2 : 1);
    candidates[0].kl = recipe.measured->kl;
    place(tensors_of(outline_, choices, false), candidates[0], candidates[0].tokens_per_second);
    if (candidates.size() == 2) {
      candidates[1].residual = true;
      candidates[1].kl = *recipe.measured->kl_fine;
      candidates[1].tokens_per_second = candidates[0].tokens_per_second;
      place(tensors_of(outline_, choices, true), candidates[1], candidates[1].fine_tokens_per_second);
    }
    for (AdviceCandidate& candidate : candidates) candidate.recipe = std::filesystem::path(recipe.path).stem().string();
    return candidates;
  }

 private:
  void place(std::vector<Tensor> tensors, AdviceCandidate& candidate, double& tokens_per_second) const {
    storage::Manifest manifest = outline_.manifest;
    manifest.tensors = std::move(tensors);
    for (const Tensor& tensor : manifest.tensors) candidate.bytes += tensor.padded_bytes();
    const backend::Shape shape = planned_shape(manifest, context_, options_.machine);
    plan::Inputs inputs =
        planning_inputs(*target_.backend, shape, target_.overhead_bytes, options_.machine, target_.rates);
    inputs.host_budget_bytes = target_.host_bytes;
    inputs.device_budget_bytes = target_.device_bytes;
    const Result<plan::Plan> plan = plan::make_plan(manifest, inputs);
    candidate.fits = plan.has_value();
    if (!plan) {
      inputs.device_budget_bytes = kMostBudget;
      const Result<plan::Plan> unlimited = plan::make_plan(manifest, inputs);
      if (unlimited) candidate.smallest_device_bytes = unlimited->smallest_device_bytes;
      return;
    }
    candidate.device_bytes = plan->resident_bytes;
    candidate.host_bytes = plan->host_bytes;
    candidate.disk_bytes = plan->disk_bytes;
    candidate.smallest_device_bytes = plan->smallest_device_bytes;
    candidate.bound = plan->bound;
    tokens_per_second = plan->pass_seconds > 0 ? 1 / plan->pass_seconds : 0;
  }

  const Outline& outline_;
  const Target& target_;
  const AdviceOptions& options_;
  const uint32_t context_;
};

}  // namespace
}  // namespace sluice::api

namespace sluice {

Result<AdviceReport> advise(const AdviceOptions& options) {
  SLUICE_TRY_ASSIGN(recipes, api::measured_recipes(options.recipes));
  SLUICE_TRY_ASSIGN(outline, api::outline_of(options.model, options.machine.log));
  SLUICE_TRY_ASSIGN(target, api::target_of(options));
  SLUICE_TRY_ASSIGN(context, api::choose_context(outline.manifest.hyper.max_context, options.model, options.machine));
  const api::Advisor advisor(outline, target, options, context);
  const auto workload = static_cast<plan::Workload>(options.workload);
  AdviceReport report{.model = outline.manifest.model_name,
                      .device = target.name,
                      .backend = target.backend_name,
                      .measured_on = recipes.front().measured->model,
                      .device_bytes = target.device_bytes,
                      .host_bytes = target.host_bytes,
                      .context = context,
                      .kl_limit = plan::loss_limit(workload),
                      .bandwidths = target.rates,
                      .candidates = {},
                      .chosen = {},
                      .reasons = {}};
  std::vector<plan::Candidate> candidates;
  for (const calibrate::Recipe& recipe : recipes) {
    SLUICE_TRY_ASSIGN(placed, advisor.place(recipe));
    for (AdviceCandidate& one : placed) {
      candidates.push_back({.recipe = one.recipe,
                            .residual = one.residual,
                            .kl = one.kl,
                            .fits = one.fits,
                            .streams = one.host_bytes + one.disk_bytes > 0,
                            .tokens_per_second = one.residual ? one.fine_tokens_per_second : one.tokens_per_second});
      report.candidates.push_back(std::move(one));
    }
  }
  plan::Decision decision = plan::choose(candidates, workload, options.tokens_per_second);
  report.chosen = decision.candidate;
  report.reasons = std::move(decision.reasons);
  return report;
}

}  // namespace sluice
