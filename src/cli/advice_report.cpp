// SPDX-License-Identifier: Apache-2.0
#include "advice_report.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "output.hpp"

namespace sluice::cli {
namespace {

const char* name_of(Workload workload) {
  switch (workload) {
    case Workload::general:
      return "general";
    case Workload::math:
      return "math";
    case Workload::code:
      return "code";
  }
  return "unknown";
}

std::string tokens_text(double rate) { return rate > 0 ? fmt::format("{:.1f}", rate) : "unknown"; }

// What to type. The checkpoint's name is the user's to fill in: the model here may be shapes alone.
std::string command_of(const AdviceCandidate& chosen, const AdviceOptions& options) {
  return fmt::format("sluice quantize CHECKPOINT -o OUT.sluice --recipe {}/{}.toml{} --calibration TEXT",
                     options.recipes, chosen.recipe, chosen.residual ? " --residual" : "");
}

std::string table(const AdviceReport& report) {
  std::string text = fmt::format("{:<36}{:>10}{:>12}{:>12}{:>12}{:>12}{:>10}{:>10}\n", "recipe", "KL", "size", "device",
                                 "host", "disk", "tok/s", "fine");
  for (size_t i = 0; i < report.candidates.size(); ++i) {
    const AdviceCandidate& one = report.candidates[i];
    const std::string name =
        fmt::format("{}{}{}", report.chosen == i ? "* " : "  ", one.recipe, one.residual ? " --residual" : "");
    text += fmt::format("{:<36}{:>10.2g}{:>12}", name, one.kl, bytes_text(one.bytes));
    if (!one.fits) {
      text += fmt::format("  does not fit: takes a device budget of {}\n", bytes_text(one.smallest_device_bytes));
      continue;
    }
    text += fmt::format("{:>12}{:>12}{:>12}{:>10}{:>10}\n", bytes_text(one.device_bytes), bytes_text(one.host_bytes),
                        bytes_text(one.disk_bytes), tokens_text(one.tokens_per_second),
                        one.residual ? tokens_text(one.fine_tokens_per_second) : "");
  }
  return text;
}

}  // namespace

std::string advice_text(const AdviceReport& report, const AdviceOptions& options) {
  std::string text;
  const auto line = [&text](const char* name, const std::string& value) {
    text += fmt::format("{:<12}{}\n", name, value);
  };
  const auto rate = [](double value) { return value > 0 ? rate_text(value) : std::string("unknown"); };
  line("model", report.model);
  line("device", fmt::format("{} ({}): {} for the model, {} of host memory", report.device, report.backend,
                             bytes_text(report.device_bytes), bytes_text(report.host_bytes)));
  line("bandwidths", fmt::format("device memory {}, bus {}, disk {}", rate(report.bandwidths.device_memory),
                                 rate(report.bandwidths.bus), rate(report.bandwidths.disk)));
  line("workload", fmt::format("{}, {} positions: mean KL of up to {}, {} tok/s wanted", name_of(options.workload),
                               report.context, report.kl_limit, options.tokens_per_second));
  if (report.chosen) {
    const AdviceCandidate& chosen = report.candidates[*report.chosen];
    line("recipe", chosen.recipe + (chosen.residual ? " with residuals" : ""));
    line("tiers", fmt::format("{} on the device, {} in host memory, {} on disk", bytes_text(chosen.device_bytes),
                              bytes_text(chosen.host_bytes), bytes_text(chosen.disk_bytes)));
    const std::string bound = chosen.bound.empty() ? "" : fmt::format(", bound by {}", chosen.bound);
    line("expect", chosen.residual ? fmt::format("{} tok/s without the residual, {} with it{}",
                                                 tokens_text(chosen.tokens_per_second),
                                                 tokens_text(chosen.fine_tokens_per_second), bound)
                                   : fmt::format("{} tok/s{}", tokens_text(chosen.tokens_per_second), bound));
  } else {
    line("recipe", "none fits");
  }
  for (size_t i = 0; i < report.reasons.size(); ++i) line(i == 0 ? "why" : "", report.reasons[i]);
  if (report.chosen) line("next", command_of(report.candidates[*report.chosen], options));
  return text + "\n" + table(report) +
         fmt::format("KL: mean, nats, measured on {}; tiers and KL with the residual where there is one.\n",
                     report.measured_on);
}

nlohmann::json advice_json(const AdviceReport& report, const AdviceOptions& options) {
  nlohmann::json candidates = nlohmann::json::array();
  for (const AdviceCandidate& one : report.candidates) {
    candidates.push_back({{"recipe", one.recipe},
                          {"residual", one.residual},
                          {"kl", one.kl},
                          {"bytes", one.bytes},
                          {"fits", one.fits},
                          {"device_bytes", one.device_bytes},
                          {"host_bytes", one.host_bytes},
                          {"disk_bytes", one.disk_bytes},
                          {"smallest_device_bytes", one.smallest_device_bytes},
                          {"tokens_per_second", one.tokens_per_second},
                          {"fine_tokens_per_second", one.fine_tokens_per_second},
                          {"bound", one.bound}});
  }
  nlohmann::json json = {{"model", report.model},
                         {"device", report.device},
                         {"backend", report.backend},
                         {"workload", name_of(options.workload)},
                         {"wanted_tokens_per_second", options.tokens_per_second},
                         {"kl_limit", report.kl_limit},
                         {"measured_on", report.measured_on},
                         {"context", report.context},
                         {"device_bytes", report.device_bytes},
                         {"host_bytes", report.host_bytes},
                         {"bandwidths",
                          {{"disk", report.bandwidths.disk},
                           {"bus", report.bandwidths.bus},
                           {"device_memory", report.bandwidths.device_memory}}},
                         {"candidates", candidates},
                         {"chosen", nullptr},
                         {"reasons", report.reasons}};
  if (report.chosen) json["chosen"] = candidates[*report.chosen];
  return json;
}

}  // namespace sluice::cli
