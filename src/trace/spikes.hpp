// SPDX-License-Identifier: Apache-2.0
// Single values that stand out of a series of latencies, and levels that change: pure functions over arrays.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace sluice::trace {

// A series against what is usual around each of its values.
struct Baseline {
  std::vector<double> level;       // running median
  std::vector<double>
      deviation;  // running median of |value - level| times 1.4826, at least kLeastDeviation of the level
  std::vector<double> score;       // (value - level) / deviation
};
// Windows of 65 values for the level and 129 for the deviation: a spike in every fourth value moves neither much, and a
// step is followed within 32.
Baseline baseline_of(std::span<const double> values);

// A value is a spike where its score reaches this. Normal noise does so once in 10^9 values; real latencies have longer
// tails, so a spike by itself says little, and a train of them is what is tested for significance (trains.hpp).
inline constexpr double kSpikeScore = 6;

// Indices of spikes. Of neighbours the highest one: what made it is over when the next but one begins.
std::vector<size_t> spikes_of(const Baseline& baseline, double least_score = kSpikeScore);

// The level changes at `index` (its first value at the new one) and stays.
struct Step {
  size_t index = 0;
  double before = 0, after = 0;    // medians of up to 64 values to either side
};
// Changes of at least 5% between medians of 48 values that are also 6 standard errors of those medians; a change that a
// slow trend explains is none.
std::vector<Step> steps_of(std::span<const double> values);

}  // namespace sluice::trace
