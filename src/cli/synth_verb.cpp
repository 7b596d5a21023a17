// SPDX-License-Identifier: Apache-2.0
// sluice synth: random weights in a model's true shapes, for benchmarks.
#include <memory>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "flags.hpp"
#include "interrupt.hpp"
#include "output.hpp"
#include "verb.hpp"
#include "sluice/sluice.hpp"

namespace sluice::cli {
namespace {

struct Flags {
  SynthOptions options;
  bool json = false;
};

Result<int> synthesize(const Flags& flags) {
  SynthOptions options = flags.options;
  RemoveOnInterrupt interrupt(options.output);
  Progress progress("writing", Progress::Unit::bytes);
  options.progress = [&progress](uint64_t done, uint64_t total) { progress.update(done, total); };
  SLUICE_TRY_ASSIGN(report, synth_model(options));
  const double rate = report.seconds > 0 ? static_cast<double>(report.bytes) / report.seconds : 0;
  note(fmt::format("wrote {} tensors, {}, in {} ({})", report.tensors, bytes_text(report.bytes),
                   seconds_text(report.seconds), rate_text(rate)));
  if (flags.json) {
    SLUICE_TRY(print_json({{"output", options.output},
                           {"tensors", report.tensors},
                           {"bytes", report.bytes},
                           {"seconds", report.seconds}}));
  }
  return 0;
}

}  // namespace

void add_synth(CLI::App& app, Chosen& chosen) {
  auto flags = std::make_shared<Flags>();
  SynthOptions& options = flags->options;
  CLI::App* verb = app.add_subcommand("synth", "Write a container of random weights in a model's shapes");
  verb->add_option("--model", options.model_toml, "Shapes: a file such as those in configs/models")
      ->required()->type_name("TOML");
  verb->add_option("-o,--output", options.output, "The .sluice file to write")->required()->type_name("FILE");
  verb->add_option("--layers", options.layers, "Write this many layers instead of the model's own")
      ->check(CLI::Range(1, 100000))->type_name("N");
  add_choice<WeightFormat>(*verb, "--weights",
                           {{"f16", WeightFormat::f16}, {"int8", WeightFormat::int8}, {"int4", WeightFormat::int4}},
                           [&options](WeightFormat f) { options.weights = f; }, "Format of the weights (default int4)");
  verb->add_option("--group", options.group, "Weights that share a scale (default 128)")
      ->check(CLI::IsMember({32, 64, 128}))->type_name("32|64|128");
  verb->add_option("--seed", options.seed, "Seed; the same seed writes the same weights")->type_name("N");
  verb->add_flag("--json", flags->json, "Print a report");
  verb->footer(
      "Example:\n  sluice synth --model configs/models/deepseek-r1-distill-llama-70b.toml --layers 8 "
      "-o models/70b-8.sluice");
  verb->callback([flags, &chosen] { chosen.action = [flags] { return synthesize(*flags); }; });
}

}  // namespace sluice::cli
