// SPDX-License-Identifier: Apache-2.0
// sluice import: a checkpoint into a container.
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
  ImportOptions options;
  bool json = false;
};

Result<int> import_checkpoint(const Flags& flags) {
  ImportOptions options = flags.options;
  RemoveOnInterrupt interrupt(options.output);
  Progress progress("importing", Progress::Unit::items);
  options.log = log_to_stderr();
  options.progress = [&progress](uint64_t done, uint64_t total, uint64_t, const std::string& name) {
    progress.update(done, total, name);
  };
  SLUICE_TRY_ASSIGN(report, import_model(options));
  note(fmt::format("imported {} tensors, {}, in {}{}", report.tensors, bytes_text(report.bytes),
                   seconds_text(report.seconds),
                   report.requantized == 0 ? std::string()
                                           : fmt::format("; {} of them requantized", report.requantized)));
  if (flags.json) {
    nlohmann::json losses = nlohmann::json::array();
    for (const RequantizationLoss& loss : report.losses) {
      losses.push_back({{"type", loss.type},
                        {"scheme", loss.scheme},
                        {"group", loss.group},
                        {"tensors", loss.tensors},
                        {"relative_error", loss.relative_error}});
    }
    SLUICE_TRY(print_json({{"output", options.output},
                           {"tensors", report.tensors},
                           {"bytes", report.bytes},
                           {"requantized", report.requantized},
                           {"losses", std::move(losses)},
                           {"seconds", report.seconds}}));
  }
  return 0;
}

}  // namespace

void add_import(CLI::App& app, Chosen& chosen) {
  auto flags = std::make_shared<Flags>();
  ImportOptions& options = flags->options;
  CLI::App* verb = app.add_subcommand("import", "Turn a GGUF file or a Hugging Face folder into a container");
  verb->add_option("source", options.source, "A .gguf file, or a folder with config.json and *.safetensors")
      ->required();
  verb->add_option("-o,--output", options.output, "The .sluice file to write; replaced only when all went well")
      ->required()->type_name("FILE");
  add_choice<WeightFormat>(*verb, "--weights", weight_formats(), [&options](WeightFormat f) { options.weights = f; },
                           "Format of the weights (default int4); keep: as close to the source as a container can be");
  verb->add_option("--group", options.group, "Weights that share a scale (default 128)")
      ->check(CLI::IsMember({32, 64, 128}))->type_name("32|64|128");
  add_choice<WeightFormat>(*verb, "--embeddings", weight_formats(),
                           [&options](WeightFormat f) { options.embeddings = f; },
                           "Format of the embeddings (default: int8 with int4 and int8 weights)");
  add_choice<WeightFormat>(*verb, "--lm-head", weight_formats(), [&options](WeightFormat f) { options.lm_head = f; },
                           "Format of the output matrix (default: int8 with int4 and int8 weights)");
  verb->add_flag("--json", flags->json, "Print a report");
  verb->footer(
      "Example:\n  sluice import SmolLM2-135M-Instruct.Q4_1.gguf --weights keep -o models/smollm2-135m.sluice");
  verb->callback([flags, &chosen] { chosen.action = [flags] { return import_checkpoint(*flags); }; });
}

}  // namespace sluice::cli
