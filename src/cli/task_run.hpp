// SPDX-License-Identifier: Apache-2.0
// A model answers the problems of a task file.
#pragma once

#include <cstdint>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "sluice/sluice.hpp"
#include "tasks.hpp"

namespace sluice::cli {

struct Task {
  std::string path, name;  // the file's name without its ending
  std::vector<Problem> problems;
};

struct TaskOptions {
  uint32_t samples = 1;  // answers to every problem
  uint32_t max_tokens = 2048;
  // Plain sampling at this temperature: what the model's own configuration says would differ from model to model.
  Sampling sampling{.temperature = 0.6f, .top_k = 0, .top_p = 1, .min_p = 0, .repeat_penalty = 1, .seed = 1};
};

struct TaskResult {
  std::string name;
  uint64_t problems = 0;
  uint32_t samples = 0, max_tokens = 0;
  PassRate rate;
  uint64_t right = 0;  // answers
  uint64_t cut = 0;    // answers that reached max_tokens
};

// Every answer as a JSON line, written as it comes.
class AnswerLog {
 public:
  // An empty path: nothing is written. Error: io.
  static Result<AnswerLog> create(const std::string& path);
  // Error: io.
  Status write(const std::string& file, const Task& task, size_t problem, uint32_t sample, bool right, bool cut,
               const std::string& text);

 private:
  std::string path_;
  std::ofstream file_;
};

// Answers all problems. Each is put through the model's chat template where it has one, and sampled with a seed of its
// own that depends on options.sampling.seed, problem and sample alone. `on_answer`: answers so far, and how many are
// right. Errors: unsupported (no tokenizer), usage (a problem that leaves no room in the context), those of a pass and
// of the log.
Result<TaskResult> run_task(const Model& model, Session& session, const Task& task, const TaskOptions& options,
                            AnswerLog& log, const std::function<void(uint64_t answers, uint64_t right)>& on_answer);

}  // namespace sluice::cli
