// SPDX-License-Identifier: Apache-2.0
// An NVIDIA GPU as a device. Two streams: copies (the prefetcher's thread) and compute (the executor's). A pass is
// submitted as graphs (pass_graphs.hpp), reads its rows and embeddings out of pinned memory by its first kernel, and the
// host waits once, at its end, for the logits.
//
// A CUDA error other than a refused allocation leaves nothing to go on with: the backend is dead, and every later call
// returns the same error.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.hpp"
#include "backend/cuda/calibration.hpp"
#include "backend/cuda/device.hpp"
#include "backend/cuda/pass_clock.hpp"
#include "backend/cuda/pass_graphs.hpp"
#include "backend/cuda/scratch.hpp"
#include "cuda/attention.hpp"

namespace sluice::backend::cuda {

class CudaBackend final : public Backend {
 public:
  static Result<std::unique_ptr<Backend>> create(const CudaOptions& options);
  ~CudaBackend() override;

  const char* name() const override { return "cuda"; }
  std::string device_name() const override { return device_.name; }
  std::string pci_bus_id() const override { return device_.pci_bus_id; }
  bool computes_in_host_memory() const override { return false; }
  uint64_t preferred_copy_bytes() const override;
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
  Calibration* calibration() override;
  Status finish_pass(std::span<float> logits) override;
  std::span<const OpTime> op_times() const override { return clock_.times(); }
  std::span<const HostTime> recordings() const override { return graphs_->captures(); }

  uint64_t kv_bytes(uint32_t tokens) const override;
  Status copy_kv(uint32_t from_session, uint32_t to_session, uint32_t tokens) override;
  Status save_kv(uint32_t session, uint32_t tokens, std::span<std::byte> out) override;
  Status load_kv(uint32_t session, uint32_t tokens, std::span<const std::byte> in) override;

 private:
  struct Buffer {
    std::byte* data = nullptr;
    uint64_t bytes = 0;
  };
  // Memory that the GPU reads and writes in place.
  struct Pinned {
    float* embeddings = nullptr;        // [max_rows][hidden]
    uint32_t* table = nullptr;          // [3][max_rows]: sessions, positions, selected
    float* logits = nullptr;            // [max_logit_rows][vocab]
    sluice::cuda::Stamp* stamps = nullptr;   // [scratch_.stamp_count]
  };

  CudaBackend(const CudaOptions& options, Device device);

  // Returns the error of `code`, if it is one, and remembers it if it is the last.
  Status check(cudaError_t code, const std::string& what);
  void check_or_die(cudaError_t code, const char* what);
  void die(Error error);
  void stamp_end();
  bool submit_or_die();                 // for calls that return nothing
  Status alive() const;
  Error out_of_memory(uint64_t bytes, const std::string& what) const;

  std::byte* at(DeviceAddress address, uint64_t bytes) const;
  const float* vector(const Op& op, int index, uint32_t width) const;
  template <class T>
  T* scratch(uint64_t offset) const { return reinterpret_cast<T*>(scratch_memory_ + offset); }
  MatmulInput input(Slot slot) const;
  float* slot(Slot slot) const { return scratch<float>(scratch_.slots[static_cast<size_t>(slot)]); }
  sluice::cuda::Stamp* stamp(size_t index) const { return scratch<sluice::cuda::Stamp>(scratch_.stamps) + index; }
  Status add(Command command, Marks marks);
  uint32_t attention_bound(uint32_t positions) const;
  uint32_t width(Slot slot) const { return scratch_.widths[static_cast<size_t>(slot)]; }
  Status allocate_pinned();
  uint64_t kv_block_bytes() const { return kv_.block_elems() * sizeof(uint16_t); }
  std::byte* kv_block(uint32_t session, uint32_t index) const;

  // cuda_ops.cpp: what a command launches.
  struct Target {
    PassKind kind;
    uint32_t rows = 0;
    uint32_t index = 0;                 // of the command in the pass
    sluice::cuda::Stamp* stamp = nullptr;
    bool programmatic = false;          // may start before the kernel in front ended
    cudaStream_t stream = nullptr;
  };
  Status launch(const Command& command, const PassKind& kind, bool overlap, cudaStream_t stream);
  cudaError_t begin(const Target& target) const;
  cudaError_t rms_norm(const Op& op, const Target& target) const;
  cudaError_t matmul(const Op& op, const Target& target) const;
  cudaError_t multiply(const Op& op, int first, int last, const MatmulInput& in, const Target& target) const;
  cudaError_t head_norm_rope(const Op& op, const Target& target) const;
  cudaError_t attention(const Op& op, const Target& target) const;
  cudaError_t swiglu(const Target& target) const;
  cudaError_t select_rows(const Target& target) const;
  cudaError_t finish(const Target& target) const;

  Device device_;
  LogHook log_;
  cudaStream_t copy_ = nullptr, compute_ = nullptr, capture_ = nullptr;
  std::vector<Buffer> buffers_;
  uint64_t allocated_bytes_ = 0;
  std::vector<std::span<std::byte>> registered_;
  bool said_unregistered_ = false;
  std::deque<cudaEvent_t> events_;
  std::unique_ptr<PassGraphs> graphs_;

  std::atomic<bool> dead_{false};
  mutable std::mutex dead_mutex_;
  Error death_;                         // under dead_mutex_, valid if dead_

  bool prepared_ = false;
  Shape shape_;                         // without inverse_frequencies
  ScratchLayout scratch_;
  std::byte* scratch_memory_ = nullptr;
  sluice::cuda::KvCacheView kv_;
  Pinned pinned_;

  // The pass in progress.
  PassKind kind_;
  uint32_t positions_in_use_ = 0;
  uint32_t active_rows_ = 0;            // rows that operations run on: all, then those that want logits
  bool in_pass_ = false;
  bool awaits_ = false;                 // the next operation's weights are waited for
  PassClock clock_;

  bool asked_for_calibration_ = false;
  std::unique_ptr<CudaCalibration> calibration_;
};

}  // namespace sluice::backend::cuda
