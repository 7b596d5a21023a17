// SPDX-License-Identifier: Apache-2.0
// One tensor of a checkpoint into the container: what it becomes, and the slab-wise way there.
#pragma once

#include <cstdint>
#include <vector>

#include "import/checkpoint.hpp"
#include "import/import.hpp"
#include "quant/rounding.hpp"
#include "sluice/result.hpp"
#include "storage/container_writer.hpp"
#include "storage/manifest.hpp"

namespace sluice::import {

// How a tensor's values get into the container.
enum class Conversion : uint8_t {
  copy,       // the same numbers: bit patterns or codes move into another layout
  round,      // to float, then rounded to nearest
  narrowest,  // F32 kept: f16 or bf16 if every value is one, f32 else; decided when the tensor is measured
};

struct Target {
  storage::Scheme scheme = storage::Scheme::f32;
  uint32_t group_elems = 0;
  Conversion conversion = Conversion::round;
  bool requantized = false;   // quantized values are rounded again: a loss worth a warning
  bool residual = false;      // int4 by rounding: a second nibble for what it leaves
};

// What a tensor becomes under these options (docs/import.md has the table). `tied`: lm_head follows the embedding.
Target choose_target(const SourceTensor& source, const Options& options, bool tied);

// Rows [first, first + rows) of a matrix, row-major, or the values of a vector, decoded and with permutations undone.
// Error: io, corrupt (the file shrank); numeric (a vector that is not finite).
Result<std::vector<float>> read_matrix_rows(const SourceFile& file, const SourceTensor& source, uint32_t first,
                                            uint32_t rows);
Result<std::vector<float>> read_vector(const SourceFile& file, const SourceTensor& source);

// The tensor as the container will have it, planes apart. `scheme` decides layout and group.
storage::Tensor tensor_of(const SourceTensor& source, storage::Scheme scheme, uint32_t group_elems);

// The range of a whole matrix: non-finite weights are refused, and it decides the scale exponent of `tensor`, whose scheme and
// group count. Errors: io, corrupt, numeric.
Result<quant::Extent> measure_matrix(const SourceFile& file, const SourceTensor& source, const storage::Tensor& tensor,
                                     uint32_t threads);

// f16 (with a scale exponent) or bf16 if every value is one, else f32.
storage::Tensor narrowest_tensor(const SourceTensor& source, const quant::Extent& of_f16);

// Reads, encodes and writes one tensor. Memory: a few slabs of about a million weights each, and the planes besides
// `values`. Encoding runs on `threads` threads; the result does not depend on their number.
// Errors: io, corrupt (the file shrank), numeric (file, tensor, row and column).
// `loss`, if given, gets what rounding cost, times the exponent; nothing is added for values that are copied.
Status write_tensor(const SourceFile& file, const SourceTensor& source, const Target& target, uint32_t threads,
                    storage::ContainerWriter& writer, quant::RoundingLoss* loss = nullptr);

}  // namespace sluice::import
