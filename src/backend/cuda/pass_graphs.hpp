// SPDX-License-Identifier: Apache-2.0
// The compute queue of a pass as CUDA graphs, so that at batch 1 no kernel waits for its launch.
//
// A pass is a list of commands, the same in every pass of a kind. It is cut into segments where the queue waits for an
// event or records one, and after kSegmentCommands, so that the first kernels run while the last are still being
// submitted. A segment that comes for the second time is captured, and replayed from then on: what changes from pass to
// pass (positions, sessions, selected rows) lies in device memory. The first time it is launched plainly, which also
// loads its kernels, so that a kind of pass that comes once costs no capture. A segment that does not come as it was
// expected is launched plainly and remembered as it came. A kind that is seen to come (decoding goes on to where the
// grid of attention grows) is captured ahead, a little behind each pass while the GPU works on it.
//
// One thread: the executor's.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.hpp"
#include "sluice/result.hpp"

namespace sluice::backend::cuda {

// What captured kernels have built in.
struct PassKind {
  uint32_t rows = 0;
  uint32_t wanted_rows = 0;
  bool prefill_attention = false;
  uint32_t attention_bound = 0;       // positions that the grid of decode attention is made for
  bool operator==(const PassKind&) const = default;
};

enum class CommandKind : uint8_t { begin_pass, operation, finish_pass };

struct Command {
  CommandKind kind = CommandKind::operation;
  uint32_t index = 0;                 // in the pass: its stamp
  uint32_t rows = 0;                  // that it works on; of finish_pass: that have logits
  Op op;                              // of an operation
};

class PassGraphs {
 public:
  // Enqueues one command on a stream, which may be capturing. `overlap`: behind a kernel of the same segment, so that it
  // may start before that one has ended; the first of a segment may follow the wait for a copy.
  using Launch =
      std::function<Status(const Command& command, const PassKind& kind, bool overlap, cudaStream_t stream)>;
  // Reports a CUDA error.
  using Check = std::function<Status(cudaError_t code, const char* what)>;

  PassGraphs(Launch launch, Check check) : launch_(std::move(launch)), check_(std::move(check)) {}
  ~PassGraphs();
  PassGraphs(const PassGraphs&) = delete;
  PassGraphs& operator=(const PassGraphs&) = delete;

  // `capture`: a stream of its own, on which nothing runs.
  void set_streams(cudaStream_t compute, cudaStream_t capture) { compute_ = compute, capture_ = capture; }

  void begin(const PassKind& kind);
  Status add(const Command& command);
  // Submits what was added since the last flush.
  Status flush();
  // Behind the last flush of a pass: captures some of a pass of another kind with the same commands, for about a
  // millisecond of the host's time, and returns at once when all of it is there.
  Status capture_ahead(const PassKind& kind);
  // When graphs were captured since begin().
  std::span<const HostTime> captures() const { return captures_; }

 private:
  struct Segment {
    std::vector<Command> commands;
    cudaGraphExec_t graph = nullptr;
  };
  struct Pass {
    PassKind kind;
    uint64_t last_used = 0;
    std::vector<Segment> segments;
  };

  Pass& pass_of(const PassKind& kind);
  static bool worth_a_graph(const Segment& segment, const PassKind& kind);
  Status launch_all(const Segment& segment, const PassKind& kind, cudaStream_t stream);
  Status capture(Segment& segment, const PassKind& kind);
  static void drop(Segment& segment);

  Launch launch_;
  Check check_;
  cudaStream_t compute_ = nullptr, capture_ = nullptr;
  std::vector<std::unique_ptr<Pass>> passes_;
  uint64_t clock_ = 0;
  Pass* pass_ = nullptr;
  size_t segment_ = 0;                // the one that is being added to
  size_t count_ = 0;                  // commands added to it
  bool as_expected_ = true;           // ... which are those it had the last time
  std::vector<HostTime> captures_;
};

}  // namespace sluice::backend::cuda
