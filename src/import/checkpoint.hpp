// SPDX-License-Identifier: Apache-2.0
// A checkpoint of any format as import sees it: a manifest without tensors, and where each tensor's bytes lie.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/handles.hpp"
#include "sluice/log.hpp"
#include "sluice/result.hpp"
#include "storage/manifest.hpp"

namespace sluice::import {

// Element types of checkpoints. The block formats are ggml's (import/ggml_blocks.hpp); the last three are matrices in
// parts (PackedInt4).
enum class SourceType : uint8_t {
  f32, f16, bf16, q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k, gptq, awq, compressed
};

const char* name_of(SourceType type);   // "F32", "Q4_1", ...
uint32_t block_elems(SourceType type);  // weights per block; 1 for plain types
uint32_t block_bytes(SourceType type);
inline bool is_plain(SourceType type) { return type <= SourceType::bf16; }

struct SourceFile {
  std::string path;
  UniqueFd fd;
};

// How INT4 codes are packed into words. The pictures are in import/packed_int4.hpp.
enum class Packing : uint8_t { gptq_v1, gptq_v2, awq, compressed };

struct FilePart {
  uint32_t file = 0;            // index into Checkpoint::files
  uint64_t offset = 0, bytes = 0;
};

// The parts of a matrix that was published as INT4. Their sizes fit the matrix.
struct PackedInt4 {
  Packing packing = Packing::gptq_v1;
  uint32_t group_elems = 0;     // columns that share a scale; `cols` where a row has one
  SourceType scale_type = SourceType::f16;
  FilePart codes, scales;
  std::optional<FilePart> zeros, group_index;
};

// One tensor of the model and its bytes in the checkpoint, row-major.
struct SourceTensor {
  storage::Role role = storage::Role::token_embedding;
  int32_t layer = -1;
  uint32_t rows = 0;            // 1 for a vector
  uint32_t cols = 0;
  bool vector = false;
  std::string name;             // in the container (Hugging Face's)
  std::string source_name;      // in the checkpoint
  SourceType type = SourceType::f32;
  uint32_t file = 0;            // index into Checkpoint::files
  uint64_t offset = 0;
  // Not 0: rows (elements, of a vector) were permuted for interleaved RoPE in heads of this many. Row h*d + half*d/2 + i
  // of the model is row h*d + 2*i + half of the checkpoint.
  uint32_t permuted_head_dim = 0;
  std::optional<PackedInt4> packed;   // then file and offset mean nothing

  uint64_t row_bytes() const { return uint64_t{cols} / block_elems(type) * block_bytes(type); }
};

struct Checkpoint {
  std::vector<SourceFile> files;
  storage::Manifest manifest;           // everything but `tensors`
  std::vector<SourceTensor> tensors;    // in execution order; lm_head of a tied model points at the embedding's bytes
};

// The type that most of the weights have. For "imported from".
SourceType most_common_type(const std::vector<SourceTensor>& tensors);

// A tensor that a model of these hyperparameters has.
struct WantedTensor {
  storage::Role role = storage::Role::token_embedding;
  int32_t layer = -1;
  uint32_t rows = 0;
  uint32_t cols = 0;
  bool vector = false;
  std::string name;
};

// All of them in execution order: embedding, layers, output_norm, lm_head (of a tied model too).
std::vector<WantedTensor> wanted_tensors(const storage::HyperParameters& hyper, bool attention_bias);

// Refuses shapes that no supported model has (zero sizes, heads that do not divide, sizes past the container's caps).
// `where` begins the message.
Status check_hyper_parameters(const storage::HyperParameters& hyper, const std::string& where);

// Whichever of the two `source` is. Errors: usage (one of a folder's files), and those below.
Result<Checkpoint> open_checkpoint(const std::string& source, const LogHook& log);

// Opens a GGUF file, or a folder in Hugging Face's form. Nothing of the weights is read yet.
// Errors: not_found, io, corrupt, unsupported; each names the file and the key or tensor.
Result<Checkpoint> open_gguf(const std::string& path, const LogHook& log);
Result<Checkpoint> open_huggingface(const std::string& folder, const LogHook& log);

}  // namespace sluice::import
