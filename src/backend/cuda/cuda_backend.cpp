// SPDX-License-Identifier: Apache-2.0
// Memory, events, and the frame of a pass. The operations: cuda_ops.cpp.
#include "backend/cuda/cuda_backend.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "backend/cuda/cuda_error.hpp"
#include "base/check.hpp"
#include "base/half.hpp"
#include "base/units.hpp"
#include "cuda/elementwise.hpp"

namespace sluice::backend::cuda {

namespace {

// PCIe 5 x16, pinned: 53-55 GB/s from here on; 1 MiB 48.6, 256 KiB 35.9.
constexpr uint64_t kPreferredCopyBytes = 4 * kMiB;

// Positions before the grid of attention grows that its graphs begin to be made.
constexpr uint32_t kGraphsAhead = 48;

// What the kernels of an operation write (cuda/elementwise.hpp, cuda/attention.hpp).
Marks marks_of(OpKind kind) {
  switch (kind) {
    case OpKind::rms_norm:
    case OpKind::attention:
    case OpKind::swiglu: return {.begin = true, .end = true};
    case OpKind::head_norm_rope:
    case OpKind::select_rows: return {.begin = true};
    case OpKind::matmul: return {};
  }
  return {};
}

}  // namespace

Result<std::unique_ptr<Backend>> CudaBackend::create(const CudaOptions& options) {
  SLUICE_TRY_ASSIGN(device, Device::open(options.device));
  std::unique_ptr<CudaBackend> self(new CudaBackend(options, std::move(device)));
  for (cudaStream_t* stream : {&self->copy_, &self->compute_, &self->capture_}) {
    SLUICE_TRY(self->check(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), "creating a stream"));
  }
  self->graphs_->set_streams(self->compute_, self->capture_);
  log_info(options.log, fmt::format("cuda: {}, {} of {} free, CUDA {}.{}", self->device_.name,
                                    format_bytes(self->device_.free_bytes()), format_bytes(self->device_.total_bytes),
                                    self->device_.driver / 1000, self->device_.driver % 1000 / 10));
  return std::unique_ptr<Backend>(std::move(self));
}

CudaBackend::CudaBackend(const CudaOptions& options, Device device) : device_(std::move(device)), log_(options.log) {
  graphs_ = std::make_unique<PassGraphs>(
      [this](const Command& command, const PassKind& kind, bool overlap, cudaStream_t stream) {
        return launch(command, kind, overlap, stream);
      },
      [this](cudaError_t code, const char* what) { return check(code, what); });
}

// A dead context may never finish what it was given: nothing is waited for then, and the process's end frees the rest.
CudaBackend::~CudaBackend() {
  device_.make_current();
  if (!dead_) {
    for (const cudaStream_t stream : {copy_, compute_}) {
      if (stream != nullptr) cudaStreamSynchronize(stream);
    }
  }
  calibration_.reset();
  graphs_.reset();
  for (const cudaEvent_t event : events_) cudaEventDestroy(event);
  for (const std::span<std::byte> memory : registered_) cudaHostUnregister(memory.data());
  for (const Buffer& buffer : buffers_) cudaFree(buffer.data);
  for (void* memory : {static_cast<void*>(pinned_.embeddings), static_cast<void*>(pinned_.table),
                       static_cast<void*>(pinned_.logits), static_cast<void*>(pinned_.stamps)}) {
    if (memory != nullptr) cudaFreeHost(memory);
  }
  for (const cudaStream_t stream : {copy_, compute_, capture_}) {
    if (stream != nullptr) cudaStreamDestroy(stream);
  }
  cudaGetLastError();
}

uint64_t CudaBackend::preferred_copy_bytes() const { return kPreferredCopyBytes; }

DeviceMemory CudaBackend::device_memory() const {
  return {.total_bytes = device_.total_bytes, .free_bytes = device_.free_bytes(),
          .overhead_bytes = device_.overhead_bytes};
}

// -------------------------------------------------------------------------------------------------------- errors

Status CudaBackend::check(cudaError_t code, const std::string& what) {
  if (code == cudaSuccess) [[likely]] return {};
  cudaGetLastError();  // a refusal is reported once
  Error error = error_of(code, fmt::format("{}: {}", device_.name, what));
  if (is_sticky(code)) die(error);
  return fail(std::move(error));
}

// For calls whose interface returns nothing: the next one that does reports it.
void CudaBackend::check_or_die(cudaError_t code, const char* what) {
  if (code == cudaSuccess) [[likely]] return;
  Status status = check(code, what);
  die(std::move(status.error()));
}

void CudaBackend::die(Error error) {
  const std::lock_guard lock(dead_mutex_);
  if (!dead_) death_ = std::move(error);
  dead_ = true;
}

Status CudaBackend::alive() const {
  if (!dead_) [[likely]] return {};
  const std::lock_guard lock(dead_mutex_);
  return fail(death_);
}

// What to lower, and to what: all that this process took and could have taken.
Error CudaBackend::out_of_memory(uint64_t bytes, const std::string& what) const {
  const uint64_t free = device_.free_bytes();
  const uint64_t possible = align_down(allocated_bytes_ + free - std::min(free, free / 16), kMiB);
  return {ErrorCode::out_of_memory,
          fmt::format("{}: {} for {} were refused, {} are free; lower --device-memory to {}M, or end what else uses the GPU",
                      device_.name, format_bytes(bytes), what, format_bytes(free),
                      (possible + device_.overhead_bytes) / kMiB),
          static_cast<int>(cudaErrorMemoryAllocation)};
}

// -------------------------------------------------------------------------------------------------------- memory

MemoryNeed CudaBackend::memory_need(const Shape& shape) const {
  const sluice::cuda::KvCacheView view{.memory = nullptr, .table = nullptr, .blocks_per_session = 0,
                                       .layers = shape.layers, .kv_heads = shape.kv_heads, .head_dim = shape.head_dim};
  const uint64_t blocks = ceil_div(shape.context, kKvBlockTokens) * shape.sessions;
  return {.kv_bytes = align_up(blocks * view.block_elems() * sizeof(uint16_t), 4096),
          .scratch_bytes = ScratchLayout(shape).bytes};
}

Status CudaBackend::prepare(const Shape& shape) {
  SLUICE_CHECK(!prepared_);
  SLUICE_CHECK(shape.context % kKvBlockTokens == 0 && shape.max_rows > 0 && shape.max_logit_rows <= shape.max_rows);
  SLUICE_CHECK(shape.heads % shape.kv_heads == 0 && shape.rotary_dims <= shape.head_dim);
  SLUICE_CHECK(shape.inverse_frequencies.size() == shape.rotary_dims / 2);
  SLUICE_TRY(alive());
  if (!sluice::cuda::attention_supported(shape.heads, shape.kv_heads, shape.head_dim)) {
    return fail(ErrorCode::unsupported,
                fmt::format("the CUDA backend has no attention for {} heads on {} KV heads of {} dimensions; --backend cpu "
                            "has", shape.heads, shape.kv_heads, shape.head_dim));
  }
  const MemoryNeed need = memory_need(shape);
  SLUICE_TRY_ASSIGN(kv, allocate(need.kv_bytes, "the KV cache"));
  SLUICE_TRY_ASSIGN(scratch, allocate(need.scratch_bytes, "activations"));
  scratch_ = ScratchLayout(shape);
  scratch_memory_ = at(scratch, need.scratch_bytes);
  shape_ = shape;
  shape_.inverse_frequencies = {};
  SLUICE_TRY(allocate_pinned());
  clock_.reserve(scratch_.stamp_count);

  const auto blocks_per_session = static_cast<uint32_t>(shape.context / kKvBlockTokens);
  std::vector<uint32_t> table(size_t{blocks_per_session} * shape.sessions);
  std::iota(table.begin(), table.end(), 0u);
  kv_ = {.memory = reinterpret_cast<__half*>(at(kv, need.kv_bytes)), .table = this->scratch<uint32_t>(scratch_.block_table),
         .blocks_per_session = blocks_per_session, .layers = shape.layers, .kv_heads = shape.kv_heads,
         .head_dim = shape.head_dim};
  // Zeros: the counters of the kernels that need them, and columns of X that nobody writes.
  SLUICE_TRY(check(cudaMemsetAsync(scratch_memory_, 0, scratch_.bytes, compute_), "clearing activations"));
  SLUICE_TRY(check(cudaMemcpyAsync(scratch_memory_ + scratch_.block_table, table.data(), table.size() * sizeof(uint32_t),
                                   cudaMemcpyHostToDevice, compute_), "writing the block table"));
  SLUICE_TRY(check(cudaMemcpyAsync(scratch_memory_ + scratch_.inverse_frequencies, shape.inverse_frequencies.data(),
                                   shape.inverse_frequencies.size_bytes(), cudaMemcpyHostToDevice, compute_),
                   "writing the frequencies"));
  SLUICE_TRY(check(cudaStreamSynchronize(compute_), "clearing activations"));
  prepared_ = true;
  return {};
}

Status CudaBackend::allocate_pinned() {
  const auto take = [&](auto*& pointer, uint64_t count, const char* what) -> Status {
    void* memory = nullptr;
    const uint64_t bytes = std::max<uint64_t>(count, 1) * sizeof *pointer;
    if (cudaHostAlloc(&memory, bytes, cudaHostAllocDefault) != cudaSuccess) {
      cudaGetLastError();
      return fail(ErrorCode::out_of_memory, fmt::format("{} of pinned memory for {} were refused; lower --context or the "
                                                        "memlock limit is too low", format_bytes(bytes), what));
    }
    pointer = static_cast<std::remove_reference_t<decltype(pointer)>>(memory);
    return {};
  };
  SLUICE_TRY(take(pinned_.embeddings, uint64_t{shape_.max_rows} * shape_.hidden, "embeddings"));
  SLUICE_TRY(take(pinned_.table, 3 * uint64_t{shape_.max_rows}, "the rows of a pass"));
  SLUICE_TRY(take(pinned_.stamps, scratch_.stamp_count, "times"));
  return take(pinned_.logits, uint64_t{shape_.max_logit_rows} * shape_.vocab, "logits");
}

Result<DeviceAddress> CudaBackend::allocate(uint64_t bytes, const std::string& what) {
  SLUICE_TRY(alive());
  device_.make_current();
  void* data = nullptr;
  const cudaError_t code = cudaMalloc(&data, std::max<uint64_t>(bytes, 1));
  if (code == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return fail(out_of_memory(bytes, what));
  }
  SLUICE_TRY(check(code, fmt::format("allocating {} for {}", format_bytes(bytes), what)));
  buffers_.push_back({.data = static_cast<std::byte*>(data), .bytes = bytes});
  allocated_bytes_ += bytes;
  return DeviceAddress{.buffer = static_cast<uint32_t>(buffers_.size() - 1), .offset = 0};
}

Status CudaBackend::register_host(std::span<std::byte> memory) {
  SLUICE_TRY(alive());
  device_.make_current();
  const cudaError_t code = cudaHostRegister(memory.data(), memory.size(), cudaHostRegisterDefault);
  if (code == cudaSuccess) {
    registered_.push_back(memory);
    return {};
  }
  cudaGetLastError();
  if (code != cudaErrorMemoryAllocation && is_sticky(code)) return check(code, "pinning host memory");
  // Copies out of it still work, through the driver's own buffer.
  if (!std::exchange(said_unregistered_, true)) {
    log_warning(log_, fmt::format("cuda: {} of host memory cannot be pinned ({}): copies run at a fraction of the bus; raise "
                                  "the memlock limit (ulimit -l)", format_bytes(memory.size()), cudaGetErrorString(code)));
  }
  return {};
}

void CudaBackend::unregister_host(std::span<std::byte> memory) {
  device_.make_current();
  if (!dead_) check_or_die(cudaStreamSynchronize(copy_), "finishing copies");
  const auto found = std::find_if(registered_.begin(), registered_.end(),
                                  [&](std::span<std::byte> other) { return other.data() == memory.data(); });
  if (found == registered_.end()) return;
  cudaHostUnregister(memory.data());
  registered_.erase(found);
}

Result<DeviceAddress> CudaBackend::import_host(std::span<const std::byte>) {
  return fail(ErrorCode::internal, "the CUDA backend does not compute in host memory");
}

std::byte* CudaBackend::at(DeviceAddress address, uint64_t bytes) const {
  SLUICE_CHECK(address.buffer < buffers_.size());
  const Buffer& buffer = buffers_[address.buffer];
  SLUICE_CHECK(address.offset <= buffer.bytes && bytes <= buffer.bytes - address.offset);
  return buffer.data + address.offset;
}

Status CudaBackend::copy_to_device(DeviceAddress dest, std::span<const std::byte> source) {
  SLUICE_TRY(alive());
  return check(cudaMemcpyAsync(at(dest, source.size()), source.data(), source.size(), cudaMemcpyHostToDevice, copy_),
               "copying weights to the device");
}

// -------------------------------------------------------------------------------------------------------- events

Result<EventId> CudaBackend::create_event() {
  SLUICE_TRY(alive());
  device_.make_current();
  // Blocking: the prefetcher's thread waits here for milliseconds, on machines with few cores.
  cudaEvent_t event = nullptr;
  SLUICE_TRY(check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync), "creating an event"));
  events_.push_back(event);
  return static_cast<EventId>(events_.size() - 1);
}

void CudaBackend::record_copy(EventId event) {
  if (dead_) return;
  check_or_die(cudaEventRecord(events_[event], copy_), "recording an event");
}

void CudaBackend::record_compute(EventId event) {
  if (dead_ || !submit_or_die()) return;
  check_or_die(cudaEventRecord(events_[event], compute_), "recording an event");
  stamp_end();
}

// The end of the last command, where no kernel of its own writes it.
void CudaBackend::stamp_end() {
  if (!in_pass_ || clock_.last().end) return;
  check_or_die(sluice::cuda::launch_stamp(stamp(clock_.size() - 1), true, compute_), "taking the time");
  clock_.last().end = true;
}

// Submitted also where the copy is there already: segments must not depend on the time of day.
void CudaBackend::compute_waits(EventId event) {
  if (dead_ || !submit_or_die()) return;
  stamp_end();
  const cudaError_t state = cudaEventQuery(events_[event]);
  if (state == cudaErrorNotReady) {
    check_or_die(cudaStreamWaitEvent(compute_, events_[event], 0), "waiting for a copy");
  } else {
    check_or_die(state, "asking for an event");
  }
  if (!in_pass_ || clock_.size() >= scratch_.stamp_count) return;
  check_or_die(sluice::cuda::launch_stamp(stamp(clock_.size()), false, compute_), "taking the time");
  awaits_ = true;
}

// What could not be submitted is missing in the pass, whose end must not come to nothing.
bool CudaBackend::submit_or_die() {
  Status status = graphs_->flush();
  if (!status) die(std::move(status.error()));
  return status.has_value();
}

void CudaBackend::copy_waits(EventId event) {
  if (dead_) return;
  check_or_die(cudaStreamWaitEvent(copy_, events_[event], 0), "waiting for a kernel");
}

Status CudaBackend::host_wait(EventId event) {
  SLUICE_TRY(alive());
  return check(cudaEventSynchronize(events_[event]), "waiting for a copy");
}

bool CudaBackend::done(EventId event) {
  if (dead_) return true;  // the next call that returns a Status says why
  const cudaError_t state = cudaEventQuery(events_[event]);
  if (state == cudaErrorNotReady) return false;
  check_or_die(state, "asking for an event");
  return true;
}

// -------------------------------------------------------------------------------------------------------- a pass

// finish_pass() waited for the pass before, so its pinned memory is free.
Status CudaBackend::begin_pass(std::span<const Row> rows, std::span<const float> embeddings) {
  SLUICE_CHECK(prepared_ && !rows.empty() && rows.size() <= shape_.max_rows);
  SLUICE_CHECK(embeddings.size() == rows.size() * shape_.hidden);
  SLUICE_TRY(alive());
  device_.make_current();
  std::memcpy(pinned_.embeddings, embeddings.data(), embeddings.size_bytes());
  uint32_t* sessions = pinned_.table;
  uint32_t* positions = sessions + shape_.max_rows;
  uint32_t* selected = positions + shape_.max_rows;
  uint32_t wanted = 0, session_runs = 1;
  positions_in_use_ = 0;
  for (uint32_t i = 0; i < rows.size(); ++i) {
    const Row& row = rows[i];
    SLUICE_CHECK(row.session < shape_.sessions && row.position < shape_.context);
    sessions[i] = row.session;
    positions[i] = row.position;
    positions_in_use_ = std::max(positions_in_use_, row.position + 1);
    if (row.wants_logits) selected[wanted++] = i;
    if (i > 0 && row.session != rows[i - 1].session) ++session_runs;
  }
  SLUICE_CHECK(wanted <= shape_.max_logit_rows);
  active_rows_ = static_cast<uint32_t>(rows.size());
  kind_ = {.rows = active_rows_, .wanted_rows = wanted,
           .prefill_attention = sluice::cuda::attention_wants_prefill(active_rows_, session_runs)};
  kind_.attention_bound = kind_.prefill_attention ? shape_.context : attention_bound(positions_in_use_);
  graphs_->begin(kind_);
  clock_.clear();
  in_pass_ = true;
  awaits_ = false;
  return add({.kind = CommandKind::begin_pass, .rows = active_rows_, .op = {}}, {.begin = true});
}

uint32_t CudaBackend::attention_bound(uint32_t positions) const {
  return sluice::cuda::attention_bound(shape_.heads, shape_.kv_heads, positions, shape_.context);
}

Status CudaBackend::add(Command command, Marks marks) {
  SLUICE_CHECK(clock_.size() < scratch_.stamp_count);
  command.index = static_cast<uint32_t>(clock_.size());
  clock_.add(marks);
  return graphs_->add(command);
}

Status CudaBackend::run(const Op& op) {
  if (active_rows_ == 0) return {};  // no row wants logits
  SLUICE_TRY(alive());
  if (op.kind == OpKind::select_rows) active_rows_ = kind_.wanted_rows;
  if (active_rows_ == 0) return {};
  Marks marks = marks_of(op.kind);
  if (std::exchange(awaits_, false)) marks.begin = marks.awaited = true;
  return add({.kind = CommandKind::operation, .rows = active_rows_, .op = op}, marks);
}

Status CudaBackend::submit() {
  SLUICE_TRY(alive());
  return graphs_->flush();
}

// What a matrix product reads is X: FP16, with a scale for each row (cuda/elementwise.hpp).
Status CudaBackend::read_slot(Slot from, std::span<float> out) {
  const uint32_t columns = width(from);
  SLUICE_CHECK(active_rows_ > 0 && out.size() == size_t{active_rows_} * columns);
  SLUICE_TRY(submit());
  const MatmulInput in = input(from);
  if (in.x == nullptr) {
    SLUICE_TRY(check(cudaMemcpyAsync(out.data(), slot(from), out.size_bytes(), cudaMemcpyDeviceToHost, compute_),
                     "reading activations"));
    return check(cudaStreamSynchronize(compute_), "reading activations");
  }
  std::vector<uint16_t> halves(size_t{active_rows_} * in.ldx);
  std::vector<float> scales(active_rows_, 1.0f);
  SLUICE_TRY(check(cudaMemcpyAsync(halves.data(), in.x, halves.size() * sizeof(uint16_t), cudaMemcpyDeviceToHost,
                                   compute_), "reading activations"));
  if (in.row_scale != nullptr) {
    SLUICE_TRY(check(cudaMemcpyAsync(scales.data(), in.row_scale, scales.size() * sizeof(float), cudaMemcpyDeviceToHost,
                                     compute_), "reading activations"));
  }
  SLUICE_TRY(check(cudaStreamSynchronize(compute_), "reading activations"));
  for (uint32_t r = 0; r < active_rows_; ++r) {
    const uint16_t* row = halves.data() + size_t{r} * in.ldx;
    for (uint32_t i = 0; i < columns; ++i) out[size_t{r} * columns + i] = float_from_half(row[i]) * scales[r];
  }
  return {};
}

Calibration* CudaBackend::calibration() {
  if (std::exchange(asked_for_calibration_, true)) return calibration_.get();
  device_.make_current();
  Result<std::unique_ptr<CudaCalibration>> opened = CudaCalibration::open({
      .stream = compute_,
      .check = [this](cudaError_t code, const char* what) { return check(code, what); },
      .flush = [this] { return submit(); },
      .input = [this](Slot from) { return input(from); },
      .read_slot = [this](Slot from, std::span<float> out) { return read_slot(from, out); },
      .rows = [this] { return active_rows_; }});
  if (opened) calibration_ = std::move(*opened);
  else log_warning(log_, fmt::format("cuda: {}; the CPU computes second moments and their factors", opened.error().message));
  return calibration_.get();
}

Status CudaBackend::finish_pass(std::span<float> logits) {
  SLUICE_CHECK(logits.empty() || logits.size() == size_t{kind_.wanted_rows} * shape_.vocab);
  SLUICE_TRY(alive());
  SLUICE_TRY(add({.kind = CommandKind::finish_pass, .rows = logits.empty() ? 0 : kind_.wanted_rows, .op = {}},
                 {.begin = true}));
  SLUICE_TRY(graphs_->flush());
  if (!kind_.prefill_attention) {
    PassKind next = kind_;
    next.attention_bound = attention_bound(std::min(positions_in_use_ + kGraphsAhead, shape_.context));
    if (next != kind_) SLUICE_TRY(graphs_->capture_ahead(next));
  }
  // Of this queue alone: copies for the next pass go on.
  SLUICE_TRY(check(cudaStreamSynchronize(compute_), "computing a pass"));
  if (!logits.empty()) std::memcpy(logits.data(), pinned_.logits, logits.size_bytes());
  clock_.read({pinned_.stamps, clock_.size()});
  active_rows_ = 0;
  in_pass_ = false;
  return alive();
}

// ------------------------------------------------------------------------------------------------------ KV cache

std::byte* CudaBackend::kv_block(uint32_t session, uint32_t index) const {
  return reinterpret_cast<std::byte*>(kv_.memory) +
         (uint64_t{session} * kv_.blocks_per_session + index) * kv_block_bytes();  // the table is the identity
}

uint64_t CudaBackend::kv_bytes(uint32_t tokens) const { return ceil_div(tokens, kKvBlockTokens) * kv_block_bytes(); }

Status CudaBackend::copy_kv(uint32_t from_session, uint32_t to_session, uint32_t tokens) {
  SLUICE_CHECK(from_session < shape_.sessions && to_session < shape_.sessions && tokens <= shape_.context);
  SLUICE_TRY(alive());
  device_.make_current();
  if (from_session == to_session || tokens == 0) return {};
  SLUICE_TRY(check(cudaMemcpyAsync(kv_block(to_session, 0), kv_block(from_session, 0), kv_bytes(tokens),
                                   cudaMemcpyDeviceToDevice, compute_), "copying a KV cache"));
  return check(cudaStreamSynchronize(compute_), "copying a KV cache");
}

Status CudaBackend::save_kv(uint32_t session, uint32_t tokens, std::span<std::byte> out) {
  SLUICE_CHECK(session < shape_.sessions && tokens <= shape_.context && out.size() == kv_bytes(tokens));
  SLUICE_TRY(alive());
  device_.make_current();
  if (tokens == 0) return {};
  SLUICE_TRY(check(cudaMemcpyAsync(out.data(), kv_block(session, 0), out.size(), cudaMemcpyDeviceToHost, compute_),
                   "reading a KV cache"));
  SLUICE_TRY(check(cudaStreamSynchronize(compute_), "reading a KV cache"));

  // Positions past the end may be another conversation's. K and V alike are [64 positions][head_dim].
  const uint32_t used = tokens % kKvBlockTokens;
  if (used == 0) return {};
  const size_t row_bytes = size_t{shape_.head_dim} * sizeof(uint16_t);
  std::byte* part = out.data() + out.size() - kv_block_bytes();
  for (uint32_t i = 0; i < 2 * shape_.layers * shape_.kv_heads; ++i, part += kKvBlockTokens * row_bytes) {
    std::memset(part + used * row_bytes, 0, (kKvBlockTokens - used) * row_bytes);
  }
  return {};
}

Status CudaBackend::load_kv(uint32_t session, uint32_t tokens, std::span<const std::byte> in) {
  SLUICE_CHECK(session < shape_.sessions && tokens <= shape_.context && in.size() == kv_bytes(tokens));
  SLUICE_TRY(alive());
  device_.make_current();
  if (tokens == 0) return {};
  SLUICE_TRY(check(cudaMemcpyAsync(kv_block(session, 0), in.data(), in.size(), cudaMemcpyHostToDevice, compute_),
                   "writing a KV cache"));
  return check(cudaStreamSynchronize(compute_), "writing a KV cache");
}

}  // namespace sluice::backend::cuda

namespace sluice::backend {

bool has_cuda_backend() { return true; }

Result<std::unique_ptr<Backend>> make_cuda_backend(const CudaOptions& options) {
  return cuda::CudaBackend::create(options);
}

}  // namespace sluice::backend
