// SPDX-License-Identifier: Apache-2.0
// Where everything that a pass writes lies in one buffer of device memory.
#pragma once

#include <array>
#include <cstdint>

#include "backend/backend.hpp"

namespace sluice::backend::vulkan {

inline constexpr size_t kSlots = static_cast<size_t>(Slot::count);

// Byte offsets, 256-byte aligned. Slots: `normed` and `attended` are X (shaders/arguments.h), and `gate` has a plain
// form, which the matmul writes, and an X form, which SwiGLU writes and the next matmul reads; all others are plain.
struct ScratchLayout {
  std::array<uint64_t, kSlots> slots{};
  std::array<uint32_t, kSlots> widths{};
  uint64_t gate_x = 0;                    // X [max_rows][ffn]
  uint64_t gathered = 0;                  // X of the widest input, where shape.gathers
  uint64_t x_half = 0, x_scale = 0;       // half form of the X that a matmul reads, widest of all
  uint64_t table = 0;                     // uint32 [3][max_rows]: sessions, positions, selected;
  uint64_t block_table = 0;               // ... behind it [sessions][context / kKvBlockTokens]
  uint64_t angles = 0;                    // float [max_rows][rotary_dims / 2]{cos, sin}
  uint32_t chunk_positions = 0;           // of split attention: what one workgroup takes
  uint32_t chunks = 0;                    // ... of a whole context
  uint64_t partial_out = 0;               // float [8 rows][heads][chunks][head_dim]
  uint64_t partial_sum = 0;               // float [8 rows][heads][chunks][2]
  uint64_t bytes = 0;

  ScratchLayout() = default;
  explicit ScratchLayout(const Shape& shape);
};

}  // namespace sluice::backend::vulkan
