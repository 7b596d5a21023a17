// SPDX-License-Identifier: Apache-2.0
// A queue with a timeline semaphore: every submission gets the next number, and a number that is reached means that it
// and all before it are done.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "backend/vulkan/device.hpp"

namespace sluice::backend::vulkan {

class Queue {
 public:
  // A semaphore that a submission waits for on the device, before any of its commands; value 0: nothing.
  struct Wait {
    VkSemaphore timeline = VK_NULL_HANDLE;
    uint64_t value = 0;
  };

  // `device` must outlive the object. Error: out_of_memory, device.
  static Result<std::unique_ptr<Queue>> create(Device& device, QueuePlace place);
  ~Queue();
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  VkSemaphore timeline() const { return timeline_; }
  VkCommandPool pool() const { return pool_; }
  // Of the last submission; 0: none. One thread submits, any thread may ask.
  uint64_t submitted() const { return submitted_; }

  VkResult allocate(VkCommandBuffer& commands);
  void free(VkCommandBuffer commands);
  // Begins recording; `once`: for one submission.
  VkResult begin(VkCommandBuffer commands, bool once);
  VkResult end(VkCommandBuffer commands) { return device_.vk.vkEndCommandBuffer(commands); }
  VkResult submit(VkCommandBuffer commands, Wait wait);
  // Blocks until submission `value` is done.
  VkResult wait(uint64_t value) const;
  // The last submission that is done.
  VkResult reached(uint64_t& value) const;

 private:
  explicit Queue(Device& device) : device_(device) {}

  Device& device_;
  VkQueue queue_ = VK_NULL_HANDLE;
  VkSemaphore timeline_ = VK_NULL_HANDLE;
  VkCommandPool pool_ = VK_NULL_HANDLE;
  uint64_t submitted_ = 0;
};

// Everything before it in the queue is seen by everything behind it.
void full_barrier(const Functions& vk, VkCommandBuffer commands);
// ... by the host, once it has waited for the submission.
void host_barrier(const Functions& vk, VkCommandBuffer commands);

}  // namespace sluice::backend::vulkan
