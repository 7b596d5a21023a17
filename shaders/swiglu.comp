// SPDX-License-Identifier: Apache-2.0
// X of silu(gate) * up. Grid: x = ceil(width / 256), y = rows. Shazeer, "GLU Variants Improve Transformer" (2020).
#version 450
#include "buffers.glsl"

layout(local_size_x = 256) in;
layout(push_constant) uniform Arguments { SwigluArguments args; };

void main() {
  const uint i = gl_GlobalInvocationID.x, row = gl_WorkGroupID.y;
  if (i >= args.width) return;
  const float gate = args.gate.at[row * args.width + i];
  // exp(88) is still finite: below, silu would be -0 and is -1e-37 times gate.
  const float silu = gate / (1.0 + exp(min(-gate, 88.0)));
  args.x.at[row * ((args.width + 63) / 64 * 64) + x_place(i)] = silu * args.up.at[row * args.width + i];
}
