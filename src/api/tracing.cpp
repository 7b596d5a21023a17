// SPDX-License-Identifier: Apache-2.0
// Traces through the public API: writing them, and what they say.
#include <sys/utsname.h>

#include <filesystem>
#include <thread>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "api/rerun.hpp"
#include "api/state.hpp"
#include "sluice/sluice.hpp"
#include "storage/container.hpp"
#include "trace/export.hpp"
#include "trace/report.hpp"
#include "trace/tokens.hpp"
#include "trace/trace_file.hpp"

namespace sluice {
namespace {

const char* tier_name(plan::Tier tier) {
  switch (tier) {
    case plan::Tier::device: return "device";
    case plan::Tier::host: return "host";
    case plan::Tier::disk: return "disk";
    case plan::Tier::rows: break;
  }
  return "rows";
}

// Which tier each tensor lives in, by layer (-1: outside of them): bytes a pass takes from there.
nlohmann::json tier_map(const exec::Engine& engine) {
  const storage::Manifest& manifest = engine.container().manifest();
  const plan::Plan& plan = engine.plan();
  nlohmann::json layers = nlohmann::json::array();
  for (size_t i = 0; i < manifest.tensors.size(); ++i) {
    const storage::Tensor& tensor = manifest.tensors[i];
    if (layers.empty() || layers.back()["layer"] != tensor.layer) {
      layers.push_back({{"layer", tensor.layer}, {"device", 0u}, {"host", 0u}, {"disk", 0u}, {"rows", 0u}});
    }
    nlohmann::json& bytes = layers.back()[tier_name(plan.tiers[i])];
    bytes = bytes.get<uint64_t>() + tensor.padded_bytes();
  }
  return layers;
}

std::string note_of(const ModelInfo& info, const ModelOptions& options, const exec::Engine& engine, const TraceNote& of) {
  utsname names = {};
  (void)::uname(&names);
  nlohmann::json note = {
      {"sluice", version()},
      {"command", of.command},
      {"model", {{"name", info.name}, {"architecture", info.architecture}, {"uuid", info.uuid}, {"file", info.path},
                 {"layers", info.layers}, {"hidden", info.hidden}, {"vocab", info.vocab}, {"context", info.context}}},
      {"backend", info.backend},
      {"device", info.device},
      {"io", info.io},
      {"bytes", {{"weights", info.weight_bytes}, {"device", info.device_weight_bytes}, {"host", info.host_weight_bytes},
                 {"disk", info.disk_weight_bytes}, {"ring", info.ring_bytes}, {"kv", info.kv_bytes},
                 {"scratch", info.scratch_bytes}, {"staging", info.staging_bytes}}},
      {"kernel", fmt::format("{} {}", names.sysname, names.release)},
      {"cores", std::thread::hardware_concurrency()},
      {"tiers", tier_map(engine)}};
  if (!of.prompt.empty()) {
    std::error_code unknown;
    const std::filesystem::path path = std::filesystem::absolute(info.path, unknown);
    note["rerun"] = api::rerun_json({.path = unknown ? info.path : path.string(), .options = options,
                                  .prompt = of.prompt, .generate = of.generate});
  }
  return note.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace

Status Model::start_trace(const std::string& path, const TraceNote& note) {
  if (state_->collector) return fail(ErrorCode::usage, "a trace of this model is being written already; stop it first");
  exec::Engine& engine = *state_->engine;
  const ModelInfo& info = state_->info;
  SLUICE_TRY_ASSIGN(collector, trace::Collector::start(engine.recorder(), path,
                                                       note_of(info, state_->options, engine, note),
                                                       {.gpu_bus_id = engine.backend().pci_bus_id(),
                                                        .weights = info.path}));
  state_->collector = std::move(collector);
  return {};
}

Result<TraceTotals> Model::stop_trace() {
  if (!state_->collector) return fail(ErrorCode::usage, "no trace of this model is being written; start one first");
  const std::unique_ptr<trace::Collector> collector = std::move(state_->collector);
  SLUICE_TRY_ASSIGN(totals, collector->stop());
  return TraceTotals{.records = totals.records, .dropped = totals.dropped};
}

Result<std::string> analyze_trace(const std::string& path) {
  SLUICE_TRY_ASSIGN(trace, trace::read_trace(path));
  SLUICE_TRY_ASSIGN(tokens, trace::tokens_of(trace));
  return trace::report_of(trace, tokens).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

Status export_trace(const std::string& path, TraceFormat format, const std::string& output, const std::string& report) {
  SLUICE_TRY_ASSIGN(trace, trace::read_trace(path));
  switch (format) {
    case TraceFormat::perfetto:
      return trace::write_to_file(output, [&](const trace::Sink& sink) { return trace::write_perfetto(trace, sink); });
    case TraceFormat::chrome:
      return trace::write_to_file(output,
                                  [&](const trace::Sink& sink) { return trace::write_chrome_json(trace, sink); });
    case TraceFormat::html: break;
  }
  SLUICE_TRY_ASSIGN(tokens, trace::tokens_of(trace));
  nlohmann::json shown = report.empty() ? trace::report_of(trace, tokens) : nlohmann::json::parse(report, nullptr, false);
  if (!shown.is_object()) return fail(ErrorCode::usage, "the report to be shown is not what analyze_trace() gave");
  const std::string page = trace::html_report(shown, tokens);
  return trace::write_to_file(output, [&](const trace::Sink& sink) { return sink(page); });
}

}  // namespace sluice
