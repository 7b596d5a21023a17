// SPDX-License-Identifier: Apache-2.0
// The compute queue of a pass as command buffers that are recorded once.
//
// A pass is a list of commands, the same in every pass of a kind. It is cut into segments where the queue waits for an
// event or records one, and after so many commands that no submission runs long (drivers reset a device that does not
// answer for seconds) and that the first kernels run while the last are still being recorded. A segment's command
// buffer is submitted again in every pass that has the same commands there: what changes from pass to pass (positions,
// sessions, selected rows) lies in device memory. A segment that does not come as expected is recorded anew.
//
// One thread: the executor's. No command buffer is in flight when a pass begins.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.hpp"
#include "backend/vulkan/pass_clock.hpp"
#include "backend/vulkan/queue.hpp"
#include "sluice/result.hpp"

namespace sluice::backend::vulkan {

// What recorded commands have built in.
struct PassKind {
  uint32_t rows = 0;
  uint32_t wanted_rows = 0;
  uint32_t chunks = 0;                // of split attention that are looked at; 0: not split
  bool timed = false;                 // with queries
  bool operator==(const PassKind&) const = default;
};

enum class CommandKind : uint8_t { begin_pass, operation, copy_logits };

struct Command {
  CommandKind kind = CommandKind::operation;
  uint32_t rows = 0;                  // that it works on
  uint32_t query = PassClock::kNoQuery;   // its first (pass_clock.hpp)
  bool awaited = false;               // an event was waited for in front of it: it is the first of its segment
  Op op;                              // of an operation
  bool operator==(const Command&) const = default;
};

class PassCommands {
 public:
  // Records one command, with what it needs to be behind everything before it.
  using Record = std::function<Status(const Command& command, VkCommandBuffer commands)>;
  using Submit = std::function<Status(VkCommandBuffer commands)>;
  // Reports a Vulkan error.
  using Check = std::function<Status(VkResult code, const char* what)>;

  PassCommands(Queue& queue, Record record, Submit submit, Check check)
      : queue_(queue), record_(std::move(record)), submit_(std::move(submit)), check_(std::move(check)) {}
  ~PassCommands();
  PassCommands(const PassCommands&) = delete;
  PassCommands& operator=(const PassCommands&) = delete;

  void begin(const PassKind& kind);
  const PassKind& kind() const { return pass_->kind; }
  Status add(const Command& command);
  // Submits what was added since the last flush.
  Status flush();
  // When command buffers were recorded since begin().
  std::span<const HostTime> recordings() const { return recordings_; }

 private:
  struct Segment {
    std::vector<Command> commands;
    VkCommandBuffer recorded = VK_NULL_HANDLE;
  };
  struct Pass {
    PassKind kind;
    uint64_t last_used = 0;
    std::vector<Segment> segments;
  };

  Status record(Segment& segment);
  void drop(Pass& pass);

  Queue& queue_;
  Record record_;
  Submit submit_;
  Check check_;
  std::vector<std::unique_ptr<Pass>> passes_;
  uint64_t clock_ = 0;
  Pass* pass_ = nullptr;
  size_t segment_ = 0;                // the one that is being added to
  size_t count_ = 0;                  // commands added to it
  bool as_expected_ = true;           // ... which are those it had the last time
  std::vector<HostTime> recordings_;
};

}  // namespace sluice::backend::vulkan
