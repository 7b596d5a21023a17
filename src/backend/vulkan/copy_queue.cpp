// SPDX-License-Identifier: Apache-2.0
#include "backend/vulkan/copy_queue.hpp"

#include <algorithm>
#include <cstring>

#include "base/units.hpp"

namespace sluice::backend::vulkan {

namespace {

// Two of them hide the memcpy of the third behind the copies.
constexpr uint64_t kBounceBytes = 2 * kMiB;

}  // namespace

Result<std::unique_ptr<CopyQueue>> CopyQueue::create(Device& device) {
  std::unique_ptr<CopyQueue> self(new CopyQueue(device));
  SLUICE_TRY_ASSIGN(queue, Queue::create(device, device.copy_queue()));
  self->queue_ = std::move(queue);
  return self;
}

CopyQueue::~CopyQueue() {
  for (Imported& one : imported_) device_.destroy(one.buffer);
  device_.destroy(bounce_);
}

bool CopyQueue::import(std::span<std::byte> memory) {
  Result<Buffer> buffer = device_.import_host(memory);
  if (!buffer) return false;
  imported_.push_back({.memory = memory, .buffer = *buffer});
  return true;
}

void CopyQueue::forget(std::span<std::byte> memory) {
  const auto found = std::find_if(imported_.begin(), imported_.end(),
                                  [&](const Imported& one) { return one.memory.data() == memory.data(); });
  if (found == imported_.end()) return;
  device_.destroy(found->buffer);
  imported_.erase(found);
}

VkResult CopyQueue::open() {
  if (open_) return VK_SUCCESS;
  Slot& slot = slots_[slot_];
  VkResult code = slot.commands == VK_NULL_HANDLE ? queue_->allocate(slot.commands) : queue_->wait(slot.submitted);
  if (code == VK_SUCCESS) code = queue_->begin(slot.commands, true);
  open_ = code == VK_SUCCESS;
  return code;
}

VkResult CopyQueue::record(VkBuffer from, uint64_t from_offset, const Buffer& dest, uint64_t offset, uint64_t bytes) {
  const VkResult code = open();
  if (code != VK_SUCCESS) return code;
  const VkBufferCopy region{.srcOffset = from_offset, .dstOffset = offset, .size = bytes};
  device_.vk.vkCmdCopyBuffer(slots_[slot_].commands, from, dest.handle, 1, &region);
  return VK_SUCCESS;
}

Result<VkResult> CopyQueue::copy(const Buffer& dest, uint64_t offset, std::span<const std::byte> source) {
  if (source.empty()) return VK_SUCCESS;
  for (const Imported& one : imported_) {
    const std::byte* begin = one.memory.data();
    if (source.data() < begin || source.data() + source.size() > begin + one.memory.size()) continue;
    return record(one.buffer.handle, static_cast<uint64_t>(source.data() - begin), dest, offset, source.size());
  }
  return bounce(dest, offset, source);
}

Result<VkResult> CopyQueue::bounce(const Buffer& dest, uint64_t offset, std::span<const std::byte> source) {
  if (bounce_.handle == VK_NULL_HANDLE) {
    SLUICE_TRY_ASSIGN(buffer, device_.create_buffer(bounce_submitted_.size() * kBounceBytes, MemoryKind::upload,
                                                    "copies to the device"));
    bounce_ = buffer;
  }
  for (uint64_t at = 0; at < source.size();) {
    const uint64_t bytes = std::min(source.size() - at, kBounceBytes), place = bounce_slot_ * kBounceBytes;
    uint64_t& submitted = bounce_submitted_[bounce_slot_];
    VkResult code = queue_->wait(submitted);
    if (code != VK_SUCCESS) return code;
    std::memcpy(bounce_.mapped + place, source.data() + at, bytes);
    code = record(bounce_.handle, place, dest, offset + at, bytes);
    if (code == VK_SUCCESS) code = flush(submitted);
    if (code != VK_SUCCESS) return code;
    bounce_slot_ = (bounce_slot_ + 1) % bounce_submitted_.size();
    at += bytes;
  }
  return VK_SUCCESS;
}

// What is open already waits as well: late is not wrong. All waits are for one queue, so the last value covers the
// others.
void CopyQueue::wait_for(const Queue::Wait& wait) {
  wait_.timeline = wait.timeline;
  wait_.value = std::max(wait_.value, wait.value);
}

VkResult CopyQueue::flush(uint64_t& value) {
  if (open_) {
    Slot& slot = slots_[slot_];
    open_ = false;
    VkResult code = queue_->end(slot.commands);
    if (code == VK_SUCCESS) code = queue_->submit(slot.commands, wait_);
    if (code != VK_SUCCESS) return code;
    wait_ = {};
    slot.submitted = queue_->submitted();
    slot_ = (slot_ + 1) % kSlots;
  }
  value = queue_->submitted();
  return VK_SUCCESS;
}

}  // namespace sluice::backend::vulkan
