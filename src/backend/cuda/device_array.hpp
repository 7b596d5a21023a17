// SPDX-License-Identifier: Apache-2.0
// Memory of the current device that goes with its owner.
#pragma once

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <utility>

#include "backend/cuda/cuda_error.hpp"
#include "base/units.hpp"
#include "sluice/result.hpp"

namespace sluice::backend::cuda {

template <class T>
class DeviceArray {
 public:
  DeviceArray() = default;
  DeviceArray(DeviceArray&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}
  DeviceArray& operator=(DeviceArray&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~DeviceArray() { cudaFree(data_); }

  // Uninitialised. Errors: out_of_memory, device.
  static Result<DeviceArray> create(size_t size) {
    DeviceArray self;
    void* memory = nullptr;
    const cudaError_t code = cudaMalloc(&memory, std::max<size_t>(size, 1) * sizeof(T));
    if (code != cudaSuccess) {
      cudaGetLastError();
      return fail(error_of(code, fmt::format("allocating {}", format_bytes(size * sizeof(T)))));
    }
    self.data_ = static_cast<T*>(memory);
    self.size_ = size;
    return self;
  }

  T* data() const { return data_; }
  size_t size() const { return size_; }
  size_t bytes() const { return size_ * sizeof(T); }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace sluice::backend::cuda
