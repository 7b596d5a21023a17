// SPDX-License-Identifier: Apache-2.0
#include "trace/spikes.hpp"

#include <algorithm>
#include <cmath>

#include "trace/statistics.hpp"

namespace sluice::trace {
namespace {

constexpr size_t kLevelWindow = 65, kDeviationWindow = 129;
constexpr double kLeastDeviation = 0.005;   // of the level: a quieter series would call the clock's own noise spikes

constexpr size_t kStepSide = 48;            // values to either side of a step
constexpr double kLeastStep = 0.05;         // of the level before
constexpr double kStepErrors = 6;
// Standard error of a median of n normal values: 1.2533 deviations / sqrt(n) (efficiency 2 / pi).
constexpr double kMedianError = 1.2533;

}  // namespace

Baseline baseline_of(std::span<const double> values) {
  Baseline baseline;
  baseline.level = running_median(values, kLevelWindow);
  std::vector<double> distance(values.size());
  for (size_t i = 0; i < values.size(); ++i) distance[i] = std::abs(values[i] - baseline.level[i]);
  baseline.deviation = running_median(distance, kDeviationWindow);
  baseline.score.resize(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    double& deviation = baseline.deviation[i];
    deviation = std::max(1.4826 * deviation, kLeastDeviation * std::abs(baseline.level[i]));
    baseline.score[i] = deviation > 0 ? (values[i] - baseline.level[i]) / deviation : 0;
  }
  return baseline;
}

std::vector<size_t> spikes_of(const Baseline& baseline, double least_score) {
  const std::vector<double>& score = baseline.score;
  std::vector<size_t> spikes;
  for (size_t i = 0; i < score.size(); ++i) {
    if (score[i] < least_score) continue;
    if (spikes.empty() || spikes.back() + 1 != i) spikes.push_back(i);
    else if (score[i] > score[spikes.back()]) spikes.back() = i;
  }
  return spikes;
}

std::vector<Step> steps_of(std::span<const double> values) {
  std::vector<Step> steps;
  if (values.size() < 2 * kStepSide) return steps;
  const std::vector<double> medians = running_median(values, 2 * (kStepSide / 2) + 1);
  const Baseline baseline = baseline_of(values);
  // Of the medians centred half a side before and behind i, the difference; the largest one in reach is the step.
  const size_t half = kStepSide / 2;
  const auto change = [&](size_t i) { return medians[i + half] - medians[i - half - 1]; };
  const auto error = [&](size_t i) {
    return std::sqrt(2.0 / kStepSide) * kMedianError *
           std::max(baseline.deviation[i - half - 1], baseline.deviation[i + half]);
  };
  // What a trend brings over the same distance, by the stretches next to it.
  const auto trend = [&](size_t i) {
    double sum = 0, count = 0;
    if (i >= half + 1 + kStepSide) sum += medians[i - half - 1] - medians[i - half - 1 - kStepSide], ++count;
    if (i + half + kStepSide < values.size()) sum += medians[i + half + kStepSide] - medians[i + half], ++count;
    return count > 0 ? sum / count : 0;
  };
  for (size_t i = kStepSide; i + kStepSide < values.size(); ++i) {
    const double size = std::abs(change(i) - trend(i));
    if (size < kStepErrors * error(i) || size < kLeastStep * medians[i - half - 1]) continue;
    bool largest = true;
    for (size_t k = std::max(kStepSide, i - half); largest && k <= std::min(i + half, values.size() - kStepSide - 1);
         ++k) {
      largest = std::abs(change(k)) < std::abs(change(i)) || (std::abs(change(k)) == std::abs(change(i)) && k >= i);
    }
    if (!largest) continue;
    const size_t left = i - std::min<size_t>(i, 64), right = std::min(values.size(), i + 64);
    steps.push_back(
        {.index = i, .before = median(values.subspan(left, i - left)), .after = median(values.subspan(i, right - i))});
  }
  return steps;
}

}  // namespace sluice::trace
