// SPDX-License-Identifier: Apache-2.0
// What addresses point to. Buffers are reached by address alone: no descriptor sets, and no storage buffer range to
// keep to (128 MiB on lavapipe, less than one matrix of a 70B model).
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_buffer_reference : require
#extension GL_EXT_buffer_reference_uvec2 : require
#extension GL_EXT_control_flow_attributes : require

layout(buffer_reference, std430, buffer_reference_align = 16) readonly buffer Words4 { uvec4 at[]; };
layout(buffer_reference, std430, buffer_reference_align = 4) buffer Words { uint at[]; };
layout(buffer_reference, std430, buffer_reference_align = 4) buffer Floats { float at[]; };
layout(buffer_reference, std430, buffer_reference_align = 16) readonly buffer Floats4 { vec4 at[]; };

#include "arguments.h"

// Place of a column in a row of X (arguments.h).
uint x_place(uint column) {
  return (column & ~15u) + (column % 8) / 2 * 4 + (column % 16) / 8 * 2 + column % 2;
}

float half_at(Words halves, uint index) {
  return unpackHalf2x16(halves.at[index / 2])[index % 2];
}

uint byte_at(Words bytes, uint index) { return (bytes.at[index / 4] >> (index % 4 * 8)) & 0xffu; }
