// SPDX-License-Identifier: Apache-2.0
#include "trace/report.hpp"

#include <algorithm>
#include <vector>

#include <nlohmann/json.hpp>

#include "trace/statistics.hpp"

namespace sluice::trace {
namespace {

using nlohmann::json;

// A token counts as accounted for when named parts explain this share of it.
constexpr double kAccounted = 0.99;

json itl_of(std::span<const double> itl) {
  return {{"p50", percentile(itl, 0.5)}, {"p90", percentile(itl, 0.9)}, {"p99", percentile(itl, 0.99)},
          {"p99.9", percentile(itl, 0.999)}, {"max", percentile(itl, 1.0)}};
}

// Seconds of each part, summed over the decoded tokens.
json parts_of(const std::vector<const Token*>& decoded) {
  json parts = json::object();
  for (size_t part = 0; part < kParts; ++part) {
    double sum = 0;
    for (const Token* token : decoded) sum += token->seconds[part];
    parts[name_of(static_cast<Part>(part))] = sum;
  }
  return parts;
}

json accounting_of(const std::vector<const Token*>& decoded) {
  size_t good = 0;
  double worst = 1;
  for (const Token* token : decoded) {
    const double share = token->accounted();
    if (share >= kAccounted) ++good;
    worst = std::min(worst, share);
  }
  const double share = decoded.empty() ? 1 : static_cast<double>(good) / static_cast<double>(decoded.size());
  return {{"tokens_at_99_percent", share}, {"worst_token", worst}};
}

}  // namespace

nlohmann::json report_of(const Trace& trace, const Tokens& tokens) {
  std::vector<const Token*> decoded;
  std::vector<double> itl;
  for (const Token& token : tokens.all) {
    if (!token.decoded) continue;
    decoded.push_back(&token);
    itl.push_back(token.total());
  }
  double seconds = 0;
  for (const double value : itl) seconds += value;
  return {{"file", trace.path},
          {"run", json::parse(trace.note, nullptr, false)},
          {"complete", trace.complete},
          {"records", trace.records},
          {"dropped", trace.dropped},
          {"tokens", tokens.all.size()},
          {"decoded_tokens", decoded.size()},
          {"decode_seconds", seconds},
          {"itl", itl_of(itl)},
          {"parts", parts_of(decoded)},
          {"accounting", accounting_of(decoded)},
          {"itl_series", itl}};
}

}  // namespace sluice::trace
