// SPDX-License-Identifier: Apache-2.0
// The times of one kernel of a pass, in nanoseconds of the GPU's clock (globaltimer: steps of 32 ns on an H100, of up
// to 1 us on older ones). Which kernels write which of the two: each launch function says it; matrix products write
// neither, and lie between the kernels beside them.
#pragma once

namespace sluice::cuda {

struct Stamp {
  unsigned long long begin_ns = 0;
  unsigned long long end_ns = 0;
};

}  // namespace sluice::cuda
