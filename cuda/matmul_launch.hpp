// SPDX-License-Identifier: Apache-2.0
// How the matmul kernel files launch, and what each offers to the dispatcher in matmul.cu.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "cuda/matmul.hpp"

namespace sluice::cuda {

// What matmul.cu finds out once per call and kernels size their grids by.
inline cudaError_t multiprocessors(uint32_t& out) {
  int device = 0, count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  out = static_cast<uint32_t>(count);
  return error;
}

// Of the compute capability.
inline cudaError_t compute_major(uint32_t& out) {
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  out = static_cast<uint32_t>(major);
  return error;
}

// What a block may have, less what the kernels have besides what they ask for at the launch.
inline cudaError_t shared_limit(uint32_t& out) {
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  out = static_cast<uint32_t>(std::max(most - 1024, 0));
  return error;
}

// ... where two blocks are to have room on a multiprocessor.
inline cudaError_t shared_limit_of_two(uint32_t& out) {
  int device = 0, all = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  out = static_cast<uint32_t>(std::max(all / 2 - 2048, 0));
  return error;
}

// Of 64 columns, in a warp's share of a step of the matvec.
inline uint32_t share_tiles(WeightFormat format, uint32_t major) {
  if (format == WeightFormat::int4) return major < 9 ? 4 : 2;
  return format == WeightFormat::int8 ? 2 : 1;
}

// More than 48 KiB of shared memory have to be asked for, per kernel and device; `seen` remembers the devices.
// `two_blocks`: of the kernel on a multiprocessor; all of its shared memory is asked for then.
template <class Kernel>
cudaError_t allow_shared(Kernel kernel, uint32_t bytes, std::atomic<uint64_t>& seen, bool two_blocks = false) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const uint64_t bit = uint64_t{1} << (device & 63);
  if ((seen.load(std::memory_order_relaxed) & bit) != 0) return cudaSuccess;
  uint32_t most = 0;
  error = shared_limit(most);
  if (error != cudaSuccess) return error;
  if (bytes > most) return cudaErrorInvalidConfiguration;
  error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(most));
  if (error == cudaSuccess && two_blocks) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess) seen.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

template <class Args>
cudaError_t launch_grid(void (*kernel)(Args), const Args& args, dim3 grid, uint32_t threads, uint32_t shared_bytes,
                        const MatmulCall& call, cudaStream_t stream) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = call.programmatic ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args);
}

struct MatvecArgs;
struct MatmulArgs;

// M <= 8. `args` is filled in but for what depends on the format. `fold`: 32, 64, 128, int4 and int8 only.
cudaError_t matvec_int4(MatvecArgs& args, uint32_t fold, const MatmulCall& call, cudaStream_t stream);
cudaError_t matvec_int8(MatvecArgs& args, uint32_t fold, const MatmulCall& call, cudaStream_t stream);
cudaError_t matvec_half(MatvecArgs& args, bool bf16, const MatmulCall& call, cudaStream_t stream);

// Any M.
cudaError_t matmul_int4(MatmulArgs& args, const MatmulCall& call, cudaStream_t stream);
cudaError_t matmul_int8(MatmulArgs& args, const MatmulCall& call, cudaStream_t stream);
cudaError_t matmul_half(MatmulArgs& args, bool bf16, const MatmulCall& call, cudaStream_t stream);

// 9 rows and more on compute capability 9.0. `serves`: the device and the weights are such; `workspace_bytes`: behind
// the counters.
bool wgmma_serves(const MatmulCall& call);
uint64_t wgmma_workspace_bytes(const MatmulCall& call);
cudaError_t matmul_int4_wgmma(const MatmulCall& call, cudaStream_t stream);

// f32, one part.
cudaError_t matmul_float(const MatmulCall& call, const MatmulPart& part, cudaStream_t stream);

}  // namespace sluice::cuda
