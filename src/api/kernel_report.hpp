// SPDX-License-Identifier: Apache-2.0
// Which matrix products a model consists of.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "backend/cuda/kernel_bench.hpp"
#include "storage/manifest.hpp"

namespace sluice::api {

struct KernelShape {
  backend::cuda::BenchShape shape;
  std::string scheme;                 // "int4 g128", "int4 g32 bias"; of several kinds, joined by " + "
  uint64_t weight_bytes = 0;          // values, scales, zeros, bias
};

// The products of a pass with everything resident, each distinct shape once, in the order in which a pass meets them.
std::vector<KernelShape> kernel_shapes(const storage::Manifest& manifest);

}  // namespace sluice::api
