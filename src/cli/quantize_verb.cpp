// SPDX-License-Identifier: Apache-2.0
// sluice quantize: a checkpoint into a container by a recipe.
#include <chrono>
#include <memory>
#include <optional>

#include <fmt/format.h>

#include "flags.hpp"
#include "interrupt.hpp"
#include "output.hpp"
#include "sluice/sluice.hpp"
#include "verb.hpp"

namespace sluice::cli {
namespace {

struct Flags {
  QuantizeOptions options;
  std::string report;
  bool json = false;
};

// Time left by the pace of this run; what an earlier run finished does not count.
class Eta {
 public:
  std::string text(uint64_t done, uint64_t total) {
    if (!first_) first_ = done;
    if (done == *first_) return "";
    const double spent = std::chrono::duration<double>(std::chrono::steady_clock::now() - started_).count();
    const double left = spent / static_cast<double>(done - *first_) * static_cast<double>(total - done);
    return left < 90 ? fmt::format("{:.0f} s left, ", left) : fmt::format("{:.0f} min left, ", left / 60);
  }

 private:
  std::chrono::steady_clock::time_point started_ = std::chrono::steady_clock::now();
  std::optional<uint64_t> first_;
};

Result<int> quantize(const Flags& flags) {
  QuantizeOptions options = flags.options;
  if (!flags.report.empty()) SLUICE_TRY(check_writable(flags.report));
  const std::string work = options.output + ".work";
  RemoveOnInterrupt interrupt(
      options.output, {.path = work, .told = work + " keeps the finished layers, and the same command goes on there"});
  Progress progress("quantizing", Progress::Unit::items);
  Eta eta;
  options.log = log_to_stderr();
  options.progress = [&](uint64_t done, uint64_t total, const std::string& detail) {
    progress.update(done, total, eta.text(done, total) + detail);
  };
  SLUICE_TRY_ASSIGN(report, quantize_model(options));
  const std::string residual = report.residual_bits_per_weight > 0
                                   ? fmt::format(" and {:.2f} of residuals", report.residual_bits_per_weight)
                                   : std::string();
  note(fmt::format("quantized {} tensors to {:.2f} bits per weight{}, {}, in {}, {:.1f} million weights a second",
                   report.tensors, report.bits_per_weight, residual, bytes_text(report.bytes),
                   seconds_text(report.seconds), report.weights_per_second * 1e-6));
  if (!flags.report.empty()) SLUICE_TRY(write_file(flags.report, report.json + "\n"));
  if (flags.json) SLUICE_TRY(print(report.json + "\n"));
  return 0;
}

}  // namespace

void add_quantize(CLI::App& app, Chosen& chosen) {
  auto flags = std::make_shared<Flags>();
  QuantizeOptions& options = flags->options;
  CLI::App* verb = app.add_subcommand("quantize", "Turn a checkpoint into a container by a recipe, with GPTQ");
  verb->add_option("source", options.source, "A .gguf file, or a folder with config.json and *.safetensors")
      ->required();
  verb->add_option("-o,--output", options.output, "The .sluice file to write; replaced only when all went well")
      ->required()
      ->type_name("FILE");
  verb->add_option("--recipe", options.recipe, "What becomes what (configs/recipes)")
      ->required()
      ->type_name("FILE.toml");
  verb->add_option("--calibration", options.calibration,
                   "Text (.txt) or JSON lines (.jsonl); may be given several times")
      ->type_name("FILE")
      ->expected(1)
      ->take_all();
  add_choice<QuantizeMethod>(
      *verb, "--method", {{"rtn", QuantizeMethod::rtn}, {"gptq", QuantizeMethod::gptq}},
      [&options](QuantizeMethod method) { options.method = method; },
      "How INT4 in the layers is rounded (default: as the recipe says); rtn needs no text");
  verb->add_option("--windows", options.windows, "Windows of calibration text (default 128)");
  verb->add_option("--window", options.window, "Tokens of a window (default 2048, at most the model's context)");
  verb->add_option("--damp", options.damp, "Damping of GPTQ (default 0.01)");
  add_choice<std::string>(
      *verb, "--backend", {{"auto", "auto"}, {"cuda", "cuda"}, {"vulkan", "vulkan"}, {"cpu", "cpu"}},
      [&options](const std::string& name) { options.backend = name; },
      "Where the layers run for calibration (default: auto, a GPU if there is one)");
  verb->add_option("--threads", options.threads, "Threads (default: one per core)");
  verb->add_flag("--residual", options.residual,
                 "Add a second nibble to every INT4 matrix: run --precision fine reads it, int4 does not");
  verb->add_flag("--restart", options.restart, "Throw away the layers that an interrupted run left in OUTPUT.work");
  verb->add_option("--report", flags->report, "Write the error of every matrix, as JSON")->type_name("FILE.json");
  verb->add_flag("--json", flags->json, "Print that report");
  verb->footer(
      "Finished layers lie in OUTPUT.work until the end: run the same command again after an interruption.\n"
      "Example:\n  sluice quantize Llama-3.1-8B -o llama.sluice --recipe configs/recipes/int4.toml "
      "--calibration wiki.txt");
  verb->callback([flags, &chosen] { chosen.action = [flags] { return quantize(*flags); }; });
}

}  // namespace sluice::cli
