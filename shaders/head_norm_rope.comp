// SPDX-License-Identifier: Apache-2.0
// Every head of q and k of a row: RMSNorm where the model has it (Qwen3), then RoPE on pairs half of the rotary
// dimensions apart; k and v go to the KV cache as FP16, finite values saturated. Su et al., "RoFormer" (2021).
//
// Grid: x = heads + kv_heads, y = rows. 64 invocations.
#version 450
#include "buffers.glsl"

const uint kThreads = 64;
layout(local_size_x = kThreads) in;
layout(constant_id = 0) const uint kHeadDim = 64;
#include "kv_cache.glsl"
layout(push_constant) uniform Arguments { RopeArguments args; };

shared float head[kHeadDim];
shared float sums[kThreads];

// NaN and infinities stay what they are.
float saturated(float x) { return abs(x) <= 3.402823466e38 ? clamp(x, -65504.0, 65504.0) : x; }

float inverse_rms() {
  const uint thread = gl_LocalInvocationIndex;
  float sum = 0;
  for (uint i = thread; i < kHeadDim; i += kThreads) sum = fma(head[i], head[i], sum);
  sums[thread] = sum;
  barrier();
  for (uint half_count = kThreads / 2; half_count > 0; half_count /= 2) {
    if (thread < half_count) sums[thread] += sums[thread + half_count];
    barrier();
  }
  return 1.0 / sqrt(sums[0] / float(kHeadDim) + args.eps);
}

void main() {
  const uint thread = gl_LocalInvocationIndex, row = gl_WorkGroupID.y;
  const bool is_q = gl_WorkGroupID.x < args.heads;
  const uint index = is_q ? gl_WorkGroupID.x : gl_WorkGroupID.x - args.heads;
  Floats rows = is_q ? args.q : args.k;
  Floats norm = is_q ? args.q_norm : args.k_norm;
  const uint first = (row * (is_q ? args.heads : args.kv_heads) + index) * kHeadDim;
  for (uint i = thread; i < kHeadDim; i += kThreads) head[i] = rows.at[first + i];
  barrier();
  if ((args.norms & (is_q ? 1u : 2u)) != 0) {
    const float factor = inverse_rms();
    for (uint i = thread; i < kHeadDim; i += kThreads) head[i] = head[i] * factor * norm.at[i];
    barrier();
  }
  for (uint i = thread; i < args.pairs; i += kThreads) {
    const float a = head[i], b = head[i + args.pairs];
    const float c = args.angles.at[(row * args.pairs + i) * 2], s = args.angles.at[(row * args.pairs + i) * 2 + 1];
    head[i] = fma(a, c, -(b * s));
    head[i + args.pairs] = fma(b, c, a * s);
  }
  barrier();
  if (is_q) {
    for (uint i = thread; i < kHeadDim; i += kThreads) rows.at[first + i] = head[i];
    return;
  }
  const uint session = args.table.at[row], position = args.table.at[args.max_rows + row];
  Words k_out = kv_rows(args.cache, args.table, 3 * args.max_rows, session, args.blocks_per_session, position,
                              args.layer, args.layers, index, args.kv_heads, false);
  Words v_out = kv_rows(args.cache, args.table, 3 * args.max_rows, session, args.blocks_per_session, position,
                              args.layer, args.layers, index, args.kv_heads, true);
  for (uint i = thread; i < kHeadDim / 2; i += kThreads) {
    k_out.at[i] = packHalf2x16(vec2(saturated(head[2 * i]), saturated(head[2 * i + 1])));
    v_out.at[i] = packHalf2x16(vec2(saturated(args.v.at[first + 2 * i]), saturated(args.v.at[first + 2 * i + 1])));
  }
}
