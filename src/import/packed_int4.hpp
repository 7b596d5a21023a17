// SPDX-License-Identifier: Apache-2.0
// Matrices that were published as INT4 into the container, code by code: nothing is rounded a second time.
//
//   word of 32 bits, nibble i = bits 4i..4i+3       belongs to
//   gptq         qweight [r][n]                     column 8r + i of row n
//                qzeros  [g][c]                     row 8c + i, group g; v1 stores z - 1, v2 stores z
//   awq          qweight [k][c], qzeros [g][c]      row 8c + {0, 2, 4, 6, 1, 3, 5, 7}[i], column k or group g
//   compressed   weight_packed [n][r]               column 8r + i of row n; the code is q + 8
//                weight_zero_point [r][g]           row 8r + i, group g; z + 8
// g_idx names the group of each column. Where it is not k / group, the columns are sorted by group and `perm` says
// where each came from.
#pragma once

#include <cstdint>
#include <vector>

#include "import/checkpoint.hpp"
#include "sluice/result.hpp"
#include "storage/container_writer.hpp"

namespace sluice::import {

// Reads, reorders and writes one matrix; int4 in groups of 128, 64 or 32, of which a longer group takes several. Zero
// points that are all 8 get no plane. Memory: the packed matrix, its scales as FP32, and a few slabs of a million
// codes. Errors: io, numeric (a scale that is zero, NaN or infinite, with row and group), corrupt (a g_idx that does
// not fill its groups), unsupported (scales that FP16 with a common power of two cannot hold exactly).
Status write_packed_tensor(const std::vector<SourceFile>& files, const SourceTensor& source, uint32_t threads,
                           storage::ContainerWriter& writer);

}  // namespace sluice::import
