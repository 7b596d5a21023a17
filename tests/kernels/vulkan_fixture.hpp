// SPDX-License-Identifier: Apache-2.0
// A Vulkan device for kernel tests: buffers that the host sees, and shaders run one at a time. Ends the program with
// Meson's "skipped" where there is no device.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include "backend/vulkan/device.hpp"
#include "backend/vulkan/kernels.hpp"
#include "backend/vulkan/queue.hpp"
#include "catch.hpp"

namespace sluice::testing {

struct Gpu {
  std::unique_ptr<backend::vulkan::Device> device;
  std::unique_ptr<backend::vulkan::Queue> queue;
  std::unique_ptr<backend::vulkan::Kernels> kernels;
  VkCommandBuffer commands = VK_NULL_HANDLE;

  Gpu() {
    auto opened = backend::vulkan::Device::open({});
    if (!opened && opened.error().code == ErrorCode::not_found) {
      std::printf("skipped: %s\n", opened.error().message.c_str());
      std::fflush(stdout);
      std::_Exit(77);
    }
    REQUIRE(opened);
    device = std::move(*opened);
    std::printf("on %s\n", device->name().c_str());
    auto made_queue = backend::vulkan::Queue::create(*device, device->compute_queue());
    REQUIRE(made_queue);
    queue = std::move(*made_queue);
    auto made_kernels = backend::vulkan::Kernels::create(*device, *queue);
    REQUIRE(made_kernels);
    kernels = std::move(*made_kernels);
    REQUIRE(queue->allocate(commands) == VK_SUCCESS);
  }

  // Records with `body(kernels, commands)` and waits for the end.
  template <class Body>
  void run(const Body& body) {
    REQUIRE(queue->begin(commands, true) == VK_SUCCESS);
    REQUIRE(body(*kernels, commands) == VK_SUCCESS);
    backend::vulkan::host_barrier(device->vk, commands);
    REQUIRE(queue->end(commands) == VK_SUCCESS);
    REQUIRE(queue->submit(commands, {}) == VK_SUCCESS);
    REQUIRE(queue->wait(queue->submitted()) == VK_SUCCESS);
  }
};

inline Gpu& gpu() {
  static Gpu one;
  return one;
}

// [count] T that both sides see.
template <class T>
class Array {
 public:
  explicit Array(std::span<const T> values) {
    auto made = gpu().device->create_buffer(std::max<size_t>(values.size_bytes(), 16),
                                            backend::vulkan::MemoryKind::readback, "a test");
    REQUIRE(made);
    buffer_ = *made;
    count_ = values.size();
    if (count_ > 0) std::memcpy(buffer_.mapped, values.data(), values.size_bytes());
  }
  explicit Array(const std::vector<T>& values) : Array(std::span<const T>(values)) {}
  Array(size_t count, T value) : Array(std::vector<T>(count, value)) {}
  Array(Array&& other) noexcept : buffer_(std::exchange(other.buffer_, {})), count_(other.count_) {}
  Array& operator=(Array&&) = delete;
  ~Array() { gpu().device->destroy(buffer_); }

  VkDeviceAddress address(size_t index = 0) const { return buffer_.address + index * sizeof(T); }
  std::span<T> values() const { return {reinterpret_cast<T*>(buffer_.mapped), count_}; }

 private:
  backend::vulkan::Buffer buffer_;
  size_t count_ = 0;
};

inline uint32_t printed_seed() {
  const uint32_t seed = std::random_device{}();
  std::printf("seed %u\n", seed);
  return seed;
}

}  // namespace sluice::testing
