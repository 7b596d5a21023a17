// SPDX-License-Identifier: Apache-2.0
// A backend that only stores: for tests of what happens around the operations.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "backend/backend.hpp"
#include "catch.hpp"

namespace sluice::test {

// Device memory in RAM; copies happen in the call; nothing computes.
class MemoryBackend : public backend::Backend {
 public:
  const char* name() const override { return "memory"; }
  std::string device_name() const override { return "test"; }
  bool computes_in_host_memory() const override { return true; }
  uint64_t preferred_copy_bytes() const override { return 1; }
  backend::MemoryNeed memory_need(const backend::Shape&) const override { return {}; }
  Status prepare(const backend::Shape&) override { return {}; }
  Result<backend::DeviceAddress> allocate(uint64_t bytes, const std::string&) override {
    memory.emplace_back(bytes, std::byte{0xa5});
    return backend::DeviceAddress{static_cast<uint32_t>(memory.size() - 1), 0};
  }
  Status register_host(std::span<std::byte>) override { return {}; }
  Result<backend::DeviceAddress> import_host(std::span<const std::byte>) override { return backend::DeviceAddress{}; }
  Status copy_to_device(backend::DeviceAddress dest, std::span<const std::byte> source) override {
    REQUIRE(dest.offset + source.size() <= memory[dest.buffer].size());
    std::memcpy(memory[dest.buffer].data() + dest.offset, source.data(), source.size());
    return {};
  }
  Result<backend::EventId> create_event() override { return events++; }
  void record_copy(backend::EventId) override {}
  void record_compute(backend::EventId) override {}
  void compute_waits(backend::EventId) override {}
  void copy_waits(backend::EventId) override {}
  Status host_wait(backend::EventId) override { return {}; }
  bool done(backend::EventId) override { return true; }
  Status begin_pass(std::span<const backend::Row>, std::span<const float>) override { return {}; }
  Status run(const backend::Op&) override { return {}; }
  Status finish_pass(std::span<float>) override { return {}; }
  uint64_t kv_bytes(uint32_t) const override { return 0; }
  Status copy_kv(uint32_t, uint32_t, uint32_t) override { return {}; }
  Status save_kv(uint32_t, uint32_t, std::span<std::byte>) override { return {}; }
  Status load_kv(uint32_t, uint32_t, std::span<const std::byte>) override { return {}; }

  std::vector<std::vector<std::byte>> memory;
  uint32_t events = 0;
};

}  // namespace sluice::test
