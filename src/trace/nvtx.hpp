// SPDX-License-Identifier: Apache-2.0
// Ranges for tools that read NVTX, such as Nsight Systems: what Sluice's threads do, above what the device does.
#pragma once

#include "trace/record.hpp"

namespace sluice::trace {

// Whether a tool had itself loaded (NVTX_INJECTION64_PATH, which such tools set). Any thread; looks once.
bool nvtx_attached();

// From here to the end of the scope, on this thread, under the kind's name, in the domain "sluice"; a layer's number is
// its payload. Ranges of a thread nest. With no tool attached, and in a build without CUDA's headers: a flag is looked at.
class NvtxRange {
 public:
  NvtxRange() = default;   // none yet
  explicit NvtxRange(Kind kind, uint16_t layer = Record::kNoLayer) { begin(kind, layer); }
  NvtxRange(const NvtxRange&) = delete;
  NvtxRange& operator=(const NvtxRange&) = delete;
  ~NvtxRange() { end(); }

  // Where none is open.
  void begin(Kind kind, uint16_t layer = Record::kNoLayer) {
    open_ = nvtx_attached();
    if (open_) push(kind, layer);
  }
  void end() {
    if (open_) pop();
    open_ = false;
  }

 private:
  static void push(Kind kind, uint16_t layer);
  static void pop();

  bool open_ = false;
};

}  // namespace sluice::trace
