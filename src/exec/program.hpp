// SPDX-License-Identifier: Apache-2.0
// A model as a flat list of operations, built once at open; a pass walks the list.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "backend/backend.hpp"
#include "plan/planner.hpp"
#include "sluice/result.hpp"
#include "storage/container.hpp"
#include "storage/manifest.hpp"

namespace sluice::exec {

// What the time of a pass is counted under.
enum class Stage : uint8_t {
  disk_wait, copy_wait, embed, norm, matmul, rope, attention, activation, lm_head, count,
};

struct Step {
  backend::Op op;
  Stage stage = Stage::norm;
  int32_t stream_item = -1;       // acquired before the operation and released after it; -1: none
  bool for_logits = false;        // left out of a pass in which no row wants logits (its item is acquired all the same)
};

// Where the planes of tensor number i begin while an operation uses them.
using AddressOf = std::function<backend::DeviceAddress(uint32_t tensor)>;

// A matrix whose planes lie behind `at` as they do in the file.
backend::Weight weight_at(const storage::Tensor& tensor, backend::DeviceAddress at);

// The steps of a dense decoder (Llama, Mistral, Qwen2, Qwen3), layer by layer:
//   norm, q k v, head norms + RoPE + KV, attention, o (+ residual), norm, gate up, SwiGLU, down (+ residual)
// and at the end the rows that want logits, norm, lm_head. Neighbouring resident matrices of one input share an
// operation; a streamed one has its own, so that its place in the ring is free again as soon as can be.
// Error: corrupt, where the file does not have its matrices in this order (streaming needs it).
Result<std::vector<Step>> build_program(const storage::Container& container, const plan::Plan& plan,
                                        const AddressOf& address_of);

}  // namespace sluice::exec
