// SPDX-License-Identifier: Apache-2.0
// The table that `sluice eval` prints.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "task_run.hpp"

namespace sluice::cli {

struct EvalRow {
  std::string file;
  bool is_reference = false;
  std::optional<double> perplexity;       // where a text was given
  uint64_t positions = 0;                 // predicted tokens
  std::optional<double> kl_mean, kl_p99;  // nats; against the reference, where one was given
  std::optional<double> top1;             // share of positions with the same best token
  double bytes_per_weight = 0;            // matrices, scales included
  uint64_t file_bytes = 0;
  uint64_t host_peak_bytes = 0;           // as HostMemory measures it
  bool host_peak_is_bound = false;
  std::optional<uint64_t> device_planned_bytes;  // of a GPU's memory: weights, ring, KV cache, scratch
  double tokens_per_second = 0, prefill_tokens_per_second = 0;
  std::vector<TaskResult> tasks;          // the same in every row
};

// The text that all rows were measured on; an empty name: none.
struct EvalText {
  std::string name;
  size_t windows = 0;
  uint32_t window = 0;
};

std::string to_markdown(const std::vector<EvalRow>& rows);
nlohmann::ordered_json to_json(const std::vector<EvalRow>& rows, const EvalText& text);
// One self-contained file: the table, and KL against bytes per weight as a chart.
std::string to_html(const std::vector<EvalRow>& rows);

}  // namespace sluice::cli
