// SPDX-License-Identifier: Apache-2.0
#include "backend/vulkan/queue.hpp"

#include <fmt/format.h>

#include "backend/vulkan/vulkan_error.hpp"

namespace sluice::backend::vulkan {

Result<std::unique_ptr<Queue>> Queue::create(Device& device, QueuePlace place) {
  std::unique_ptr<Queue> self(new Queue(device));
  const Functions& vk = device.vk;
  vk.vkGetDeviceQueue(device.handle(), place.family, place.index, &self->queue_);
  const VkSemaphoreTypeCreateInfo type{.sType = VK_STRUCTURE_TYPE_SEMAPHORE_TYPE_CREATE_INFO,
                                       .semaphoreType = VK_SEMAPHORE_TYPE_TIMELINE};
  const VkSemaphoreCreateInfo semaphore{.sType = VK_STRUCTURE_TYPE_SEMAPHORE_CREATE_INFO, .pNext = &type};
  VkResult code = vk.vkCreateSemaphore(device.handle(), &semaphore, nullptr, &self->timeline_);
  const VkCommandPoolCreateInfo pool{.sType = VK_STRUCTURE_TYPE_COMMAND_POOL_CREATE_INFO,
                                     .flags = VK_COMMAND_POOL_CREATE_RESET_COMMAND_BUFFER_BIT,
                                     .queueFamilyIndex = place.family};
  if (code == VK_SUCCESS) code = vk.vkCreateCommandPool(device.handle(), &pool, nullptr, &self->pool_);
  if (code != VK_SUCCESS) return fail(error_of(code, fmt::format("{}: creating a queue", device.name())));
  return self;
}

Queue::~Queue() {
  if (pool_ != VK_NULL_HANDLE) device_.vk.vkDestroyCommandPool(device_.handle(), pool_, nullptr);
  if (timeline_ != VK_NULL_HANDLE) device_.vk.vkDestroySemaphore(device_.handle(), timeline_, nullptr);
}

VkResult Queue::allocate(VkCommandBuffer& commands) {
  const VkCommandBufferAllocateInfo info{.sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_ALLOCATE_INFO,
                                         .commandPool = pool_,
                                         .level = VK_COMMAND_BUFFER_LEVEL_PRIMARY,
                                         .commandBufferCount = 1};
  return device_.vk.vkAllocateCommandBuffers(device_.handle(), &info, &commands);
}

void Queue::free(VkCommandBuffer commands) {
  if (commands != VK_NULL_HANDLE) device_.vk.vkFreeCommandBuffers(device_.handle(), pool_, 1, &commands);
}

VkResult Queue::begin(VkCommandBuffer commands, bool once) {
  const VkCommandBufferBeginInfo info{
      .sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_BEGIN_INFO,
      .flags = once ? VkCommandBufferUsageFlags{VK_COMMAND_BUFFER_USAGE_ONE_TIME_SUBMIT_BIT} : 0};
  return device_.vk.vkBeginCommandBuffer(commands, &info);
}

VkResult Queue::submit(VkCommandBuffer commands, Wait wait) {
  const uint64_t value = submitted_ + 1;
  const bool waits = wait.value != 0;
  const VkPipelineStageFlags stage = VK_PIPELINE_STAGE_ALL_COMMANDS_BIT;
  const VkTimelineSemaphoreSubmitInfo values{.sType = VK_STRUCTURE_TYPE_TIMELINE_SEMAPHORE_SUBMIT_INFO,
                                             .waitSemaphoreValueCount = waits ? 1u : 0u,
                                             .pWaitSemaphoreValues = &wait.value,
                                             .signalSemaphoreValueCount = 1,
                                             .pSignalSemaphoreValues = &value};
  const VkSubmitInfo info{.sType = VK_STRUCTURE_TYPE_SUBMIT_INFO,
                          .pNext = &values,
                          .waitSemaphoreCount = waits ? 1u : 0u,
                          .pWaitSemaphores = &wait.timeline,
                          .pWaitDstStageMask = &stage,
                          .commandBufferCount = 1,
                          .pCommandBuffers = &commands,
                          .signalSemaphoreCount = 1,
                          .pSignalSemaphores = &timeline_};
  const std::lock_guard lock(device_.submit_mutex());
  const VkResult code = device_.vk.vkQueueSubmit(queue_, 1, &info, VK_NULL_HANDLE);
  if (code == VK_SUCCESS) submitted_ = value;
  return code;
}

VkResult Queue::wait(uint64_t value) const {
  if (value == 0) return VK_SUCCESS;
  const VkSemaphoreWaitInfo info{.sType = VK_STRUCTURE_TYPE_SEMAPHORE_WAIT_INFO,
                                 .semaphoreCount = 1,
                                 .pSemaphores = &timeline_,
                                 .pValues = &value};
  return device_.vk.vkWaitSemaphores(device_.handle(), &info, UINT64_MAX);
}

VkResult Queue::reached(uint64_t& value) const {
  return device_.vk.vkGetSemaphoreCounterValue(device_.handle(), timeline_, &value);
}

void full_barrier(const Functions& vk, VkCommandBuffer commands) {
  constexpr VkPipelineStageFlags kStages = VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT | VK_PIPELINE_STAGE_TRANSFER_BIT;
  const VkMemoryBarrier barrier{.sType = VK_STRUCTURE_TYPE_MEMORY_BARRIER,
                                .srcAccessMask = VK_ACCESS_SHADER_WRITE_BIT | VK_ACCESS_TRANSFER_WRITE_BIT,
                                .dstAccessMask = VK_ACCESS_SHADER_READ_BIT | VK_ACCESS_SHADER_WRITE_BIT |
                                                 VK_ACCESS_TRANSFER_READ_BIT | VK_ACCESS_TRANSFER_WRITE_BIT};
  vk.vkCmdPipelineBarrier(commands, kStages, kStages, 0, 1, &barrier, 0, nullptr, 0, nullptr);
}

void host_barrier(const Functions& vk, VkCommandBuffer commands) {
  const VkMemoryBarrier barrier{.sType = VK_STRUCTURE_TYPE_MEMORY_BARRIER,
                                .srcAccessMask = VK_ACCESS_SHADER_WRITE_BIT | VK_ACCESS_TRANSFER_WRITE_BIT,
                                .dstAccessMask = VK_ACCESS_HOST_READ_BIT};
  vk.vkCmdPipelineBarrier(commands, VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT | VK_PIPELINE_STAGE_TRANSFER_BIT,
                          VK_PIPELINE_STAGE_HOST_BIT, 0, 1, &barrier, 0, nullptr, 0, nullptr);
}

}  // namespace sluice::backend::vulkan
