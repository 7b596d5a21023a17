// SPDX-License-Identifier: Apache-2.0
// X of in / sqrt(mean(in^2) + eps) * weight. One workgroup of 256 per row; the sum is added up as a tree, the same for
// every row. Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
#version 450
#include "buffers.glsl"

const uint kThreads = 256;
layout(local_size_x = kThreads) in;
layout(push_constant) uniform Arguments { RmsNormArguments args; };

shared float sums[kThreads];

void main() {
  const uint thread = gl_LocalInvocationIndex, row = gl_WorkGroupID.x;
  const uint first = row * args.width;
  float sum = 0;
  for (uint i = thread; i < args.width; i += kThreads) {
    const float value = args.in_rows.at[first + i];
    sum = fma(value, value, sum);
  }
  sums[thread] = sum;
  barrier();
  for (uint half_count = kThreads / 2; half_count > 0; half_count /= 2) {
    if (thread < half_count) sums[thread] += sums[thread + half_count];
    barrier();
  }
  const float factor = 1.0 / sqrt(sums[0] / float(args.width) + args.eps);
  const uint stride = (args.width + 63) / 64 * 64;
  for (uint i = thread; i < args.width; i += kThreads) {
    const float weight = args.has_weight != 0 ? args.weight.at[i] : 1.0;
    args.x.at[row * stride + x_place(i)] = args.in_rows.at[first + i] * factor * weight;
  }
}
