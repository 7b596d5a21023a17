// SPDX-License-Identifier: Apache-2.0
// Rows that want logits move to the front, in place: selected[i] >= i, so one invocation per column takes them in
// order.
#version 450
#include "buffers.glsl"

layout(local_size_x = 256) in;
layout(push_constant) uniform Arguments { SelectRowsArguments args; };

void main() {
  const uint column = gl_GlobalInvocationID.x;
  if (column >= args.width) return;
  for (uint i = 0; i < args.selected; ++i) {
    const uint from = args.table.at[2 * args.max_rows + i];
    args.rows.at[i * args.width + column] = args.rows.at[from * args.width + column];
  }
}
