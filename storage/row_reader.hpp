// SPDX-License-Identifier: Apache-2.0
// Embedding rows straight from the container, a few KiB per token: a table that is gathered from is never loaded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/handles.hpp"
#include "sluice/result.hpp"
#include "storage/container.hpp"
#include "storage/manifest.hpp"
#include "storage/read_queue.hpp"

namespace sluice::storage {

// Fetches rows of one tensor in `rows` layout and checks each against the tensor's `row_sums`. Everything is allocated
// at open. One thread at a time.
//
// What it reads is exact: for each id asked for (repeated ids again), the 4096-aligned ranges that cover the row's values
// and, where there are scales, the row's scales. range_bytes(id) is their sum.
class RowReader {
 public:
  // The token embedding of `container`. Errors: not_found, io, corrupt (the row sums), unsupported (an embedding with
  // zeros or bias planes, or rows that do not start on a byte).
  static Result<RowReader> open(const Container& container, bool direct);
  static Result<RowReader> open(const Container& container, const ReadQueueOptions& options);
  // The same for any such tensor of `path`. `options.depth` is the number of ranges in flight.
  static Result<RowReader> open(const std::string& path, const Tensor& tensor, const ReadQueueOptions& options);

  // Reads row ids[i] to values_out[i * value_row_bytes()] and scales_out[i * scale_row_bytes()]. The sizes must be exact
  // (a CHECK); `scales_out` is empty for a tensor without scales. No allocation.
  // Errors: usage (an id outside the table), io, corrupt (token id and file offset); the outputs are then undefined.
  Status read(std::span<const int32_t> ids, std::span<std::byte> values_out, std::span<std::byte> scales_out);

  uint64_t value_row_bytes() const { return value_row_bytes_; }
  uint64_t scale_row_bytes() const { return scale_row_bytes_; }
  // Bytes read from the file for row `id`, and for all rows since open (the row sums, read at open, are not in it).
  uint64_t range_bytes(int32_t id) const;
  uint64_t bytes_read() const { return queue_->bytes_read() - bytes_at_open_; }
  bool direct() const { return queue_->direct(); }
  uint64_t retries() const { return queue_->retries(); }

 private:
  // The aligned bytes around a row of one plane.
  struct Range {
    uint64_t offset = 0;     // in the file, aligned
    uint64_t bytes = 0;      // aligned
    uint64_t row_at = 0;     // where the row begins in it
  };
  // A row on its way.
  struct Row {
    size_t index = 0;        // in `ids`
    Range values;
    Range scales;
    uint32_t pending = 0;    // ranges not yet here
  };

  RowReader() = default;
  static Range range_of(uint64_t plane_offset, uint64_t row_bytes, int32_t id);
  Status load_row_sums(const std::string& path, const Tensor& tensor);
  Status read_rows(std::span<const int32_t> ids, std::span<std::byte> values_out, std::span<std::byte> scales_out);
  void start_row(uint32_t slot, size_t index, int32_t id);
  Status finish_row(const Row& row, std::span<const std::byte> buffer, int32_t id, std::span<std::byte> values_out,
                    std::span<std::byte> scales_out) const;
  std::span<std::byte> slot_buffer(uint32_t slot) const {
    return buffer_.bytes().subspan(slot * slot_bytes_, slot_bytes_);
  }

  std::string path_;
  std::string tensor_name_;
  uint32_t rows_ = 0;
  uint64_t values_offset_ = 0;
  uint64_t scales_offset_ = 0;
  uint64_t value_row_bytes_ = 0;
  uint64_t scale_row_bytes_ = 0;         // 0: no scales
  uint64_t value_slot_bytes_ = 0;        // room for any row's values range; its scales range comes behind
  uint64_t slot_bytes_ = 0;
  std::vector<uint64_t> row_sums_;
  Mapping buffer_;                       // one slot per row in flight
  std::vector<Row> in_flight_;           // by slot
  std::vector<uint32_t> free_slots_;
  uint64_t bytes_at_open_ = 0;
  std::unique_ptr<ReadQueue> queue_;     // last: drained before the buffers go
};

}  // namespace sluice::storage
