// SPDX-License-Identifier: Apache-2.0
// Writes a float32 matrix as a NumPy .npy file, version 1.0 (numpy/lib/format.py describes it).
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "sluice/result.hpp"

namespace sluice::cli {

// Rows go to a temporary file beside `path`, which takes its name in finish(); without it nothing is left behind.
class NpyWriter {
 public:
  // Error: io.
  static Result<NpyWriter> create(const std::string& path, uint64_t rows, uint64_t cols);
  NpyWriter(NpyWriter&& other) noexcept;
  NpyWriter& operator=(NpyWriter&&) = delete;
  ~NpyWriter();

  // `values`: one row. In any order. Error: io.
  Status write_row(uint64_t row, std::span<const float> values);
  Status finish();

 private:
  NpyWriter(std::string path, std::string temporary, int fd)
      : path_(std::move(path)), temporary_(std::move(temporary)), fd_(fd) {}

  std::string path_, temporary_;
  int fd_ = -1;
  uint64_t header_bytes_ = 0;
};

}  // namespace sluice::cli
