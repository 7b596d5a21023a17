// SPDX-License-Identifier: Apache-2.0
// What each operation of a pass took, out of the stamps that its kernels left (cuda/stamps.hpp). No CUDA calls.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/backend.hpp"
#include "cuda/stamps.hpp"

namespace sluice::backend::cuda {

// Which stamps a command leaves. A product of resident weights leaves none: it fills the time between its neighbours.
struct Marks {
  bool begin = false, end = false;
  bool awaited = false;               // its weights were waited for: idle time in front of it is a wait
};

// The commands of one pass. Allocates nothing up to the number of commands reserved.
class PassClock {
 public:
  void reserve(size_t commands) { marks_.reserve(commands), times_.reserve(commands); }
  void clear() { marks_.clear(), times_.clear(); }
  void add(Marks marks) { marks_.push_back(marks); }
  Marks& last() { return marks_.back(); }
  size_t size() const { return marks_.size(); }

  // `stamps`: one per command; the first and the last command are the pass's own kernels, which mark their beginning.
  void read(std::span<const sluice::cuda::Stamp> stamps);
  // Of all commands but the first and the last, once read.
  std::span<const OpTime> times() const { return times_; }

 private:
  std::vector<Marks> marks_;
  std::vector<OpTime> times_;
};

}  // namespace sluice::backend::cuda
