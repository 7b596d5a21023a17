// SPDX-License-Identifier: Apache-2.0
#include "exec/prefetcher.hpp"

#include <algorithm>
#include <chrono>

#include "base/check.hpp"
#include "trace/nvtx.hpp"

namespace sluice::exec {

using storage::kBlockBytes;

std::vector<BlockRead> reads_of(const storage::Tensor& tensor) {
  std::vector<BlockRead> reads;
  for (const storage::Plane& plane : tensor.planes) {
    for (uint64_t index = 0; index < plane.block_sums.size(); ++index) {
      const uint64_t offset = plane.offset + index * kBlockBytes;
      const auto padded = static_cast<uint32_t>(align_up(storage::block_bytes(plane, index), storage::kPlaneAlignment));
      // The tail of a values plane and the scales behind it come in one read.
      if (reads.empty() || reads.back().bytes + padded > kBlockBytes) {
        reads.push_back({.offset = offset, .bytes = 0, .tensor_offset = offset - tensor.offset(), .blocks = {}});
      }
      BlockRead& read = reads.back();
      SLUICE_CHECK(read.offset + read.bytes == offset);  // planes of a tensor are contiguous: checked at open
      read.blocks.push_back({.plane = &plane, .index = index, .at = read.bytes});
      read.bytes += padded;
    }
  }
  return reads;
}

Status check_read(const storage::Container& container, const storage::Tensor& tensor, const BlockRead& read,
                  std::span<const std::byte> data) {
  for (const BlockRead::Block& block : read.blocks) {
    SLUICE_TRY(storage::check_block(container.path(), tensor, *block.plane, block.index,
                                    data.subspan(block.at, storage::block_bytes(*block.plane, block.index))));
  }
  return {};
}

Result<std::unique_ptr<Prefetcher>> Prefetcher::start(const storage::Container& container, const plan::Plan& plan,
                                                      backend::Backend& backend,
                                                      std::unique_ptr<storage::ReadQueue> queue, Options options) {
  std::unique_ptr<Prefetcher> self(
      new Prefetcher(container, plan, backend, std::move(queue), std::move(options)));
  for (size_t i = 0; i < plan.stream.size(); ++i) {
    SLUICE_TRY_ASSIGN(landed, backend.create_event());
    SLUICE_TRY_ASSIGN(freed, backend.create_event());
    self->landed_events_.push_back(landed);
    self->freed_events_.push_back(freed);
  }
  for (Slot& slot : self->slots_) {
    SLUICE_TRY_ASSIGN(event, backend.create_event());
    slot.event = event;
  }
  if (!plan.stream.empty()) self->thread_ = std::thread([raw = self.get()] { raw->run(); });
  return self;
}

Prefetcher::Prefetcher(const storage::Container& container, const plan::Plan& plan, backend::Backend& backend,
                       std::unique_ptr<storage::ReadQueue> queue, Options options)
    : container_(container), plan_(plan), backend_(backend), queue_(std::move(queue)), options_(std::move(options)) {
  SLUICE_CHECK(options_.host_weights.size() == plan.stream.size());
  if (options_.recorder != nullptr && !plan.stream.empty()) {
    track_ = &options_.recorder->add_track("prefetcher", trace::Recorder::kBusyCapacity);
    drive_track_ = &options_.recorder->add_track("drive");
    ns_per_tick_ = options_.recorder->ns_per_tick();
  }
  for (uint32_t item = 0; item < plan.stream.size(); ++item) {
    item_ends_.push_back((item == 0 ? 0 : item_ends_.back()) + plan.stream[item].bytes);
    if (plan.stream[item].tier != plan::Tier::disk) continue;
    std::vector<BlockRead> reads = reads_of(container.manifest().tensors[plan.stream[item].tensor]);
    for (size_t k = 0; k < reads.size(); ++k) {
      reads_.push_back({.item = item, .last_of_item = k + 1 == reads.size(), .read = std::move(reads[k])});
    }
  }
  slots_.resize(reads_.empty() ? 0 : options_.staging.size() / kBlockBytes);
  SLUICE_CHECK(reads_.empty() || (queue_ != nullptr && !slots_.empty()));
  if (queue_ == nullptr) return;
  bytes_before_ = queue_->bytes_read();
  retries_before_ = queue_->retries();
}

Prefetcher::~Prefetcher() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
  if (queue_ != nullptr) queue_->drain();
}

void Prefetcher::run() {
  while (!stopping_.load(std::memory_order_relaxed)) {
    bool idle = false;
    const uint64_t released = released_.load(std::memory_order_acquire);
    if (Status status = step(idle); !status) {
      const std::lock_guard lock(mutex_);
      error_ = std::move(status.error());
      failed_.store(true, std::memory_order_release);
      changed_.notify_all();
      return;
    }
    if (!idle) continue;
    const trace::NvtxRange range(trace::Kind::ring_wait);
    const uint64_t begin = trace::ticks();
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return stopping_.load() || released_.load() != released; });
    }
    record(trace::Kind::ring_wait, begin);
  }
}

// One action, most urgent first: a copy that can go, then waiting for a read, then for the copy out of the slot that the
// next read takes; idle if only a release can help. All reads that are done are taken first: drives finish many at once,
// and while one is checked and copied the others' places in the drive's queue would stand empty.
Status Prefetcher::step(bool& idle) {
  SLUICE_TRY(start_reads());
  while (queue_ != nullptr && queue_->in_flight() > 0 && queue_->ready()) {
    SLUICE_TRY(take_read());
    SLUICE_TRY(start_reads());
  }
  const plan::StreamItem& item = plan_.stream[items_copied_ % plan_.stream.size()];
  if (ring_is_free()) {
    if (item.tier == plan::Tier::host) return copy_host_item();
    if (slots_[reads_copied_ % slots_.size()].landed) return copy_landed_read();
  }
  if (queue_ != nullptr && queue_->in_flight() > 0) return take_read();
  if (reads_started_ - reads_copied_ < slots_.size()) {
    const Slot& next = slots_[reads_started_ % slots_.size()];
    if (next.copied) return wait_for_slot(next);
  }
  idle = true;
  return {};
}

// What the copy waits for was submitted before it.
Status Prefetcher::wait_for_slot(const Slot& slot) {
  const trace::NvtxRange range(trace::Kind::slot_wait);
  const uint64_t begin = trace::ticks();
  SLUICE_TRY(backend_.host_wait(slot.event));
  record(trace::Kind::slot_wait, begin);
  return {};
}

Status Prefetcher::take_read() {
  const trace::NvtxRange range(trace::Kind::stage_wait);
  const uint64_t begin = trace::ticks();
  SLUICE_TRY_ASSIGN(done, queue_->wait());
  inject(trace::Fault::read);
  record(trace::Kind::stage_wait, begin);
  record_read(done);
  slots_[done.tag % slots_.size()].landed = true;
  const auto now = std::chrono::steady_clock::now();
  busy_ns_.fetch_add(static_cast<uint64_t>(std::chrono::nanoseconds(now - busy_since_).count()),
                     std::memory_order_relaxed);
  busy_since_ = now;
  bytes_read_.store(queue_->bytes_read() - bytes_before_, std::memory_order_relaxed);
  retries_.store(queue_->retries() - retries_before_, std::memory_order_relaxed);
  return {};
}

// Each is handed to the kernel by itself: in batches a drive was slower (docs/benchmarks.md).
Status Prefetcher::start_reads() {
  if (reads_.empty()) return {};  // host tier only
  if (queue_->in_flight() == 0) busy_since_ = std::chrono::steady_clock::now();
  while (reads_started_ - reads_copied_ < slots_.size()) {
    Slot& slot = slots_[reads_started_ % slots_.size()];
    if (slot.copied && !backend_.done(slot.event)) break;  // the copy engine still reads the slot
    const BlockRead& read = reads_[reads_started_ % reads_.size()].read;
    if (!queue_->start(read.offset, slot_bytes(reads_started_).first(read.bytes), reads_started_)) break;
    slot.landed = false;
    slot.copied = false;
    ++reads_started_;
    SLUICE_TRY(queue_->flush());
  }
  return {};
}

bool Prefetcher::ring_is_free() const {
  const uint64_t distance = plan_.stream[items_copied_ % plan_.stream.size()].distance;
  return items_copied_ < distance || released_.load(std::memory_order_acquire) > items_copied_ - distance;
}

Status Prefetcher::copy_host_item() {
  const auto index = static_cast<uint32_t>(items_copied_ % plan_.stream.size());
  const plan::StreamItem& item = plan_.stream[index];
  if (items_copied_ >= item.distance) {
    backend_.copy_waits(freed_events_[(items_copied_ - item.distance) % plan_.stream.size()]);
  }
  inject(trace::Fault::copy);
  const trace::NvtxRange range(trace::Kind::bus_copy);
  const uint64_t begin = trace::ticks();
  SLUICE_TRY(backend_.copy_to_device(options_.ring + item.ring_offset, options_.host_weights[index]));
  record(trace::Kind::bus_copy, begin, static_cast<uint32_t>(options_.host_weights[index].size()), index);
  publish_item();
  return {};
}

Status Prefetcher::copy_landed_read() {
  const PassRead& next = reads_[reads_copied_ % reads_.size()];
  const plan::StreamItem& item = plan_.stream[next.item];
  SLUICE_CHECK(next.item == items_copied_ % plan_.stream.size());
  const std::span<std::byte> data = slot_bytes(reads_copied_).first(next.read.bytes);
  uint64_t begin = trace::ticks();
  {
    const trace::NvtxRange range(trace::Kind::check);
    SLUICE_TRY(check_read(container_, container_.manifest().tensors[item.tensor], next.read, data));
  }
  record(trace::Kind::check, begin, next.read.bytes);
  const trace::NvtxRange range(trace::Kind::bus_copy);
  begin = trace::ticks();
  if (!ring_waited_ && items_copied_ >= item.distance) {
    backend_.copy_waits(freed_events_[(items_copied_ - item.distance) % plan_.stream.size()]);
  }
  ring_waited_ = true;
  SLUICE_TRY(backend_.copy_to_device(options_.ring + (item.ring_offset + next.read.tensor_offset), data));
  record(trace::Kind::bus_copy, begin, next.read.bytes, next.item);
  Slot& slot = slots_[reads_copied_ % slots_.size()];
  backend_.record_copy(slot.event);
  slot.copied = true;
  slot.landed = false;
  ++reads_copied_;
  if (next.last_of_item) publish_item();
  return {};
}

void Prefetcher::publish_item() {
  backend_.record_copy(landed_events_[items_copied_ % plan_.stream.size()]);
  ring_waited_ = false;
  ++items_copied_;
  if (track_ != nullptr) {
    const uint64_t released = released_.load(std::memory_order_relaxed);
    track_->count(trace::Counter::ring_bytes, trace::ticks(), bytes_of_items(items_copied_) - bytes_of_items(released));
  }
  {
    const std::lock_guard lock(mutex_);
    published_.store(items_copied_, std::memory_order_release);
  }
  changed_.notify_all();
}

uint64_t Prefetcher::bytes_of_items(uint64_t count) const {
  const uint64_t pass = plan_.stream.size();
  return count / pass * item_ends_.back() + (count % pass == 0 ? 0 : item_ends_[count % pass - 1]);
}

std::span<std::byte> Prefetcher::slot_bytes(uint64_t read_number) const {
  return options_.staging.subspan((read_number % slots_.size()) * kBlockBytes, kBlockBytes);
}

void Prefetcher::record(trace::Kind kind, uint64_t begin, uint32_t bytes, uint64_t value) {
  if (track_ != nullptr) track_->record(kind, begin, trace::ticks(), trace::Record::kNoLayer, bytes, value);
}

void Prefetcher::record_read(const storage::ReadDone& done) {
  if (drive_track_ == nullptr) return;
  const BlockRead& read = reads_[done.tag % reads_.size()].read;
  const uint64_t begin = trace::ticks_at(done.submitted_ns, ns_per_tick_);
  drive_track_->record(trace::Kind::disk_read, begin, std::max(begin, trace::ticks_at(done.completed_ns, ns_per_tick_)),
                       trace::Record::kNoLayer, read.bytes, read.offset);
}

void Prefetcher::inject(trace::Fault fault) {
  if (options_.recorder != nullptr && options_.recorder->injector() != nullptr)
    options_.recorder->injector()->take(fault);
}

Status Prefetcher::acquire(uint32_t item, AcquireTimes& times) {
  SLUICE_CHECK(item == acquired_ % plan_.stream.size());
  if (published_.load(std::memory_order_acquire) <= acquired_) {
    const auto begin = std::chrono::steady_clock::now();
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return failed_.load() || published_.load() > acquired_; });
    }
    const auto waited = static_cast<uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - begin).count());
    (plan_.stream[item].tier == plan::Tier::disk ? times.disk_wait_ns : times.copy_wait_ns) += waited;
  }
  if (published_.load(std::memory_order_acquire) <= acquired_) {
    const std::lock_guard lock(mutex_);
    return fail(error_);
  }
  backend_.compute_waits(landed_events_[item]);
  ++acquired_;
  return {};
}

void Prefetcher::release(uint32_t item) {
  backend_.record_compute(freed_events_[item]);
  {
    const std::lock_guard lock(mutex_);
    released_.fetch_add(1, std::memory_order_acq_rel);
  }
  changed_.notify_all();
}

}  // namespace sluice::exec
