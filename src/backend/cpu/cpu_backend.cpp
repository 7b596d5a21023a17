// SPDX-License-Identifier: Apache-2.0
// Memory, events, and the frame of a pass. The operations: cpu_ops.cpp.
#include "backend/cpu/cpu_backend.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "base/check.hpp"
#include "base/units.hpp"

namespace sluice::backend::cpu {

namespace {

// A memcpy of this size runs at full speed; smaller ones pay for the call around them.
constexpr uint64_t kPreferredCopyBytes = 64 * kKiB;

// Bytes of the largest form of a chunk of activations with `cols` columns. Which schemes will come is not known yet.
uint64_t form_bytes(uint64_t cols, uint32_t max_rows) {
  const uint64_t quantized = ceil_div(cols, 64) * std::min(max_rows, kChunkRows) * sizeof(QuantizedBlock);
  const uint64_t spread = ceil_div(cols, 64) * std::min(max_rows, kFloatChunkRows) * 128 * sizeof(float);
  return std::max(quantized, spread);  // spread16 takes two floats a column like spread64, padded to 16 only
}

}  // namespace

ScratchLayout::ScratchLayout(const Shape& shape, uint32_t threads) {
  const auto reserve = [this](uint64_t wanted) {
    const uint64_t offset = bytes;
    bytes = align_up(bytes + wanted, 64);
    return offset;
  };
  const auto set_width = [this](Slot slot, uint32_t width) { widths[static_cast<size_t>(slot)] = width; };
  set_width(Slot::residual, shape.hidden);
  set_width(Slot::normed, shape.hidden);
  set_width(Slot::q, shape.heads * shape.head_dim);
  set_width(Slot::k, shape.kv_heads * shape.head_dim);
  set_width(Slot::v, shape.kv_heads * shape.head_dim);
  set_width(Slot::attended, shape.heads * shape.head_dim);
  set_width(Slot::gate, shape.ffn);
  set_width(Slot::up, shape.ffn);
  set_width(Slot::logits, shape.vocab);
  uint64_t widest = 0;
  for (size_t i = 0; i < kSlots; ++i) {
    const bool is_logits = i == static_cast<size_t>(Slot::logits);
    slots[i] = reserve(uint64_t{is_logits ? shape.max_logit_rows : shape.max_rows} * widths[i] * sizeof(float));
    if (!is_logits) widest = std::max<uint64_t>(widest, widths[i]);
  }
  cos = reserve(uint64_t{shape.max_rows} * (shape.rotary_dims / 2) * sizeof(float));
  sin = reserve(uint64_t{shape.max_rows} * (shape.rotary_dims / 2) * sizeof(float));
  form = reserve(form_bytes(widest, shape.max_rows));
  accumulators = reserve(threads * kAccumulatorFloats * sizeof(float));
  bytes = align_up(bytes, 4096);
}

CpuBackend::CpuBackend(const CpuOptions& options, std::unique_ptr<ThreadPool> pool)
    : activations_(options.activations), pool_(std::move(pool)) {}

std::string CpuBackend::device_name() const { return fmt::format("{} threads, {}", pool_->threads(), simd_target()); }

uint64_t CpuBackend::preferred_copy_bytes() const { return kPreferredCopyBytes; }

MemoryNeed CpuBackend::memory_need(const Shape& shape) const {
  return {.kv_bytes = KvCache::bytes_needed(shape), .scratch_bytes = ScratchLayout(shape, pool_->threads()).bytes};
}

Status CpuBackend::prepare(const Shape& shape) {
  SLUICE_CHECK(!prepared_);
  SLUICE_CHECK(shape.context % kKvBlockTokens == 0 && shape.max_rows > 0 && shape.max_logit_rows <= shape.max_rows);
  SLUICE_CHECK(shape.heads % shape.kv_heads == 0 && shape.rotary_dims <= shape.head_dim);
  SLUICE_CHECK(shape.inverse_frequencies.size() == shape.rotary_dims / 2);
  if (shape.head_dim > kMaxHeadDim) {
    return fail(ErrorCode::unsupported, fmt::format("heads of {} dimensions: the CPU backend goes up to {}",
                                                    shape.head_dim, kMaxHeadDim));
  }
  ScratchLayout layout(shape, pool_->threads());
  SLUICE_TRY_ASSIGN(kv, KvCache::create(shape));
  SLUICE_TRY_ASSIGN(memory, Mapping::anonymous(layout.bytes, "activations"));
  kv_ = std::move(kv);
  scratch_ = layout;
  scratch_memory_ = std::move(memory);
  inverse_frequencies_.assign(shape.inverse_frequencies.begin(), shape.inverse_frequencies.end());
  shape_ = shape;
  shape_.inverse_frequencies = {};
  prepared_ = true;
  return {};
}

// ------------------------------------------------------------------------------------------------- device memory

Result<DeviceAddress> CpuBackend::allocate(uint64_t bytes, const std::string& what) {
  SLUICE_TRY_ASSIGN(memory, Mapping::anonymous(std::max<uint64_t>(bytes, 1), what));
  std::byte* data = memory.data();
  buffers_.push_back({.owned = std::move(memory), .data = data, .bytes = bytes, .writable = true});
  return DeviceAddress{.buffer = static_cast<uint32_t>(buffers_.size() - 1), .offset = 0};
}

Status CpuBackend::register_host(std::span<std::byte>) { return {}; }

Result<DeviceAddress> CpuBackend::import_host(std::span<const std::byte> memory) {
  buffers_.push_back({.owned = {}, .data = const_cast<std::byte*>(memory.data()), .bytes = memory.size(),
                      .writable = false});
  return DeviceAddress{.buffer = static_cast<uint32_t>(buffers_.size() - 1), .offset = 0};
}

std::byte* CpuBackend::at(DeviceAddress address, uint64_t bytes) const {
  SLUICE_CHECK(address.buffer < buffers_.size());
  const Buffer& buffer = buffers_[address.buffer];
  SLUICE_CHECK(address.offset <= buffer.bytes && bytes <= buffer.bytes - address.offset);
  return buffer.data + address.offset;
}

Status CpuBackend::copy_to_device(DeviceAddress dest, std::span<const std::byte> source) {
  std::byte* to = at(dest, source.size());
  SLUICE_CHECK(buffers_[dest.buffer].writable);
  std::memcpy(to, source.data(), source.size());
  return {};
}

// -------------------------------------------------------------------------------------------------------- events

// Work is done when the call that submitted it returns, so there is nothing to wait for, and an event that was never
// recorded stands for no work (as in CUDA). The counter orders memory: who sees a recording sees the work before it.

Result<EventId> CpuBackend::create_event() {
  events_.emplace_back(0u);
  return static_cast<EventId>(events_.size() - 1);
}

void CpuBackend::record(EventId event) {
  SLUICE_CHECK(event < events_.size());
  events_[event].fetch_add(1, std::memory_order_release);
}

bool CpuBackend::done(EventId event) {
  SLUICE_CHECK(event < events_.size());
  static_cast<void>(events_[event].load(std::memory_order_acquire));
  return true;
}

Status CpuBackend::host_wait(EventId event) {
  done(event);
  return {};
}

// -------------------------------------------------------------------------------------------------------- a pass

float* CpuBackend::slot(Slot slot) const {
  return reinterpret_cast<float*>(scratch_memory_.data() + scratch_.slots[static_cast<size_t>(slot)]);
}

const float* CpuBackend::vector(const Op& op, int index, uint32_t width) const {
  if (!op.has_vector[index]) return nullptr;
  return reinterpret_cast<const float*>(at(op.vectors[index], uint64_t{width} * sizeof(float)));
}

Status CpuBackend::begin_pass(std::span<const Row> rows, std::span<const float> embeddings) {
  SLUICE_CHECK(prepared_ && !rows.empty() && rows.size() <= shape_.max_rows);
  SLUICE_CHECK(embeddings.size() == rows.size() * shape_.hidden);
  rows_ = rows;
  active_rows_ = static_cast<uint32_t>(rows.size());
  wanted_rows_ = 0;
  for (const Row& row : rows) {
    SLUICE_CHECK(row.session < shape_.sessions && row.position < shape_.context);
    wanted_rows_ += row.wants_logits ? 1 : 0;
  }
  SLUICE_CHECK(wanted_rows_ <= shape_.max_logit_rows);
  std::memcpy(slot(Slot::residual), embeddings.data(), embeddings.size_bytes());

  // One angle per row and pair for the whole pass. In double: at position 100000 a float's last bit is 0.008 rad.
  const size_t pairs = shape_.rotary_dims / 2;
  auto* cos = reinterpret_cast<float*>(scratch_memory_.data() + scratch_.cos);
  auto* sin = reinterpret_cast<float*>(scratch_memory_.data() + scratch_.sin);
  pool_->parallel_for(active_rows_, 8, [&](uint32_t first, uint32_t last, uint32_t) {
    for (uint32_t r = first; r < last; ++r) {
      for (size_t i = 0; i < pairs; ++i) {
        const double angle = double{inverse_frequencies_[i]} * rows[r].position;
        cos[r * pairs + i] = static_cast<float>(std::cos(angle) * double{shape_.rope_attention_factor});
        sin[r * pairs + i] = static_cast<float>(std::sin(angle) * double{shape_.rope_attention_factor});
      }
    }
  });
  return {};
}

Status CpuBackend::run(const Op& op) {
  if (active_rows_ == 0) return {};  // no row wants logits
  switch (op.kind) {
    case OpKind::rms_norm: rms_norm(op); return {};
    case OpKind::matmul: return matmul(op);
    case OpKind::head_norm_rope: head_norm_rope(op); return {};
    case OpKind::attention: attention(op); return {};
    case OpKind::swiglu: swiglu(); return {};
    case OpKind::select_rows: select_rows(); return {};
  }
  return fail(ErrorCode::internal, fmt::format("operation {} is unknown to the CPU backend", static_cast<int>(op.kind)));
}

Status CpuBackend::read_slot(Slot from, std::span<float> out) {
  SLUICE_CHECK(out.size() == size_t{active_rows_} * width(from));
  std::memcpy(out.data(), slot(from), out.size_bytes());
  return {};
}

Status CpuBackend::finish_pass(std::span<float> logits) {
  SLUICE_CHECK(logits.empty() || logits.size() == size_t{wanted_rows_} * shape_.vocab);
  if (!logits.empty()) std::memcpy(logits.data(), slot(Slot::logits), logits.size_bytes());
  rows_ = {};
  active_rows_ = 0;
  return {};
}

// ------------------------------------------------------------------------------------------------------ KV cache

Status CpuBackend::copy_kv(uint32_t from_session, uint32_t to_session, uint32_t tokens) {
  SLUICE_CHECK(from_session < shape_.sessions && to_session < shape_.sessions && tokens <= shape_.context);
  kv_.copy(from_session, to_session, tokens);
  return {};
}

Status CpuBackend::save_kv(uint32_t session, uint32_t tokens, std::span<std::byte> out) {
  SLUICE_CHECK(session < shape_.sessions && tokens <= shape_.context);
  kv_.save(session, tokens, out);
  return {};
}

Status CpuBackend::load_kv(uint32_t session, uint32_t tokens, std::span<const std::byte> in) {
  SLUICE_CHECK(session < shape_.sessions && tokens <= shape_.context);
  kv_.load(session, tokens, in);
  return {};
}

}  // namespace sluice::backend::cpu

namespace sluice::backend {

Status Backend::read_slot(Slot, std::span<float>) {
  return fail(ErrorCode::unsupported, fmt::format("the {} backend does not give its activations; calibrate with --backend "
                                                  "cpu", name()));
}

Result<std::unique_ptr<Backend>> make_cpu_backend(const CpuOptions& options) {
  const uint32_t threads = options.threads != 0 ? options.threads : cpu::physical_cores();
  SLUICE_TRY_ASSIGN(pool, cpu::ThreadPool::create(threads));
  std::unique_ptr<Backend> backend = std::make_unique<cpu::CpuBackend>(options, std::move(pool));
  log_info(options.log, fmt::format("cpu: {}", backend->device_name()));
  return backend;
}

}  // namespace sluice::backend
