// SPDX-License-Identifier: Apache-2.0
// Writes small, valid containers of random weights, and says what each weight is. The packing below follows the pictures in
// docs/container.md lane by lane, on purpose not by storage/tile.hpp: two derivations check each other.
#pragma once

#include <cmath>
#include <cstring>
#include <map>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/half.hpp"
#include "sluice/result.hpp"
#include "storage/checksum.hpp"
#include "storage/container_writer.hpp"
#include "storage/manifest.hpp"
#include "temp_folder.hpp"

namespace sluice::test {

// What an int4 tensor has besides scales.
enum class Int4Kind { symmetric, zeros, bias };

struct TinyOptions {
  storage::HyperParameters hyper;
  storage::Scheme scheme = storage::Scheme::int4;      // of the matrices in the layers
  storage::Scheme embedding = storage::Scheme::int8;   // not int4
  storage::Scheme lm_head = storage::Scheme::int8;     // ignored where hyper.tied_embeddings
  Int4Kind int4_kind = Int4Kind::symmetric;
  uint32_t group_elems = 32;
  int32_t scale_exponent = 0;                          // of the matrices
  bool attention_bias = false;                         // llama only; qwen2 always has it
  uint32_t seed = 1;
  storage::TokenizerSpec tokenizer;                    // none unless given
};

// Two layers with ragged shapes: nothing is a multiple of 64, hidden is 2.5 groups of 32.
inline storage::HyperParameters tiny_hyper(storage::Architecture architecture = storage::Architecture::llama) {
  storage::HyperParameters hyper;
  hyper.architecture = architecture;
  hyper.layers = 2;
  hyper.hidden = 80;
  hyper.heads = 5;
  hyper.kv_heads = 1;
  hyper.head_dim = 16;
  hyper.ffn = 104;
  hyper.vocab = 200;
  hyper.max_context = 256;
  return hyper;
}

// Planes in memory, in file order, and the value of every weight (row-major) as a reader must see it.
struct TinyTensor {
  storage::Tensor tensor;   // planes empty
  std::vector<std::pair<storage::PlaneKind, std::vector<std::byte>>> planes;
  std::vector<float> weights;
};

namespace tiny_detail {

template <class T>
void store(std::vector<std::byte>& plane, uint64_t element, T value) {
  std::memcpy(plane.data() + element * sizeof(T), &value, sizeof(T));
}

// Calls visit(row, col, lane, word, nibble, tile) for every place of a tile16x64 plane, padding included.
template <class Visit>
void for_each_nibble(uint32_t rows, uint32_t cols, Visit&& visit) {
  // Row and column of nibble i in word j of lane 4g + t, as drawn: rows g and g + 8, columns 16j + 2t and 3 more.
  static constexpr uint32_t kRowOf[8] = {0, 8, 0, 8, 0, 8, 0, 8};
  static constexpr uint32_t kColOf[8] = {0, 0, 8, 8, 1, 1, 9, 9};
  uint64_t tile = 0;
  for (uint32_t row0 = 0; row0 < rows; row0 += 16) {
    for (uint32_t col0 = 0; col0 < cols; col0 += 64, ++tile) {
      for (uint32_t g = 0; g < 8; ++g) {
        for (uint32_t t = 0; t < 4; ++t) {
          for (uint32_t j = 0; j < 4; ++j) {
            for (uint32_t i = 0; i < 8; ++i) {
              visit(row0 + g + kRowOf[i], col0 + 16 * j + 2 * t + kColOf[i], 4 * g + t, j, i, tile);
            }
          }
        }
      }
    }
  }
}

// Calls visit(row, col, element) for every place of a tile16x16 plane, in the order of the file.
template <class Visit>
void for_each_half(uint32_t rows, uint32_t cols, Visit&& visit) {
  static constexpr uint32_t kRowOf[4] = {0, 8, 0, 8};   // a0, a1, a2, a3
  static constexpr uint32_t kColOf[4] = {0, 0, 8, 8};
  uint64_t element = 0;
  for (uint32_t row0 = 0; row0 < rows; row0 += 16) {
    for (uint32_t col0 = 0; col0 < cols; col0 += 16) {
      for (uint32_t lane = 0; lane < 32; ++lane) {
        for (uint32_t a = 0; a < 4; ++a) {
          for (uint32_t side = 0; side < 2; ++side) {
            visit(row0 + lane / 4 + kRowOf[a], col0 + 2 * (lane % 4) + kColOf[a] + side, element++);
          }
        }
      }
    }
  }
}

}  // namespace tiny_detail

// Random values for a tensor whose name, role, shape, scheme, layout, group and exponent are set.
inline TinyTensor tiny_tensor(const storage::Tensor& tensor, Int4Kind int4_kind, uint32_t seed) {
  using storage::PlaneKind;
  using storage::Scheme;
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  const auto draw = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };

  TinyTensor out;
  out.tensor = tensor;
  out.tensor.planes.clear();
  const uint32_t rows = tensor.rows, cols = tensor.cols;
  const bool tiled = tensor.layout != storage::Layout::rows;
  const float spread = rows == 1 ? 1.0f : 1.7f / std::sqrt(static_cast<float>(cols));
  const float unit = std::ldexp(1.0f, tensor.scale_exponent);
  std::vector<std::byte> values(storage::expected_plane_bytes(tensor, PlaneKind::values));
  out.weights.resize(uint64_t{rows} * cols);
  const auto weight = [&](uint32_t row, uint32_t col) -> float& { return out.weights[uint64_t{row} * cols + col]; };

  // f32, f16, bf16: random numbers that the scheme holds exactly. Norms lie around 1.
  std::vector<uint16_t> halves;
  if (tensor.group_elems == 0) {
    for (float& value : out.weights) {
      value = uniform(random) * spread;
      const bool norm = tensor.role == storage::Role::attn_norm || tensor.role == storage::Role::ffn_norm ||
                        tensor.role == storage::Role::output_norm || tensor.role == storage::Role::q_norm ||
                        tensor.role == storage::Role::k_norm;
      if (norm) value = 1.0f + 0.2f * value;
      uint16_t bits = 0;
      if (tensor.scheme == Scheme::f16) value = float_from_half(bits = half_from_float(value));
      if (tensor.scheme == Scheme::bf16) value = float_from_bf16(bits = bf16_from_float(value));
      halves.push_back(bits);
    }
    if (tensor.scheme == Scheme::f32) {
      std::memcpy(values.data(), out.weights.data(), values.size());
    } else if (tiled) {
      tiny_detail::for_each_half(rows, cols, [&](uint32_t row, uint32_t col, uint64_t element) {
        if (row < rows && col < cols) tiny_detail::store(values, element, halves[uint64_t{row} * cols + col]);
      });
    } else {
      std::memcpy(values.data(), halves.data(), values.size());
    }
    for (float& value : out.weights) value *= unit;
    out.planes.emplace_back(PlaneKind::values, std::move(values));
  } else {
    const bool int4 = tensor.scheme == Scheme::int4;
    const uint32_t groups = (cols + tensor.group_elems - 1) / tensor.group_elems;
    std::vector<std::byte> scales(storage::expected_plane_bytes(tensor, PlaneKind::scales));
    std::vector<std::byte> zeros(int4 && int4_kind == Int4Kind::zeros ? scales.size() / 2 : 0);
    std::vector<std::byte> bias(int4 && int4_kind == Int4Kind::bias ? scales.size() : 0);
    std::vector<float> scale_of(uint64_t{rows} * groups), offset_of(uint64_t{rows} * groups);
    for (uint32_t row = 0; row < rows; ++row) {
      for (uint32_t group = 0; group < groups; ++group) {
        const uint64_t at = tiled ? (uint64_t{row / 16} * groups + group) * 16 + row % 16 : uint64_t{row} * groups + group;
        const uint16_t scale_bits = half_from_float(uniform(random) * spread / (int4 ? 8.0f : 127.0f));
        const float scale = float_from_half(scale_bits);
        tiny_detail::store(scales, at, scale_bits);
        float offset = int4 ? -8.0f * scale : 0.0f;   // value = q * scale + offset
        if (!zeros.empty()) {
          const int zero = draw(0, 15);
          zeros[at] = static_cast<std::byte>(zero);
          offset = -static_cast<float>(zero) * scale;
        }
        if (!bias.empty()) {
          const uint16_t bias_bits = half_from_float(uniform(random) * spread);
          tiny_detail::store(bias, at, bias_bits);
          offset = float_from_half(bias_bits);
        }
        scale_of[uint64_t{row} * groups + group] = scale;
        offset_of[uint64_t{row} * groups + group] = offset;
      }
    }
    std::vector<int> quantized(uint64_t{rows} * cols);
    for (uint32_t row = 0; row < rows; ++row) {
      for (uint32_t col = 0; col < cols; ++col) {
        const int q = int4 ? draw(0, 15) : draw(-127, 127);
        const uint64_t group = uint64_t{row} * groups + col / tensor.group_elems;
        quantized[uint64_t{row} * cols + col] = q;
        weight(row, col) = (static_cast<float>(q) * scale_of[group] + offset_of[group]) * unit;
        if (!tiled) values[uint64_t{row} * cols + col] = static_cast<std::byte>(q);
      }
    }
    if (tiled) {
      const auto place = [&](uint32_t row, uint32_t col, uint32_t lane, uint32_t word, uint32_t nibble, uint64_t tile) {
        if (row >= rows || col >= cols) return;
        const int q = quantized[uint64_t{row} * cols + col];
        if (int4) {
          std::byte& byte = values[tile * 512 + lane * 16 + word * 4 + nibble / 2];
          byte |= static_cast<std::byte>(nibble % 2 == 0 ? q : q << 4);
        } else {
          values[tile * 1024 + (word / 2) * 512 + lane * 16 + (word % 2) * 8 + nibble] = static_cast<std::byte>(q);
        }
      };
      tiny_detail::for_each_nibble(rows, cols, place);
    }
    out.planes.emplace_back(PlaneKind::values, std::move(values));
    out.planes.emplace_back(PlaneKind::scales, std::move(scales));
    if (!zeros.empty()) out.planes.emplace_back(PlaneKind::zeros, std::move(zeros));
    if (!bias.empty()) out.planes.emplace_back(PlaneKind::bias, std::move(bias));
  }

  if (tensor.role == storage::Role::token_embedding) {
    const std::span<const std::byte> all_values = out.planes[0].second;
    const std::span<const std::byte> all_scales =
        out.planes.size() > 1 ? std::span<const std::byte>(out.planes[1].second) : std::span<const std::byte>();
    std::vector<std::byte> sums(uint64_t{rows} * 8);
    for (uint64_t row = 0; row < rows; ++row) {
      const uint64_t value_bytes = all_values.size() / rows, scale_bytes = all_scales.size() / rows;
      tiny_detail::store(sums, row, storage::row_checksum(all_values.subspan(row * value_bytes, value_bytes),
                                                          all_scales.subspan(row * scale_bytes, scale_bytes)));
    }
    out.planes.emplace_back(PlaneKind::row_sums, std::move(sums));
  }
  return out;
}

// Every tensor a model of these options has, in file order.
inline std::vector<TinyTensor> tiny_tensors(const TinyOptions& options) {
  using storage::Architecture;
  using storage::Layout;
  using storage::Role;
  using storage::Scheme;
  const storage::HyperParameters& hyper = options.hyper;
  std::vector<TinyTensor> tensors;

  const auto add = [&](Role role, int32_t layer, uint32_t rows, uint32_t cols, Scheme scheme) {
    storage::Tensor tensor;
    tensor.role = role;
    tensor.layer = layer;
    tensor.name = layer < 0 ? std::string(name_of(role)) : "layers." + std::to_string(layer) + "." + std::string(name_of(role));
    tensor.rows = rows;
    tensor.cols = cols;
    tensor.scheme = scheme;
    const bool quantized = scheme == Scheme::int4 || scheme == Scheme::int8;
    if (quantized) tensor.group_elems = options.group_elems;
    if (rows != 1) tensor.scale_exponent = options.scale_exponent;
    const bool tiled = rows != 1 && role != Role::token_embedding && scheme != Scheme::f32;
    if (tiled) tensor.layout = quantized ? Layout::tile16x64 : Layout::tile16x16;
    // Draws go row by row whatever the layout, so the embedding's seed gives a tied lm_head the embedding's values.
    const bool tied = role == Role::lm_head && hyper.tied_embeddings;
    const uint32_t index = tied ? 0 : static_cast<uint32_t>(tensors.size());
    tensors.push_back(tiny_tensor(tensor, options.int4_kind, options.seed * 100'003u + index));
  };
  const auto matrix = [&](Role role, int32_t layer, uint32_t rows, uint32_t cols) {
    add(role, layer, rows, cols, options.scheme);
  };
  const auto vector = [&](Role role, int32_t layer, uint32_t length) { add(role, layer, 1, length, Scheme::f32); };

  const uint32_t q_rows = hyper.heads * hyper.head_dim, kv_rows = hyper.kv_heads * hyper.head_dim;
  const bool biases = hyper.architecture == Architecture::qwen2 || options.attention_bias;
  const bool head_norms = hyper.architecture == Architecture::qwen3;
  add(Role::token_embedding, -1, hyper.vocab, hyper.hidden, options.embedding);
  for (int32_t layer = 0; layer < static_cast<int32_t>(hyper.layers); ++layer) {
    vector(Role::attn_norm, layer, hyper.hidden);
    matrix(Role::q, layer, q_rows, hyper.hidden);
    matrix(Role::k, layer, kv_rows, hyper.hidden);
    matrix(Role::v, layer, kv_rows, hyper.hidden);
    if (biases) {
      vector(Role::q_bias, layer, q_rows);
      vector(Role::k_bias, layer, kv_rows);
      vector(Role::v_bias, layer, kv_rows);
    }
    if (head_norms) {
      vector(Role::q_norm, layer, hyper.head_dim);
      vector(Role::k_norm, layer, hyper.head_dim);
    }
    matrix(Role::o, layer, hyper.hidden, q_rows);
    vector(Role::ffn_norm, layer, hyper.hidden);
    matrix(Role::gate, layer, hyper.ffn, hyper.hidden);
    matrix(Role::up, layer, hyper.ffn, hyper.hidden);
    matrix(Role::down, layer, hyper.hidden, hyper.ffn);
  }
  vector(Role::output_norm, -1, hyper.hidden);
  add(Role::lm_head, -1, hyper.vocab, hyper.hidden, hyper.tied_embeddings ? options.embedding : options.lm_head);
  return tensors;
}

// Everything but the tensors.
inline storage::Manifest tiny_manifest(const TinyOptions& options) {
  storage::Manifest manifest;
  manifest.model_name = "tiny";
  manifest.source = "random, seed " + std::to_string(options.seed);
  manifest.hyper = options.hyper;
  manifest.tokenizer = options.tokenizer;
  manifest.rope.rotary_dims = options.hyper.head_dim;
  for (uint32_t i = 0; i < options.hyper.head_dim; i += 2) {
    const float exponent = -static_cast<float>(i) / static_cast<float>(options.hyper.head_dim);
    manifest.rope.inverse_frequencies.push_back(std::pow(10000.0f, exponent));
  }
  return manifest;
}

// Writes the container to `path` and returns what lies in it: weights by tensor name ("layers.0.q", "lm_head", ...).
inline Result<std::map<std::string, std::vector<float>>> write_tiny_container(const std::string& path,
                                                                              const TinyOptions& options) {
  SLUICE_TRY_ASSIGN(writer, storage::ContainerWriter::create(path));
  std::map<std::string, std::vector<float>> weights;
  for (TinyTensor& tensor : tiny_tensors(options)) {
    SLUICE_TRY(writer.begin_tensor(tensor.tensor));
    for (const auto& [kind, bytes] : tensor.planes) SLUICE_TRY(writer.write_plane(kind, bytes));
    SLUICE_TRY(writer.end_tensor());
    weights[tensor.tensor.name] = std::move(tensor.weights);
  }
  SLUICE_TRY(writer.finish(tiny_manifest(options)));
  return weights;
}

}  // namespace sluice::test
