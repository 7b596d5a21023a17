// SPDX-License-Identifier: Apache-2.0
// What a device's memory and bus can do: the ceilings that benchmarks are held against.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "backend/vulkan/copy_queue.hpp"
#include "backend/vulkan/device.hpp"
#include "backend/vulkan/kernels.hpp"
#include "backend/vulkan/queue.hpp"
#include "backend/vulkan/vulkan_error.hpp"
#include "base/handles.hpp"
#include "base/units.hpp"

namespace sluice::backend::vulkan {

namespace {

constexpr uint64_t kReadBytes = kGiB, kSoftwareReadBytes = 256 * kMiB;   // larger than any cache
constexpr uint64_t kCopyBytes = 16 * kMiB;
constexpr int kCopies = 16, kRounds = 5;                                 // the best round counts

// Buffers and queries that go whatever happens.
struct Bench {
  Device& device;
  Queue& queue;
  Buffer memory;
  VkQueryPool queries = VK_NULL_HANDLE;
  VkCommandBuffer commands = VK_NULL_HANDLE;
  ~Bench() {
    if (queries != VK_NULL_HANDLE) device.vk.vkDestroyQueryPool(device.handle(), queries, nullptr);
    queue.free(commands);
    device.destroy(memory);
  }
};

// Nanoseconds of one read of all of the memory, by the device's clock.
VkResult time_read(Bench& bench, Kernels& kernels, double& ns) {
  const Functions& vk = bench.device.vk;
  VkResult code = bench.queue.begin(bench.commands, true);
  if (code != VK_SUCCESS) return code;
  vk.vkCmdResetQueryPool(bench.commands, bench.queries, 0, 2);
  full_barrier(vk, bench.commands);
  vk.vkCmdWriteTimestamp(bench.commands, VK_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT, bench.queries, 0);
  code = kernels.memory_read(bench.commands, {.data = bench.memory.address, .never = bench.memory.address,
                                              .count = static_cast<uint32_t>(bench.memory.bytes / 16)});
  vk.vkCmdWriteTimestamp(bench.commands, VK_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT, bench.queries, 1);
  if (code == VK_SUCCESS) code = bench.queue.end(bench.commands);
  if (code == VK_SUCCESS) code = bench.queue.submit(bench.commands, {});
  if (code == VK_SUCCESS) code = bench.queue.wait(bench.queue.submitted());
  uint64_t stamps[2] = {};
  if (code == VK_SUCCESS) {
    code = vk.vkGetQueryPoolResults(bench.device.handle(), bench.queries, 0, 2, sizeof stamps, stamps, sizeof stamps[0],
                                    VK_QUERY_RESULT_64_BIT | VK_QUERY_RESULT_WAIT_BIT);
  }
  ns = static_cast<double>(stamps[1] - stamps[0]) * double{bench.device.limits().timestampPeriod};
  return code;
}

// Bytes a second out of registered host memory, many copies long; 0: none was measured.
Result<double> copy_rate(Device& device, const Buffer& memory) {
  SLUICE_TRY_ASSIGN(source, Mapping::anonymous(kCopyBytes, "measuring the bus"));
  std::memset(source.data(), 1, kCopyBytes);
  SLUICE_TRY_ASSIGN(copies, CopyQueue::create(device));
  copies->import(source.bytes().first(kCopyBytes));
  double best = 0;
  VkResult code = VK_SUCCESS;
  for (int round = 0; round < kRounds && code == VK_SUCCESS; ++round) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kCopies && code == VK_SUCCESS; ++i) {
      SLUICE_TRY_ASSIGN(copied, copies->copy(memory, uint64_t(i) * kCopyBytes, source.bytes().first(kCopyBytes)));
      code = copied;
    }
    uint64_t value = 0;
    if (code == VK_SUCCESS) code = copies->flush(value);
    if (code == VK_SUCCESS) code = copies->queue().wait(value);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(kCopies * kCopyBytes) / seconds.count());
  }
  if (code != VK_SUCCESS) return fail(error_of(code, fmt::format("{}: measuring the bus", device.name())));
  return best;
}

}  // namespace

Result<Rates> measure_rates(const DeviceChoice& choice) {
  SLUICE_TRY_ASSIGN(device, Device::open(choice));
  SLUICE_TRY_ASSIGN(queue, Queue::create(*device, device->compute_queue()));
  SLUICE_TRY_ASSIGN(kernels, Kernels::create(*device, *queue));
  Bench bench{.device = *device, .queue = *queue};
  SLUICE_TRY_ASSIGN(memory, device->create_buffer(device->software() ? kSoftwareReadBytes : kReadBytes, MemoryKind::device,
                                                  "measuring its memory"));
  bench.memory = memory;
  const VkQueryPoolCreateInfo info{.sType = VK_STRUCTURE_TYPE_QUERY_POOL_CREATE_INFO, .queryType = VK_QUERY_TYPE_TIMESTAMP,
                                   .queryCount = 2};
  VkResult code = device->vk.vkCreateQueryPool(device->handle(), &info, nullptr, &bench.queries);
  if (code == VK_SUCCESS) code = queue->allocate(bench.commands);
  Rates rates{.device = device->name()};
  for (int round = 0; round < kRounds && code == VK_SUCCESS; ++round) {
    double ns = 0;
    code = time_read(bench, *kernels, ns);
    if (ns > 0) rates.read = std::max(rates.read, static_cast<double>(memory.bytes) / (ns * 1e-9));
  }
  if (code != VK_SUCCESS) return fail(error_of(code, fmt::format("{}: measuring its memory", device->name())));
  SLUICE_TRY_ASSIGN(bus, copy_rate(*device, memory));
  rates.bus = bus;
  return rates;
}

}  // namespace sluice::backend::vulkan
