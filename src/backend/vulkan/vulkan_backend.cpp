// SPDX-License-Identifier: Apache-2.0
// Memory, events, and the frame of a pass. The operations: vulkan_ops.cpp.
#include "backend/vulkan/vulkan_backend.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

#include "backend/vulkan/vulkan_error.hpp"
#include "base/check.hpp"
#include "base/units.hpp"

namespace sluice::backend::vulkan {

namespace {

constexpr uint64_t kPreferredCopyBytes = 4 * kMiB;
// Room for what a driver takes after the device was opened: pipelines, command buffers.
constexpr uint64_t kLaterGrowth = 64 * kMiB;
// Pieces in which a KV cache is saved and loaded.
constexpr uint64_t kPieceBytes = 4 * kMiB;

}  // namespace

Result<std::unique_ptr<VulkanBackend>> VulkanBackend::create(const DeviceChoice& choice, const LogHook& log) {
  SLUICE_TRY_ASSIGN(device, Device::open(choice));
  std::unique_ptr<VulkanBackend> self(new VulkanBackend(std::move(device), log));
  SLUICE_TRY(self->create_queues());
  const Device& opened = *self->device_;
  // A device that computes on the CPU has no memory of its own.
  if (!opened.software()) {
    self->overhead_bytes_ = opened.total_bytes() - std::min(opened.total_bytes(), opened.free_bytes());
    self->overhead_bytes_ = std::min(self->overhead_bytes_, 512 * kMiB) + kLaterGrowth;
  }
  log_info(log, fmt::format("vulkan: {} ({}), {}, Vulkan {}, {}", opened.name(), opened.report().kind, opened.report().driver,
                            opened.report().version, opened.report().features));
  if (opened.has_matrices() && !self->kernels_->uses_matrices()) {
    log_warning(log, fmt::format("vulkan: the matrix instructions of {} lay numbers out in a way that is not known here; INT4 "
                                 "products go without them, slower", opened.name()));
  }
  return self;
}

Status VulkanBackend::create_queues() {
  SLUICE_TRY_ASSIGN(compute, Queue::create(*device_, device_->compute_queue()));
  compute_ = std::move(compute);
  SLUICE_TRY_ASSIGN(kernels, Kernels::create(*device_, *compute_));
  SLUICE_TRY_ASSIGN(copies, CopyQueue::create(*device_));
  kernels_ = std::move(kernels);
  copies_ = std::move(copies);
  commands_ = std::make_unique<PassCommands>(
      *compute_, [this](const Command& command, VkCommandBuffer commands) { return record(command, commands); },
      [this](VkCommandBuffer commands) { return enqueue(commands); },
      [this](VkResult code, const char* what) { return check(code, what); });
  return check(compute_->allocate(utility_), "allocating a command buffer");
}

// A lost device answers waits at once; destroying what it used is allowed.
VulkanBackend::~VulkanBackend() {
  if (compute_ != nullptr) device_->vk.vkDeviceWaitIdle(device_->handle());
  commands_.reset();
  copies_.reset();
  compute_.reset();
  kernels_.reset();
  if (queries_ != VK_NULL_HANDLE) device_->vk.vkDestroyQueryPool(device_->handle(), queries_, nullptr);
  for (Buffer& buffer : buffers_) device_->destroy(buffer);
  device_->destroy(upload_);
  device_->destroy(readback_);
}

uint64_t VulkanBackend::preferred_copy_bytes() const { return kPreferredCopyBytes; }

DeviceMemory VulkanBackend::device_memory() const {
  if (device_->software()) return {};
  return {.total_bytes = device_->total_bytes(), .free_bytes = device_->free_bytes(), .overhead_bytes = overhead_bytes_};
}

// -------------------------------------------------------------------------------------------------------- errors

Status VulkanBackend::check(VkResult code, const std::string& what) {
  if (code == VK_SUCCESS) [[likely]] return {};
  Error error = error_of(code, fmt::format("{}: {}", device_->name(), what));
  if (is_sticky(code)) die(error);
  return fail(std::move(error));
}

// For calls whose interface returns nothing: the next one that does reports it.
void VulkanBackend::check_or_die(VkResult code, const char* what) {
  if (code == VK_SUCCESS) [[likely]] return;
  Status status = check(code, what);
  die(std::move(status.error()));
}

void VulkanBackend::die(Error error) {
  const std::lock_guard lock(dead_mutex_);
  if (!dead_) death_ = std::move(error);
  dead_ = true;
}

Status VulkanBackend::alive() const {
  if (!dead_) [[likely]] return {};
  const std::lock_guard lock(dead_mutex_);
  return fail(death_);
}

// -------------------------------------------------------------------------------------------------------- memory

uint64_t VulkanBackend::kv_block_bytes() const {
  return uint64_t{shape_.layers} * shape_.kv_heads * 2 * kKvBlockTokens * shape_.head_dim * sizeof(uint16_t);
}

MemoryNeed VulkanBackend::memory_need(const Shape& shape) const {
  const uint64_t block = uint64_t{shape.layers} * shape.kv_heads * 2 * kKvBlockTokens * shape.head_dim * sizeof(uint16_t);
  const uint64_t blocks = ceil_div(shape.context, kKvBlockTokens) * shape.sessions;
  return {.kv_bytes = align_up(blocks * block, 4096), .scratch_bytes = ScratchLayout(shape).bytes};
}

Status VulkanBackend::prepare(const Shape& shape) {
  SLUICE_CHECK(!prepared_);
  SLUICE_CHECK(shape.context % kKvBlockTokens == 0 && shape.max_rows > 0 && shape.max_logit_rows <= shape.max_rows);
  SLUICE_CHECK(shape.heads % shape.kv_heads == 0 && shape.rotary_dims <= shape.head_dim);
  SLUICE_CHECK(shape.inverse_frequencies.size() == shape.rotary_dims / 2);
  SLUICE_TRY(alive());
  if (shape.head_dim > kMostHeadDim || shape.head_dim % 2 != 0) {
    return fail(ErrorCode::unsupported, fmt::format("heads of {} dimensions: the Vulkan backend takes even numbers up to {}; "
                                                    "--backend cpu runs the model", shape.head_dim, kMostHeadDim));
  }
  const MemoryNeed need = memory_need(shape);
  SLUICE_TRY_ASSIGN(kv, allocate(need.kv_bytes, "the KV cache"));
  SLUICE_TRY_ASSIGN(scratch, allocate(need.scratch_bytes, "activations"));
  kv_ = buffers_[kv.buffer];
  scratch_memory_ = buffers_[scratch.buffer];
  scratch_ = ScratchLayout(shape);
  inverse_frequencies_.assign(shape.inverse_frequencies.begin(), shape.inverse_frequencies.end());
  shape_ = shape;
  shape_.inverse_frequencies = {};
  SLUICE_TRY(create_host_buffers());
  SLUICE_TRY(initialise_scratch());
  SLUICE_TRY(create_clock());
  prepared_ = true;
  return {};
}

Status VulkanBackend::create_host_buffers() {
  const uint64_t rows = shape_.max_rows;
  upload_table_ = rows * shape_.hidden * sizeof(float);
  upload_angles_ = upload_table_ + 3 * rows * sizeof(uint32_t);
  const uint64_t blocks = shape_.sessions * ceil_div(shape_.context, kKvBlockTokens);
  const uint64_t upload_bytes = upload_angles_ + rows * shape_.rotary_dims * sizeof(float);
  SLUICE_TRY_ASSIGN(upload, device_->create_buffer(std::max(upload_bytes, blocks * sizeof(uint32_t)), MemoryKind::upload,
                                                   "the rows of a pass"));
  upload_ = upload;
  const uint64_t logits = uint64_t{shape_.max_logit_rows} * shape_.vocab * sizeof(float);
  SLUICE_TRY_ASSIGN(readback, device_->create_buffer(std::max(logits, kPieceBytes), MemoryKind::readback, "logits"));
  readback_ = readback;
  return {};
}

// Zeros: columns of X that nobody writes. The block table is the identity.
Status VulkanBackend::initialise_scratch() {
  const uint64_t blocks = shape_.sessions * ceil_div(shape_.context, kKvBlockTokens);
  auto* table = reinterpret_cast<uint32_t*>(upload_.mapped);
  std::iota(table, table + blocks, 0u);
  return run_now("clearing activations", [&](VkCommandBuffer commands) {
    device_->vk.vkCmdFillBuffer(commands, scratch_memory_.handle, 0, scratch_.bytes, 0);
    full_barrier(device_->vk, commands);
    const VkBufferCopy region{.srcOffset = 0, .dstOffset = scratch_.block_table, .size = blocks * sizeof(uint32_t)};
    device_->vk.vkCmdCopyBuffer(commands, upload_.handle, scratch_memory_.handle, 1, &region);
  });
}

Status VulkanBackend::create_clock() {
  const TickKind ticks{.valid_bits = device_->timestamp_bits(), .ns = double{device_->limits().timestampPeriod}};
  clock_ = PassClock(ticks, most_commands(shape_.layers));
  if (clock_.queries() == 0) return {};
  const VkQueryPoolCreateInfo info{.sType = VK_STRUCTURE_TYPE_QUERY_POOL_CREATE_INFO,
                                   .queryType = VK_QUERY_TYPE_TIMESTAMP,
                                   .queryCount = clock_.queries()};
  return check(device_->vk.vkCreateQueryPool(device_->handle(), &info, nullptr, &queries_), "making room for times");
}

template <class Body>
Status VulkanBackend::run_now(const char* what, const Body& body) {
  SLUICE_TRY(check(compute_->begin(utility_, true), what));
  full_barrier(device_->vk, utility_);
  body(utility_);
  SLUICE_TRY(check(compute_->end(utility_), what));
  SLUICE_TRY(check(compute_->submit(utility_, {}), what));
  return check(compute_->wait(compute_->submitted()), what);
}

Result<DeviceAddress> VulkanBackend::allocate(uint64_t bytes, const std::string& what) {
  SLUICE_TRY(alive());
  SLUICE_TRY_ASSIGN(buffer, device_->create_buffer(bytes, MemoryKind::device, what));
  buffers_.push_back(buffer);
  return DeviceAddress{.buffer = static_cast<uint32_t>(buffers_.size() - 1), .offset = 0};
}

Status VulkanBackend::register_host(std::span<std::byte> memory) {
  SLUICE_TRY(alive());
  if (copies_->import(memory)) return {};
  if (!std::exchange(said_unregistered_, true)) {
    log_info(log_, fmt::format("vulkan: {} does not import {} of host memory; copies pass through a buffer", device_->name(),
                               format_bytes(memory.size())));
  }
  return {};
}

void VulkanBackend::unregister_host(std::span<std::byte> memory) {
  uint64_t value = 0;
  if (!dead_) check_or_die(copies_->flush(value), "finishing copies");
  if (!dead_) check_or_die(copies_->queue().wait(value), "finishing copies");
  copies_->forget(memory);
}

Result<DeviceAddress> VulkanBackend::import_host(std::span<const std::byte>) {
  return fail(ErrorCode::internal, "the Vulkan backend does not compute in host memory");
}

const Buffer& VulkanBackend::buffer_at(DeviceAddress address, uint64_t bytes) const {
  SLUICE_CHECK(address.buffer < buffers_.size());
  const Buffer& buffer = buffers_[address.buffer];
  SLUICE_CHECK(address.offset <= buffer.bytes && bytes <= buffer.bytes - address.offset);
  return buffer;
}

Status VulkanBackend::copy_to_device(DeviceAddress dest, std::span<const std::byte> source) {
  SLUICE_TRY(alive());
  SLUICE_TRY_ASSIGN(code, copies_->copy(buffer_at(dest, source.size()), dest.offset, source));
  return check(code, "copying weights to the device");
}

// -------------------------------------------------------------------------------------------------------- events

// Both kinds of record submit what is there, so that a wait never stands in a queue before what it waits for: where the
// device has one queue, that would never end.

Result<EventId> VulkanBackend::create_event() {
  events_.emplace_back();
  return static_cast<EventId>(events_.size() - 1);
}

void VulkanBackend::record_copy(EventId event) {
  if (dead_) return;
  uint64_t value = 0;
  check_or_die(copies_->flush(value), "copying weights to the device");
  events_[event].of_copy = true;
  events_[event].value.store(value, std::memory_order_release);
}

void VulkanBackend::record_compute(EventId event) {
  if (dead_ || !flush()) return;
  events_[event].of_copy = false;
  events_[event].value.store(compute_->submitted(), std::memory_order_release);
}

// Submitted also where the copy is there already: segments must not depend on the time of day.
void VulkanBackend::compute_waits(EventId event) {
  if (dead_ || !flush()) return;
  if (!events_[event].of_copy) return;
  copies_to_see_ = std::max(copies_to_see_, events_[event].value.load(std::memory_order_acquire));
  awaits_ = true;
}

void VulkanBackend::copy_waits(EventId event) {
  if (dead_ || events_[event].of_copy) return;
  copies_->wait_for({.timeline = compute_->timeline(), .value = events_[event].value.load(std::memory_order_acquire)});
}

Status VulkanBackend::host_wait(EventId event) {
  SLUICE_TRY(alive());
  const uint64_t value = events_[event].value.load(std::memory_order_acquire);
  const bool of_copy = events_[event].of_copy;
  SLUICE_TRY(check((of_copy ? copies_->queue() : *compute_).wait(value), "waiting for a copy"));
  if (of_copy && value > copies_done_) copies_done_ = value;
  return {};
}

bool VulkanBackend::done(EventId event) {
  if (dead_) return true;  // the next call that returns a Status says why
  uint64_t reached = 0;
  check_or_die((events_[event].of_copy ? copies_->queue() : *compute_).reached(reached), "asking for an event");
  return dead_ || reached >= events_[event].value.load(std::memory_order_acquire);
}

bool VulkanBackend::flush() {
  Status status = commands_->flush();
  if (!status) die(std::move(status.error()));
  return status.has_value();
}

// A copy that the host has waited for is still waited for here: what makes its bytes visible to kernels is the
// semaphore.
Status VulkanBackend::enqueue(VkCommandBuffer commands) {
  Queue::Wait wait{.timeline = copies_->queue().timeline(), .value = std::max(copies_to_see_, copies_done_.load())};
  if (wait.value <= copies_seen_) wait = {};
  SLUICE_TRY(check(compute_->submit(commands, wait), "submitting a pass"));
  copies_seen_ = std::max(copies_seen_, wait.value);
  return {};
}

// -------------------------------------------------------------------------------------------------------- a pass

// One angle per row and pair. In double: at position 100000 a float's last bit is 0.008 rad.
void VulkanBackend::write_angles(std::span<const Row> rows) {
  auto* angles = reinterpret_cast<float*>(upload_.mapped + upload_angles_);
  for (const Row& row : rows) {
    for (const float frequency : inverse_frequencies_) {
      const double angle = double{frequency} * row.position;
      *angles++ = static_cast<float>(std::cos(angle) * double{shape_.rope_attention_factor});
      *angles++ = static_cast<float>(std::sin(angle) * double{shape_.rope_attention_factor});
    }
  }
}

// finish_pass() waited for the pass before, so the host's buffers and all command buffers are free.
Status VulkanBackend::begin_pass(std::span<const Row> rows, std::span<const float> embeddings) {
  SLUICE_CHECK(prepared_ && !rows.empty() && rows.size() <= shape_.max_rows);
  SLUICE_CHECK(embeddings.size() == rows.size() * shape_.hidden);
  SLUICE_TRY(alive());
  SLUICE_TRY(check(compute_->wait(compute_->submitted()), "waiting for the pass before"));
  std::memcpy(upload_.mapped, embeddings.data(), embeddings.size_bytes());
  auto* sessions = reinterpret_cast<uint32_t*>(upload_.mapped + upload_table_);
  uint32_t* positions = sessions + shape_.max_rows;
  uint32_t* selected = positions + shape_.max_rows;
  uint32_t wanted = 0, last = 0;
  for (uint32_t i = 0; i < rows.size(); ++i) {
    const Row& row = rows[i];
    SLUICE_CHECK(row.session < shape_.sessions && row.position < shape_.context);
    sessions[i] = row.session;
    positions[i] = row.position;
    last = std::max(last, row.position);
    if (row.wants_logits) selected[wanted++] = i;
  }
  SLUICE_CHECK(wanted <= shape_.max_logit_rows);
  write_angles(rows);
  active_rows_ = static_cast<uint32_t>(rows.size());

  // Powers of two, so that a growing past records seven kinds of pass and not one per chunk.
  uint32_t chunks = 0;
  if (active_rows_ <= kSplitRows) {
    for (chunks = 1; chunks < last / scratch_.chunk_positions + 1;) chunks *= 2;
    chunks = std::min(chunks, scratch_.chunks);
  }
  // Stamps in every pass would cost 7.5% of decoding (docs/kernels-vulkan.md).
  const bool timed = timed_ && clock_.queries() > 0;
  commands_->begin({.rows = active_rows_, .wanted_rows = wanted, .chunks = chunks, .timed = timed});
  clock_.begin(timed);
  awaits_ = false;
  return commands_->add({.kind = CommandKind::begin_pass, .rows = active_rows_, .query = clock_.add(false), .op = {}});
}

Status VulkanBackend::run(const Op& op) {
  if (active_rows_ == 0) return {};  // no row wants logits
  SLUICE_TRY(alive());
  if (op.kind == OpKind::select_rows) active_rows_ = commands_->kind().wanted_rows;
  if (active_rows_ == 0) return {};
  const bool awaited = std::exchange(awaits_, false);
  return commands_->add({.kind = CommandKind::operation, .rows = active_rows_, .query = clock_.add(awaited),
                         .awaited = awaited, .op = op});
}

Status VulkanBackend::submit() {
  SLUICE_TRY(alive());
  return commands_->flush();
}

// What a matrix product reads is X: padded, and out of order (shaders/arguments.h). `gate` is read as SwiGLU left it.
Status VulkanBackend::read_slot(Slot slot, std::span<float> out) {
  static constexpr std::array<uint8_t, 16> kColumnOf = {0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15};
  const bool is_x = slot == Slot::normed || slot == Slot::attended || slot == Slot::gate;
  const uint32_t columns = width(slot), stride = is_x ? x_stride(columns) : columns;
  SLUICE_CHECK(active_rows_ > 0 && out.size() == size_t{active_rows_} * columns);
  SLUICE_TRY(submit());
  const uint64_t from = slot == Slot::gate ? scratch_.gate_x : scratch_.slots[static_cast<size_t>(slot)];
  const auto most = static_cast<uint32_t>(kPieceBytes / (stride * sizeof(float)));
  for (uint32_t first = 0; first < active_rows_; first += most) {
    const uint32_t rows = std::min(most, active_rows_ - first);
    SLUICE_TRY(run_now("reading activations", [&](VkCommandBuffer commands) {
      const VkBufferCopy region{.srcOffset = from + uint64_t{first} * stride * sizeof(float), .dstOffset = 0,
                                .size = uint64_t{rows} * stride * sizeof(float)};
      device_->vk.vkCmdCopyBuffer(commands, scratch_memory_.handle, readback_.handle, 1, &region);
      host_barrier(device_->vk, commands);
    }));
    const auto* read = reinterpret_cast<const float*>(readback_.mapped);
    for (uint32_t r = 0; r < rows; ++r) {
      float* to = out.data() + size_t{first + r} * columns;
      for (uint32_t i = 0; i < stride; ++i) {
        const uint32_t column = is_x ? i / 16 * 16 + kColumnOf[i % 16] : i;
        if (column < columns) to[column] = read[size_t{r} * stride + i];
      }
    }
  }
  return {};
}

Status VulkanBackend::finish_pass(std::span<float> logits) {
  const uint32_t wanted = commands_->kind().wanted_rows;
  SLUICE_CHECK(logits.empty() || logits.size() == size_t{wanted} * shape_.vocab);
  SLUICE_TRY(alive());
  if (!logits.empty()) SLUICE_TRY(commands_->add({.kind = CommandKind::copy_logits, .rows = wanted, .op = {}}));
  SLUICE_TRY(commands_->flush());
  SLUICE_TRY(check(compute_->wait(compute_->submitted()), "computing a pass"));
  if (!logits.empty()) std::memcpy(logits.data(), readback_.mapped, logits.size_bytes());
  SLUICE_TRY(read_clock());
  active_rows_ = 0;
  return alive();
}

// All is there, as the queue was waited for; a driver that says otherwise gets a pass without times, not a wait.
Status VulkanBackend::read_clock() {
  const std::span<uint64_t> ticks = clock_.ticks();
  if (ticks.empty()) return {};
  const auto count = static_cast<uint32_t>(ticks.size());
  const VkResult code = device_->vk.vkGetQueryPoolResults(device_->handle(), queries_, 0, count, ticks.size_bytes(),
                                                          ticks.data(), sizeof(uint64_t), VK_QUERY_RESULT_64_BIT);
  if (code == VK_NOT_READY) return {};
  SLUICE_TRY(check(code, "reading the times of a pass"));
  clock_.read();
  return {};
}

// ------------------------------------------------------------------------------------------------------ KV cache

uint64_t VulkanBackend::kv_offset(uint32_t session) const {
  return uint64_t{session} * (shape_.context / kKvBlockTokens) * kv_block_bytes();  // the table is the identity
}

uint64_t VulkanBackend::kv_bytes(uint32_t tokens) const { return ceil_div(tokens, kKvBlockTokens) * kv_block_bytes(); }

Status VulkanBackend::copy_kv(uint32_t from_session, uint32_t to_session, uint32_t tokens) {
  SLUICE_CHECK(from_session < shape_.sessions && to_session < shape_.sessions && tokens <= shape_.context);
  SLUICE_TRY(alive());
  if (from_session == to_session || tokens == 0) return {};
  return run_now("copying a KV cache", [&](VkCommandBuffer commands) {
    const VkBufferCopy region{.srcOffset = kv_offset(from_session), .dstOffset = kv_offset(to_session), .size = kv_bytes(tokens)};
    device_->vk.vkCmdCopyBuffer(commands, kv_.handle, kv_.handle, 1, &region);
  });
}

Status VulkanBackend::save_kv(uint32_t session, uint32_t tokens, std::span<std::byte> out) {
  SLUICE_CHECK(session < shape_.sessions && tokens <= shape_.context && out.size() == kv_bytes(tokens));
  SLUICE_TRY(alive());
  for (uint64_t at = 0; at < out.size(); at += kPieceBytes) {
    const uint64_t bytes = std::min(kPieceBytes, out.size() - at);
    SLUICE_TRY(run_now("reading a KV cache", [&](VkCommandBuffer commands) {
      const VkBufferCopy region{.srcOffset = kv_offset(session) + at, .dstOffset = 0, .size = bytes};
      device_->vk.vkCmdCopyBuffer(commands, kv_.handle, readback_.handle, 1, &region);
      host_barrier(device_->vk, commands);
    }));
    std::memcpy(out.data() + at, readback_.mapped, bytes);
  }

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

Status VulkanBackend::load_kv(uint32_t session, uint32_t tokens, std::span<const std::byte> in) {
  SLUICE_CHECK(session < shape_.sessions && tokens <= shape_.context && in.size() == kv_bytes(tokens));
  SLUICE_TRY(alive());
  for (uint64_t at = 0; at < in.size(); at += kPieceBytes) {
    const uint64_t bytes = std::min(kPieceBytes, in.size() - at);
    std::memcpy(readback_.mapped, in.data() + at, bytes);
    SLUICE_TRY(run_now("writing a KV cache", [&](VkCommandBuffer commands) {
      const VkBufferCopy region{.srcOffset = 0, .dstOffset = kv_offset(session) + at, .size = bytes};
      device_->vk.vkCmdCopyBuffer(commands, readback_.handle, kv_.handle, 1, &region);
    }));
  }
  return {};
}

}  // namespace sluice::backend::vulkan

namespace sluice::backend {

bool has_vulkan_backend() { return true; }

Result<std::unique_ptr<Backend>> make_vulkan_backend(const VulkanOptions& options) {
  if (!options.software && !vulkan::has_gpu_file("/dev")) {
    return fail(ErrorCode::not_found, "no GPU for Vulkan shows in /dev (dri/renderD128, nvidiactl)");
  }
  SLUICE_TRY_ASSIGN(backend, vulkan::VulkanBackend::create({.software = options.software}, options.log));
  return std::unique_ptr<Backend>(std::move(backend));
}

}  // namespace sluice::backend
