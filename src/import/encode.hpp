// SPDX-License-Identifier: Apache-2.0
// One tensor of a checkpoint into the container: what it becomes, and the slab-wise way there.
#pragma once

#include <cstdint>

#include "import/checkpoint.hpp"
#include "import/import.hpp"
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
};

// What a tensor becomes under these options (docs/import.md has the table). `tied`: lm_head follows the embedding.
Target choose_target(const SourceTensor& source, const Options& options, bool tied);

// Reads, encodes and writes one tensor. Memory: a few slabs of about a million weights each, and the planes besides
// `values`. Encoding runs on `threads` threads; the result does not depend on their number.
// Errors: io, corrupt (the file shrank), numeric (file, tensor, row and column).
Status write_tensor(const SourceFile& file, const SourceTensor& source, const Target& target, uint32_t threads,
                    storage::ContainerWriter& writer);

}  // namespace sluice::import
