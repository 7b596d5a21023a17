// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/cuda_error.hpp"

#include <fmt/format.h>

namespace sluice::backend::cuda {

namespace {

constexpr const char* kOrCpu = "; --backend cpu runs without a GPU";

std::string version(int number) { return fmt::format("{}.{}", number / 1000, number % 1000 / 10); }

// The runtime reports an absent driver and one that is too old alike.
std::string driver_problem(const Surroundings& around) {
  if (around.driver == 0) return fmt::format("no NVIDIA driver is installed (libcuda.so.1 was not found){}", kOrCpu);
  return fmt::format("the NVIDIA driver is too old: it supports CUDA {}, and this build needs {}; update the driver{}",
                     version(around.driver), version(around.runtime), kOrCpu);
}

}  // namespace

bool is_sticky(cudaError_t code) {
  return code != cudaErrorMemoryAllocation && code != cudaErrorHostMemoryAlreadyRegistered &&
         code != cudaErrorNotSupported && code != cudaErrorInvalidValue;
}

Surroundings Surroundings::of_this_process() {
  Surroundings around;
  if (cudaDriverGetVersion(&around.driver) != cudaSuccess) around.driver = 0;
  if (cudaRuntimeGetVersion(&around.runtime) != cudaSuccess) around.runtime = 0;
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess) {
    around.architecture = fmt::format("sm_{}{}", major, minor);
  }
  cudaGetLastError();  // a question is no failure
  return around;
}

Error error_of(cudaError_t code, const std::string& what) {
  const bool asks = code == cudaErrorInsufficientDriver || code == cudaErrorNoKernelImageForDevice ||
                    code == cudaErrorInvalidDeviceFunction;
  return error_of(code, what, asks ? Surroundings::of_this_process() : Surroundings{});
}

Error error_of(cudaError_t code, const std::string& what, const Surroundings& around) {
  const int number = static_cast<int>(code);
  switch (code) {
    case cudaErrorInsufficientDriver: return {ErrorCode::not_found, driver_problem(around), number};
    case cudaErrorNoDevice:
      return {ErrorCode::not_found,
              fmt::format("the NVIDIA driver finds no device; see nvidia-smi and CUDA_VISIBLE_DEVICES{}", kOrCpu), number};
    case cudaErrorInvalidDevice:
      return {ErrorCode::not_found, fmt::format("{}: there is no such device", what), number};
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return {ErrorCode::not_found,
              fmt::format("this build has no kernels for the device's architecture, {}; build with -Dgpu_archs={} or "
                          "-Dgpu_archs=all{}", around.architecture, around.architecture, kOrCpu),
              number};
    case cudaErrorMemoryAllocation:
      return {ErrorCode::out_of_memory, fmt::format("{}: the GPU has not enough free memory", what), number};
    default:
      return {ErrorCode::device,
              fmt::format("{}: {} ({}); the GPU cannot be used again by this process, start a new one", what,
                          cudaGetErrorString(code), cudaGetErrorName(code)),
              number};
  }
}

}  // namespace sluice::backend::cuda
