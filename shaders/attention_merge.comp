// SPDX-License-Identifier: Apache-2.0
// Puts the chunks of attention.comp together, in their order. Grid: x = heads, y = rows; 64 invocations over
// dimensions.
#version 450
#include "buffers.glsl"

const uint kThreads = 64;
layout(local_size_x = kThreads) in;
layout(push_constant) uniform Arguments { AttentionMergeArguments args; };

void main() {
  const uint head = gl_WorkGroupID.x, row = gl_WorkGroupID.y;
  const uint count = args.table.at[args.max_rows + row] / args.chunk_positions + 1;
  const uint first = (row * args.heads + head) * args.chunks;
  float largest = args.partial_sum.at[2 * first];
  for (uint chunk = 1; chunk < count; ++chunk) largest = max(largest, args.partial_sum.at[2 * (first + chunk)]);
  float total = 0;
  for (uint chunk = 0; chunk < count; ++chunk) {
    total = fma(args.partial_sum.at[2 * (first + chunk) + 1], exp(args.partial_sum.at[2 * (first + chunk)] - largest),
                total);
  }
  for (uint dim = gl_LocalInvocationIndex; dim < args.head_dim; dim += kThreads) {
    float sum = 0;
    for (uint chunk = 0; chunk < count; ++chunk) {
      sum = fma(args.partial_out.at[(first + chunk) * args.head_dim + dim],
                exp(args.partial_sum.at[2 * (first + chunk)] - largest), sum);
    }
    args.attended.at[row * args.x_stride + x_place(head * args.head_dim + dim)] = sum / total;
  }
}
