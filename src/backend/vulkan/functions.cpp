// SPDX-License-Identifier: Apache-2.0
#include "backend/vulkan/functions.hpp"

#include <dlfcn.h>
#include <fmt/format.h>

#include <utility>

namespace sluice::backend::vulkan {

namespace {

Unexpected missing(const char* name) {
  return fail(ErrorCode::not_found, fmt::format("the Vulkan driver lacks {}; update it (Vulkan 1.2 is needed), or use "
                                                "--backend cpu", name));
}

}  // namespace

Result<Loader> Loader::open(const char* library, Functions& functions) {
  Loader loader;
  loader.library_ = ::dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (loader.library_ != nullptr) {
    loader.get_ = reinterpret_cast<PFN_vkGetInstanceProcAddr>(::dlsym(loader.library_, "vkGetInstanceProcAddr"));
  }
  if (loader.get_ == nullptr) {
    return fail(ErrorCode::not_found, fmt::format("no Vulkan loader is installed ({} was not found); install libvulkan1 and "
                                                  "the GPU's driver, or use --backend cpu", library));
  }
#define SLUICE_VULKAN_LOAD(name)                                                                    \
  functions.name = reinterpret_cast<PFN_##name>(loader.get_(nullptr, #name));                       \
  if (functions.name == nullptr) return missing(#name);
  SLUICE_VULKAN_GLOBAL(SLUICE_VULKAN_LOAD)
#undef SLUICE_VULKAN_LOAD
  return loader;
}

Status Loader::load_instance(VkInstance instance, Functions& functions) const {
#define SLUICE_VULKAN_LOAD(name)                                                                    \
  functions.name = reinterpret_cast<PFN_##name>(get_(instance, #name));                             \
  if (functions.name == nullptr) return missing(#name);
  SLUICE_VULKAN_INSTANCE(SLUICE_VULKAN_LOAD)
#undef SLUICE_VULKAN_LOAD
#define SLUICE_VULKAN_LOAD(name) functions.name = reinterpret_cast<PFN_##name>(get_(instance, #name));
  SLUICE_VULKAN_OPTIONAL_INSTANCE(SLUICE_VULKAN_LOAD)
#undef SLUICE_VULKAN_LOAD
  return {};
}

// Straight from the device: calls then skip the loader's dispatch.
Status Loader::load_device(VkDevice device, Functions& functions) {
#define SLUICE_VULKAN_LOAD(name)                                                                    \
  functions.name = reinterpret_cast<PFN_##name>(functions.vkGetDeviceProcAddr(device, #name));      \
  if (functions.name == nullptr) return missing(#name);
  SLUICE_VULKAN_DEVICE(SLUICE_VULKAN_LOAD)
#undef SLUICE_VULKAN_LOAD
#define SLUICE_VULKAN_LOAD(name) \
  functions.name = reinterpret_cast<PFN_##name>(functions.vkGetDeviceProcAddr(device, #name));
  SLUICE_VULKAN_OPTIONAL(SLUICE_VULKAN_LOAD)
#undef SLUICE_VULKAN_LOAD
  return {};
}

Loader::Loader(Loader&& other) noexcept
    : library_(std::exchange(other.library_, nullptr)), get_(std::exchange(other.get_, nullptr)) {}

Loader& Loader::operator=(Loader&& other) noexcept {
  std::swap(library_, other.library_);
  std::swap(get_, other.get_);
  return *this;
}

Loader::~Loader() {
  if (library_ != nullptr) ::dlclose(library_);
}

}  // namespace sluice::backend::vulkan
