// SPDX-License-Identifier: Apache-2.0
// Token embeddings: rows fetched from the container and decoded to FP32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "sluice/result.hpp"
#include "storage/container.hpp"
#include "storage/row_reader.hpp"

namespace sluice::exec {

class Embedding {
 public:
  // Room for `max_rows` rows a call. Errors: those of RowReader::open.
  static Result<Embedding> open(const storage::Container& container, uint32_t max_rows,
                                const storage::ReadQueueOptions& options);

  // out: FP32 [ids.size()][hidden]; at most max_rows ids. Repeated ids are fetched again. No allocation.
  // Errors: usage (an id outside the vocabulary), io, corrupt; `out` is then undefined.
  Status fetch(std::span<const int32_t> ids, std::span<float> out);

  uint64_t bytes_read() const { return reader_.bytes_read(); }
  uint64_t range_bytes(int32_t id) const { return reader_.range_bytes(id); }   // read from the file for one row
  uint64_t retries() const { return reader_.retries(); }

 private:
  Embedding(storage::RowReader reader, const storage::Tensor& tensor, uint32_t max_rows);

  storage::RowReader reader_;
  storage::Scheme scheme_;
  uint32_t hidden_ = 0;
  uint32_t group_elems_ = 0;
  float scale_ = 1;
  std::vector<std::byte> values_, scales_;
};

}  // namespace sluice::exec
