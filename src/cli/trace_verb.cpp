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
  bool json = false;
};

Result<int> show(const Flags& flags) {
  SLUICE_TRY_ASSIGN(text, analyze_trace(flags.path));
  const nlohmann::json report = nlohmann::json::parse(text, nullptr, false);
  if (!report.is_object()) return fail(ErrorCode::internal, "analyze_trace() did not give a JSON object");
  if (flags.json) SLUICE_TRY(print_json(report));
  else SLUICE_TRY(print(trace_summary(report) + "\n"));
  return 0;
}

}  // namespace

void add_trace(CLI::App& app, Chosen& chosen) {
  auto flags = std::make_shared<Flags>();
  CLI::App* verb = app.add_subcommand("trace", "Show where the time of a traced run went, and what stood out");
  verb->add_option("file", flags->path, "The .sltrace file of `sluice run --trace`")->required();
  verb->add_flag("--json", flags->json, "Print everything as JSON");
  verb->footer("Example:\n  sluice trace run.sltrace");
  verb->callback([flags, &chosen] { chosen.action = [flags] { return show(*flags); }; });
}

}  // namespace sluice::cli
