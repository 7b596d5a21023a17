// SPDX-License-Identifier: Apache-2.0
#include "timing_report.hpp"

#include <algorithm>
#include <array>
#include <cmath>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "output.hpp"

namespace sluice::cli {
namespace {

struct Stage {
  const char* name;
  double PassTimes::*seconds;
};

// In the order in which a pass meets them. What they leave of the total is the residual.
constexpr std::array<Stage, 11> kStages = {{
    {"disk wait", &PassTimes::disk_wait},
    {"copy wait", &PassTimes::copy_wait},
    {"embedding", &PassTimes::embed},
    {"norm", &PassTimes::norm},
    {"matmul", &PassTimes::matmul},
    {"rope", &PassTimes::rope},
    {"attention", &PassTimes::attention},
    {"activation", &PassTimes::activation},
    {"lm_head", &PassTimes::lm_head},
    {"sampling", &PassTimes::sampling},
    {"output", &PassTimes::output},
}};

double per_pass(double seconds, const PassTimes& times) {
  return times.passes == 0 ? 0 : seconds / static_cast<double>(times.passes);
}

// "   12.31 ms  63.1%", or blanks for a kind of pass that did not happen.
std::string cell(double seconds, const PassTimes& times) {
  if (times.passes == 0) return fmt::format("{:>19}", "-");
  const double share = times.total > 0 ? seconds / times.total * 100 : 0;
  return fmt::format("{:>11} {:>6.1f}%", seconds_text(per_pass(seconds, times)), share);
}

std::string tokens_per_second(const PassTimes& times) {
  return times.total > 0 ? fmt::format("{:.2f} tok/s", static_cast<double>(times.tokens) / times.total) : "-";
}

nlohmann::json pass_json(const PassTimes& times) {
  nlohmann::json json = {{"passes", times.passes}, {"tokens", times.tokens}, {"total", times.total}};
  for (const Stage& stage : kStages) {
    std::string name = stage.name;
    std::replace(name.begin(), name.end(), ' ', '_');
    json[name] = times.*stage.seconds;
  }
  json["residual"] = times.residual();
  return json;
}

}  // namespace

std::string timing_summary(const ModelInfo& model, const Timings& timings) {
  const PassTimes& prefill = timings.prefill;
  const PassTimes& decode = timings.decode;
  std::string text = fmt::format("open {}, first token after {}\n", seconds_text(timings.open_seconds),
                                 seconds_text(timings.first_token_seconds));
  text += fmt::format("weights {}: {} device, {} host, {} disk; ring {}, KV cache {}, scratch {}, staging {}\n",
                      bytes_text(model.weight_bytes), bytes_text(model.device_weight_bytes),
                      bytes_text(model.host_weight_bytes), bytes_text(model.disk_weight_bytes),
                      bytes_text(model.ring_bytes), bytes_text(model.kv_bytes), bytes_text(model.scratch_bytes),
                      bytes_text(model.staging_bytes));
  text += fmt::format("{:<12}{:>19}{:>19}\n", "per pass", "prefill", "decode");
  text += fmt::format("{:<12}{:>19}{:>19}\n", "passes", prefill.passes, decode.passes);
  text += fmt::format("{:<12}{:>19}{:>19}\n", "tokens", prefill.tokens, decode.tokens);
  for (const Stage& stage : kStages) {
    text += fmt::format("{:<12}{:>19}{:>19}\n", stage.name, cell(prefill.*stage.seconds, prefill),
                        cell(decode.*stage.seconds, decode));
  }
  text += fmt::format("{:<12}{:>19}{:>19}\n", "residual", cell(prefill.residual(), prefill),
                      cell(decode.residual(), decode));
  text += fmt::format("{:<12}{:>19}{:>19}\n", "total", cell(prefill.total, prefill), cell(decode.total, decode));
  text += fmt::format("{:<12}{:>19}{:>19}\n", "rate", tokens_per_second(prefill), tokens_per_second(decode));
  if (timings.disk_bytes > 0) {
    text += fmt::format("disk: {} read in all through {}, {} a pass", bytes_text(timings.disk_bytes), model.io,
                        bytes_text(timings.disk_bytes_per_pass));
    if (decode.passes > 0) {
      text += fmt::format(", {} in decode",
                          rate_text(static_cast<double>(timings.disk_bytes_per_pass) / per_pass(decode.total, decode)));
    }
    if (timings.retries > 0) text += fmt::format(", {} reads retried", timings.retries);
    text += '\n';
  }
  if (decode.passes > 0 && timings.predicted_pass_seconds > 0) {
    const double measured = per_pass(decode.total, decode);
    text += fmt::format("decode pass: {} measured, {} predicted by the planner ({:.2f}x)\n", seconds_text(measured),
                        seconds_text(timings.predicted_pass_seconds), measured / timings.predicted_pass_seconds);
  }
  text.pop_back();
  return text;
}

nlohmann::json timing_json(const ModelInfo& model, const Timings& timings) {
  return {{"open_seconds", timings.open_seconds},
          {"first_token_seconds", timings.first_token_seconds},
          {"prefill", pass_json(timings.prefill)},
          {"decode", pass_json(timings.decode)},
          {"token_latencies", timings.token_latencies},
          {"disk_bytes", timings.disk_bytes},
          {"disk_bytes_per_pass", timings.disk_bytes_per_pass},
          {"embedding_bytes", timings.embedding_bytes},
          {"retries", timings.retries},
          {"predicted_pass_seconds", timings.predicted_pass_seconds},
          {"io", model.io},
          {"backend", model.backend},
          {"weight_bytes", model.weight_bytes},
          {"device_weight_bytes", model.device_weight_bytes},
          {"host_weight_bytes", model.host_weight_bytes},
          {"disk_weight_bytes", model.disk_weight_bytes},
          {"ring_bytes", model.ring_bytes},
          {"kv_bytes", model.kv_bytes},
          {"scratch_bytes", model.scratch_bytes},
          {"staging_bytes", model.staging_bytes}};
}

double percentile(std::vector<double> values, double q) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const double rank = std::ceil(q * static_cast<double>(values.size()));
  const size_t index = static_cast<size_t>(std::max(1.0, rank)) - 1;
  return values[std::min(index, values.size() - 1)];
}

}  // namespace sluice::cli
