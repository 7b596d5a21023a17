// SPDX-License-Identifier: Apache-2.0
// sluice trace: what a trace of `run --trace` says.
#include <memory>

#include <nlohmann/json.hpp>

#include "output.hpp"
#include "trace_summary.hpp"
#include "verb.hpp"
#include "sluice/sluice.hpp"

namespace sluice::cli {
namespace {

struct Flags {
  std::string path;
  std::string html, perfetto, chrome;
  bool json = false, confirm = false;
};

Result<std::string> confirm(const std::string& path) {
  Progress progress("running again", Progress::Unit::items);
  return confirm_trace(path, {.log = log_to_stderr(true), .progress = [&progress](uint64_t done, uint64_t total) {
                                progress.update(done, total);
                              }});
}

Result<int> show(const Flags& flags) {
  SLUICE_TRY_ASSIGN(text, flags.confirm ? confirm(flags.path) : analyze_trace(flags.path));
  const nlohmann::json report = nlohmann::json::parse(text, nullptr, false);
  if (!report.is_object()) return fail(ErrorCode::internal, "analyze_trace() did not give a JSON object");
  if (!flags.html.empty()) SLUICE_TRY(export_trace(flags.path, TraceFormat::html, flags.html, text));
  if (!flags.perfetto.empty()) SLUICE_TRY(export_trace(flags.path, TraceFormat::perfetto, flags.perfetto));
  if (!flags.chrome.empty()) SLUICE_TRY(export_trace(flags.path, TraceFormat::chrome, flags.chrome));
  if (flags.json) SLUICE_TRY(print_json(report));
  else SLUICE_TRY(print(trace_summary(report) + "\n"));
  return 0;
}

}  // namespace

void add_trace(CLI::App& app, Chosen& chosen) {
  auto flags = std::make_shared<Flags>();
  CLI::App* verb = app.add_subcommand("trace", "Show where the time of a traced run went, and what stood out");
  verb->add_option("file", flags->path, "The .sltrace file of `sluice run --trace`")->required();
  verb->add_flag("--confirm", flags->confirm,
                 "Make the run again, as it was and with each suspect out of the way, to confirm the causes");
  verb->add_flag("--json", flags->json, "Print everything as JSON");
  verb->add_option("--html", flags->html, "Write a report that needs nothing but a browser")->type_name("FILE");
  verb->add_option("--perfetto", flags->perfetto, "Write the trace for ui.perfetto.dev")->type_name("FILE");
  verb->add_option("--chrome", flags->chrome, "Write the trace as JSON for chrome://tracing")->type_name("FILE");
  verb->footer("Example:\n  sluice trace run.sltrace --html report.html");
  verb->callback([flags, &chosen] { chosen.action = [flags] { return show(*flags); }; });
}

}  // namespace sluice::cli
