// SPDX-License-Identifier: Apache-2.0
// The CPU as a device. Device memory is memory of its own, a copy is a memcpy, and both queues run inside the calls that
// submit to them: what is recorded is done.
#pragma once

#include <array>
#include <atomic>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.hpp"
#include "backend/cpu/kernels.hpp"
#include "backend/cpu/kv_cache.hpp"
#include "backend/cpu/thread_pool.hpp"
#include "base/handles.hpp"

namespace sluice::backend::cpu {

inline constexpr size_t kSlots = static_cast<size_t>(Slot::count);

// Where everything lies in the scratch memory: byte offsets, 64-byte aligned.
struct ScratchLayout {
  std::array<uint64_t, kSlots> slots{};   // [max_rows][width] FP32; logits [max_logit_rows][vocab]
  std::array<uint32_t, kSlots> widths{};
  uint64_t cos = 0, sin = 0;              // [max_rows][rotary_dims / 2] FP32
  uint64_t form = 0;                      // a chunk of activations as the matmul kernels take them
  uint64_t accumulators = 0;              // [threads][kAccumulatorFloats]
  uint64_t bytes = 0;

  ScratchLayout() = default;
  ScratchLayout(const Shape& shape, uint32_t threads);
};

class CpuBackend final : public Backend {
 public:
  CpuBackend(const CpuOptions& options, std::unique_ptr<ThreadPool> pool);

  const char* name() const override { return "cpu"; }
  std::string device_name() const override;
  bool computes_in_host_memory() const override { return true; }
  uint64_t preferred_copy_bytes() const override;

  MemoryNeed memory_need(const Shape& shape) const override;
  Status prepare(const Shape& shape) override;

  Result<DeviceAddress> allocate(uint64_t bytes, const std::string& what) override;
  Status register_host(std::span<std::byte> memory) override;
  std::span<std::byte> host_view(DeviceAddress address, uint64_t bytes) override { return {at(address, bytes), bytes}; }
  Result<DeviceAddress> import_host(std::span<const std::byte> memory) override;

  Status copy_to_device(DeviceAddress dest, std::span<const std::byte> source) override;

  Result<EventId> create_event() override;
  void record_copy(EventId event) override { record(event); }
  void record_compute(EventId event) override { record(event); }
  void compute_waits(EventId event) override { done(event); }
  void copy_waits(EventId event) override { done(event); }
  Status host_wait(EventId event) override;
  bool done(EventId event) override;

  Status begin_pass(std::span<const Row> rows, std::span<const float> embeddings) override;
  Status run(const Op& op) override;
  Status read_slot(Slot slot, std::span<float> out) override;
  Status finish_pass(std::span<float> logits) override;

  uint64_t kv_bytes(uint32_t tokens) const override { return kv_.saved_bytes(tokens); }
  Status copy_kv(uint32_t from_session, uint32_t to_session, uint32_t tokens) override;
  Status save_kv(uint32_t session, uint32_t tokens, std::span<std::byte> out) override;
  Status load_kv(uint32_t session, uint32_t tokens, std::span<const std::byte> in) override;

 private:
  // Memory that a DeviceAddress names: of the backend's own, or the caller's, which nothing here writes.
  struct Buffer {
    Mapping owned;
    std::byte* data = nullptr;
    uint64_t bytes = 0;
    bool writable = false;
  };
  // What activations look like to a kernel (kernels.hpp).
  enum class Form : uint8_t { quantized, spread64, spread16, plain };

  void record(EventId event);
  std::byte* at(DeviceAddress address, uint64_t bytes) const;
  const float* vector(const Op& op, int index, uint32_t width) const;
  float* slot(Slot slot) const;
  uint32_t width(Slot slot) const { return scratch_.widths[static_cast<size_t>(slot)]; }

  // cpu_ops.cpp
  void rms_norm(const Op& op);
  Status matmul(const Op& op);
  void head_norm_rope(const Op& op);
  void attention(const Op& op);
  void swiglu();
  void select_rows();

  Result<Matrix> matrix(const Weight& weight) const;
  Form form_of(const Matrix& matrix) const;
  void prepare_form(Form form, const float* in, const uint32_t* perm, uint32_t cols, uint32_t rows);
  void multiply_chunk(const Op& op, uint32_t first_weight, uint32_t last_weight, Form form, const Matrix* matrices,
                      uint32_t first_row, uint32_t rows);
  void multiply_tiles(const Matrix& matrix, Form form, const float* in, uint32_t rows, uint32_t first_tile,
                      uint32_t last_tile, const MatmulOut& out, uint32_t thread);

  CpuActivations activations_;
  std::unique_ptr<ThreadPool> pool_;
  std::vector<Buffer> buffers_;
  std::deque<std::atomic<uint32_t>> events_;  // times recorded; elements never move

  bool prepared_ = false;
  Shape shape_;                               // without inverse_frequencies
  std::vector<float> inverse_frequencies_;
  KvCache kv_;
  ScratchLayout scratch_;
  Mapping scratch_memory_;

  // The pass in progress.
  std::span<const Row> rows_;
  uint32_t active_rows_ = 0;                  // rows that operations run on: all, then those that want logits
  uint32_t wanted_rows_ = 0;
};

}  // namespace sluice::backend::cpu
