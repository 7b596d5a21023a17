// SPDX-License-Identifier: Apache-2.0
#include "eval_report.hpp"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "output.hpp"

namespace sluice::cli {
namespace {

std::string name_of(const EvalRow& row) {
  return row.file.substr(row.file.rfind('/') + 1) + (row.is_reference ? " (reference)" : "");
}

std::string number(const std::optional<double>& value, const char* otherwise = "") {
  if (!value) return otherwise;
  return *value == 0 ? "0" : std::fabs(*value) < 1e-3 ? fmt::format("{:.2e}", *value) : fmt::format("{:.4f}", *value);
}

std::string percent(const std::optional<double>& value) { return value ? fmt::format("{:.2f}%", *value * 100) : ""; }

std::string pass_rate(const TaskResult& task) {
  return fmt::format("{:.1f}% ({:.1f} to {:.1f})", 100 * task.rate.rate, 100 * task.rate.low, 100 * task.rate.high);
}

// Columns in front of the size: only where a text was given.
std::vector<std::string> cells(const EvalRow& row) {
  std::vector<std::string> all = {name_of(row)};
  if (row.perplexity) {
    all.insert(all.end(), {fmt::format("{:.3f}", *row.perplexity), number(row.kl_mean), number(row.kl_p99),
                           percent(row.top1)});
  }
  all.insert(all.end(), {fmt::format("{:.3f}", row.bytes_per_weight), bytes_text(row.file_bytes),
                         (row.host_peak_is_bound ? "at most " : "") + bytes_text(row.host_peak_bytes)});
  if (row.device_planned_bytes) all.push_back(bytes_text(*row.device_planned_bytes));
  all.insert(all.end(), {fmt::format("{:.1f}", row.tokens_per_second),
                         fmt::format("{:.0f}", row.prefill_tokens_per_second)});
  for (const TaskResult& task : row.tasks) all.push_back(pass_rate(task));
  return all;
}

std::vector<std::string> headings(const std::vector<EvalRow>& rows) {
  std::vector<std::string> all = {"file"};
  if (rows.front().perplexity) all.insert(all.end(), {"perplexity", "KL mean", "KL p99", "top-1 agreement"});
  all.insert(all.end(), {"bytes/weight", "size", "host peak, measured"});
  if (rows.front().device_planned_bytes) all.emplace_back("device, planned");
  all.insert(all.end(), {"decode tok/s", "prefill tok/s"});
  for (const TaskResult& task : rows.front().tasks) {
    all.push_back(fmt::format("{} pass@1, {} x {}", task.name, task.problems, task.samples));
  }
  return all;
}

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '&':
        out += "&amp;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

// KL (logarithmic) over bytes per weight, one dot a file.
std::string chart(const std::vector<EvalRow>& rows) {
  constexpr double kWidth = 640, kHeight = 360, kMargin = 60;
  double most_bytes = 0, least = 0, most = -20;
  for (const EvalRow& row : rows) {
    if (!row.kl_mean || *row.kl_mean <= 0) continue;
    most_bytes = std::max(most_bytes, row.bytes_per_weight);
    least = std::min(least, std::floor(std::log10(*row.kl_mean)));
    most = std::max(most, std::ceil(std::log10(*row.kl_mean)));
  }
  if (most_bytes == 0) return "";
  if (most <= least) most = least + 1;
  const auto x = [&](double bytes) { return kMargin + bytes / (most_bytes * 1.1) * (kWidth - 2 * kMargin); };
  const auto y = [&](double log_kl) { return kMargin + (most - log_kl) / (most - least) * (kHeight - 2 * kMargin); };
  std::string svg =
      fmt::format("<svg viewBox=\"0 0 {} {}\" width=\"{}\" font-family=\"sans-serif\" font-size=\"12\">\n", kWidth,
                  kHeight, kWidth);
  for (double power = least; power <= most; power += 1) {
    svg += fmt::format(
        "<line x1=\"{0}\" x2=\"{1}\" y1=\"{2:.1f}\" y2=\"{2:.1f}\" stroke=\"#ddd\"/>"
        "<text x=\"8\" y=\"{3:.1f}\">1e{4:.0f}</text>\n",
        kMargin, kWidth - kMargin, y(power), y(power) + 4, power);
  }
  for (const EvalRow& row : rows) {
    if (!row.kl_mean || *row.kl_mean <= 0) continue;
    const double at_x = x(row.bytes_per_weight), at_y = y(std::log10(*row.kl_mean));
    svg += fmt::format(
        "<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"4\" fill=\"#1663a9\"/><text x=\"{:.1f}\" y=\"{:.1f}\">{}</text>\n",
        at_x, at_y, at_x + 7, at_y - 5, escaped(name_of(row)));
  }
  return svg + fmt::format(
                   "<text x=\"{}\" y=\"{}\">bytes per weight</text><text x=\"8\" y=\"24\">mean KL, nats</text></svg>\n",
                   kWidth / 2 - 50, kHeight - 12);
}

}  // namespace

std::string to_markdown(const std::vector<EvalRow>& rows) {
  std::string out = fmt::format("| {} |\n|", fmt::join(headings(rows), " | "));
  for (size_t i = 0; i < headings(rows).size(); ++i) out += i == 0 ? "---|" : "---:|";
  out += "\n";
  for (const EvalRow& row : rows) out += fmt::format("| {} |\n", fmt::join(cells(row), " | "));
  return out;
}

nlohmann::ordered_json to_json(const std::vector<EvalRow>& rows, const EvalText& text) {
  using Json = nlohmann::ordered_json;
  Json files = Json::array();
  for (const EvalRow& row : rows) {
    Json json = {{"file", row.file}, {"reference", row.is_reference}};
    if (row.perplexity) {
      json["perplexity"] = *row.perplexity;
      json["positions"] = row.positions;
    }
    if (row.kl_mean) json["kl_mean"] = *row.kl_mean;
    if (row.kl_p99) json["kl_p99"] = *row.kl_p99;
    if (row.top1) json["top1_agreement"] = *row.top1;
    json["bytes_per_weight"] = row.bytes_per_weight;
    json["file_bytes"] = row.file_bytes;
    json["host_peak_bytes"] = row.host_peak_bytes;
    if (row.host_peak_is_bound) json["host_peak_is_bound"] = true;
    if (row.device_planned_bytes) json["device_planned_bytes"] = *row.device_planned_bytes;
    json["decode_tokens_per_second"] = row.tokens_per_second;
    json["prefill_tokens_per_second"] = row.prefill_tokens_per_second;
    for (const TaskResult& task : row.tasks) {
      json["tasks"].push_back({{"task", task.name},
                               {"problems", task.problems},
                               {"samples", task.samples},
                               {"max_tokens", task.max_tokens},
                               {"pass_at_1", task.rate.rate},
                               {"low_95", task.rate.low},
                               {"high_95", task.rate.high},
                               {"right", task.right},
                               {"cut", task.cut}});
    }
    files.push_back(std::move(json));
  }
  Json json;
  if (!text.name.empty()) json = {{"text", text.name}, {"windows", text.windows}, {"window", text.window}};
  json["files"] = std::move(files);
  return json;
}

std::string to_html(const std::vector<EvalRow>& rows) {
  std::string html =
      "<!DOCTYPE html>\n<html><head><meta charset=\"utf-8\"><title>sluice eval</title>\n"
      "<style>body{font-family:sans-serif;margin:2em}td,th{padding:.3em .8em;text-align:right}"
      "td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:#f4f4f4}</style></head><body>\n"
      "<h1>Quantization loss</h1>\n<table><tr>";
  for (const std::string& heading : headings(rows)) html += "<th>" + escaped(heading) + "</th>";
  html += "</tr>\n";
  for (const EvalRow& row : rows) {
    html += "<tr>";
    for (const std::string& cell : cells(row)) html += "<td>" + escaped(cell) + "</td>";
    html += "</tr>\n";
  }
  return html + "</table>\n" + chart(rows) + "</body></html>\n";
}

}  // namespace sluice::cli
