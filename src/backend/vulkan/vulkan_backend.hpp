// SPDX-License-Identifier: Apache-2.0
// Any GPU with Vulkan 1.2 as a device. Two queues: copies (the prefetcher's thread) and compute (the executor's), each
// with a timeline semaphore; an event is a number on one of them. A pass is submitted as command buffers that are
// recorded once (pass_commands.hpp), and the host waits once, at its end, for the logits.
//
// A Vulkan error other than a refused allocation leaves nothing to go on with: the backend is dead, and every later
// call returns the same error. A new backend opens the device anew.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.hpp"
#include "backend/vulkan/copy_queue.hpp"
#include "backend/vulkan/device.hpp"
#include "backend/vulkan/kernels.hpp"
#include "backend/vulkan/pass_clock.hpp"
#include "backend/vulkan/pass_commands.hpp"
#include "backend/vulkan/queue.hpp"
#include "backend/vulkan/scratch.hpp"

namespace sluice::backend::vulkan {

class VulkanBackend final : public Backend {
 public:
  static Result<std::unique_ptr<VulkanBackend>> create(const DeviceChoice& choice, const LogHook& log);
  ~VulkanBackend() override;

  const char* name() const override { return "vulkan"; }
  std::string device_name() const override { return device_->name(); }
  std::string pci_bus_id() const override { return device_->pci_bus_id(); }
  bool computes_in_host_memory() const override { return false; }
  uint64_t preferred_copy_bytes() const override;
  uint64_t max_allocation_bytes() const override { return device_->max_allocation_bytes(); }
  DeviceMemory device_memory() const override;

  MemoryNeed memory_need(const Shape& shape) const override;
  Status prepare(const Shape& shape) override;

  Result<DeviceAddress> allocate(uint64_t bytes, const std::string& what) override;
  Status register_host(std::span<std::byte> memory) override;
  void unregister_host(std::span<std::byte> memory) override;
  Result<DeviceAddress> import_host(std::span<const std::byte> memory) override;

  Status copy_to_device(DeviceAddress dest, std::span<const std::byte> source) override;

  Result<EventId> create_event() override;
  void record_copy(EventId event) override;
  void record_compute(EventId event) override;
  void compute_waits(EventId event) override;
  void copy_waits(EventId event) override;
  Status host_wait(EventId event) override;
  bool done(EventId event) override;

  Status begin_pass(std::span<const Row> rows, std::span<const float> embeddings) override;
  Status run(const Op& op) override;
  Status submit() override;
  Status read_slot(Slot slot, std::span<float> out) override;
  Status finish_pass(std::span<float> logits) override;
  std::span<const OpTime> op_times() const override { return clock_.times(); }
  void time_operations(bool on) override { timed_ = on; }
  std::span<const HostTime> recordings() const override { return commands_->recordings(); }

  uint64_t kv_bytes(uint32_t tokens) const override;
  Status copy_kv(uint32_t from_session, uint32_t to_session, uint32_t tokens) override;
  Status save_kv(uint32_t session, uint32_t tokens, std::span<std::byte> out) override;
  Status load_kv(uint32_t session, uint32_t tokens, std::span<const std::byte> in) override;

  // For tests, which break its functions.
  Device& device() { return *device_; }

 private:
  // A number on the timeline of a queue; 0: never recorded, which stands for no work.
  struct Event {
    std::atomic<uint64_t> value{0};
    std::atomic<bool> of_copy{false};
  };

  VulkanBackend(std::unique_ptr<Device> device, LogHook log) : device_(std::move(device)), log_(std::move(log)) {}
  Status create_queues();

  // Returns the error of `code`, if it is one, and remembers it if it is the last.
  Status check(VkResult code, const std::string& what);
  void check_or_die(VkResult code, const char* what);
  void die(Error error);
  Status alive() const;

  const Buffer& buffer_at(DeviceAddress address, uint64_t bytes) const;
  VkDeviceAddress at(DeviceAddress address, uint64_t bytes) const {
    return buffer_at(address, bytes).address + address.offset;
  }
  VkDeviceAddress vector(const Op& op, int index, uint32_t width) const;
  VkDeviceAddress scratch(uint64_t offset) const { return scratch_memory_.address + offset; }
  VkDeviceAddress slot(Slot slot) const { return scratch(scratch_.slots[static_cast<size_t>(slot)]); }
  uint32_t width(Slot slot) const { return scratch_.widths[static_cast<size_t>(slot)]; }
  Status create_host_buffers();
  Status initialise_scratch();
  Status create_clock();
  Status read_clock();
  void write_angles(std::span<const Row> rows);
  // Records with `body`, submits, and waits for the end.
  template <class Body>
  Status run_now(const char* what, const Body& body);
  uint64_t kv_block_bytes() const;
  uint64_t kv_offset(uint32_t session) const;
  Status enqueue(VkCommandBuffer commands);
  bool flush();                         // what was added to the pass; false: it failed, and the backend is dead

  // vulkan_ops.cpp: what a command records.
  Status record(const Command& command, VkCommandBuffer commands);
  Status record_work(const Command& command, VkCommandBuffer commands);
  void begin(VkCommandBuffer commands, uint32_t rows) const;
  VkResult rms_norm(VkCommandBuffer commands, const Op& op, uint32_t rows) const;
  VkResult matmul(VkCommandBuffer commands, const Op& op, uint32_t rows) const;
  VkResult multiply(VkCommandBuffer commands, const Op& op, int first, int last, VkDeviceAddress x, uint32_t rows) const;
  VkResult head_norm_rope(VkCommandBuffer commands, const Op& op, uint32_t rows) const;
  VkResult attention(VkCommandBuffer commands, const Op& op, uint32_t rows) const;
  VkResult swiglu(VkCommandBuffer commands, uint32_t rows) const;
  VkResult select_rows(VkCommandBuffer commands, uint32_t rows) const;

  std::unique_ptr<Device> device_;      // first: it goes last
  LogHook log_;
  std::unique_ptr<Kernels> kernels_;
  std::unique_ptr<Queue> compute_;
  std::unique_ptr<CopyQueue> copies_;
  std::unique_ptr<PassCommands> commands_;
  VkCommandBuffer utility_ = VK_NULL_HANDLE;   // of run_now
  std::vector<Buffer> buffers_;
  std::deque<Event> events_;
  bool said_unregistered_ = false;
  uint64_t overhead_bytes_ = 0;

  std::atomic<bool> dead_{false};
  mutable std::mutex dead_mutex_;
  Error death_;                         // under dead_mutex_, valid if dead_

  bool prepared_ = false;
  Shape shape_;                         // without inverse_frequencies
  std::vector<float> inverse_frequencies_;
  ScratchLayout scratch_;
  Buffer scratch_memory_, kv_;          // of buffers_
  // [max_rows][hidden] embeddings, [3][max_rows] table, [max_rows][rotary_dims] angles, as floats and uint32.
  Buffer upload_;
  uint64_t upload_table_ = 0, upload_angles_ = 0;   // byte offsets
  Buffer readback_;                     // [max_logit_rows][vocab] logits; pieces of a KV cache
  VkQueryPool queries_ = VK_NULL_HANDLE;   // of clock_; null: the queue has no clock
  bool timed_ = true;                   // passes from the next one on

  // The pass in progress.
  uint32_t active_rows_ = 0;            // rows that operations run on: all, then those that want logits
  uint64_t copies_to_see_ = 0;          // number on the copy timeline that the next submission waits for
  std::atomic<uint64_t> copies_done_{0};   // ... that the host has waited for, and the compute queue has not yet
  uint64_t copies_seen_ = 0;
  PassClock clock_;
  bool awaits_ = false;                 // the next operation's weights
};

}  // namespace sluice::backend::vulkan
