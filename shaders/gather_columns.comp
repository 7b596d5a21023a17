// SPDX-License-Identifier: Apache-2.0
// X with its columns in another order: column k is column perm[k]. Grid: x = ceil(x_stride / 256), y = rows.
#version 450
#include "buffers.glsl"

layout(local_size_x = 256) in;
layout(push_constant) uniform Arguments { GatherColumnsArguments args; };

void main() {
  const uint column = gl_GlobalInvocationID.x, stride = (args.width + 63) / 64 * 64, row = gl_WorkGroupID.y * stride;
  if (column >= stride) return;
  float value = 0;
  if (column < args.width) value = args.x.at[row + x_place(min(args.perm.at[column], args.width - 1))];
  args.gathered.at[row + x_place(column)] = value;
}
