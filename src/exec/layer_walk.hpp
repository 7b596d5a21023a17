// SPDX-License-Identifier: Apache-2.0
// The operations of one decoder layer (Llama, Mistral, Qwen2, Qwen3), in order.
#pragma once

#include "backend/backend.hpp"
#include "storage/manifest.hpp"

namespace sluice::exec {

// A matrix, the slot its product goes to, and the bias behind it if the model has one.
struct Product {
  storage::Role matrix;
  backend::Slot out;
  storage::Role bias;
};
inline constexpr storage::Role kNoBias = storage::Role::token_embedding;

// Calls `sink` once for each operation: norm(role of its weight), matmul(input, whether it adds to its output,
// {products of that input}), rope(), attention(), swiglu().
template <class Sink>
void walk_layer(Sink& sink) {
  using backend::Slot;
  using storage::Role;
  sink.norm(Role::attn_norm);
  sink.matmul(Slot::normed, false,
              {{Role::q, Slot::q, Role::q_bias}, {Role::k, Slot::k, Role::k_bias}, {Role::v, Slot::v, Role::v_bias}});
  sink.rope();
  sink.attention();
  sink.matmul(Slot::attended, true, {{Role::o, Slot::residual, kNoBias}});
  sink.norm(Role::ffn_norm);
  sink.matmul(Slot::normed, false, {{Role::gate, Slot::gate, kNoBias}, {Role::up, Slot::up, kNoBias}});
  sink.swiglu();
  sink.matmul(Slot::gate, true, {{Role::down, Slot::residual, kNoBias}});
}

}  // namespace sluice::exec
