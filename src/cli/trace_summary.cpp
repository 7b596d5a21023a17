// SPDX-License-Identifier: Apache-2.0
#include "trace_summary.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "output.hpp"

namespace sluice::cli {
namespace {

using nlohmann::json;

// Eight heights of a block, from the median's half up to the highest value, by square root: a spike stands out and the
// rest keeps its shape.
std::string sparkline(const json& series, double typical) {
  constexpr std::array<const char*, 8> kBlocks = {"▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  constexpr size_t kWidth = 72;
  const size_t columns = std::min(kWidth, series.size());
  std::vector<double> highest(columns, 0);
  for (size_t i = 0; i < series.size(); ++i) {
    double& column = highest[i * columns / series.size()];
    column = std::max(column, series[i].get<double>());
  }
  const double floor = typical / 2;
  const double top = columns == 0 ? 0 : *std::max_element(highest.begin(), highest.end());
  std::string line;
  for (const double value : highest) {
    const double share = top > floor ? std::sqrt(std::max(0.0, value - floor) / (top - floor)) : 0;
    line += kBlocks[static_cast<size_t>(std::min(7.0, share * 7.999))];
  }
  return line;
}

std::string seconds_of(const json& value) { return seconds_text(value.get<double>()); }

// Parts by size, those below a thousandth left out.
std::string parts_table(const json& report) {
  const double total = report["decode_seconds"].get<double>();
  const auto tokens = report["decoded_tokens"].get<double>();
  std::vector<std::pair<double, std::string>> parts;
  for (const auto& [name, seconds] : report["parts"].items()) parts.emplace_back(seconds.get<double>(), name);
  std::sort(parts.rbegin(), parts.rend());
  std::string text;
  for (const auto& [seconds, name] : parts) {
    if (seconds < total * 1e-3) continue;
    text += fmt::format("  {:<12}{:>11} {:>6.1f}%\n", name, seconds_text(seconds / tokens), 100 * seconds / total);
  }
  return text;
}

// A train's period or phase: "16.0 tokens", "250 ms", "64.0 MiB read".
std::string on_its_clock(const json& train, const char* which) {
  const std::string clock = train["clock"];
  const auto value = train[which].get<double>();
  if (clock == "token") return fmt::format("{:.1f} tokens", value);
  if (clock == "time") return seconds_text(value);
  return bytes_text(static_cast<uint64_t>(value)) + " read";
}

std::string spikes_text(const json& report) {
  std::string text;
  for (const json& train : report["trains"]) {
    text += fmt::format("\nspikes every {} (phase {}): {} of {:.0f} places, {} each, {:.1f}% of the time",
                        on_its_clock(train, "period"), on_its_clock(train, "phase"), train["tokens"].size(),
                        train["places"].get<double>(), seconds_of(train["excess_each"]),
                        100 * train["share_of_time"].get<double>());
    text += fmt::format("\n  {} ({}): {}", train["cause"].get<std::string>(), train["grade"].get<std::string>(),
                        train["cause_text"].get<std::string>());
    if (!train["evidence"].get<std::string>().empty()) text += "; " + train["evidence"].get<std::string>();
    if (train.contains("confirmation")) text += "\n  " + train["confirmation"]["text"].get<std::string>();
    for (const json& clock : train["also"])
      text += fmt::format("\n  the {} clock fits as well", clock.get<std::string>());
  }
  const json& loose = report["loose_spikes"];
  if (loose["count"].get<uint64_t>() > 0) {
    std::string causes;
    for (const auto& [cause, count] : loose["causes"].items())
      causes += fmt::format("{}{} {}", causes.empty() ? "" : ", ", count.get<uint64_t>(), cause);
    text += fmt::format("\n{} spikes without a period, {:.1f}% of the time: {}", loose["count"].get<uint64_t>(),
                        100 * loose["share_of_time"].get<double>(), causes);
  }
  const json& steps = report["steps"];
  for (const json& step : steps["largest"]) {
    text += fmt::format("\nstep at token {}: {} before, {} after", step["token"].get<uint64_t>(),
                        seconds_of(step["before"]), seconds_of(step["after"]));
  }
  if (const auto count = steps["count"].get<uint64_t>(); count > steps["largest"].size()) {
    text += fmt::format("\n... and {} smaller steps", count - steps["largest"].size());
  }
  if (const json& trend = report["trend"]; trend.is_object()) {
    text += fmt::format("\ncontext growth: {} at {} tokens of context, {} at {}", seconds_of(trend["first"]),
                        trend["context_first"].get<uint64_t>(), seconds_of(trend["last"]),
                        trend["context_last"].get<uint64_t>());
  }
  for (const json& fault : report["injected"])
    text += fmt::format("\nfault made on purpose: {}, {} times", fault["text"].get<std::string>(),
                        fault["times"].get<uint64_t>());
  return text;
}

std::string clock_text(const json& clock) {
  const auto within = [&](const char* name) {
    const auto ns = clock[name].get<uint64_t>();
    return ns < 1000 ? fmt::format("{} ns", ns) : seconds_text(static_cast<double>(ns) * 1e-9);
  };
  std::string text = "the clocks are known to within " + within("host_error_ns");
  if (!clock["device_error_ns"].is_null())
    text += "; the GPU's clock is known to within " + within("device_error_ns") + " in nine of ten passes";
  return text;
}

}  // namespace

std::string trace_summary(const json& report) {
  const auto decoded = report["decoded_tokens"].get<uint64_t>();
  std::string text = fmt::format("trace: {} tokens, {} of them decoded, {} records", report["tokens"].get<uint64_t>(),
                                 decoded, report["records"].get<uint64_t>());
  const auto dropped = report["dropped"].get<uint64_t>();
  if (dropped > 0) text += fmt::format(", {} dropped: the disk takes the trace too slowly", dropped);
  if (!report["complete"].get<bool>()) text += "; the run ended before its trace was finished";
  if (decoded == 0) return text;
  const json& itl = report["itl"];
  text += fmt::format("\nITL: p50 {}, p90 {}, p99 {}, p99.9 {}, max {}\n", seconds_of(itl["p50"]),
                      seconds_of(itl["p90"]), seconds_of(itl["p99"]), seconds_of(itl["p99.9"]), seconds_of(itl["max"]));
  text += fmt::format("  {}\n", sparkline(report["itl_series"], itl["p50"].get<double>()));
  text += "time of a token:\n" + parts_table(report);
  const json& accounting = report["accounting"];
  text += fmt::format("accounted for to 99%: {:.2f}% of the tokens (the worst one: {:.1f}% of its time)",
                      100 * accounting["tokens_at_99_percent"].get<double>(),
                      100 * accounting["worst_token"].get<double>());
  text += fmt::format("\n{}", clock_text(report["clock"]));
  text += spikes_text(report);
  return text;
}

Result<std::string> finish_trace(Model& model, const std::string& path) {
  SLUICE_TRY_ASSIGN(totals, model.stop_trace());
  Result<std::string> text = analyze_trace(path);
  if (!text && text.error().code == ErrorCode::unsupported) {
    return fmt::format("trace: {} records in {}, no token yet", totals.records, path);
  }
  if (!text) return fail(std::move(text.error()));
  return trace_summary(json::parse(*text));
}

}  // namespace sluice::cli
