// SPDX-License-Identifier: Apache-2.0
// xxh3-64, the one checksum of the container (https://github.com/Cyan4973/xxHash, seed 0).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace sluice::storage {

// Of one run of bytes.
uint64_t checksum(std::span<const std::byte> data);

// Of bytes that come in parts. One thread.
class StreamingChecksum {
 public:
  StreamingChecksum();
  StreamingChecksum(StreamingChecksum&&) noexcept;
  StreamingChecksum& operator=(StreamingChecksum&&) noexcept;
  ~StreamingChecksum();

  void update(std::span<const std::byte> data);
  // The sum of everything since construction or the last `finish`; begins anew.
  uint64_t finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// A `row_sums` entry: the row's value bytes, then its scale bytes (none for f32, f16 and bf16).
uint64_t row_checksum(std::span<const std::byte> values, std::span<const std::byte> scales);

}  // namespace sluice::storage
