// SPDX-License-Identifier: Apache-2.0
// softmax(q K^T / sqrt(head_dim)) V of kHeads query heads that share a KV head, over one chunk of their row's past,
// with the running maximum of Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
//
// Grid: x = kv_heads * calls (calls = heads per KV head / kHeads, rounded up), y = rows, z = chunks. 128 invocations:
// each takes the score of one position in a step of 128, then a pair of dimensions of V for every kParts-th position.
// What a row gives depends on its own position and the chunk length alone. Scores and sums are FP32. Shared memory: 8
// KiB for q (later for sums), 4 KiB for scores.
#version 450
#include "buffers.glsl"

const uint kThreads = 128;
layout(local_size_x = kThreads) in;
layout(constant_id = 0) const uint kHeadDim = 64;
layout(constant_id = 1) const uint kHeads = 1;       // query heads of a workgroup: 1 to 8
#include "kv_cache.glsl"
layout(push_constant) uniform Arguments { AttentionArguments args; };

const uint kPairs = kHeadDim / 2;                    // at most 128
const uint kParts = kThreads / kPairs;
const uint kTeams = kThreads / 8;                    // invocations that look for one head's maximum or sum

shared float staged[kHeads * kParts * kHeadDim];     // q [heads][head_dim], then sums [heads][parts][head_dim]
shared float weights[kHeads * kThreads];             // [heads][128 positions]
shared float team[8 * kTeams];
shared float largest[kHeads], total[kHeads], shrink[kHeads];

#define kMinusInfinity uintBitsToFloat(0xff800000u)

// The maximum (or sum) of every head's weights[0..kThreads), one team of kTeams invocations a head; into team[head *
// kTeams]. The order is the same whatever the number of valid positions.
void reduce(bool is_sum) {
  const uint thread = gl_LocalInvocationIndex, h = thread / kTeams, member = thread % kTeams;
  float value = is_sum ? 0.0 : kMinusInfinity;
  if (h < kHeads) {
    for (uint i = member; i < kThreads; i += kTeams) {
      const float w = weights[h * kThreads + i];
      value = is_sum ? value + w : max(value, w);
    }
  }
  team[thread] = value;
  barrier();
  for (uint half_count = kTeams / 2; half_count > 0; half_count /= 2) {
    if (member < half_count) {
      const float other = team[thread + half_count];
      team[thread] = is_sum ? team[thread] + other : max(team[thread], other);
    }
    barrier();
  }
}

void score(uint base, uint last, uint session, uint kv_head) {
  const uint position = base + gl_LocalInvocationIndex;
  float sums[kHeads];
  for (uint h = 0; h < kHeads; ++h) sums[h] = 0;
  if (position <= last) {
    Words k = kv_rows(args.cache, args.table, 3 * args.max_rows, session, args.blocks_per_session, position,
                            args.layer, args.layers, kv_head, args.kv_heads, false);
    for (uint i = 0; i < kPairs; ++i) {
      const vec2 pair = unpackHalf2x16(k.at[i]);
      for (uint h = 0; h < kHeads; ++h) {
        sums[h] = fma(pair.y, staged[h * kHeadDim + 2 * i + 1], fma(pair.x, staged[h * kHeadDim + 2 * i], sums[h]));
      }
    }
  }
  for (uint h = 0; h < kHeads; ++h) {
    weights[h * kThreads + gl_LocalInvocationIndex] = position <= last ? sums[h] * args.scale : kMinusInfinity;
  }
}

void main() {
  const uint thread = gl_LocalInvocationIndex, row = gl_WorkGroupID.y, chunk = gl_WorkGroupID.z;
  const uint group = args.heads / args.kv_heads;
  const uint calls = (group + kHeads - 1) / kHeads;
  const uint kv_head = gl_WorkGroupID.x / calls;
  const uint first_of_group = gl_WorkGroupID.x % calls * kHeads;
  const uint first_head = kv_head * group + first_of_group;
  const uint heads = min(kHeads, group - first_of_group);
  const uint session = args.table.at[row];
  const uint begin = chunk * args.chunk_positions;
  const uint position = args.table.at[args.max_rows + row];
  if (begin > position) return;
  const uint last = args.chunks == 0 ? position : min(position, begin + args.chunk_positions - 1);

  for (uint i = thread; i < kHeads * kHeadDim; i += kThreads) {
    const uint h = min(i / kHeadDim, heads - 1);     // heads past the group's end repeat its last
    staged[i] = args.q.at[(row * args.heads + first_head + h) * kHeadDim + i % kHeadDim];
  }
  if (thread < kHeads) {
    largest[thread] = kMinusInfinity;
    total[thread] = 0;
  }
  barrier();

  const uint pair = thread % kPairs, part = thread / kPairs;
  vec2 sums[kHeads];
  for (uint h = 0; h < kHeads; ++h) sums[h] = vec2(0);
  for (uint base = begin; base <= last; base += kThreads) {
    score(base, last, session, kv_head);
    barrier();
    reduce(false);
    if (thread < kHeads) {
      const float now = max(largest[thread], team[thread * kTeams]);
      shrink[thread] = exp(largest[thread] - now);
      largest[thread] = now;
    }
    barrier();
    for (uint h = 0; h < kHeads; ++h) {
      weights[h * kThreads + thread] = exp(weights[h * kThreads + thread] - largest[h]);
    }
    barrier();
    reduce(true);
    if (thread < kHeads) total[thread] = fma(total[thread], shrink[thread], team[thread * kTeams]);
    for (uint h = 0; h < kHeads; ++h) sums[h] *= shrink[h];
    if (part < kParts) {
      const uint count = min(kThreads, last - base + 1);
      for (uint i = part; i < count; i += kParts) {
        Words v = kv_rows(args.cache, args.table, 3 * args.max_rows, session, args.blocks_per_session, base + i,
                                args.layer, args.layers, kv_head, args.kv_heads, true);
        const vec2 value = unpackHalf2x16(v.at[pair]);
        for (uint h = 0; h < kHeads; ++h) {
          const float w = weights[h * kThreads + i];
          sums[h] = vec2(fma(w, value.x, sums[h].x), fma(w, value.y, sums[h].y));
        }
      }
    }
    barrier();
  }

  if (part < kParts) {
    for (uint h = 0; h < kHeads; ++h) {
      staged[(h * kParts + part) * kHeadDim + 2 * pair] = sums[h].x;
      staged[(h * kParts + part) * kHeadDim + 2 * pair + 1] = sums[h].y;
    }
  }
  barrier();
  for (uint i = thread; i < heads * kHeadDim; i += kThreads) {
    const uint h = i / kHeadDim, dim = i % kHeadDim;
    float sum = 0;
    for (uint p = 0; p < kParts; ++p) sum += staged[(h * kParts + p) * kHeadDim + dim];
    const uint head = first_head + h;
    if (args.chunks == 0) {
      args.attended.at[row * args.x_stride + x_place(head * kHeadDim + dim)] = sum / total[h];
    } else {
      const uint slot = (row * args.heads + head) * args.chunks + chunk;
      args.partial_out.at[slot * kHeadDim + dim] = sum;
      if (dim == 0) {
        args.partial_sum.at[2 * slot] = largest[h];
        args.partial_sum.at[2 * slot + 1] = total[h];
      }
    }
  }
}
