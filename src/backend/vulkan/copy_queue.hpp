// SPDX-License-Identifier: Apache-2.0
// Host memory to device buffers, in order, on a queue of its own. One thread at a time: the loader's, then the
// prefetcher's.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "backend/vulkan/device.hpp"
#include "backend/vulkan/queue.hpp"

namespace sluice::backend::vulkan {

class CopyQueue {
 public:
  // `device` must outlive the object.
  static Result<std::unique_ptr<CopyQueue>> create(Device& device);
  ~CopyQueue();
  CopyQueue(const CopyQueue&) = delete;
  CopyQueue& operator=(const CopyQueue&) = delete;

  Queue& queue() { return *queue_; }

  // Copies out of this memory go straight from it from now on. False: the driver does not import it, and copies pass
  // through a buffer of this object's (bounced).
  bool import(std::span<std::byte> memory);
  // After the last copy out of it is done.
  void forget(std::span<std::byte> memory);

  // Adds a copy. `source` stays unchanged until submission flush() is done.
  Result<VkResult> copy(const Buffer& dest, uint64_t offset, std::span<const std::byte> source);
  // What is added from now on waits for this submission of another queue.
  void wait_for(const Queue::Wait& wait);
  // Submits what was added. All copies so far are done when the queue reaches `value`.
  VkResult flush(uint64_t& value);

 private:
  struct Imported {
    std::span<std::byte> memory;
    Buffer buffer;
  };
  struct Slot {
    VkCommandBuffer commands = VK_NULL_HANDLE;
    uint64_t submitted = 0;           // not to be recorded again before that is done
  };
  static constexpr size_t kSlots = 16;

  explicit CopyQueue(Device& device) : device_(device) {}
  VkResult open();
  VkResult record(VkBuffer from, uint64_t from_offset, const Buffer& dest, uint64_t offset, uint64_t bytes);
  Result<VkResult> bounce(const Buffer& dest, uint64_t offset, std::span<const std::byte> source);

  Device& device_;
  std::unique_ptr<Queue> queue_;
  std::vector<Imported> imported_;
  std::array<Slot, kSlots> slots_{};
  size_t slot_ = 0;
  bool open_ = false;                 // slots_[slot_] is being recorded
  Queue::Wait wait_;
  Buffer bounce_;                     // kBounceSlots pieces
  std::array<uint64_t, 4> bounce_submitted_{};
  size_t bounce_slot_ = 0;
};

}  // namespace sluice::backend::vulkan
