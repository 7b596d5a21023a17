// SPDX-License-Identifier: Apache-2.0
// What a .sluice container says about itself, as plain C++ values. docs/container.md has the bytes.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/units.hpp"

namespace sluice::storage {

inline constexpr uint64_t kPlaneAlignment = 4096;         // every plane starts on it and is zero-padded to it
inline constexpr uint64_t kBlockBytes = 512 * kKiB;       // one checksum each; also the unit of a disk read
inline constexpr uint32_t kTileRows = 16;                 // of both tile layouts

enum class Architecture : uint8_t { llama = 0, mistral = 1, qwen2 = 2, qwen3 = 3 };

// How values are encoded. Value of one weight, before the tensor's power-of-two `scale_exponent`:
//   f32, f16, bf16  the number itself
//   int8            q * s                     q in -128..127
//   int4            (q - 8) * s               q in 0..15, no further plane
//                   (q - z) * s               with a `zeros` plane
//                   q * s + b                 with a `bias` plane
enum class Scheme : uint8_t { f32 = 0, f16 = 1, bf16 = 2, int8 = 3, int4 = 4 };

// With a `perm` plane (int4) column k of the values is column perm[k] of the model: act-order checkpoints, whose groups are
// contiguous only after sorting. Activations are gathered through it.

// How values lie in their plane.
//   rows       plain row-major, rows x cols (embeddings, vectors, f32 matrices)
//   tile16x16  f16 and bf16 matrices: tiles of 16 rows x 16 columns, 512 B
//   tile16x64  int4 (512 B) and int8 (1024 B) matrices: tiles of 16 rows x 64 columns
enum class Layout : uint8_t { rows = 0, tile16x16 = 1, tile16x64 = 2 };

// `row_sums` belongs to embeddings: u64 xxh3 of each row's values followed by its scales, so that a row fetched alone is
// checked without reading the 512 KiB block around it.
enum class PlaneKind : uint8_t {
  values = 0, scales = 1, zeros = 2, bias = 3, residual = 4, residual_scales = 5, perm = 6, row_sums = 7,
};

enum class Role : uint8_t {
  token_embedding = 0,
  attn_norm = 1, q = 2, k = 3, v = 4, o = 5, q_bias = 6, k_bias = 7, v_bias = 8, q_norm = 9, k_norm = 10,
  ffn_norm = 11, gate = 12, up = 13, down = 14,
  output_norm = 15, lm_head = 16,
};

struct Plane {
  PlaneKind kind = PlaneKind::values;
  uint32_t part = 0;                  // always 0: there for striping over several drives
  uint64_t offset = 0;                // in the file, a multiple of kPlaneAlignment
  uint64_t bytes = 0;                 // without padding
  std::vector<uint64_t> block_sums;   // xxh3-64 of every kBlockBytes, the last one of what is left

  uint64_t padded_bytes() const { return align_up(bytes, kPlaneAlignment); }
};

struct Tensor {
  std::string name;                   // Hugging Face name, e.g. "model.layers.0.self_attn.q_proj.weight"
  Role role = Role::token_embedding;
  int32_t layer = -1;                 // -1 outside the layers
  uint32_t rows = 0;                  // outputs N; 1 for a vector
  uint32_t cols = 0;                  // inputs K; the length of a vector
  Scheme scheme = Scheme::f32;
  Layout layout = Layout::rows;
  uint32_t group_elems = 0;           // 32, 64 or 128 for int4 and int8, else 0
  uint32_t residual_group_elems = 0;  // of residual_scales; 0: group_elems
  int32_t scale_exponent = 0;         // every value is multiplied by 2^this
  std::vector<Plane> planes;          // contiguous in the file, in this order, values first
  bool is_residual = false;           // in memory only: the residual of the tensor before it (Container::set_precision)

  const Plane* plane(PlaneKind kind) const;
  // The residual planes as a matrix of their own: int4 with values and scales. Without planes where this has no residual.
  Tensor residual() const;
  uint32_t residual_group() const { return residual_group_elems != 0 ? residual_group_elems : group_elems; }
  bool is_vector() const { return rows == 1 && layout == Layout::rows && scheme == Scheme::f32; }
  // First byte and padded size of the run that holds all planes.
  uint64_t offset() const { return planes.front().offset; }
  uint64_t padded_bytes() const { return planes.back().offset + planes.back().padded_bytes() - planes.front().offset; }
};

struct HyperParameters {
  Architecture architecture = Architecture::llama;
  uint32_t layers = 0;
  uint32_t hidden = 0;
  uint32_t heads = 0;
  uint32_t kv_heads = 0;
  uint32_t head_dim = 0;
  uint32_t ffn = 0;
  uint32_t vocab = 0;                 // rows of the embedding and of lm_head
  uint32_t max_context = 0;           // what the model was trained for
  float norm_eps = 1e-5f;
  bool tied_embeddings = false;       // lm_head holds the same quantized values as the embedding
};

// RoPE as its result: position p turns pair i by the angle p * inverse_frequencies[i]; cos and sin are multiplied by
// attention_factor. Pairs are (i, i + rotary_dims/2) when `halves` ("NeoX", as in Hugging Face), else (2i, 2i+1).
struct Rope {
  std::vector<float> inverse_frequencies;  // rotary_dims / 2
  float attention_factor = 1.0f;
  uint32_t rotary_dims = 0;
  bool halves = true;                 // always true in files of version 1: import unpermutes what GGUF permuted
};

enum class TokenKind : uint8_t { normal = 0, special = 1, added = 2, byte = 3, unknown = 4, unused = 5 };
enum class TokenizerModel : uint8_t { none = 0, byte_level_bpe = 1, sentencepiece_bpe = 2 };

// One step of a pre-tokenizer, applied to every piece that the steps before it left.
enum class SplitBehavior : uint8_t { isolated = 0, removed = 1 };
struct SplitStep {
  std::string pattern;                // PCRE2 syntax as found in tokenizer.json ("\s" is rewritten when compiled)
  SplitBehavior behavior = SplitBehavior::isolated;
  bool invert = false;
};

// How a SentencePiece tokenizer with add_prefix_space puts the space before text: before every stretch between special
// tokens, before those that do not begin with one, or so before the first alone. Byte-level: always the second.
enum class SpacePrefix : uint8_t { always = 0, if_missing = 1, first_if_missing = 2 };

// A tokenizer as data: everything that encoding and decoding need.
struct TokenizerSpec {
  TokenizerModel model = TokenizerModel::none;
  // Token text by id. byte_level_bpe: in the GPT-2 byte alphabet ("Ġ" is a space) for normal tokens, plain UTF-8 for
  // special and added ones. sentencepiece_bpe: with "▁" for a space.
  std::vector<std::string> tokens;
  std::vector<TokenKind> kinds;       // one per token
  std::vector<float> scores;          // sentencepiece_bpe from GGUF without merges: one per token; else empty
  std::vector<std::string> merges;    // "left right", best first; may be empty when scores are there
  std::vector<SplitStep> splits;      // pre-tokenizer; empty for sentencepiece_bpe
  bool nfc = false;                   // normalize to NFC first
  bool ignore_merges = false;         // a piece that is a token as it stands is not merged (Llama 3)
  bool byte_fallback = false;         // unknown characters become <0xXX> tokens (sentencepiece_bpe)
  bool add_prefix_space = false;      // a space (or "▁") goes before the text
  bool add_bos = false;
  bool add_eos = false;
  int32_t bos = -1;                   // -1: none
  int32_t eos = -1;
  int32_t unknown = -1;
  std::vector<int32_t> stop_ids;      // tokens that end a generation (eos included)
  std::vector<int32_t> rstrip_ids;    // added tokens that swallow the white space after them
  std::vector<int32_t> lstrip_ids;    // ... before them
  std::string chat_template;          // Jinja; empty: none
  SpacePrefix space_prefix = SpacePrefix::always;  // sentencepiece_bpe with add_prefix_space
};

// Defaults of sampling, from generation_config.json; a negative value was not given.
struct GenerationDefaults {
  float temperature = -1;
  int32_t top_k = -1;
  float top_p = -1;
  float min_p = -1;
  float repetition_penalty = -1;
};

struct Manifest {
  std::string model_name;
  std::string source;                 // what it was imported from, e.g. "gguf Q4_1" or "safetensors BF16"
  HyperParameters hyper;
  Rope rope;
  TokenizerSpec tokenizer;
  GenerationDefaults generation;
  std::vector<Tensor> tensors;        // in execution order: embedding, layers, output_norm, lm_head
};

// Exact size of each plane that `tensor` (scheme, layout, shape, group) must have; 0 for a plane it must not have.
// values: rows*cols elements in `rows`; ceil(rows/16)*ceil(cols/tile cols) tiles otherwise.
// scales, bias: FP16, zeros: u8. Tiles: [ceil(rows/16)][ceil(cols/group)][16]; rows: [rows][ceil(cols/group)].
uint64_t expected_plane_bytes(const Tensor& tensor, PlaneKind kind);

std::string_view name_of(Architecture value);   // "llama", "mistral", "qwen2", "qwen3"
std::string_view name_of(Scheme value);         // "f32", "f16", "bf16", "int8", "int4"
std::string_view name_of(Layout value);         // "rows", "tile16x16", "tile16x64"
std::string_view name_of(PlaneKind value);
std::string_view name_of(Role value);

}  // namespace sluice::storage
