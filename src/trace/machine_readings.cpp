// SPDX-License-Identifier: Apache-2.0
#include "trace/machine_readings.hpp"

#include <algorithm>

#include "trace/statistics.hpp"

namespace sluice::trace {
namespace {

constexpr Counter kMachineCounters[] = {Counter::busy_ms, Counter::steal_ms, Counter::reclaimed_pages,
                                        Counter::swapped_pages, Counter::refaults};
// A token has its reading's growth but not its time: another reading is where one of these grew otherwise, or so long
// after that it cannot be the same one (they are 0.2 s apart and a little more).
constexpr double kLongestReading = 0.25;

bool same_reading(const Token& first, const Token& token) {
  return token.end - first.end < kLongestReading &&
         std::all_of(std::begin(kMachineCounters), std::end(kMachineCounters),
                     [&](Counter counter) { return first[counter] == token[counter]; });
}

}  // namespace

MachineReadings::MachineReadings(std::span<const Token* const> tokens, std::span<const double> excess)
    : tokens_(tokens), reading_of_(tokens.size()) {
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (readings_.empty() || !same_reading(*tokens[readings_.back().first], *tokens[i])) {
      readings_.push_back({.first = i, .slowest = excess[i]});
    }
    readings_.back().slowest = std::max(readings_.back().slowest, excess[i]);
    reading_of_[i] = static_cast<uint32_t>(readings_.size() - 1);
  }
}

Growth MachineReadings::growth_of(Counter counter, std::span<const size_t> members, double like) const {
  std::vector<bool> has_member(readings_.size());
  for (const size_t i : members) has_member[reading_of_[i]] = true;
  std::vector<double> theirs, others;
  for (size_t i = 0; i < readings_.size(); ++i) {
    const double grown = (*tokens_[readings_[i].first])[counter];
    if (has_member[i]) theirs.push_back(grown);
    else if (readings_[i].slowest < like) others.push_back(grown);
  }
  Growth growth{.readings = static_cast<double>(theirs.size()), .others = static_cast<double>(others.size())};
  for (const double grown : theirs) growth.sum += grown;
  for (const double grown : others) growth.usual += grown / growth.others;
  growth.seldom = percentile(others, 0.95);
  for (const double grown : theirs) growth.exceeding += grown > growth.seldom ? 1 / growth.readings : 0;
  return growth;
}

}  // namespace sluice::trace
