// SPDX-License-Identifier: Apache-2.0
// From a file and the user's options to a plan: backend, context, budgets.
#include <algorithm>

#include <fmt/format.h>

#include "api/state.hpp"
#include "base/available_memory.hpp"
#include "base/check.hpp"
#include "base/units.hpp"

namespace sluice::api {
namespace {

constexpr uint32_t kDefaultContext = 4096;
constexpr uint32_t kMostContext = 1u << 24;
constexpr uint32_t kDefaultLogitRows = 8;
// Of a GPU's free memory this much is left: a desktop's windows come and go.
constexpr uint64_t kDeviceMargin = 512 * kMiB;
constexpr uint64_t kDeviceMarginShare = 20;   // or this part of all of it, if that is more

// Bytes that hold everything the model could use.
uint64_t full_need(const storage::Manifest& manifest, const plan::Inputs& inputs) {
  const plan::FixedNeed fixed = inputs.fixed_need(inputs.max_rows == 0 ? plan::kMostRows : inputs.max_rows);
  uint64_t bytes = fixed.kv_bytes + fixed.scratch_bytes + fixed.overhead_bytes;
  for (const storage::Tensor& tensor : manifest.tensors) {
    if (tensor.role == storage::Role::token_embedding) continue;
    if (!inputs.in_place || tensor.is_vector()) bytes += tensor.padded_bytes();
  }
  return bytes;
}

}  // namespace

Result<uint32_t> choose_context(uint32_t trained, const std::string& path, const ModelOptions& options) {
  if (options.context == 0) return std::min(trained, kDefaultContext);
  if (options.context > kMostContext) {
    return fail(ErrorCode::usage, fmt::format("a context of {} positions; at most {} are possible", options.context,
                                              kMostContext));
  }
  if (options.context > trained) {
    log_warning(options.log, fmt::format("{}: the context of {} is longer than the {} that the model was trained for; "
                                         "what it writes beyond them may be nonsense",
                                         path, options.context, trained));
  }
  return options.context;
}

uint64_t free_to_take(const backend::DeviceMemory& device) {
  if (device.total_bytes == 0) return static_cast<uint64_t>(kShareOfFreeMemory * static_cast<double>(available_memory()));
  const uint64_t margin = std::max(kDeviceMargin, device.total_bytes / kDeviceMarginShare);
  return device.overhead_bytes + device.free_bytes - std::min(device.free_bytes, margin);
}

backend::Shape planned_shape(const storage::Manifest& manifest, uint32_t context, const ModelOptions& options) {
  backend::Shape shape = exec::Engine::shape_of(manifest);
  shape.context = static_cast<uint32_t>(align_up(context, backend::kKvBlockTokens));
  shape.sessions = options.sessions;
  shape.max_logit_rows = options.max_logit_rows == 0 ? kDefaultLogitRows : options.max_logit_rows;
  return shape;
}

plan::Inputs planning_inputs(const backend::Backend& backend, const backend::Shape& shape, uint64_t overhead_bytes,
                             const ModelOptions& options, const Bandwidths& bandwidths) {
  plan::Inputs inputs;
  inputs.host_budget_bytes = options.host_memory_bytes;
  inputs.max_rows = options.max_rows;
  inputs.in_place = options.io == Io::mmap;
  inputs.bandwidths = {.disk = bandwidths.disk, .bus = bandwidths.bus, .device_memory = bandwidths.device_memory};
  inputs.fixed_need = [&backend, shape, overhead_bytes](uint32_t rows) {
    backend::Shape sized = shape;
    sized.max_rows = rows;
    sized.max_logit_rows = std::min(shape.max_logit_rows, rows);
    const backend::MemoryNeed need = backend.memory_need(sized);
    return plan::FixedNeed{.kv_bytes = need.kv_bytes, .scratch_bytes = need.scratch_bytes,
                           .overhead_bytes = overhead_bytes};
  };
  return inputs;
}

Result<std::unique_ptr<backend::Backend>> make_backend(const ModelOptions& options) {
  const std::string& name = options.backend;
  const bool automatic = name == "auto";
  if (!automatic && name != "cpu" && name != "cuda" && name != "vulkan") {
    return fail(ErrorCode::usage,
                fmt::format("backend \"{}\" does not exist; there are: auto, cuda, vulkan, cpu", name));
  }
  // A mapping is computed in where it is, which a GPU cannot. Without a backend in the build there is nothing to say.
  const bool gpu = automatic && options.io != Io::mmap;
  std::string why;
  if (name == "cuda" || (gpu && backend::has_cuda_backend())) {
    Result<std::unique_ptr<backend::Backend>> cuda = backend::make_cuda_backend({.device = 0, .log = options.log});
    if (cuda || !automatic) return cuda;
    why = cuda.error().message;
  }
  if (name == "vulkan" || (gpu && backend::has_vulkan_backend())) {
    // A driver that computes on the CPU is slower than the CPU backend, and taken only where it is asked for.
    Result<std::unique_ptr<backend::Backend>> vulkan =
        backend::make_vulkan_backend({.software = !automatic, .log = options.log});
    if (vulkan && !why.empty()) log_info(options.log, fmt::format("running on Vulkan: {}", why));
    if (vulkan || !automatic) return vulkan;
    why += (why.empty() ? "" : "; ") + vulkan.error().message;
  }
  if (!why.empty()) log_info(options.log, fmt::format("running on the CPU: {}", why));
  const auto activations = options.cpu_activations == Activations::f32 ? backend::CpuActivations::f32
                                                                       : backend::CpuActivations::int8;
  return backend::make_cpu_backend({.threads = options.threads, .activations = activations, .log = options.log});
}

Result<Opening> open_and_plan(const std::string& path, const ModelOptions& options, const Bandwidths& bandwidths) {
  if (options.sessions == 0) return fail(ErrorCode::usage, "a model needs room for at least one session");
  SLUICE_TRY_ASSIGN(container, storage::Container::open(path));
  const bool has_residuals = container.has_residuals();
  if (options.precision == Precision::fine && !has_residuals) {
    log_info(options.log, fmt::format("{}: has no residual planes, so precision fine is that of the file", path));
  }
  SLUICE_TRY(container.set_precision(options.precision == Precision::fine ? storage::Precision::fine
                                                                          : storage::Precision::int4));
  SLUICE_TRY_ASSIGN(backend, make_backend(options));
  SLUICE_TRY_ASSIGN(context, choose_context(container.manifest().hyper.max_context, path, options));

  const storage::Manifest& manifest = container.manifest();
  const backend::Shape shape = planned_shape(manifest, context, options);
  const backend::DeviceMemory device = backend->device_memory();
  plan::Inputs inputs = planning_inputs(*backend, shape, device.overhead_bytes, options, bandwidths);
  if (inputs.in_place && !backend->computes_in_host_memory()) {
    return fail(ErrorCode::usage, fmt::format("--io mmap needs a backend that computes in host memory, and {} does not; "
                                              "use --io auto", backend->name()));
  }

  if (options.device_memory_bytes) {
    inputs.device_budget_bytes = *options.device_memory_bytes;
  } else {
    const uint64_t need = full_need(manifest, inputs);
    const uint64_t free = free_to_take(device);
    inputs.device_budget_bytes = std::min(need, free);
    if (need > free) {
      log_info(options.log, fmt::format("the model could use {}, of which {} are free to take; the rest of its weights is "
                                        "read from disk in every pass (--device-memory sets another limit)",
                                        format_bytes(need), format_bytes(free)));
    }
  }
  Result<plan::Plan> plan = plan::make_plan(manifest, inputs);
  if (!plan) {
    plan.error().message = fmt::format("{}: {}", path, plan.error().message);
    return fail(std::move(plan.error()));
  }
  return Opening{.container = std::move(container), .backend = std::move(backend), .shape = shape,
                 .plan = std::move(*plan), .context = context, .device_budget_bytes = inputs.device_budget_bytes,
                 .has_residuals = has_residuals};
}

}  // namespace sluice::api

namespace sluice {

Result<PlanReport> plan_model(const std::string& path, const ModelOptions& options, const Bandwidths& bandwidths) {
  SLUICE_TRY_ASSIGN(opening, api::open_and_plan(path, options, bandwidths));
  const plan::Plan& plan = opening.plan;
  PlanReport report{.backend = opening.backend->name(), .device_bytes = opening.device_budget_bytes,
                    .host_bytes = options.host_memory_bytes,
                    .resident_bytes = plan.resident_bytes, .host_tier_bytes = plan.host_bytes,
                    .disk_tier_bytes = plan.disk_bytes, .ring_bytes = plan.ring_bytes, .kv_bytes = plan.kv_bytes,
                    .scratch_bytes = plan.scratch_bytes + plan.overhead_bytes, .context = opening.context,
                    .max_rows = plan.max_rows,
                    .smallest_device_bytes = plan.smallest_device_bytes, .pass_seconds = plan.pass_seconds,
                    .tokens_per_second = plan.pass_seconds > 0 ? 1 / plan.pass_seconds : 0, .bound = plan.bound,
                    .tensors = {}};
  constexpr const char* kTierNames[] = {"device", "host", "disk", "rows"};
  const std::vector<storage::Tensor>& tensors = opening.container.manifest().tensors;
  for (size_t i = 0; i < tensors.size(); ++i) {
    report.tensors.push_back({.tensor = tensors[i].name, .tier = kTierNames[static_cast<size_t>(plan.tiers[i])],
                              .bytes = tensors[i].padded_bytes()});
  }
  return report;
}

}  // namespace sluice
