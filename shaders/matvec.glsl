// SPDX-License-Identifier: Apache-2.0
// The frame of every matvec: one workgroup for 16 outputs and kRows rows of X.
//
// Invocation = 32 * slice + lane, lane = 4 * g + t as in storage/tile.hpp: it owns weight rows g and g + 8 and the
// columns of its t in tiles slice, slice + slices, ... Every accumulator is one (invocation, row of X, output); at the
// end the four t and the slices are added in a fixed order. So neither the number of rows nor their company changes a
// bit of a row's result: kRows decides only how many of them share a weight that was read. No subgroup operation is
// needed, so any subgroup size does; where it is 32, a subgroup reads a whole tile with one 16-byte load per
// invocation.
//
// Grid: x = ceil(N / 16), y = ceil(rows / kRows). Shared memory: 2 * kRows * invocations floats (16 KiB at most).
#include "buffers.glsl"

layout(local_size_x_id = 0) in;
layout(constant_id = 1) const uint kRows = 1;

layout(push_constant) uniform Arguments { MatvecArguments args; };

shared float partial[2 * kRows * gl_WorkGroupSize.x];

struct Place {
  uint g, t;              // of the lane
  uint lane, slice, slices;
  uint tile_row;          // 16 rows of W
  uint first_row;         // of X
};

Place place_of() {
  const uint lane = gl_LocalInvocationIndex % 32;
  return Place(lane / 4, lane % 4, lane, gl_LocalInvocationIndex / 32, gl_WorkGroupSize.x / 32, gl_WorkGroupID.x,
               gl_WorkGroupID.y * kRows);
}

uint x_stride() { return (args.columns + 63) / 64 * 64; }

// Four columns of row `first_row + m` of X: block of 16 columns, place t. Rows past the last one repeat it.
vec4 x_at(Place place, uint m, uint block) {
  const uint row = min(place.first_row + m, args.rows - 1);
  return args.x.at[row * (x_stride() / 4) + block * 4 + place.t];
}

float dot4(vec4 w, vec4 x, float sum) {
  return fma(w.w, x.w, fma(w.z, x.z, fma(w.y, x.y, fma(w.x, x.x, sum))));
}

// Adds up the accumulators of the workgroup and writes its outputs.
void finish(Place place, float low[kRows], float high[kRows]) {
  const uint threads = gl_WorkGroupSize.x;
  for (uint m = 0; m < kRows; ++m) {
    partial[(2 * m) * threads + gl_LocalInvocationIndex] = low[m];
    partial[(2 * m + 1) * threads + gl_LocalInvocationIndex] = high[m];
  }
  barrier();
  for (uint i = gl_LocalInvocationIndex; i < 16 * kRows; i += threads) {
    const uint n = place.tile_row * 16 + i % 16, m = i / 16;
    const uint row = place.first_row + m;
    if (n >= args.outputs || row >= args.rows) continue;
    const uint first = (2 * m + i % 16 / 8) * threads + 4 * (i % 8);
    float sum = 0;
    for (uint slice = 0; slice < place.slices; ++slice) {
      const uint at = first + 32 * slice;
      sum += (partial[at] + partial[at + 1]) + (partial[at + 2] + partial[at + 3]);
    }
    precise float result = sum * args.scale;
    if (args.has_vector != 0) result += args.vector.at[n];
    const uint at = row * args.outputs + n;
    if (args.accumulate != 0) result += args.out_rows.at[at];
    args.out_rows.at[at] = result;
  }
}
