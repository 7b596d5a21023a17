// SPDX-License-Identifier: Apache-2.0
//
// A synthetic model has the bytes of a real one, not its sense. Codes are uniform; scales make every matrix have variance
// 1/K, so that a row of it times a normalized activation is of order 1 whatever the depth. Signs of scales alternate at
// random, as they do in Q4_0: the mean of the codes, -1/2, would else add up to a drift of all activations.
//
// Speed: random bytes come from a counter through splitmix64's mixer (4 GB/s on one core), a chunk ahead of the writer on
// a thread of their own, so that the drive is what one waits for.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <future>
#include <limits>
#include <new>
#include <system_error>

#include "base/half.hpp"
#include "import/checkpoint.hpp"
#include "import/import.hpp"
#include "import/model_toml.hpp"
#include "model/pre_tokenizer.hpp"
#include "model/utf8.hpp"
#include "quant/layout.hpp"
#include "storage/checksum.hpp"
#include "storage/container_writer.hpp"

namespace sluice::import {
namespace {

using storage::Layout;
using storage::PlaneKind;
using storage::Role;
using storage::Scheme;
using storage::Tensor;

constexpr uint64_t kChunkBytes = 4 * kMiB;
constexpr uint32_t kByteTokens = 256;

// Word `index` of the stream `key`: splitmix64 (Steele, Lea, Flood 2014), whose state is a counter.
uint64_t random_word(uint64_t key, uint64_t index) {
  uint64_t z = key + index * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// The bytes of a stream from `offset` (a multiple of 8) on.
void fill_random(uint64_t key, uint64_t offset, std::span<std::byte> out) {
  const uint64_t first = offset / 8;
  const size_t words = out.size() / 8;
  for (size_t i = 0; i < words; ++i) {
    const uint64_t word = random_word(key, first + i);
    std::memcpy(out.data() + 8 * i, &word, 8);
  }
  const uint64_t last = random_word(key, first + words);
  if (out.size() % 8 != 0) std::memcpy(out.data() + 8 * words, &last, out.size() % 8);
}

// Uniform in [0, 1).
float unit_random(uint64_t key, uint64_t index) { return static_cast<float>(random_word(key, index) >> 40) * 0x1p-24f; }

// What the random bytes of a tensor mean.
struct Recipe {
  Tensor tensor;
  uint64_t key = 0;  // of the values; scales use key + 1

  // Standard deviation of the stored codes: uniform over 16, over 256, or a half of one binade and either sign.
  float code_deviation() const {
    return tensor.scheme == Scheme::int4 ? 4.61f : tensor.scheme == Scheme::int8 ? 73.9f : 1.53f;
  }
  float wanted_deviation() const { return 1.0f / std::sqrt(static_cast<float>(tensor.cols)); }
};

// Values of a plane of int4 or int8 codes, or of FP16 numbers with one exponent: all finite, mean zero.
void fill_values(const Recipe& recipe, uint64_t offset, std::span<std::byte> out) {
  fill_random(recipe.key, offset, out);
  if (recipe.tensor.scheme != Scheme::f16) return;
  const long exponent = std::lround(std::log2(recipe.wanted_deviation() / recipe.code_deviation()));
  const uint64_t biased = static_cast<uint64_t>(std::clamp(exponent + 15, 1L, 30L)) << 10;
  const uint64_t pattern = biased | biased << 16 | biased << 32 | biased << 48;
  for (size_t i = 0; i + 8 <= out.size(); i += 8) {
    uint64_t word;
    std::memcpy(&word, out.data() + i, 8);
    word = (word & 0x83ff83ff83ff83ffu) | pattern;
    std::memcpy(out.data() + i, &word, 8);
  }
}

std::vector<uint16_t> make_scales(const Recipe& recipe) {
  std::vector<uint16_t> scales(storage::expected_plane_bytes(recipe.tensor, PlaneKind::scales) / 2);
  const float scale = recipe.wanted_deviation() / recipe.code_deviation();
  for (size_t i = 0; i < scales.size(); ++i) {
    const float random = unit_random(recipe.key + 1, i);  // first bit the sign, the rest 0.75 to 1.25 times the mean
    const float sign = random < 0.5f ? -1.0f : 1.0f;
    const float rest = random < 0.5f ? 2 * random : 2 * random - 1;
    scales[i] = half_from_float(sign * scale * (0.75f + 0.5f * rest));
  }
  return scales;
}

// Writes a synthetic model; its methods share the writer and the progress.
class Synthesizer {
 public:
  Synthesizer(const SynthOptions& options, storage::ContainerWriter& writer, uint64_t total_bytes)
      : options_(options), writer_(writer), total_bytes_(total_bytes) {}

  Status write(const Recipe& recipe, bool tied_head, uint64_t embedding_key) {
    SLUICE_TRY(writer_.begin_tensor(recipe.tensor));
    if (recipe.tensor.is_vector()) {
      SLUICE_TRY(write_vector(recipe));
    } else if (tied_head) {
      SLUICE_TRY(write_tied_head(recipe, embedding_key));
    } else {
      SLUICE_TRY(write_matrix(recipe));
    }
    return writer_.end_tensor();
  }

 private:
  // Norms around 1, biases around 0.
  Status write_vector(const Recipe& recipe) {
    const Role role = recipe.tensor.role;
    const float middle = role == Role::q_bias || role == Role::k_bias || role == Role::v_bias ? 0.0f : 1.0f;
    std::vector<float> values(recipe.tensor.cols);
    for (size_t i = 0; i < values.size(); ++i) values[i] = middle + 0.2f * (unit_random(recipe.key, i) - 0.5f);
    return writer_.write_plane(PlaneKind::values, std::as_bytes(std::span(values)));
  }

  Status write_matrix(const Recipe& recipe) {
    const Tensor& tensor = recipe.tensor;
    const bool embedding = tensor.role == Role::token_embedding;
    const bool quantized = tensor.scheme != Scheme::f16;
    const std::vector<uint16_t> scales = quantized ? make_scales(recipe) : std::vector<uint16_t>();
    const auto scale_bytes = std::as_bytes(std::span(scales));
    const uint64_t bytes = storage::expected_plane_bytes(tensor, PlaneKind::values);
    const uint64_t row_bytes = embedding ? bytes / tensor.rows : 8;
    const uint64_t chunk = std::max(kChunkBytes / row_bytes, uint64_t{1}) * row_bytes;
    std::vector<uint64_t> row_sums;
    const auto make = [&](uint64_t offset) {
      std::vector<std::byte> values(std::min(chunk, bytes - offset));
      fill_values(recipe, offset, values);
      return values;
    };
    SLUICE_TRY(writer_.begin_plane(PlaneKind::values));
    std::future<std::vector<std::byte>> next = std::async(std::launch::async, make, 0);
    for (uint64_t offset = 0; offset < bytes; offset += chunk) {
      const std::vector<std::byte> values = next.get();
      if (offset + chunk < bytes) next = std::async(std::launch::async, make, offset + chunk);
      if (embedding) {
        const uint64_t row_scale_bytes = scale_bytes.size() / tensor.rows;
        for (uint64_t at = 0; at < values.size(); at += row_bytes) {
          row_sums.push_back(storage::row_checksum(
              std::span(values).subspan(at, row_bytes),
              scale_bytes.subspan(row_sums.size() * row_scale_bytes, row_scale_bytes)));
        }
      }
      SLUICE_TRY(writer_.append(values));
      if (options_.progress) options_.progress(writer_.bytes_written(), total_bytes_);
    }
    SLUICE_TRY(writer_.end_plane());
    if (quantized) SLUICE_TRY(writer_.write_plane(PlaneKind::scales, scale_bytes));
    if (embedding) SLUICE_TRY(writer_.write_plane(PlaneKind::row_sums, std::as_bytes(std::span(row_sums))));
    return {};
  }

  // The embedding's values once more, in tiles.
  Status write_tied_head(const Recipe& recipe, uint64_t embedding_key) {
    Recipe rows = recipe;
    rows.key = embedding_key;
    rows.tensor.layout = Layout::rows;
    const bool quantized = recipe.tensor.scheme != Scheme::f16;
    const uint64_t elem_bytes = quantized ? 1 : 2;
    const uint64_t groups = quantized ? ceil_div(recipe.tensor.cols, recipe.tensor.group_elems) : 0;
    const std::vector<uint16_t> scales = quantized ? make_scales(rows) : std::vector<uint16_t>();
    const uint32_t slab_rows = static_cast<uint32_t>(
        std::max<uint64_t>(kChunkBytes / (recipe.tensor.cols * elem_bytes) / storage::kTileRows, 1) * storage::kTileRows);
    std::vector<std::byte> tiled_scales;
    SLUICE_TRY(writer_.begin_plane(PlaneKind::values));
    for (uint32_t row = 0; row < recipe.tensor.rows; row += slab_rows) {
      Tensor slab = recipe.tensor;
      slab.rows = std::min(slab_rows, recipe.tensor.rows - row);
      const uint64_t elems = uint64_t{slab.rows} * slab.cols;
      std::vector<uint16_t> storage(ceil_div(elems * elem_bytes, 2));
      const auto bytes = std::as_writable_bytes(std::span(storage)).first(elems * elem_bytes);
      fill_values(rows, uint64_t{row} * slab.cols * elem_bytes, bytes);
      quant::Planes planes;
      if (quantized) {
        const std::span<const uint8_t> codes(reinterpret_cast<const uint8_t*>(storage.data()), elems);
        planes = quant::lay_out_codes(slab, {codes, std::span(scales).subspan(row * groups, slab.rows * groups), {}});
      } else {
        planes = quant::lay_out_halves(slab, storage);
      }
      tiled_scales.insert(tiled_scales.end(), planes.scales.begin(), planes.scales.end());
      SLUICE_TRY(writer_.append(planes.values));
    }
    SLUICE_TRY(writer_.end_plane());
    return quantized ? writer_.write_plane(PlaneKind::scales, tiled_scales) : Status();
  }

  const SynthOptions& options_;
  storage::ContainerWriter& writer_;
  uint64_t total_bytes_;
};

// Every byte is a token: text goes in and out, one token a byte.
storage::TokenizerSpec byte_tokenizer() {
  storage::TokenizerSpec spec;
  spec.model = storage::TokenizerModel::byte_level_bpe;
  for (uint32_t byte = 0; byte < kByteTokens; ++byte) {
    std::string text;
    model::append_utf8(text, model::byte_alphabet_char(static_cast<uint8_t>(byte)));
    spec.tokens.push_back(std::move(text));
    spec.kinds.push_back(storage::TokenKind::normal);
  }
  spec.splits.push_back({std::string(model::gpt2_split_pattern()), storage::SplitBehavior::isolated, false});
  return spec;
}

Tensor tensor_of(const WantedTensor& wanted, const SynthOptions& options) {
  Tensor tensor;
  tensor.name = wanted.name;
  tensor.role = wanted.role;
  tensor.layer = wanted.layer;
  tensor.rows = wanted.rows;
  tensor.cols = wanted.cols;
  if (wanted.vector) return tensor;
  const bool row_wise = wanted.role == Role::token_embedding;
  const bool outer = row_wise || wanted.role == Role::lm_head;
  tensor.scheme = options.weights == Weights::f16                ? Scheme::f16
                  : options.weights == Weights::int8 || outer ? Scheme::int8
                                                                 : Scheme::int4;
  tensor.group_elems = tensor.scheme == Scheme::f16 ? 0 : options.group_elems;
  tensor.layout = row_wise ? Layout::rows : tensor.scheme == Scheme::f16 ? Layout::tile16x16 : Layout::tile16x64;
  return tensor;
}

uint64_t plane_bytes(const Tensor& tensor) {
  uint64_t bytes = 0;
  for (const PlaneKind kind : {PlaneKind::values, PlaneKind::scales, PlaneKind::row_sums}) {
    bytes += align_up(storage::expected_plane_bytes(tensor, kind), storage::kPlaneAlignment);
  }
  return bytes;
}

// Padding of tiles is zero in the format, and random bytes have none.
Status check_shape(const storage::HyperParameters& hyper, const std::string& path) {
  const uint32_t q_width = hyper.heads * hyper.head_dim, kv_width = hyper.kv_heads * hyper.head_dim;
  if (hyper.hidden % 64 != 0 || hyper.ffn % 64 != 0 || q_width % 64 != 0 || kv_width % 16 != 0 || hyper.vocab % 16 != 0) {
    return fail(ErrorCode::unsupported,
                fmt::format("{}: hidden {}, ffn {} and the width of all heads {} must be multiples of 64, that of the KV "
                            "heads {} and vocab {} of 16", path, hyper.hidden, hyper.ffn, q_width, kv_width, hyper.vocab));
  }
  if (hyper.vocab < kByteTokens) {
    return fail(ErrorCode::unsupported, fmt::format("{}: vocab is {}, the byte-level tokenizer needs {}", path,
                                                    hyper.vocab, kByteTokens));
  }
  return {};
}

// Better now than after half an hour of writing.
Status check_space(const std::string& output, uint64_t bytes) {
  std::error_code error;
  const auto folder = std::filesystem::absolute(output, error).parent_path();
  const auto space = std::filesystem::space(folder, error);
  if (error || space.available >= bytes) return {};
  return fail(ErrorCode::io, fmt::format("{}: needs {}, the drive has {} free", output, format_bytes(bytes),
                                         format_bytes(space.available)), ENOSPC);
}

Result<Report> run_synth(const SynthOptions& options) {
  const auto start = std::chrono::steady_clock::now();
  if (options.group_elems != 32 && options.group_elems != 64 && options.group_elems != 128) {
    return fail(ErrorCode::usage, fmt::format("groups of {} weights; 32, 64 and 128 are possible", options.group_elems));
  }
  if (options.weights == Weights::keep) {
    return fail(ErrorCode::usage, "random weights have no type to keep; choose f16, int8 or int4");
  }
  SLUICE_TRY_ASSIGN(shape, read_model_toml(options.model_toml));
  if (options.layers) shape.hyper.layers = *options.layers;
  SLUICE_TRY(check_hyper_parameters(shape.hyper, options.model_toml));
  SLUICE_TRY(check_shape(shape.hyper, options.model_toml));

  std::vector<Recipe> recipes;
  uint64_t total_bytes = 0;
  const bool bias = shape.hyper.architecture == storage::Architecture::qwen2;
  for (const WantedTensor& wanted : wanted_tensors(shape.hyper, bias)) {
    recipes.push_back({tensor_of(wanted, options), random_word(options.seed, 2 * recipes.size())});
    total_bytes += plane_bytes(recipes.back().tensor);
  }
  SLUICE_TRY(check_space(options.output, total_bytes));
  SLUICE_TRY_ASSIGN(writer, storage::ContainerWriter::create(options.output));
  Synthesizer synthesizer(options, writer, total_bytes);
  for (const Recipe& recipe : recipes) {
    const bool tied_head = recipe.tensor.role == Role::lm_head && shape.hyper.tied_embeddings;
    SLUICE_TRY(synthesizer.write(recipe, tied_head, recipes.front().key));
  }
  if (options.progress) options.progress(total_bytes, total_bytes);

  storage::Manifest manifest;
  manifest.model_name = shape.name + " (random weights)";
  manifest.source = fmt::format("synth, seed {}", options.seed);
  manifest.hyper = shape.hyper;
  manifest.rope = std::move(shape.rope);
  manifest.tokenizer = byte_tokenizer();
  SLUICE_TRY(writer.finish(std::move(manifest)));
  Report report;
  report.hyper = shape.hyper;
  report.tensors = recipes.size();
  std::error_code ignored;
  report.bytes = std::filesystem::file_size(options.output, ignored);
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return report;
}

}  // namespace

Result<Report> synth_model(const SynthOptions& options) {
  // The standard library reports exhaustion by throwing; this is where that ends.
  try {
    return run_synth(options);
  } catch (const std::bad_alloc&) {
    return fail(ErrorCode::out_of_memory, fmt::format("{}: not enough memory to write it", options.output));
  } catch (const std::system_error& error) {
    return fail(ErrorCode::out_of_memory, fmt::format("{}: cannot start a thread: {}", options.output, error.what()),
                error.code().value());
  }
}

}  // namespace sluice::import
