// SPDX-License-Identifier: Apache-2.0
#include "quant/layout.hpp"

#include <algorithm>
#include <cstring>

#include "base/check.hpp"
#include "base/units.hpp"
#include "storage/checksum.hpp"

namespace sluice::quant {
namespace {

using storage::kTileRows;
using storage::Layout;
using storage::PlaneKind;
using storage::Role;
using storage::Scheme;

constexpr uint32_t kInt4TileBytes = 512;
constexpr uint32_t kInt8TileBytes = 1024;

uint64_t load8(const uint8_t* from) {
  uint64_t value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Bytes of two words taken in turn: low[0], high[0], low[1], high[1], ... In tile16x64 the even nibble pairs of a word
// belong to columns 16j..16j+7 and the odd ones to 16j+8..16j+15, so this is the whole shuffle.
void interleave(uint64_t low, uint64_t high, uint8_t* out) {
  for (int i = 0; i < 8; ++i) {
    out[2 * i] = static_cast<uint8_t>(low >> (8 * i));
    out[2 * i + 1] = static_cast<uint8_t>(high >> (8 * i));
  }
}

// One 16 x 64 tile of int4. `rows` points at 16 rows of 64 codes, 64 bytes apart.
void pack_int4_tile(const uint8_t* rows, std::byte* tile) {
  for (uint32_t g = 0; g < 8; ++g) {
    const uint8_t* top = rows + g * 64;
    const uint8_t* bottom = rows + (g + 8) * 64;
    for (uint32_t word = 0; word < 4; ++word) {
      const uint64_t low = load8(top + word * 16) | load8(bottom + word * 16) << 4;
      const uint64_t high = load8(top + word * 16 + 8) | load8(bottom + word * 16 + 8) << 4;
      uint8_t lanes[16];
      interleave(low, high, lanes);
      for (uint32_t t = 0; t < 4; ++t) std::memcpy(tile + (4 * g + t) * 16 + word * 4, lanes + 4 * t, 4);
    }
  }
}

// One 16 x 64 tile of int8: nibble order, but bytes; words 0-1 in the first half, 2-3 in the second.
void pack_int8_tile(const uint8_t* rows, std::byte* tile) {
  for (uint32_t g = 0; g < 8; ++g) {
    const uint8_t* top = rows + g * 64;
    const uint8_t* bottom = rows + (g + 8) * 64;
    for (uint32_t word = 0; word < 4; ++word) {
      for (uint32_t t = 0; t < 4; ++t) {
        const uint32_t col = word * 16 + 2 * t;
        const uint8_t bytes[8] = {top[col],     bottom[col],     top[col + 8], bottom[col + 8],
                                  top[col + 1], bottom[col + 1], top[col + 9], bottom[col + 9]};
        std::memcpy(tile + (word / 2) * 512 + (4 * g + t) * 16 + (word % 2) * 8, bytes, 8);
      }
    }
  }
}

// One 16 x 16 tile of 2-byte elements: per lane a0, a1, a2, a3, two neighbouring columns each.
void pack_half_tile(const uint16_t* rows, std::byte* tile) {
  for (uint32_t g = 0; g < 8; ++g) {
    for (uint32_t t = 0; t < 4; ++t) {
      std::byte* lane = tile + (4 * g + t) * 16;
      std::memcpy(lane, rows + g * 16 + 2 * t, 4);
      std::memcpy(lane + 4, rows + (g + 8) * 16 + 2 * t, 4);
      std::memcpy(lane + 8, rows + g * 16 + 2 * t + 8, 4);
      std::memcpy(lane + 12, rows + (g + 8) * 16 + 2 * t + 8, 4);
    }
  }
}

// Cuts row-major elements into tiles of 16 x kCols, padding with zeros, and hands each tile to `pack`.
template <uint32_t kCols, class Element, class Pack>
void tile_up(std::span<const Element> elements, uint32_t rows, uint32_t cols, uint32_t tile_bytes, std::byte* out,
             Pack pack) {
  const uint32_t tiles_across = static_cast<uint32_t>(ceil_div(cols, kCols));
  Element tile[kTileRows * kCols];
  for (uint32_t row = 0; row < rows; row += kTileRows) {
    const uint32_t height = std::min(kTileRows, rows - row);
    for (uint32_t across = 0; across < tiles_across; ++across) {
      const uint32_t col = across * kCols;
      const uint32_t width = std::min(kCols, cols - col);
      if (height < kTileRows || width < kCols) std::memset(tile, 0, sizeof tile);
      for (uint32_t r = 0; r < height; ++r) {
        std::memcpy(tile + r * kCols, elements.data() + uint64_t{row + r} * cols + col, width * sizeof(Element));
      }
      pack(tile, out);
      out += tile_bytes;
    }
  }
}

// [rows][groups] into [ceil(rows/16)][groups][16].
template <class Element>
void tile_groups(std::span<const Element> elements, uint32_t rows, uint64_t groups, std::byte* out) {
  for (uint32_t row = 0; row < rows; ++row) {
    for (uint64_t group = 0; group < groups; ++group) {
      const uint64_t element = (uint64_t{row / kTileRows} * groups + group) * kTileRows + row % kTileRows;
      std::memcpy(out + element * sizeof(Element), &elements[row * groups + group], sizeof(Element));
    }
  }
}

std::vector<std::byte> sized_plane(const storage::Tensor& tensor, PlaneKind kind) {
  return std::vector<std::byte>(storage::expected_plane_bytes(tensor, kind));
}

void add_row_sums(const storage::Tensor& tensor, Planes& planes) {
  if (tensor.role != Role::token_embedding) return;
  const uint64_t row_bytes = planes.values.size() / tensor.rows;
  const uint64_t scale_bytes = planes.scales.size() / tensor.rows;
  planes.row_sums.resize(uint64_t{tensor.rows} * sizeof(uint64_t));
  for (uint64_t r = 0; r < tensor.rows; ++r) {
    const auto values = std::span<const std::byte>(planes.values).subspan(r * row_bytes, row_bytes);
    const auto scales = std::span<const std::byte>(planes.scales).subspan(r * scale_bytes, scale_bytes);
    const uint64_t sum = storage::row_checksum(values, scales);
    std::memcpy(planes.row_sums.data() + r * sizeof sum, &sum, sizeof sum);
  }
}

}  // namespace

Planes lay_out_codes(const storage::Tensor& tensor, const Codes& codes) {
  const uint64_t groups = ceil_div(tensor.cols, tensor.group_elems);
  SLUICE_CHECK(codes.values.size() == uint64_t{tensor.rows} * tensor.cols);
  SLUICE_CHECK(codes.scales.size() == tensor.rows * groups);
  Planes planes;
  planes.values = sized_plane(tensor, PlaneKind::values);
  planes.scales = sized_plane(tensor, PlaneKind::scales);
  if (tensor.layout == Layout::rows) {
    SLUICE_CHECK(tensor.scheme == Scheme::int8 && codes.bias.empty());
    std::memcpy(planes.values.data(), codes.values.data(), codes.values.size());
    std::memcpy(planes.scales.data(), codes.scales.data(), codes.scales.size_bytes());
    add_row_sums(tensor, planes);
    return planes;
  }
  SLUICE_CHECK(tensor.layout == Layout::tile16x64);
  if (tensor.scheme == Scheme::int4) {
    tile_up<64>(codes.values, tensor.rows, tensor.cols, kInt4TileBytes, planes.values.data(), pack_int4_tile);
  } else {
    tile_up<64>(codes.values, tensor.rows, tensor.cols, kInt8TileBytes, planes.values.data(), pack_int8_tile);
  }
  tile_groups(codes.scales, tensor.rows, groups, planes.scales.data());
  if (!codes.bias.empty()) {
    planes.bias.resize(planes.scales.size());
    tile_groups(codes.bias, tensor.rows, groups, planes.bias.data());
  }
  if (!codes.zeros.empty()) {
    SLUICE_CHECK(tensor.scheme == Scheme::int4 && codes.bias.empty());
    planes.zeros = sized_plane(tensor, PlaneKind::zeros);
    tile_groups(codes.zeros, tensor.rows, groups, planes.zeros.data());
  }
  return planes;
}

Planes lay_out_halves(const storage::Tensor& tensor, std::span<const uint16_t> elements) {
  SLUICE_CHECK(elements.size() == uint64_t{tensor.rows} * tensor.cols);
  Planes planes;
  planes.values = sized_plane(tensor, PlaneKind::values);
  if (tensor.layout == Layout::rows) {
    std::memcpy(planes.values.data(), elements.data(), elements.size_bytes());
    add_row_sums(tensor, planes);
  } else {
    SLUICE_CHECK(tensor.layout == Layout::tile16x16);
    tile_up<16>(elements, tensor.rows, tensor.cols, 512, planes.values.data(), pack_half_tile);
  }
  return planes;
}

Planes lay_out_floats(const storage::Tensor& tensor, std::span<const float> values) {
  SLUICE_CHECK(tensor.layout == Layout::rows && values.size() == uint64_t{tensor.rows} * tensor.cols);
  Planes planes;
  planes.values = sized_plane(tensor, PlaneKind::values);
  std::memcpy(planes.values.data(), values.data(), values.size_bytes());
  add_row_sums(tensor, planes);
  return planes;
}

}  // namespace sluice::quant
