// SPDX-License-Identifier: Apache-2.0
// Order statistics over arrays.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace sluice::trace {

// The value below which a share `q` of `values` lies (nearest rank); 0 of nothing.
double percentile(std::span<const double> values, double q);
double median(std::span<const double> values);

// Median of |value - median|, times 1.4826: the standard deviation, if the values are normal.
double robust_deviation(std::span<const double> values);

// Median of the `window` (odd) values around each; the window shrinks at the ends. O(n window), by a sorted window in
// one cache line or two.
std::vector<double> running_median(std::span<const double> values, size_t window);

}  // namespace sluice::trace
