// SPDX-License-Identifier: Apache-2.0
#include "import/ggml_blocks.hpp"

#include <cstring>

#include "base/check.hpp"
#include "base/half.hpp"

namespace sluice::import {
namespace {

uint8_t byte_at(const std::byte* data, size_t index) { return static_cast<uint8_t>(data[index]); }

uint16_t half_bits_at(const std::byte* data) {
  uint16_t bits;
  std::memcpy(&bits, data, 2);
  return bits;
}

float half_at(const std::byte* data) { return float_from_half(half_bits_at(data)); }

uint32_t word_at(const std::byte* data) {
  uint32_t word;
  std::memcpy(&word, data, 4);
  return word;
}

// 16 bytes of nibbles: weight i low, weight i + 16 high.
void split_nibbles(const std::byte* packed, uint8_t* out) {
  for (size_t i = 0; i < 16; ++i) {
    out[i] = byte_at(packed, i) & 15;
    out[i + 16] = byte_at(packed, i) >> 4;
  }
}

void decode_q4_0(const std::byte* block, float* out) {
  uint8_t q[kBlockElems];
  split_nibbles(block + 2, q);
  const float d = half_at(block);
  for (size_t i = 0; i < kBlockElems; ++i) out[i] = static_cast<float>(q[i] - 8) * d;
}

void decode_q4_1(const std::byte* block, float* out) {
  uint8_t q[kBlockElems];
  split_nibbles(block + 4, q);
  const float d = half_at(block), m = half_at(block + 2);
  for (size_t i = 0; i < kBlockElems; ++i) out[i] = static_cast<float>(q[i]) * d + m;
}

void decode_q5_0(const std::byte* block, float* out) {
  uint8_t q[kBlockElems];
  split_nibbles(block + 6, q);
  const float d = half_at(block);
  const uint32_t high = word_at(block + 2);
  for (size_t i = 0; i < kBlockElems; ++i) {
    const int32_t code = q[i] | static_cast<int32_t>((high >> i) & 1) << 4;
    out[i] = static_cast<float>(code - 16) * d;
  }
}

void decode_q5_1(const std::byte* block, float* out) {
  uint8_t q[kBlockElems];
  split_nibbles(block + 8, q);
  const float d = half_at(block), m = half_at(block + 2);
  const uint32_t high = word_at(block + 4);
  for (size_t i = 0; i < kBlockElems; ++i) {
    const int32_t code = q[i] | static_cast<int32_t>((high >> i) & 1) << 4;
    out[i] = static_cast<float>(code) * d + m;
  }
}

void decode_q8_0(const std::byte* block, float* out) {
  const float d = half_at(block);
  for (size_t i = 0; i < kBlockElems; ++i) {
    out[i] = static_cast<float>(static_cast<int8_t>(byte_at(block + 2, i))) * d;
  }
}

// Two-bit codes of Q2_K and Q3_K: weight 128h + 32s + l has bits 2s of byte 32h + l.
void decode_q2_k(const std::byte* block, float* out) {
  const std::byte* scales = block;
  const std::byte* codes = block + 16;
  const float d = half_at(block + 80), dmin = half_at(block + 82);
  for (size_t i = 0; i < kSuperBlockElems; ++i) {
    const size_t half = i / 128, shift = (i % 128) / 32, l = i % 32;
    const int32_t code = (byte_at(codes, 32 * half + l) >> (2 * shift)) & 3;
    const uint8_t scale = byte_at(scales, i / 16);
    out[i] = d * static_cast<float>(scale & 15) * static_cast<float>(code) - dmin * static_cast<float>(scale >> 4);
  }
}

// Sixteen 6-bit scales in 12 bytes: low nibbles of scale j in byte j % 8 (high nibble from j = 8 on), its two high bits
// in byte 8 + j % 4 at 2 (j / 4).
void decode_q3_k(const std::byte* block, float* out) {
  const std::byte* high = block;
  const std::byte* codes = block + 32;
  const std::byte* packed = block + 96;
  const float d = half_at(block + 108);
  float scales[16];
  for (size_t j = 0; j < 16; ++j) {
    const uint32_t low = j < 8 ? byte_at(packed, j) & 15u : byte_at(packed, j - 8) >> 4;
    const uint32_t top = (byte_at(packed, 8 + j % 4) >> (2 * (j / 4))) & 3u;
    scales[j] = d * static_cast<float>(static_cast<int32_t>(low | top << 4) - 32);
  }
  for (size_t i = 0; i < kSuperBlockElems; ++i) {
    const size_t half = i / 128, shift = (i % 128) / 32, l = i % 32;
    const int32_t low = (byte_at(codes, 32 * half + l) >> (2 * shift)) & 3;
    const int32_t top = (byte_at(high, l) >> (i / 32)) & 1;
    out[i] = scales[i / 16] * static_cast<float>((low | top << 2) - 4);
  }
}

// Scale and minimum j of Q4_K and Q5_K: eight pairs of 6 bits in 12 bytes. The first four are the low 6 bits of bytes j
// and j + 4; the others have their low nibbles in byte j + 4 and their high bits on top of bytes j - 4 and j.
struct ScaleAndMin {
  float scale = 0, min = 0;
};
ScaleAndMin scale_and_min(const std::byte* packed, size_t j) {
  if (j < 4) {
    return {static_cast<float>(byte_at(packed, j) & 63), static_cast<float>(byte_at(packed, j + 4) & 63)};
  }
  const int32_t scale = (byte_at(packed, j + 4) & 15) | (byte_at(packed, j - 4) >> 6) << 4;
  const int32_t min = (byte_at(packed, j + 4) >> 4) | (byte_at(packed, j) >> 6) << 4;
  return {static_cast<float>(scale), static_cast<float>(min)};
}

// Weight 64c + l has the low nibble of byte 32c + l, weight 64c + 32 + l the high one. `high` (Q5_K) adds bit i / 32 of
// byte l as bit 4.
void decode_q4_or_q5_k(const std::byte* block, const std::byte* high, const std::byte* codes, float* out) {
  const float d = half_at(block), dmin = half_at(block + 2);
  for (size_t j = 0; j < kSuperBlockElems / 32; ++j) {
    const ScaleAndMin pair = scale_and_min(block + 4, j);
    const float scale = d * pair.scale, min = dmin * pair.min;
    for (size_t l = 0; l < 32; ++l) {
      const uint8_t byte = byte_at(codes, 32 * (j / 2) + l);
      int32_t code = j % 2 == 0 ? byte & 15 : byte >> 4;
      if (high != nullptr) code |= ((byte_at(high, l) >> j) & 1) << 4;
      out[32 * j + l] = scale * static_cast<float>(code) - min;
    }
  }
}

void decode_q4_k(const std::byte* block, float* out) { decode_q4_or_q5_k(block, nullptr, block + 16, out); }
void decode_q5_k(const std::byte* block, float* out) { decode_q4_or_q5_k(block, block + 16, block + 48, out); }

// Weight 128h + 32s + l: nibble s / 2 of byte 64h + 32 (s % 2) + l, and bits 2s of byte 32h + l of the second part.
void decode_q6_k(const std::byte* block, float* out) {
  const std::byte* low = block;
  const std::byte* high = block + 128;
  const std::byte* scales = block + 192;
  const float d = half_at(block + 208);
  for (size_t i = 0; i < kSuperBlockElems; ++i) {
    const size_t half = i / 128, s = (i % 128) / 32, l = i % 32;
    const uint8_t byte = byte_at(low, 64 * half + 32 * (s % 2) + l);
    const int32_t nibble = s < 2 ? byte & 15 : byte >> 4;
    const int32_t top = (byte_at(high, 32 * half + l) >> (2 * s)) & 3;
    const float scale = d * static_cast<float>(static_cast<int8_t>(byte_at(scales, i / 16)));
    out[i] = scale * static_cast<float>((nibble | top << 4) - 32);
  }
}

using BlockDecoder = void (*)(const std::byte*, float*);

BlockDecoder decoder_of(SourceType type) {
  switch (type) {
    case SourceType::q4_0: return decode_q4_0;
    case SourceType::q4_1: return decode_q4_1;
    case SourceType::q5_0: return decode_q5_0;
    case SourceType::q5_1: return decode_q5_1;
    case SourceType::q8_0: return decode_q8_0;
    case SourceType::q2_k: return decode_q2_k;
    case SourceType::q3_k: return decode_q3_k;
    case SourceType::q4_k: return decode_q4_k;
    case SourceType::q5_k: return decode_q5_k;
    case SourceType::q6_k: return decode_q6_k;
    default: return nullptr;
  }
}

}  // namespace

void decode_to_float(SourceType type, std::span<const std::byte> bytes, std::span<float> out) {
  SLUICE_CHECK(bytes.size() == out.size() / block_elems(type) * block_bytes(type));
  if (type == SourceType::f32) {
    std::memcpy(out.data(), bytes.data(), bytes.size());
    return;
  }
  if (type == SourceType::bf16) {
    for (size_t i = 0; i < out.size(); ++i) out[i] = float_from_bf16(half_bits_at(bytes.data() + 2 * i));
    return;
  }
  if (type == SourceType::f16) {
    for (size_t i = 0; i < out.size(); ++i) out[i] = half_at(bytes.data() + 2 * i);
    return;
  }
  const BlockDecoder decode = decoder_of(type);
  const size_t blocks = out.size() / block_elems(type);
  for (size_t b = 0; b < blocks; ++b) {
    decode(bytes.data() + b * block_bytes(type), out.data() + b * block_elems(type));
  }
}

void decode_to_codes(SourceType type, std::span<const std::byte> bytes, std::span<uint8_t> codes,
                     std::span<uint16_t> scales, std::span<uint16_t> bias) {
  const size_t blocks = codes.size() / kBlockElems;
  SLUICE_CHECK(scales.size() == blocks && bytes.size() == blocks * block_bytes(type));
  for (size_t b = 0; b < blocks; ++b) {
    const std::byte* block = bytes.data() + b * block_bytes(type);
    uint8_t* out = codes.data() + b * kBlockElems;
    scales[b] = half_bits_at(block);
    switch (type) {
      case SourceType::q4_0: split_nibbles(block + 2, out); break;
      case SourceType::q4_1:
        bias[b] = half_bits_at(block + 2);
        split_nibbles(block + 4, out);
        break;
      case SourceType::q8_0: std::memcpy(out, block + 2, kBlockElems); break;
      default: SLUICE_CHECK(false);
    }
  }
}

}  // namespace sluice::import
