// SPDX-License-Identifier: Apache-2.0
// Token embeddings: rows fetched from the container and decoded to FP32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/handles.hpp"
#include "sluice/result.hpp"
#include "storage/container.hpp"
#include "storage/row_reader.hpp"

namespace sluice::exec {

// Memory that recently used rows may take. A row costs the drive's latency (0.1 ms), of a token that a GPU decodes in
// 2 ms.
inline constexpr uint64_t kRowCacheBytes = 32ull << 20;

// Rows that were read and checked, as the file holds them, at the place that the id's remainder says. Tokenizers number
// tokens by how common they were, so the common ones rarely share a place. Memory is touched as rows come.
class RowCache {
 public:
  // Room for as many of `rows` rows as kRowCacheBytes holds. Error: out_of_memory.
  static Result<RowCache> create(uint32_t rows, uint64_t row_bytes);

  // The row's bytes, valid until the next insert; empty if it is not there.
  std::span<const std::byte> find(int32_t id) const;
  // The place to put the row's bytes; whatever row was there is forgotten.
  std::span<std::byte> insert(int32_t id);

 private:
  RowCache() = default;
  size_t slot(int32_t id) const { return static_cast<uint32_t>(id) % ids_.size(); }
  std::span<std::byte> at(size_t slot) const { return memory_.bytes().subspan(slot * row_bytes_, row_bytes_); }

  uint64_t row_bytes_ = 0;
  std::vector<int64_t> ids_;          // by slot; -1: empty
  Mapping memory_;
};

class Embedding {
 public:
  // Room for `max_rows` rows a call. Errors: those of RowReader::open, out_of_memory.
  static Result<Embedding> open(const storage::Container& container, uint32_t max_rows,
                                const storage::ReadQueueOptions& options);

  // out: FP32 [ids.size()][hidden]; at most max_rows ids. Rows that the cache does not hold are read, an id that comes
  // twice in one call twice. No allocation.
  // Errors: usage (an id outside the vocabulary), io, corrupt; `out` is then undefined.
  Status fetch(std::span<const int32_t> ids, std::span<float> out);

  uint64_t bytes_read() const { return reader_.bytes_read(); }
  uint64_t range_bytes(int32_t id) const { return reader_.range_bytes(id); }   // read from the file for one row
  uint64_t retries() const { return reader_.retries(); }

 private:
  Embedding(storage::RowReader reader, RowCache cache, const storage::Tensor& tensor, uint32_t max_rows);
  void convert_row(std::span<const std::byte> values, std::span<const std::byte> scales, std::span<float> out) const;

  storage::RowReader reader_;
  RowCache cache_;
  storage::Scheme scheme_;
  uint32_t hidden_ = 0;
  uint32_t group_elems_ = 0;
  float scale_ = 1;
  std::vector<std::byte> values_, scales_;   // of the rows that are read
  std::vector<int32_t> missing_;             // their ids
  std::vector<uint32_t> missing_at_;         // ... and their rows in `out`
};

}  // namespace sluice::exec
