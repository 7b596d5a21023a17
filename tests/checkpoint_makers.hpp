// SPDX-License-Identifier: Apache-2.0
// Makes GGUF and safetensors files in memory, valid or not, for the tests and fuzz targets of import.
#pragma once

#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/half.hpp"
#include "base/units.hpp"

namespace sluice::test {

using Bytes = std::vector<uint8_t>;

template <class T>
void put(Bytes& out, T value) {
  const size_t at = out.size();
  out.resize(at + sizeof value);
  std::memcpy(out.data() + at, &value, sizeof value);
}

inline void put_text(Bytes& out, std::string_view text) {
  put<uint64_t>(out, text.size());
  out.insert(out.end(), text.begin(), text.end());
}

inline void save(const std::string& path, std::span<const uint8_t> bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
}

// ggml's numbers of the types that tests write.
enum class GgmlType : uint32_t {
  f32 = 0, f16 = 1, q4_0 = 2, q4_1 = 3, q5_0 = 6, q8_0 = 8, q4_k = 12, q6_k = 14, bf16 = 30
};

struct GgufMaker {
  struct Tensor {
    std::vector<uint64_t> shape;  // columns first, as in the file
    GgmlType type = GgmlType::f32;
    Bytes data;
  };

  uint32_t version = 3;
  Bytes keys;                     // encoded
  uint64_t key_count = 0;
  std::map<std::string, Tensor> tensors;

  void key_u32(std::string_view key, uint32_t value) { begin(key, 4), put(keys, value); }
  void key_f32(std::string_view key, float value) { begin(key, 6), put(keys, value); }
  void key_text(std::string_view key, std::string_view value) { begin(key, 8), put_text(keys, value); }
  void key_texts(std::string_view key, const std::vector<std::string>& values) {
    begin(key, 9);
    put<uint32_t>(keys, 8);
    put<uint64_t>(keys, values.size());
    for (const std::string& value : values) put_text(keys, value);
  }

  Bytes bytes() const {
    Bytes out = {'G', 'G', 'U', 'F'};
    put(out, version);
    put<uint64_t>(out, tensors.size());
    put(out, key_count);
    out.insert(out.end(), keys.begin(), keys.end());
    uint64_t offset = 0;
    for (const auto& [name, tensor] : tensors) {
      put_text(out, name);
      put(out, static_cast<uint32_t>(tensor.shape.size()));
      for (const uint64_t size : tensor.shape) put(out, size);
      put(out, static_cast<uint32_t>(tensor.type));
      put(out, offset);
      offset = align_up(offset + tensor.data.size(), 32);
    }
    out.resize(align_up(out.size(), 32));
    const size_t data = out.size();
    for (const auto& [name, tensor] : tensors) {
      out.resize(data + align_up(out.size() - data, 32));
      out.insert(out.end(), tensor.data.begin(), tensor.data.end());
    }
    return out;
  }

 private:
  void begin(std::string_view key, uint32_t type) {
    ++key_count;
    put_text(keys, key);
    put(keys, type);
  }
};

// Random blocks of one type, and what they mean: derived here from the pictures in import/ggml_blocks.hpp, not by its code.
struct MadeWeights {
  Bytes data;
  std::vector<float> values;  // in the order of the bytes
};

inline MadeWeights make_weights(GgmlType type, uint64_t elems, std::mt19937& random) {
  MadeWeights made;
  const auto uniform = [&] { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(random); };
  const auto below = [&](int end) { return std::uniform_int_distribution<int>(0, end - 1)(random); };
  if (type == GgmlType::f32 || type == GgmlType::f16 || type == GgmlType::bf16) {
    for (uint64_t i = 0; i < elems; ++i) {
      float value = uniform() * 0.1f;
      if (type == GgmlType::f32) {
        put(made.data, value);
      } else {
        const uint16_t bits = type == GgmlType::f16 ? half_from_float(value) : bf16_from_float(value);
        value = type == GgmlType::f16 ? float_from_half(bits) : float_from_bf16(bits);
        put(made.data, bits);
      }
      made.values.push_back(value);
    }
    return made;
  }
  for (uint64_t block = 0; block < elems / 32; ++block) {
    const uint16_t d = half_from_float(uniform() * 0.02f), m = half_from_float(uniform() * 0.1f);
    const float scale = float_from_half(d), low = float_from_half(m);
    put(made.data, d);
    if (type == GgmlType::q4_1) put(made.data, m);
    int q[32];
    for (int& code : q) code = type == GgmlType::q8_0 ? below(256) - 128 : below(16);
    if (type == GgmlType::q8_0) {
      for (const int code : q) put(made.data, static_cast<int8_t>(code));
    } else {
      for (int i = 0; i < 16; ++i) put(made.data, static_cast<uint8_t>(q[i] | q[i + 16] << 4));
    }
    for (const int code : q) {
      made.values.push_back(type == GgmlType::q8_0   ? static_cast<float>(code) * scale
                            : type == GgmlType::q4_0 ? static_cast<float>(code - 8) * scale
                                                     : static_cast<float>(code) * scale + low);
    }
  }
  return made;
}

// The smallest that blocks of 32 weights allow.
struct GgufShape {
  uint32_t hidden = 64, heads = 2, kv_heads = 1, head_dim = 32, ffn = 96, vocab = 48;
};

// A llama of one layer, every matrix of `type`, vectors F32. `weights` gets what each matrix holds, rows in the file's
// order.
struct TinyGguf {
  static constexpr uint32_t kHidden = GgufShape().hidden, kHeadDim = GgufShape().head_dim;  // where no shape is given
  GgufMaker file;
  std::map<std::string, std::vector<float>> weights;

  explicit TinyGguf(GgmlType type = GgmlType::q4_0, const std::string& architecture = "llama", uint32_t seed = 1,
                    const GgufShape& shape = {}) {
    const uint32_t hidden = shape.hidden;
    const uint32_t q_rows = shape.heads * shape.head_dim, kv_rows = shape.kv_heads * shape.head_dim;
    std::mt19937 random(seed);
    file.key_text("general.architecture", architecture);
    const std::string prefix = architecture + ".";
    file.key_u32(prefix + "block_count", 1);
    file.key_u32(prefix + "embedding_length", hidden);
    file.key_u32(prefix + "attention.head_count", shape.heads);
    file.key_u32(prefix + "attention.head_count_kv", shape.kv_heads);
    file.key_u32(prefix + "feed_forward_length", shape.ffn);
    file.key_u32(prefix + "context_length", 128);
    file.key_f32(prefix + "attention.layer_norm_rms_epsilon", 1e-5f);
    file.key_f32(prefix + "rope.freq_base", 10000.0f);
    const auto matrix = [&](const std::string& name, uint32_t rows, uint32_t cols) {
      MadeWeights made = make_weights(type, uint64_t{rows} * cols, random);
      weights[name] = std::move(made.values);
      file.tensors[name] = {{cols, rows}, type, std::move(made.data)};
    };
    const auto vector = [&](const std::string& name, uint32_t length) {
      MadeWeights made = make_weights(GgmlType::f32, length, random);
      weights[name] = std::move(made.values);
      file.tensors[name] = {{length}, GgmlType::f32, std::move(made.data)};
    };
    matrix("token_embd.weight", shape.vocab, hidden);
    matrix("output.weight", shape.vocab, hidden);
    matrix("blk.0.attn_q.weight", q_rows, hidden);
    matrix("blk.0.attn_k.weight", kv_rows, hidden);
    matrix("blk.0.attn_v.weight", kv_rows, hidden);
    matrix("blk.0.attn_output.weight", hidden, q_rows);
    matrix("blk.0.ffn_gate.weight", shape.ffn, hidden);
    matrix("blk.0.ffn_up.weight", shape.ffn, hidden);
    matrix("blk.0.ffn_down.weight", hidden, shape.ffn);
    for (const char* name : {"blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"}) {
      vector(name, hidden);
    }
    if (architecture == "qwen2") {
      vector("blk.0.attn_q.bias", q_rows);
      vector("blk.0.attn_k.bias", kv_rows);
      vector("blk.0.attn_v.bias", kv_rows);
    }
  }

  // Replaces a matrix by random blocks of a K format, whose FP16 scales are about 0.01. What they mean is not derived
  // here: `weights` loses it.
  void put_k_blocks(const std::string& name, GgmlType type, std::mt19937& random) {
    GgufMaker::Tensor& tensor = file.tensors.at(name);
    const uint64_t blocks = tensor.shape[0] * tensor.shape[1] / 256;
    const size_t bytes = type == GgmlType::q4_k ? 144 : 210;
    tensor.type = type;
    tensor.data.resize(blocks * bytes);
    for (uint8_t& byte : tensor.data) byte = static_cast<uint8_t>(random());
    for (uint64_t block = 0; block < blocks; ++block) {
      // Q4_K: d and dmin come first. Q6_K: d comes last.
      for (const size_t at : type == GgmlType::q4_k ? std::vector<size_t>{0, 2} : std::vector<size_t>{208}) {
        const uint16_t scale = half_from_float(std::uniform_real_distribution<float>(0.005f, 0.01f)(random));
        std::memcpy(tensor.data.data() + block * bytes + at, &scale, sizeof scale);
      }
    }
    weights.erase(name);
  }
};

struct SafetensorsMaker {
  struct Tensor {
    std::string dtype;
    std::vector<uint64_t> shape;
    Bytes data;
  };
  std::map<std::string, Tensor> tensors;

  static Bytes with_header(std::string_view header, std::span<const uint8_t> data) {
    Bytes out;
    put_text(out, header);  // a length of 8 bytes, then the text: the same prefix as GGUF's strings
    out.insert(out.end(), data.begin(), data.end());
    return out;
  }

  Bytes bytes() const {
    std::string header = R"({"__metadata__":{"format":"pt"})";
    Bytes data;
    for (const auto& [name, tensor] : tensors) {
      std::string shape;
      for (const uint64_t size : tensor.shape) shape += (shape.empty() ? "" : ",") + std::to_string(size);
      header += ",\"" + name + R"(":{"dtype":")" + tensor.dtype + R"(","shape":[)" + shape + R"(],"data_offsets":[)" +
                std::to_string(data.size()) + "," + std::to_string(data.size() + tensor.data.size()) + "]}";
      data.insert(data.end(), tensor.data.begin(), tensor.data.end());
    }
    return with_header(header + "}", data);
  }
};

}  // namespace sluice::test
