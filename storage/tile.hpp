// SPDX-License-Identifier: Apache-2.0
// Where the weight of (row, column) lies in a `values` or `scales` plane. The picture is in docs/container.md.
//
// A tile has 16 rows. Lane l = 4*g + t (g = 0..7, t = 0..3) owns 16 consecutive bytes of every 512.
#pragma once

#include <cstdint>

#include "storage/manifest.hpp"

namespace sluice::storage {

// tile16x64, int4: byte of the plane and whether the value sits in its high nibble.
struct NibbleAddress {
  uint64_t byte = 0;
  bool high = false;
};

// Word j = column/16 of the lane holds 8 nibbles; nibble i is row g + 8*(i&1), column 16j + 2t + {0,8,1,9}[i>>1].
constexpr uint32_t tile16x64_lane(uint32_t row, uint32_t col) { return 4 * (row % 8) + (col % 8) / 2; }
constexpr uint32_t tile16x64_nibble(uint32_t row, uint32_t col) {
  return ((row % 16) / 8) + 2 * ((col % 16) / 8) + 4 * (col % 2);
}

// `cols` is the tensor's input width K; tiles are counted along it rounded up to 64.
constexpr NibbleAddress int4_address(uint32_t row, uint32_t col, uint32_t cols) {
  const uint64_t tile = uint64_t{row / 16} * ((cols + 63) / 64) + col / 64;
  const uint32_t word = (col % 64) / 16;
  const uint32_t nibble = tile16x64_nibble(row, col);
  return {tile * 512 + tile16x64_lane(row, col) * 16 + word * 4 + nibble / 2, (nibble & 1) != 0};
}

// tile16x64, int8: two halves of 512 B (words 0-1, words 2-3); in each, a lane's 16 bytes are the 8 values of the first
// word, then the 8 of the second, in nibble order.
constexpr uint64_t int8_address(uint32_t row, uint32_t col, uint32_t cols) {
  const uint64_t tile = uint64_t{row / 16} * ((cols + 63) / 64) + col / 64;
  const uint32_t word = (col % 64) / 16;
  return tile * 1024 + (word / 2) * 512 + tile16x64_lane(row, col) * 16 + (word % 2) * 8 + tile16x64_nibble(row, col);
}

// tile16x16, f16 and bf16: a lane's 16 bytes are a0 (row g, columns 2t 2t+1), a1 (row g+8, the same), a2 (row g, columns
// 2t+8 2t+9), a3 (row g+8, the same). Result: index of the 2-byte element.
constexpr uint64_t tile16x16_element(uint32_t row, uint32_t col, uint32_t cols) {
  const uint64_t tile = uint64_t{row / 16} * ((cols + 15) / 16) + col / 16;
  const uint32_t lane = 4 * (row % 8) + (col % 8) / 2;
  const uint32_t pair = ((row % 16) / 8) + 2 * ((col % 16) / 8);
  return tile * 256 + lane * 8 + pair * 2 + col % 2;
}

// Scales, zeros and biases of tiled tensors: [ceil(N/16)][ceil(K/group)][16].
constexpr uint64_t tiled_scale_element(uint32_t row, uint32_t col, uint32_t cols, uint32_t group_elems) {
  const uint64_t groups = (cols + group_elems - 1) / group_elems;
  return (uint64_t{row / 16} * groups + col / group_elems) * 16 + row % 16;
}

// ... of embeddings: [N][ceil(K/group)].
constexpr uint64_t row_scale_element(uint32_t row, uint32_t col, uint32_t cols, uint32_t group_elems) {
  const uint64_t groups = (cols + group_elems - 1) / group_elems;
  return uint64_t{row} * groups + col / group_elems;
}

}  // namespace sluice::storage
