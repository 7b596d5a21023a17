// SPDX-License-Identifier: Apache-2.0
// sluice eval: what quantization cost, measured on a text against a reference.
#include <algorithm>
#include <cmath>
#include <fstream>
#include <memory>
#include <numeric>
#include <optional>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "eval_report.hpp"
#include "flags.hpp"
#include "output.hpp"
#include "sluice/sluice.hpp"
#include "verb.hpp"

namespace sluice::cli {
namespace {

struct Flags {
  std::vector<std::string> files;
  std::string reference, text_file, html;
  uint32_t window = 512;
  uint64_t tokens = 16384;
  ModelOptions options;
  bool json = false;
};

// An open model and what was measured of it.
struct Candidate {
  Model model;
  Session session;
  EvalRow row;
  std::vector<double> divergences;  // KL of every position
  double log_probability = 0;       // sum over predicted tokens
  uint64_t positions = 0, agreements = 0;
};

constexpr uint32_t kDecodedTokens = 32;

Result<std::unique_ptr<Candidate>> open_candidate(const std::string& path, const Flags& flags) {
  ModelOptions options = flags.options;
  options.context = flags.window + kDecodedTokens;
  if (!options.device_memory_bytes) options.max_logit_rows = std::min(flags.window, 64u);
  SLUICE_TRY_ASSIGN(model, open_model(path, std::move(options)));
  SLUICE_TRY_ASSIGN(session, model.new_session());
  return std::make_unique<Candidate>(Candidate{std::move(model), std::move(session), {}, {}, 0, 0, 0});
}

size_t best_of(std::span<const float> logits) {
  return static_cast<size_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

// log sum exp, in double: with a vocabulary of 128k, sums in float lose the fourth digit.
double log_total(std::span<const float> logits) {
  const double largest = logits[best_of(logits)];
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - largest);
  return largest + std::log(sum);
}

// sum p log(p / q) for softmaxes of reference and candidate.
double divergence(std::span<const float> reference, std::span<const float> logits, double reference_total,
                  double total) {
  double sum = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    const double log_p = static_cast<double>(reference[i]) - reference_total;
    sum += std::exp(log_p) * (log_p - (static_cast<double>(logits[i]) - total));
  }
  return std::max(sum, 0.0);  // rounding can leave -1e-16 of two equal ones
}

// One window through one model: its logits in `out` (the reference), or compared with `reference`.
Status run_window(Candidate& candidate, std::span<const int32_t> ids, std::span<const float> reference,
                  std::vector<float>* out) {
  SLUICE_TRY(candidate.session.truncate(0));
  SLUICE_TRY(candidate.session.append(ids));
  const size_t vocab = candidate.model.info().vocab;
  if (out != nullptr) out->resize(ids.size() * vocab);
  return candidate.session.score([&](uint32_t position, std::span<const float> logits) {
    if (out != nullptr)
      std::copy(logits.begin(), logits.end(), out->begin() + static_cast<ptrdiff_t>(position * vocab));
    const double total = log_total(logits);
    if (position + 1 < ids.size()) {
      candidate.log_probability += static_cast<double>(logits[static_cast<size_t>(ids[position + 1])]) - total;
      ++candidate.positions;
    }
    if (reference.empty()) return;
    const std::span<const float> expected = reference.subspan(position * vocab, vocab);
    candidate.divergences.push_back(divergence(expected, logits, log_total(expected), total));
    candidate.agreements += best_of(expected) == best_of(logits) ? 1 : 0;
  });
}

// Weights of all matrices as the container stores them: embedding and output matrix apart, tied or not.
uint64_t matrix_weights(const ModelInfo& info) {
  const uint64_t q = uint64_t{info.heads} * info.head_dim, kv = uint64_t{info.kv_heads} * info.head_dim;
  const uint64_t layer = 2 * info.hidden * (q + kv) + 3 * uint64_t{info.hidden} * info.ffn;
  return info.layers * layer + 2 * uint64_t{info.vocab} * info.hidden;
}

Result<EvalRow> finish(Candidate& candidate, const std::string& path, bool is_reference) {
  EvalRow row;
  const ModelInfo& info = candidate.model.info();
  row.file = path;
  row.is_reference = is_reference;
  row.perplexity = std::exp(-candidate.log_probability / static_cast<double>(candidate.positions));
  row.positions = candidate.positions;
  row.bytes_per_weight = static_cast<double>(info.weight_bytes) / static_cast<double>(matrix_weights(info));
  row.file_bytes = info.file_bytes;
  row.memory_bytes = info.device_weight_bytes + info.host_weight_bytes + info.ring_bytes + info.kv_bytes +
                     info.scratch_bytes + info.staging_bytes;
  if (!candidate.divergences.empty()) {
    std::vector<double>& all = candidate.divergences;
    row.kl_mean = std::accumulate(all.begin(), all.end(), 0.0) / static_cast<double>(all.size());
    const auto p99 = all.begin() + static_cast<ptrdiff_t>((all.size() - 1) * 99 / 100);
    std::nth_element(all.begin(), p99, all.end());
    row.kl_p99 = *p99;
    row.top1 = static_cast<double>(candidate.agreements) / static_cast<double>(all.size());
  }
  const PassTimes prefill = candidate.session.timings().prefill;
  row.prefill_tokens_per_second = prefill.total > 0 ? static_cast<double>(prefill.tokens) / prefill.total : 0;
  const GenerateOptions generate{
      .max_tokens = kDecodedTokens, .sampling = {.temperature = 0}, .stop = {}, .ignore_eos = true};
  SLUICE_TRY(candidate.session.generate(generate, [](const Token&) { return true; }));
  const PassTimes decode = candidate.session.timings().decode;
  row.tokens_per_second = decode.total > 0 ? static_cast<double>(decode.tokens) / decode.total : 0;
  return row;
}

Result<std::vector<int32_t>> text_tokens(const Flags& flags, const Candidate& candidate) {
  SLUICE_TRY_ASSIGN(text, read_text(flags.text_file));
  std::vector<int32_t> ids = candidate.model.tokenize(text, false, false);
  if (ids.size() > flags.tokens) ids.resize(flags.tokens);
  if (ids.size() < flags.window) {
    return fail(ErrorCode::usage,
                fmt::format("{}: has {} tokens, one window takes {}; give more text or a shorter --window",
                            flags.text_file, ids.size(), flags.window));
  }
  return ids;
}

Result<int> evaluate(const Flags& flags) {
  std::vector<std::string> paths = flags.files;
  std::vector<std::unique_ptr<Candidate>> candidates;
  if (!flags.reference.empty()) paths.insert(paths.begin(), flags.reference);
  for (const std::string& path : paths) {
    SLUICE_TRY_ASSIGN(candidate, open_candidate(path, flags));
    if (!candidates.empty() && candidate->model.info().vocab != candidates.front()->model.info().vocab) {
      return fail(ErrorCode::usage,
                  fmt::format("{}: has a vocabulary of {}, {} one of {}; only models of one tokenizer compare", path,
                              candidate->model.info().vocab, paths.front(), candidates.front()->model.info().vocab));
    }
    candidates.push_back(std::move(candidate));
  }
  SLUICE_TRY_ASSIGN(ids, text_tokens(flags, *candidates.front()));
  const size_t windows = ids.size() / flags.window;
  Progress progress("evaluating", Progress::Unit::items);
  std::vector<float> reference;
  for (size_t w = 0; w < windows; ++w) {
    const std::span<const int32_t> window = std::span(ids).subspan(w * flags.window, flags.window);
    for (size_t i = 0; i < candidates.size(); ++i) {
      const bool fills = i == 0 && !flags.reference.empty();
      SLUICE_TRY(run_window(*candidates[i], window,
                            fills ? std::span<const float>() : std::span<const float>(reference),
                            fills ? &reference : nullptr));
      progress.update(w * candidates.size() + i + 1, windows * candidates.size(), paths[i]);
    }
  }
  std::vector<EvalRow> rows;
  for (size_t i = 0; i < candidates.size(); ++i) {
    SLUICE_TRY_ASSIGN(row, finish(*candidates[i], paths[i], i == 0 && !flags.reference.empty()));
    rows.push_back(std::move(row));
  }
  if (!flags.html.empty()) SLUICE_TRY(write_html(flags.html, rows));
  if (flags.json) {
    SLUICE_TRY(print_json(to_json(rows, flags.text_file, windows, flags.window)));
  } else {
    SLUICE_TRY(print(to_markdown(rows)));
  }
  return 0;
}

}  // namespace

void add_eval(CLI::App& app, Chosen& chosen) {
  auto flags = std::make_shared<Flags>();
  flags->options.cpu_activations = Activations::f32;
  CLI::App* verb = app.add_subcommand("eval", "Measure what quantization costs: perplexity, KL divergence, agreement");
  verb->add_option("files", flags->files, "The .sluice files to compare")->required();
  verb->add_option("--reference", flags->reference, "The .sluice file that the others are measured against")
      ->type_name("FILE");
  verb->add_option("--text", flags->text_file, "A text; - is standard input")->required()->type_name("FILE");
  verb->add_option("--window", flags->window, "Tokens scored together (default 512)")->check(CLI::Range(8u, 1u << 20));
  verb->add_option("--tokens", flags->tokens, "Tokens of the text at most (default 16384)");
  verb->add_option("--html", flags->html, "Write the table with a chart as one HTML file")->type_name("FILE.html");
  verb->add_flag("--json", flags->json, "Print JSON instead of a Markdown table");
  add_model_flags(*verb, flags->options);
  verb->footer(
      "KL is that of the reference's next-token distribution from the file's, in nats, over every position.\n"
      "On the CPU activations are f32 here, so that their rounding is not counted (--cpu-activations int8 counts "
      "it).\nExample:\n  sluice eval int8.sluice int4.sluice --reference f16.sluice --text wiki.test.txt");
  verb->callback([flags, &chosen] { chosen.action = [flags] { return evaluate(*flags); }; });
}

}  // namespace sluice::cli
