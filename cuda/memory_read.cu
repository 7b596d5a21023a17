// SPDX-License-Identifier: Apache-2.0
// argument  shape          type   layout, alignment
// memory    [bytes / 16]   uint4  16 B
// sink      [1024]         u32
//
// Geometry: a block of 512 threads for every 64 KiB, eight 16-byte loads in flight per thread. (Blocks that stay and
// stride through memory read 3% less on an H100: 3.10 against 3.19 TB/s.) Bytes moved: `bytes`.
#include "cuda/memory_read.hpp"

namespace sluice::cuda {
namespace {

constexpr uint32_t kThreads = 512, kLoads = 8;

__global__ void __launch_bounds__(kThreads) read_memory_kernel(const uint4* memory, uint64_t count, uint32_t* sink) {
  const uint64_t base = uint64_t{blockIdx.x} * kThreads * kLoads + threadIdx.x;
  uint4 v[kLoads];
#pragma unroll
  for (uint32_t i = 0; i < kLoads; ++i) {
    const uint64_t at = base + i * kThreads;
    v[i] = at < count ? __ldcs(memory + at) : make_uint4(0, 0, 0, 0);
  }
  uint32_t sum = 0;
#pragma unroll
  for (uint32_t i = 0; i < kLoads; ++i) sum += v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
  if (sum == 0x9e3779b9u) sink[blockIdx.x & 1023] = sum;
}

}  // namespace

cudaError_t read_memory(const void* memory, uint64_t bytes, uint32_t* sink, cudaStream_t stream) {
  const uint64_t blocks = (bytes / 16 + kThreads * kLoads - 1) / (kThreads * kLoads);
  if (bytes % 16 != 0 || blocks == 0 || blocks > 0x7fffffffu) return cudaErrorInvalidValue;
  read_memory_kernel<<<static_cast<uint32_t>(blocks), kThreads, 0, stream>>>(static_cast<const uint4*>(memory),
                                                                             bytes / 16, sink);
  return cudaGetLastError();
}

}  // namespace sluice::cuda
