// SPDX-License-Identifier: Apache-2.0
// sluice eval: what quantization cost, measured on a text against a reference, and by problems with answers.
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <memory>
#include <numeric>
#include <optional>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "eval_report.hpp"
#include "flags.hpp"
#include "host_memory.hpp"
#include "output.hpp"
#include "sluice/sluice.hpp"
#include "task_run.hpp"
#include "tasks.hpp"
#include "verb.hpp"

namespace sluice::cli {
namespace {

struct Flags {
  std::vector<std::string> files;
  std::string reference, text_file, html, answers;
  std::vector<std::string> task_files;
  uint64_t problems = 0;
  TaskOptions task;
  uint32_t window = 512;
  uint64_t tokens = 16384;
  ModelOptions options;
  bool json = false;
};

// An open model and what was measured of it.
struct Candidate {
  Model model;
  Session session;
  HostMemory memory;
  EvalRow row;
  std::vector<double> divergences;  // KL of every position
  double log_probability = 0;       // sum over predicted tokens
  uint64_t positions = 0, agreements = 0;
};

constexpr uint32_t kDecodedTokens = 32;
constexpr uint32_t kProblemTokens = 2048;  // room for a problem in front of its answer

Result<std::unique_ptr<Candidate>> open_candidate(const std::string& path, const Flags& flags) {
  ModelOptions options = flags.options;
  if (options.context == 0) {
    options.context = flags.window + kDecodedTokens;
    if (!flags.task_files.empty()) options.context = std::max(options.context, kProblemTokens + flags.task.max_tokens);
  }
  if (!options.device_memory_bytes) options.max_logit_rows = std::min(flags.window, 64u);
  SLUICE_TRY_ASSIGN(model, open_model(path, std::move(options)));
  SLUICE_TRY_ASSIGN(session, model.new_session());
  return std::make_unique<Candidate>(Candidate{std::move(model), std::move(session), {}, {}, {}, 0, 0, 0});
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

// One window through one model: its logits in `out` (the reference), or compared with `reference`. Both are float
// [ids.size()][vocabulary], or empty.
Status run_window(Candidate& candidate, std::span<const int32_t> ids, std::span<const float> reference,
                  std::span<float> out) {
  SLUICE_TRY(candidate.session.truncate(0));
  SLUICE_TRY(candidate.session.append(ids));
  const size_t vocab = candidate.model.info().vocab;
  return candidate.session.score([&](uint32_t position, std::span<const float> logits) {
    if (!out.empty()) std::copy(logits.begin(), logits.end(), out.subspan(position * vocab).begin());
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

Status finish(Candidate& candidate, const std::string& path, bool is_reference) {
  EvalRow& row = candidate.row;
  const ModelInfo& info = candidate.model.info();
  row.file = path;
  row.is_reference = is_reference;
  if (candidate.positions > 0) {
    row.perplexity = std::exp(-candidate.log_probability / static_cast<double>(candidate.positions));
  }
  row.positions = candidate.positions;
  row.bytes_per_weight = static_cast<double>(info.weight_bytes) / static_cast<double>(matrix_weights(info));
  row.file_bytes = info.file_bytes;
  if (info.backend != "cpu") {  // whose "device" is the host
    row.device_planned_bytes = info.device_weight_bytes + info.ring_bytes + info.kv_bytes + info.scratch_bytes;
  }
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
  if (candidate.row.tasks.empty()) {
    const GenerateOptions generate{
        .max_tokens = kDecodedTokens, .sampling = {.temperature = 0}, .stop = {}, .ignore_eos = true};
    SLUICE_TRY(candidate.memory.measure([&] { return candidate.session.generate(generate, {}); }));
  }
  row.host_peak_bytes = candidate.memory.peak_bytes();
  row.host_peak_is_bound = candidate.memory.is_bound();
  const PassTimes decode = candidate.session.timings().decode;
  row.tokens_per_second = decode.total > 0 ? static_cast<double>(decode.tokens) / decode.total : 0;
  return {};
}

Result<std::vector<int32_t>> text_tokens(const Flags& flags, const std::string& text, const Candidate& candidate) {
  std::vector<int32_t> ids = candidate.model.tokenize(text, false, false);
  if (ids.size() > flags.tokens) ids.resize(flags.tokens);
  if (ids.size() < flags.window) {
    return fail(ErrorCode::usage,
                fmt::format("{}: has {} tokens, one window takes {}; give more text or a shorter --window",
                            flags.text_file, ids.size(), flags.window));
  }
  return ids;
}

// Windows of the text through every model, the reference first.
Result<EvalText> run_text(const Flags& flags, const std::string& text, const std::vector<std::string>& paths,
                          const std::vector<std::unique_ptr<Candidate>>& candidates) {
  SLUICE_TRY_ASSIGN(ids, text_tokens(flags, text, *candidates.front()));
  const size_t windows = ids.size() / flags.window;
  Progress progress("evaluating", Progress::Unit::items);
  // Made here, so that no model's memory is charged with it.
  const size_t vocab = candidates.front()->model.info().vocab;
  std::vector<float> logits(flags.reference.empty() ? 0 : flags.window * vocab);
  for (size_t w = 0; w < windows; ++w) {
    const std::span<const int32_t> window = std::span(ids).subspan(w * flags.window, flags.window);
    for (size_t i = 0; i < candidates.size(); ++i) {
      const bool is_reference = i == 0 && !flags.reference.empty();
      SLUICE_TRY(candidates[i]->memory.measure([&] {
        return is_reference ? run_window(*candidates[i], window, {}, logits)
                            : run_window(*candidates[i], window, logits, {});
      }));
      progress.update(w * candidates.size() + i + 1, windows * candidates.size(), paths[i]);
    }
  }
  return EvalText{.name = flags.text_file, .windows = windows, .window = flags.window};
}

// What is found before the first model is opened: a result that would have nowhere to go among it.
Status check_flags(const Flags& flags) {
  if (flags.text_file.empty() && flags.task_files.empty()) {
    return fail(ErrorCode::usage, "there is nothing to measure on; give --text FILE, --tasks FILE.jsonl or both");
  }
  if (flags.task.samples > 1 && flags.task.sampling.temperature == 0) {
    return fail(
        ErrorCode::usage,
        fmt::format("{} samples at temperature 0 are all the same; give --samples 1 or --temp", flags.task.samples));
  }
  for (const std::string& path : {flags.html, flags.answers}) {
    if (!path.empty()) SLUICE_TRY(check_writable(path));
  }
  return {};
}

Result<std::vector<Task>> read_task_files(const Flags& flags) {
  std::vector<Task> tasks;
  for (const std::string& path : flags.task_files) {
    SLUICE_TRY_ASSIGN(problems, read_tasks(path));
    tasks.push_back({.path = path,
                     .name = std::filesystem::path(path).stem().string(),
                     .problems = take_evenly(std::move(problems), flags.problems)});
  }
  return tasks;
}

Status run_tasks(const Flags& flags, const std::vector<Task>& tasks,
                 const std::vector<std::unique_ptr<Candidate>>& candidates) {
  if (tasks.empty()) return {};
  SLUICE_TRY_ASSIGN(log, AnswerLog::create(flags.answers));
  uint64_t total = 0, done = 0;
  for (const Task& task : tasks) total += task.problems.size() * flags.task.samples * candidates.size();
  Progress progress("answering", Progress::Unit::items);
  for (const std::unique_ptr<Candidate>& candidate : candidates) {
    for (const Task& task : tasks) {
      const auto on_answer = [&](uint64_t answers, uint64_t right) {
        progress.update(done + answers, total,
                        fmt::format("{}: {}, {} of {} right", candidate->model.info().path, task.name, right, answers));
      };
      SLUICE_TRY_ASSIGN(result, candidate->memory.measure([&] {
        return run_task(candidate->model, candidate->session, task, flags.task, log, on_answer);
      }));
      done += task.problems.size() * flags.task.samples;
      if (result.cut > 0) {
        note(fmt::format("{}: {}: {} of {} answers were cut at {} tokens", candidate->model.info().path, task.name,
                         result.cut, result.problems * result.samples, result.max_tokens));
      }
      candidate->row.tasks.push_back(std::move(result));
    }
  }
  return {};
}

Result<int> evaluate(const Flags& flags) {
  SLUICE_TRY(check_flags(flags));
  SLUICE_TRY_ASSIGN(tasks, read_task_files(flags));
  std::string text;
  if (!flags.text_file.empty()) {
    SLUICE_TRY_ASSIGN(read, read_utf8(flags.text_file));
    text = std::move(read);
  }
  std::vector<std::string> paths = flags.files;
  std::vector<std::unique_ptr<Candidate>> candidates;
  if (!flags.reference.empty()) paths.insert(paths.begin(), flags.reference);
  for (const std::string& path : paths) {
    HostMemory memory;
    SLUICE_TRY_ASSIGN(candidate, memory.measure([&] { return open_candidate(path, flags); }));
    candidate->memory = memory;
    if (!candidates.empty() && candidate->model.info().vocab != candidates.front()->model.info().vocab) {
      return fail(ErrorCode::usage,
                  fmt::format("{}: has a vocabulary of {}, {} one of {}; only models of one tokenizer compare", path,
                              candidate->model.info().vocab, paths.front(), candidates.front()->model.info().vocab));
    }
    candidates.push_back(std::move(candidate));
  }
  EvalText measured_on;
  if (!flags.text_file.empty()) {
    SLUICE_TRY_ASSIGN(windows, run_text(flags, text, paths, candidates));
    measured_on = std::move(windows);
  }
  SLUICE_TRY(run_tasks(flags, tasks, candidates));
  std::vector<EvalRow> rows;
  for (size_t i = 0; i < candidates.size(); ++i) {
    SLUICE_TRY(finish(*candidates[i], paths[i], i == 0 && !flags.reference.empty()));
    rows.push_back(std::move(candidates[i]->row));
  }
  if (!flags.html.empty()) SLUICE_TRY(write_file(flags.html, to_html(rows)));
  if (flags.json) {
    SLUICE_TRY(print_json(to_json(rows, measured_on)));
  } else {
    SLUICE_TRY(print(to_markdown(rows)));
  }
  return 0;
}

}  // namespace

void add_eval(CLI::App& app, Chosen& chosen) {
  auto flags = std::make_shared<Flags>();
  flags->options.cpu_activations = Activations::f32;
  CLI::App* verb =
      app.add_subcommand("eval", "Measure what quantization costs: KL divergence, perplexity, right answers");
  verb->add_option("files", flags->files, "The .sluice files to compare")->required();
  verb->add_option("--reference", flags->reference, "The .sluice file that the others are measured against")
      ->type_name("FILE");
  verb->add_option("--text", flags->text_file, "A text to predict; - is standard input")->type_name("FILE");
  verb->add_option("--window", flags->window, "Tokens scored together (default 512)")->check(CLI::Range(8u, 1u << 20));
  verb->add_option("--tokens", flags->tokens, "Tokens of the text at most (default 16384)");
  verb->add_option("--html", flags->html, "Write the table with a chart as one HTML file")->type_name("FILE.html");
  verb->add_flag("--json", flags->json, "Print JSON instead of a Markdown table");
  const char* group = "Tasks";
  CLI::Option* tasks = verb->add_option("--tasks", flags->task_files,
                                        "Problems with answers: MATH-500, GSM8K, AIME, GPQA as published, or lines of "
                                        "prompt, answer, check; may be given several times")
                           ->type_name("FILE.jsonl")
                           ->expected(1)
                           ->take_all()
                           ->group(group);
  verb->add_option("--problems", flags->problems, "So many problems of each file, spread evenly (default: all)")
      ->type_name("N")
      ->needs(tasks)
      ->group(group);
  verb->add_option("--samples", flags->task.samples, "Answers to each problem (default 1)")
      ->check(CLI::Range(1, 1 << 16))
      ->type_name("N")
      ->needs(tasks)
      ->group(group);
  verb->add_option("--max-tokens", flags->task.max_tokens, "Tokens of an answer at most (default 2048)")
      ->check(CLI::Range(1, 1 << 20))
      ->type_name("N")
      ->needs(tasks)
      ->group(group);
  verb->add_option("--temp", flags->task.sampling.temperature, "Temperature (default 0.6); 0 takes the likeliest token")
      ->check(CLI::Range(0.0f, 100.0f))
      ->type_name("T")
      ->needs(tasks)
      ->group(group);
  verb->add_option("--top-p", flags->task.sampling.top_p,
                   "Only the likeliest tokens that hold this probability (default 1)")
      ->check(CLI::Range(0.0f, 1.0f))
      ->type_name("P")
      ->needs(tasks)
      ->group(group);
  verb->add_option("--seed", flags->task.sampling.seed, "Seed (default 1)")->type_name("N")->needs(tasks)->group(group);
  verb->add_option("--answers", flags->answers, "Write every answer as a JSON line as it comes")
      ->type_name("FILE.jsonl")
      ->needs(tasks)
      ->group(group);
  add_model_flags(*verb, flags->options);
  verb->footer(
      "KL is that of the reference's next-token distribution from the file's, in nats, over every position.\n"
      "On the CPU activations are f32 here, so that their rounding is not counted (--cpu-activations int8 counts "
      "it).\nExamples:\n  sluice eval int8.sluice int4.sluice --reference f16.sluice --text wiki.test.txt\n"
      "  sluice eval int4.sluice --tasks gsm8k-test.jsonl --problems 100 --max-tokens 512");
  verb->callback([flags, &chosen] { chosen.action = [flags] { return evaluate(*flags); }; });
}

}  // namespace sluice::cli
