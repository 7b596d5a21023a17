// SPDX-License-Identifier: Apache-2.0
// `sluice bench --kernels`.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sluice/sluice.hpp"

namespace sluice::cli {

// Prints a line per shape and number of rows, or JSON. The exit code.
Result<int> bench_kernel_table(const std::string& path, const std::vector<uint32_t>& rows, bool json);

}  // namespace sluice::cli
