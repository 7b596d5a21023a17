// SPDX-License-Identifier: Apache-2.0
// Where everything that a pass writes lies in one allocation of device memory.
#pragma once

#include <array>
#include <cstdint>

#include "backend/backend.hpp"

namespace sluice::backend::cuda {

inline constexpr size_t kSlots = static_cast<size_t>(Slot::count);

// Decoding alone: a norm's result is read by hundreds of blocks at once, and the lines of L2 that hold it were the wait
// (10240 x 8192 for 1 row on an H200: 13.3 us with one copy, 12.4 with eight).
inline constexpr uint32_t kNormedCopies = 8, kCopiedRows = 2;
inline uint32_t copies_of_normed(uint32_t rows) { return rows <= kCopiedRows ? kNormedCopies : 1; }

// Byte offsets, 256-byte aligned. Slots: `normed` and `attended` are X (cuda/elementwise.hpp), and `gate` has a float
// form, which the matmul writes, and an X form, which SwiGLU writes and the next matmul reads; all others are float.
struct ScratchLayout {
  std::array<uint64_t, kSlots> slots{};
  std::array<uint32_t, kSlots> widths{};
  uint64_t gate_x = 0;                    // half [max_rows][x_stride(ffn)]
  uint64_t gathered = 0;                  // X of the widest input, where shape.gathers
  uint64_t normed_scale = 0;              // float [max_rows]
  uint64_t gate_scale = 0;                // float [max_rows]
  uint64_t sessions = 0, positions = 0, selected = 0;   // uint32 [max_rows]
  uint64_t angles = 0;                    // float2 [max_rows][rotary_dims / 2]
  uint64_t inverse_frequencies = 0;       // float [rotary_dims / 2]
  uint64_t block_table = 0;               // uint32 [sessions][context / 64]
  uint64_t stamps = 0;                    // sluice::cuda::Stamp [stamp_count]
  uint32_t stamp_count = 0;               // commands that a pass can have
  uint64_t swiglu_sync = 0;               // zero between launches, as are the two workspaces
  uint64_t attention_workspace = 0, attention_workspace_bytes = 0;
  uint64_t matmul_workspace = 0, matmul_workspace_bytes = 0;
  uint64_t bytes = 0;

  ScratchLayout() = default;
  explicit ScratchLayout(const Shape& shape);
};

}  // namespace sluice::backend::cuda
