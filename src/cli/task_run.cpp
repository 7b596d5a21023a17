// SPDX-License-Identifier: Apache-2.0
#include "task_run.hpp"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

namespace sluice::cli {
namespace {

constexpr uint64_t kSeedStride = 1'000'003;  // between problems: more than samples of one

const char* name_of(Check check) {
  switch (check) {
    case Check::exact:
      return "exact";
    case Check::numeric:
      return "numeric";
    case Check::boxed:
      return "boxed";
    case Check::choice:
      return "choice";
  }
  return "unknown";
}

Result<std::vector<int32_t>> tokens_of(const Model& model, const Problem& problem) {
  if (!model.info().has_chat_template) return model.tokenize(problem.prompt);
  const ChatMessage message{"user", problem.prompt};
  SLUICE_TRY_ASSIGN(rendered, model.render_chat({&message, 1}));
  return model.tokenize(rendered, true, false);  // the template writes begin-of-text itself
}

}  // namespace

Result<AnswerLog> AnswerLog::create(const std::string& path) {
  AnswerLog log;
  log.path_ = path;
  if (path.empty()) return log;
  log.file_.open(path, std::ios::binary | std::ios::trunc);
  if (!log.file_) return fail(ErrorCode::io, fmt::format("{}: cannot be written", path));
  return log;
}

Status AnswerLog::write(const std::string& file, const Task& task, size_t problem, uint32_t sample, bool right,
                        bool cut, const std::string& text) {
  if (path_.empty()) return {};
  const Problem& asked = task.problems[problem];
  const nlohmann::ordered_json line = {{"file", file},
                                       {"task", task.name},
                                       {"problem", problem},
                                       {"sample", sample},
                                       {"prompt", asked.prompt},
                                       {"expected", asked.answer},
                                       {"check", name_of(asked.check)},
                                       {"right", right},
                                       {"cut", cut},
                                       {"answer", text}};
  file_ << line.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) << std::endl;
  if (file_) return {};
  return fail(ErrorCode::io, fmt::format("{}: cannot be written; is the disk full?", path_));
}

Result<TaskResult> run_task(const Model& model, Session& session, const Task& task, const TaskOptions& options,
                            AnswerLog& log, const std::function<void(uint64_t answers, uint64_t right)>& on_answer) {
  if (!model.info().has_tokenizer) {
    return fail(ErrorCode::unsupported,
                fmt::format("{} has no tokenizer, so it cannot read the problems of {}", model.info().path, task.path));
  }
  TaskResult result{.name = task.name,
                    .problems = task.problems.size(),
                    .samples = options.samples,
                    .max_tokens = options.max_tokens};
  std::vector<uint32_t> right(task.problems.size());
  for (size_t i = 0; i < task.problems.size(); ++i) {
    SLUICE_TRY_ASSIGN(tokens, tokens_of(model, task.problems[i]));
    if (tokens.empty() || tokens.size() + options.max_tokens > model.info().context) {
      return fail(
          ErrorCode::usage,
          fmt::format("{}: problem {} has {} tokens and its answer up to {}, the context {}; give a longer --context "
                      "or a smaller --max-tokens",
                      task.path, i + 1, tokens.size(), options.max_tokens, model.info().context));
    }
    SLUICE_TRY(session.truncate(0));
    SLUICE_TRY(session.append(std::span(tokens).first(tokens.size() - 1)));
    for (uint32_t sample = 0; sample < options.samples; ++sample) {
      // The problem's last token goes through the model anew: its logits begin the next sample.
      SLUICE_TRY(session.truncate(static_cast<uint32_t>(tokens.size() - 1)));
      SLUICE_TRY(session.append(std::span(tokens).last(1)));
      GenerateOptions generate{.max_tokens = options.max_tokens, .sampling = options.sampling, .stop = {}};
      generate.sampling.seed = options.sampling.seed + i * kSeedStride + sample;
      std::string text;
      SLUICE_TRY_ASSIGN(stopped, session.generate(generate, [&text](const Token& token) {
        text += token.text;
        return true;
      }));
      const bool is_cut = stopped == StopReason::max_tokens;
      const bool ok = is_right(task.problems[i], text);
      right[i] += ok ? 1 : 0;
      result.right += ok ? 1 : 0;
      result.cut += is_cut ? 1 : 0;
      SLUICE_TRY(log.write(model.info().path, task, i, sample, ok, is_cut, text));
      on_answer(i * options.samples + sample + 1, result.right);
    }
  }
  result.rate = pass_at_1(right, options.samples);
  return result;
}

}  // namespace sluice::cli
