// SPDX-License-Identifier: Apache-2.0
// One interface for every device: memory, copies with events, and the closed list of operations a dense decoder needs.
//
// Order of things: allocate everything, `prepare` once, then passes. Two queues exist. The copy queue takes
// `copy_to_device` and belongs to the prefetcher's thread; the compute queue takes everything else that runs in a pass
// and belongs to the executor's thread. Each runs in order; events join them. A backend may run a queue's work inside
// the call that submits it (the CPU backend does).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "sluice/log.hpp"
#include "sluice/result.hpp"
#include "storage/manifest.hpp"

namespace sluice::backend {

// A place in device memory: the number of an allocation and a byte offset in it.
struct DeviceAddress {
  uint32_t buffer = 0;
  uint64_t offset = 0;

  DeviceAddress operator+(uint64_t bytes) const { return {buffer, offset + bytes}; }
  bool operator==(const DeviceAddress&) const = default;
};

// One weight tensor where the kernels find it in this pass. Shapes as in the container: rows N, cols K.
struct Weight {
  storage::Scheme scheme = storage::Scheme::f32;
  storage::Layout layout = storage::Layout::rows;
  uint32_t rows = 0;
  uint32_t cols = 0;
  uint32_t group_elems = 0;
  float scale = 1.0f;                 // 2^scale_exponent
  DeviceAddress values;
  DeviceAddress scales;               // valid if group_elems != 0
  DeviceAddress zeros;                // valid if has_zeros
  DeviceAddress bias;                 // valid if has_bias
  DeviceAddress perm;                 // valid if has_perm: u32 [cols], column k of the values multiplies input perm[k]
  bool has_zeros = false;
  bool has_bias = false;
  bool has_perm = false;
  uint64_t perm_sum = 0;              // checksum of perm's content; 0 without

  bool operator==(const Weight&) const = default;
};

// Whether two matrices take the same inputs in the same order of columns.
inline bool same_order(const Weight& a, const Weight& b) { return a.has_perm == b.has_perm && a.perm_sum == b.perm_sum; }

// The activations of a pass, all [rows of the pass][width] row-major FP32 as far as the executor is concerned (a GPU may
// keep them in another form inside). Widths: residual, normed: hidden; q, attended: heads*head_dim; k, v:
// kv_heads*head_dim; gate, up: ffn; logits: vocab, one row per row that wants logits.
enum class Slot : uint8_t { residual, normed, q, k, v, attended, gate, up, logits, count };

enum class OpKind : uint8_t {
  rms_norm,       // out[0] = in / sqrt(mean(in^2) + eps) * vectors[0]
  matmul,         // out[i] = in * weights[i]^T (+ vectors[i]);  with `accumulate` out[i] += ...
  head_norm_rope, // q and k in place: per-head RMSNorm by vectors[0] (q) and vectors[1] (k) where present, then RoPE;
                  // then k and v go to the KV cache of `layer` as FP16
  attention,      // attended = softmax(q K^T / sqrt(head_dim)) V over positions 0..position of the row's session
  swiglu,         // gate = silu(gate) * up
  select_rows,    // residual rows that want logits move to the front, in order; later operations run on them alone
};

inline constexpr int kMaxWeights = 3;

struct Op {
  OpKind kind = OpKind::rms_norm;
  uint32_t layer = 0;
  uint8_t weight_count = 0;
  bool accumulate = false;
  Slot in = Slot::residual;
  Slot out[kMaxWeights] = {};
  Weight weights[kMaxWeights];        // matmul only
  // Resident FP32 vectors: norm weights, or biases of weights[i]; `has_vector` says which exist.
  DeviceAddress vectors[kMaxWeights];
  bool has_vector[kMaxWeights] = {};
  bool operator==(const Op&) const = default;
};

// One row of a pass: a token of some session.
struct Row {
  uint32_t session = 0;               // slot of the KV cache, < Shape::sessions
  uint32_t position = 0;              // 0-based, < Shape::context
  bool wants_logits = false;
};

// Everything that sizes buffers; fixed at open.
struct Shape {
  uint32_t layers = 0, hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, ffn = 0, vocab = 0;
  float norm_eps = 1e-5f;
  std::span<const float> inverse_frequencies;   // rotary_dims / 2 values, read during `prepare` only
  float rope_attention_factor = 1.0f;
  uint32_t rotary_dims = 0;
  bool gathers = false;               // some matrix has a column permutation
  uint32_t context = 0;               // positions per session, a multiple of kKvBlockTokens
  uint32_t sessions = 1;
  uint32_t max_rows = 0;              // rows of a pass
  uint32_t max_logit_rows = 0;        // rows of a pass that want logits
};

// KV cache: FP16, per session slot and layer blocks of kKvBlockTokens positions, addressed through a block table (the
// identity at first).
inline constexpr uint32_t kKvBlockTokens = 64;

struct MemoryNeed {
  uint64_t kv_bytes = 0;
  uint64_t scratch_bytes = 0;         // activations and whatever else `prepare` allocates
};

// A device with memory of its own; all 0 where it is the host's.
struct DeviceMemory {
  uint64_t total_bytes = 0;
  uint64_t free_bytes = 0;            // now
  uint64_t overhead_bytes = 0;        // that the process takes by using the device at all: context, kernels, graphs
};

// When an operation of a pass ran, on a device that works through its queue by itself; nanoseconds of the device's clock,
// which begins anywhere.
struct OpTime {
  uint64_t begin_ns = 0;              // where the operation before it ended
  uint64_t ready_ns = 0;              // ... and until when the device was idle for weights that had to be waited for
  uint64_t end_ns = 0;
  uint64_t wait_ns() const { return ready_ns - begin_ns; }
  uint64_t run_ns() const { return end_ns - ready_ns; }
};

// When the host did something; nanoseconds of the steady clock.
struct HostTime {
  uint64_t begin_ns = 0, end_ns = 0;
};

// Commands of a pass at most: a layer's 14 products, where its seven matrices are streamed and have residuals, and the 5
// between them; 4 for the logits, its begin and end, and some to spare.
inline constexpr uint32_t most_commands(uint32_t layers) { return 19 * layers + 16; }

using EventId = uint32_t;

// Calibration's linear algebra, where a device does it faster than the host: the second moments of what matrices read,
// and their Cholesky factors. Calls come from the thread that runs passes. Matrices are FP32, row-major.
class Calibration {
 public:
  virtual ~Calibration() = default;
  // A sum of x^T x over rows x of `cols` columns, zero at first: [cols][cols], symmetric. Returns its number. Errors:
  // out_of_memory, device.
  virtual Result<uint32_t> create_sum(uint32_t cols) = 0;
  // Adds the rows that a slot holds at this place of the pass. Error: device.
  virtual Status add(uint32_t sum, Slot slot) = 0;
  // Waits, copies the sum, and gives its memory back. Error: device.
  virtual Status take(uint32_t sum, std::span<float> out) = 0;
  // Replaces the lower triangle of a symmetric matrix [n][n], of which it is all that is read, by the inverse of its
  // Cholesky factor; false, and the triangle as it was, if it is not positive definite. Errors: out_of_memory, device.
  virtual Result<bool> invert_factor(std::span<float> matrix, uint32_t n) = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual const char* name() const = 0;            // "cpu", "cuda", "vulkan"
  virtual std::string device_name() const = 0;     // "2 threads, AVX3_ZEN4", "NVIDIA H200"
  virtual std::string pci_bus_id() const { return {}; }   // "0000:3B:00.0"; empty: no such place, or not known
  // True if operations may read weights where import_host put them (the CPU): --io=mmap then needs no copies.
  virtual bool computes_in_host_memory() const = 0;
  virtual uint64_t preferred_copy_bytes() const = 0;   // copies below this size waste the bus
  virtual uint64_t max_allocation_bytes() const { return UINT64_MAX; }   // of one allocate()

  virtual DeviceMemory device_memory() const { return {}; }
  // What `prepare(shape)` will take, exactly.
  virtual MemoryNeed memory_need(const Shape& shape) const = 0;
  // Allocates KV cache and scratch. Once. Error: out_of_memory.
  virtual Status prepare(const Shape& shape) = 0;

  // Device memory, uninitialised, 4096-aligned; freed with the backend. `what` names it in the error. Open time only.
  virtual Result<DeviceAddress> allocate(uint64_t bytes, const std::string& what) = 0;
  // Makes host memory known to the copy engine (pins it); it must outlive the backend's last copy. Open time only.
  virtual Status register_host(std::span<std::byte> memory) = 0;
  // Before registered memory is given back: waits for the copies out of it.
  virtual void unregister_host(std::span<std::byte> /*memory*/) {}
  // So many bytes at an address as host memory, where the device's memory is the host's (the CPU): loading then reads straight
  // into it. Empty elsewhere.
  virtual std::span<std::byte> host_view(DeviceAddress, uint64_t /*bytes*/) { return {}; }
  // Host memory as a device address, where computes_in_host_memory(). It must outlive the backend.
  virtual Result<DeviceAddress> import_host(std::span<const std::byte> memory) = 0;

  // Copy queue. `source` must stay unchanged until an event recorded after the copy is complete.
  virtual Status copy_to_device(DeviceAddress dest, std::span<const std::byte> source) = 0;

  // Events: created at open, recorded and waited for without allocation. `record_copy` marks the copy queue's end,
  // `record_compute` the compute queue's. The *_waits calls make a queue wait on the device; `host_wait` blocks the
  // caller; `done` does not.
  virtual Result<EventId> create_event() = 0;
  virtual void record_copy(EventId event) = 0;
  virtual void record_compute(EventId event) = 0;
  virtual void compute_waits(EventId event) = 0;
  virtual void copy_waits(EventId event) = 0;
  virtual Status host_wait(EventId event) = 0;
  virtual bool done(EventId event) = 0;

  // Compute queue. A pass is begin_pass, then run for each operation, then finish_pass.
  // `rows` (1..max_rows) stay valid until finish_pass returns. Rows of one session have ascending positions.
  // `embeddings`: FP32 [rows.size()][hidden], copied into Slot::residual.
  virtual Status begin_pass(std::span<const Row> rows, std::span<const float> embeddings) = 0;
  virtual Status run(const Op& op) = 0;
  // Hands what was run so far to the device, which a backend may put off. Before the caller waits for something else.
  virtual Status submit() { return {}; }
  // Waits for the compute queue and copies what a slot holds at this place of the pass, FP32 [rows of the pass][width]: for
  // calibration, not for passes that someone waits for. Error: unsupported, where a backend does not give it.
  virtual Status read_slot(Slot slot, std::span<float> out);
  // Null where the host does as well. Goes with the backend.
  virtual Calibration* calibration() { return nullptr; }
  // Waits for the compute queue and copies the logits, FP32 [wanted rows][vocab], to `logits` (empty: none wanted).
  virtual Status finish_pass(std::span<float> logits) = 0;
  // Whether op_times are wanted of the passes that follow; asked for before begin_pass. A device whose stamps cost
  // nothing (CUDA) gives them always. On at first.
  virtual void time_operations(bool) {}
  // Of the last finished pass, one for each `run` that had rows to work on, in their order; valid until the next
  // begin_pass. Empty where `run` itself computes (the CPU), and the caller's clock tells; also where the device has no
  // clock (some of Vulkan's), of a pass with more operations than a model has, and, of a device whose stamps cost time,
  // of a pass for which they were not wanted.
  virtual std::span<const OpTime> op_times() const { return {}; }
  // ... and when commands were recorded that later passes repeat: graphs, command buffers.
  virtual std::span<const HostTime> recordings() const { return {}; }

  // KV cache of a session slot, between passes. `save_kv`/`load_kv`: positions 0..tokens-1 of all layers as opaque bytes,
  // kv_bytes(tokens) of them, the same for every slot.
  virtual uint64_t kv_bytes(uint32_t tokens) const = 0;
  virtual Status copy_kv(uint32_t from_session, uint32_t to_session, uint32_t tokens) = 0;
  virtual Status save_kv(uint32_t session, uint32_t tokens, std::span<std::byte> out) = 0;
  virtual Status load_kv(uint32_t session, uint32_t tokens, std::span<const std::byte> in) = 0;
};

enum class CpuActivations { int8, f32 };

struct CpuOptions {
  uint32_t threads = 0;               // 0: one per physical core that this process may use
  CpuActivations activations = CpuActivations::int8;
  LogHook log;
};
Result<std::unique_ptr<Backend>> make_cpu_backend(const CpuOptions& options);

struct CudaOptions {
  int device = 0;                     // as CUDA counts the devices that this process sees
  LogHook log;
};
bool has_cuda_backend();   // in this build; whether a device works is another question
// Errors: not_found (a build without CUDA, no driver, one too old, no device, no kernels for it), device.
Result<std::unique_ptr<Backend>> make_cuda_backend(const CudaOptions& options);

struct VulkanOptions {
  bool software = true;               // a driver that computes on the CPU (lavapipe) will do where there is no GPU
  LogHook log;
};
bool has_vulkan_backend();   // in this build
// Errors: not_found (a build without Vulkan, no loader, no driver, no device, or what each lacks), out_of_memory, device.
Result<std::unique_ptr<Backend>> make_vulkan_backend(const VulkanOptions& options);

}  // namespace sluice::backend
