// SPDX-License-Identifier: Apache-2.0
// Reads memory and keeps nothing: what a device's memory gives to kernels. 256 invocations, 16 bytes each at a time,
// the whole grid side by side.
#version 450
#include "buffers.glsl"

layout(local_size_x = 256) in;
layout(push_constant) uniform Arguments { MemoryReadArguments args; };

void main() {
  const uint stride = gl_NumWorkGroups.x * 256;
  uvec4 seen = uvec4(0);
  for (uint i = gl_GlobalInvocationID.x; i < args.count; i += 4 * stride) {
    // Four loads on the way at once; past the end the first one again.
    [[unroll]] for (uint k = 0; k < 4; ++k) seen ^= args.data.at[i + k * stride < args.count ? i + k * stride : i];
  }
  // Never so, which the compiler does not know.
  if (seen == uvec4(0x9e3779b9u, 0x7f4a7c15u, 0xf39cc060u, 0x5cedc834u)) args.never.at[0] = seen.x;
}
