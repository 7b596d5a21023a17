// SPDX-License-Identifier: Apache-2.0
// How much of the host's memory one of several open models takes, by the kernel's count of resident pages.
#pragma once

#include <cstdint>

namespace sluice::cli {

// Adds up what one model's work takes, work by work: pages that the process had before are not the model's. What is
// made once (a GPU's context, threads) counts for the model that needs it first. Mapped files count; what a GPU's driver
// maps for itself may not. One measurement at a time, in the whole process.
class HostMemory {
 public:
  // Gives what `work()` gives.
  template <class Work>
  auto measure(const Work& work) {
    begin();
    auto result = work();
    end();
    return result;
  }

  uint64_t peak_bytes() const { return peak_; }
  // The kernel's mark could not be set back (/proc/self/clear_refs): the peaks of other models may be in this one.
  bool is_bound() const { return bound_; }

 private:
  void begin();
  void end();

  int64_t held_ = 0;    // by the model between two measurements
  int64_t before_ = 0;  // by the process where this one began
  uint64_t peak_ = 0;
  bool bound_ = false;
};

}  // namespace sluice::cli
