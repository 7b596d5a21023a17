// SPDX-License-Identifier: Apache-2.0
// Folders whose matrices were quantized by others: what their configuration says, and where the parts of a matrix lie.
//
//   method                 parts of a matrix of N outputs and K inputs in G groups           value
//   gptq                   qweight I32 [K/8][N]   qzeros I32 [G][N/8]   scales [G][N]   g_idx I32 [K]     (q - z) s
//   awq, version gemm      qweight I32 [K][N/8]   qzeros I32 [G][N/8]   scales [G][N]                     (q - z) s
//   compressed-tensors,    weight_packed I32 [N][ceil(K/8)]   weight_scale [N][G]   weight_shape I64 [2]
//     pack-quantized         weight_zero_point I32 [ceil(N/8)][G], weight_g_idx I32 [K], both optional    (q - z) s
// In which nibble a code lies: import/packed_int4.hpp. Sources: AutoGPTQ's qlinear_cuda.py and GPTQModel
// (checkpoint_format gptq_v2), AutoAWQ's gemm.py and packing_utils.py, compressed-tensors' pack_quantized.py.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>

#include "import/checkpoint.hpp"
#include "import/json_text.hpp"
#include "import/shards.hpp"
#include "sluice/log.hpp"
#include "sluice/result.hpp"

namespace sluice::import {

struct QuantizationConfig {
  Packing packing = Packing::gptq_v1;
  uint32_t group_elems = 0;  // 0: one group per row
  bool symmetric = true;     // compressed-tensors: no zero points
  std::string path;          // of the file that says so
  bool act_order = false;    // columns of a group lie apart, so every matrix has a g_idx
};

// What config.json (`config`), or the quantize_config.json or quant_config.json of older writers, says; nothing where
// the folder holds plain weights. Errors: corrupt, unsupported (another method such as fp8 or bitsandbytes, another
// number of bits, quantized activations): the message says which and what to import instead.
Result<std::optional<QuantizationConfig>> read_quantization_config(const Json& config, const std::string& folder,
                                                                   const LogHook& log);

// The matrix in parts, every shape checked against it; nothing where the folder has it as plain numbers (or not at
// all). Errors: corrupt, unsupported (a group size that is no multiple of 32), io.
Result<std::optional<SourceTensor>> locate_packed(const Shards& shards, const WantedTensor& wanted,
                                                  const QuantizationConfig& config);

// Names of all parts that a matrix may have, present or not.
std::set<std::string> packed_part_names(const SourceTensor& tensor);

}  // namespace sluice::import
