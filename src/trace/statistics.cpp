// SPDX-License-Identifier: Apache-2.0
#include "trace/statistics.hpp"

#include <algorithm>
#include <cmath>

namespace sluice::trace {

double percentile(std::span<const double> values, double q) {
  if (values.empty()) return 0;
  std::vector<double> sorted(values.begin(), values.end());
  const double rank = std::ceil(q * static_cast<double>(sorted.size()));
  const size_t index = std::min(static_cast<size_t>(std::max(1.0, rank)) - 1, sorted.size() - 1);
  std::nth_element(sorted.begin(), sorted.begin() + static_cast<std::ptrdiff_t>(index), sorted.end());
  return sorted[index];
}

double median(std::span<const double> values) {
  if (values.empty()) return 0;
  std::vector<double> sorted(values.begin(), values.end());
  const auto middle = sorted.begin() + static_cast<std::ptrdiff_t>(sorted.size() / 2);
  std::nth_element(sorted.begin(), middle, sorted.end());
  if (sorted.size() % 2 == 1) return *middle;
  return (*middle + *std::max_element(sorted.begin(), middle)) / 2;
}

double robust_deviation(std::span<const double> values) {
  const double center = median(values);
  std::vector<double> distances(values.size());
  std::transform(values.begin(), values.end(), distances.begin(), [center](double v) { return std::abs(v - center); });
  return 1.4826 * median(distances);
}

std::vector<double> running_median(std::span<const double> values, size_t window) {
  const size_t half = window / 2;
  std::vector<double> sorted, medians(values.size());
  sorted.reserve(window + 1);
  size_t begin = 0, end = 0;   // of what `sorted` holds
  for (size_t i = 0; i < values.size(); ++i) {
    for (; end < std::min(values.size(), i + half + 1); ++end) {
      sorted.insert(std::upper_bound(sorted.begin(), sorted.end(), values[end]), values[end]);
    }
    for (; begin + half < i; ++begin) sorted.erase(std::lower_bound(sorted.begin(), sorted.end(), values[begin]));
    const size_t middle = sorted.size() / 2;
    medians[i] = sorted.size() % 2 == 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
  }
  return medians;
}

}  // namespace sluice::trace
