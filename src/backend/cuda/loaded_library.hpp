// SPDX-License-Identifier: Apache-2.0
// A shared library opened at run time, where it is: nothing links to it.
#pragma once

#include <dlfcn.h>
#include <fmt/format.h>

#include <string>
#include <utility>

#include "sluice/result.hpp"

namespace sluice::backend::cuda {

class LoadedLibrary {
 public:
  LoadedLibrary() = default;
  LoadedLibrary(LoadedLibrary&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  LoadedLibrary& operator=(LoadedLibrary&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~LoadedLibrary() {
    if (handle_ != nullptr) ::dlclose(handle_);
  }

  // Error: not_found.
  static Result<LoadedLibrary> open(const std::string& name) {
    LoadedLibrary self;
    self.handle_ = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (self.handle_ != nullptr) return self;
    return fail(ErrorCode::not_found,
                fmt::format("{} cannot be opened: {}; LD_LIBRARY_PATH says where it is", name, ::dlerror()));
  }

  // Error: not_found.
  template <class Function>
  Status find(Function*& function, const char* symbol) const {
    function = reinterpret_cast<Function*>(::dlsym(handle_, symbol));
    if (function != nullptr) return {};
    return fail(ErrorCode::not_found, fmt::format("a library lacks what its header declares: {}", ::dlerror()));
  }

 private:
  void* handle_ = nullptr;
};

}  // namespace sluice::backend::cuda
