// SPDX-License-Identifier: Apache-2.0
// Rows travel through a ReadQueue: one decoded token is one submission of two small reads, and the hundreds of rows of a
// prefill keep the drive's queue full (4 KiB at depth 1 takes about 0.1 ms a read).
#include "storage/row_reader.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "base/check.hpp"
#include "base/units.hpp"
#include "storage/checksum.hpp"

namespace sluice::storage {
namespace {

constexpr uint64_t kAlignment = 4096;
constexpr uint64_t kMaxRangeBytes = kMiB;   // of a ReadQueue's read

// The most that an aligned range around `row_bytes` at any row's begin can take.
uint64_t max_range_bytes(uint64_t row_bytes) {
  // A power of two up to the alignment, or any multiple of it, divides pages evenly: rows never straddle one more.
  if (row_bytes == 0) return 0;
  if (kAlignment % row_bytes == 0 || row_bytes % kAlignment == 0) return align_up(row_bytes, kAlignment);
  return align_up(row_bytes + kAlignment - 1, kAlignment);
}

}  // namespace

Result<RowReader> RowReader::open(const Container& container, bool direct) {
  ReadQueueOptions options;
  options.direct = direct;
  return open(container, options);
}

Result<RowReader> RowReader::open(const Container& container, const ReadQueueOptions& options) {
  const Tensor* tensor = container.find(Role::token_embedding);
  if (tensor == nullptr) {
    return fail(ErrorCode::not_found, fmt::format("{}: has no token embedding; import the model again", container.path()));
  }
  return open(container.path(), *tensor, options);
}

Result<RowReader> RowReader::open(const std::string& path, const Tensor& tensor, const ReadQueueOptions& options) {
  const Plane* values = tensor.plane(PlaneKind::values);
  const Plane* scales = tensor.plane(PlaneKind::scales);
  if (tensor.layout != Layout::rows || tensor.rows == 0 || values == nullptr ||
      tensor.plane(PlaneKind::zeros) != nullptr || tensor.plane(PlaneKind::bias) != nullptr ||
      values->bytes % tensor.rows != 0 || (scales != nullptr && scales->bytes % tensor.rows != 0)) {
    return fail(ErrorCode::unsupported, fmt::format("{}: rows of {} cannot be fetched one by one (layout {}, scheme {}); "
                                                    "import the model again with an int8 or f16 embedding", path, tensor.name,
                                                    name_of(tensor.layout), name_of(tensor.scheme)));
  }

  RowReader reader;
  reader.path_ = path;
  reader.tensor_name_ = tensor.name;
  reader.rows_ = tensor.rows;
  reader.values_offset_ = values->offset;
  reader.value_row_bytes_ = values->bytes / tensor.rows;
  if (scales != nullptr) {
    reader.scales_offset_ = scales->offset;
    reader.scale_row_bytes_ = scales->bytes / tensor.rows;
  }
  reader.value_slot_bytes_ = max_range_bytes(reader.value_row_bytes_);
  reader.slot_bytes_ = reader.value_slot_bytes_ + max_range_bytes(reader.scale_row_bytes_);
  if (reader.value_slot_bytes_ > kMaxRangeBytes) {
    return fail(ErrorCode::unsupported, fmt::format("{}: a row of {} takes {}, more than the 1 MiB of one read", path,
                                                    tensor.name, format_bytes(reader.value_row_bytes_)));
  }

  const uint32_t ranges_per_row = reader.scale_row_bytes_ > 0 ? 2 : 1;
  const uint32_t row_slots = std::max<uint32_t>(1, options.depth / ranges_per_row);
  ReadQueueOptions queue_options = options;
  queue_options.depth = row_slots * ranges_per_row;
  SLUICE_TRY_ASSIGN(queue, ReadQueue::open(path, queue_options));
  reader.queue_ = std::move(queue);
  const uint64_t buffer_bytes = std::max(row_slots * reader.slot_bytes_, kBlockBytes);   // the row sums come through it too
  SLUICE_TRY_ASSIGN(buffer, Mapping::anonymous(buffer_bytes, "embedding rows"));
  reader.buffer_ = std::move(buffer);
  reader.in_flight_.resize(row_slots);
  for (uint32_t slot = row_slots; slot-- > 0;) reader.free_slots_.push_back(slot);

  SLUICE_TRY(reader.load_row_sums(path, tensor));
  reader.bytes_at_open_ = reader.queue_->bytes_read();
  return reader;
}

Status RowReader::load_row_sums(const std::string& path, const Tensor& tensor) {
  const Plane* plane = tensor.plane(PlaneKind::row_sums);
  if (plane == nullptr || plane->bytes != uint64_t{tensor.rows} * sizeof(uint64_t)) {
    return fail(ErrorCode::corrupt, fmt::format("{}: {} lacks the checksums of its rows (plane row_sums of {} bytes); "
                                                "import the model again", path, tensor.name,
                                                uint64_t{tensor.rows} * sizeof(uint64_t)));
  }
  row_sums_.resize(tensor.rows);
  auto* out = reinterpret_cast<std::byte*>(row_sums_.data());
  for (uint64_t block = 0; block * kBlockBytes < plane->bytes; ++block) {
    const uint64_t begin = block * kBlockBytes;
    const uint64_t bytes = std::min(kBlockBytes, plane->bytes - begin);
    queue_->start(plane->offset + begin, {buffer_.data(), align_up(bytes, kAlignment)}, block);
    auto done = queue_->wait();
    if (!done) return fail(std::move(done.error()));
    SLUICE_TRY(check_block(path, tensor, *plane, block, {buffer_.data(), bytes}));
    std::memcpy(out + begin, buffer_.data(), bytes);
  }
  return {};
}

Status RowReader::read(std::span<const int32_t> ids, std::span<std::byte> values_out, std::span<std::byte> scales_out) {
  SLUICE_CHECK(values_out.size() == ids.size() * value_row_bytes_ && scales_out.size() == ids.size() * scale_row_bytes_);
  for (const int32_t id : ids) {
    if (id < 0 || static_cast<uint32_t>(id) >= rows_) {
      return fail(ErrorCode::usage, fmt::format("{}: token id {} is outside the vocabulary of {}", path_, id, rows_));
    }
  }
  auto status = read_rows(ids, values_out, scales_out);
  if (!status) {   // other rows may still be on their way into the buffers
    queue_->drain();
    free_slots_.clear();
    for (uint32_t slot = static_cast<uint32_t>(in_flight_.size()); slot-- > 0;) free_slots_.push_back(slot);
  }
  return status;
}

Status RowReader::read_rows(std::span<const int32_t> ids, std::span<std::byte> values_out,
                            std::span<std::byte> scales_out) {
  size_t next = 0;
  while (next < ids.size() || queue_->in_flight() > 0) {
    for (; next < ids.size() && !free_slots_.empty(); ++next) {
      const uint32_t slot = free_slots_.back();
      free_slots_.pop_back();
      start_row(slot, next, ids[next]);
    }
    auto done = queue_->wait();
    if (!done) return fail(std::move(done.error()));
    const auto slot = static_cast<uint32_t>(done->tag);
    Row& row = in_flight_[slot];
    if (--row.pending > 0) continue;
    SLUICE_TRY(finish_row(row, slot_buffer(slot), ids[row.index], values_out, scales_out));
    free_slots_.push_back(slot);
  }
  return {};
}

RowReader::Range RowReader::range_of(uint64_t plane_offset, uint64_t row_bytes, int32_t id) {
  const uint64_t row_begin = plane_offset + static_cast<uint64_t>(id) * row_bytes;
  const uint64_t begin = align_down(row_begin, kAlignment);
  return {.offset = begin, .bytes = align_up(row_begin + row_bytes, kAlignment) - begin, .row_at = row_begin - begin};
}

uint64_t RowReader::range_bytes(int32_t id) const {
  uint64_t bytes = range_of(values_offset_, value_row_bytes_, id).bytes;
  if (scale_row_bytes_ > 0) bytes += range_of(scales_offset_, scale_row_bytes_, id).bytes;
  return bytes;
}

void RowReader::start_row(uint32_t slot, size_t index, int32_t id) {
  Row& row = in_flight_[slot];
  row = Row{.index = index, .values = range_of(values_offset_, value_row_bytes_, id), .scales = {}, .pending = 1};
  bool started = queue_->start(row.values.offset, slot_buffer(slot).first(row.values.bytes), slot);
  if (scale_row_bytes_ > 0) {
    row.scales = range_of(scales_offset_, scale_row_bytes_, id);
    row.pending = 2;
    started &= queue_->start(row.scales.offset, slot_buffer(slot).subspan(value_slot_bytes_, row.scales.bytes), slot);
  }
  SLUICE_CHECK(started);   // the queue is as deep as all slots together
}

Status RowReader::finish_row(const Row& row, std::span<const std::byte> buffer, int32_t id,
                             std::span<std::byte> values_out, std::span<std::byte> scales_out) const {
  const std::span values = buffer.subspan(row.values.row_at, value_row_bytes_);
  const std::span scales = buffer.subspan(scale_row_bytes_ > 0 ? value_slot_bytes_ + row.scales.row_at : 0, scale_row_bytes_);
  if (row_checksum(values, scales) != row_sums_[static_cast<uint32_t>(id)]) {
    const uint64_t row_number = static_cast<uint64_t>(id);
    std::string where = fmt::format("values at offset {}", values_offset_ + row_number * value_row_bytes_);
    if (scale_row_bytes_ > 0) where += fmt::format(", scales at offset {}", scales_offset_ + row_number * scale_row_bytes_);
    return fail(ErrorCode::corrupt,
                fmt::format("{}: the embedding row of token {} ({}, {}) does not match its checksum; run `sluice verify` on "
                            "the file and restore it", path_, id, tensor_name_, where));
  }
  std::memcpy(values_out.data() + row.index * value_row_bytes_, values.data(), value_row_bytes_);
  if (scale_row_bytes_ > 0) {
    std::memcpy(scales_out.data() + row.index * scale_row_bytes_, scales.data(), scale_row_bytes_);
  }
  return {};
}

}  // namespace sluice::storage
