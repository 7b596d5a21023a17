// SPDX-License-Identifier: Apache-2.0
// The half form of X (arguments.h). A subgroup of 32 takes 64 columns of a row, two for each invocation.
// Grid: x = ceil(x_stride / 64 / 8), y = rows; 256 invocations.
#version 450
#extension GL_KHR_shader_subgroup_arithmetic : require
#include "buffers.glsl"

layout(local_size_x = 256) in;
layout(push_constant) uniform Arguments { HalveArguments args; };

void main() {
  const uint block = gl_WorkGroupID.x * 8 + gl_SubgroupID, row = gl_WorkGroupID.y, lane = gl_SubgroupInvocationID;
  if (block >= args.blocks) return;
  const uint from = (row * args.blocks + block) * 64 + 2 * lane;
  const vec2 pair = vec2(args.x.at[from], args.x.at[from + 1]);
  const float largest = subgroupMax(max(abs(pair.x), abs(pair.y)));
  // Up to 2^15: dot products of 16 are taken in FP32, so the headroom is for rounding only.
  const uint exponent = floatBitsToUint(largest) >> 23;
  const uint shift = exponent > 127 + 14 ? exponent - (127 + 14) : 0;
  const vec2 scaled = pair * uintBitsToFloat((127 - shift) << 23);
  // lane = 8 * (block of 16) + 2 * t + half of the four
  const uint sixteen = lane / 8, t = lane % 8 / 2;
  const uint four_words = ((row / 8) * args.blocks * 2 + block * 2 + sixteen / 2) * 32 + row % 8 * 4 + t;
  args.x_half.at[four_words * 4 + sixteen % 2 * 2 + lane % 2] = packHalf2x16(scaled);
  if (lane == 0) args.x_scale.at[(row / 8 * args.blocks + block) * 8 + row % 8] = uintBitsToFloat((127 + shift) << 23);
}
