// SPDX-License-Identifier: Apache-2.0
#include "backend/vulkan/matrix_check.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "backend/vulkan/vulkan_error.hpp"
#include "base/half.hpp"

namespace sluice::backend::vulkan {

namespace {

// Several tiles, a group that ends inside one, outputs that do not fill a tile, and rows that do not fill one.
constexpr uint32_t kOutputs = 40, kColumns = 224, kGroup = 64, kGroups = 4, kRows = 13;
constexpr uint64_t kValueBytes = 3 * 4 * 512, kScaleBytes = uint64_t{3} * kGroups * 16 * 2;

// xorshift: the same matrix in every process.
uint32_t next(uint32_t& state) {
  state ^= state << 13;
  state ^= state >> 17;
  return state ^= state << 5;
}

// One buffer: values, scales, X, its half form and scales, and the two results.
struct Places {
  uint64_t values = 0, scales = kValueBytes, x = scales + kScaleBytes;
  uint64_t x_half = x + uint64_t{kRows} * x_stride(kColumns) * 4;
  uint64_t x_scale = x_half + x_half_bytes(kRows, kColumns);
  uint64_t results = x_scale + x_scale_bytes(kRows, kColumns);
  uint64_t result_bytes = uint64_t{kRows} * kOutputs * 4;
  uint64_t bytes = results + 2 * result_bytes;
};

void fill(const Places& places, std::byte* memory) {
  uint32_t state = 2463534242u;
  auto* values = reinterpret_cast<uint32_t*>(memory + places.values);
  for (uint64_t i = 0; i < kValueBytes / 4; ++i) values[i] = next(state);
  auto* scales = reinterpret_cast<uint16_t*>(memory + places.scales);
  for (uint64_t i = 0; i < kScaleBytes / 2; ++i) {
    scales[i] = half_from_float(static_cast<float>(static_cast<int>(next(state) % 64) - 32) / 64);
  }
  // Numbers that FP16 holds: both ways multiply the same ones.
  auto* x = reinterpret_cast<float*>(memory + places.x);
  for (uint32_t row = 0; row < kRows; ++row) {
    for (uint32_t k = 0; k < x_stride(kColumns); ++k) {
      x[row * x_stride(kColumns) + x_place(k)] =
          k < kColumns ? static_cast<float>(static_cast<int>(next(state) % 256) - 128) / 32 : 0.0f;
    }
  }
}

}  // namespace

Result<bool> matrix_variant_agrees(Device& device, Queue& queue, Kernels& kernels) {
  const Places places;
  SLUICE_TRY_ASSIGN(made, device.create_buffer(places.bytes, MemoryKind::readback, "checking matrix instructions"));
  Buffer buffer = made;
  fill(places, buffer.mapped);
  VkCommandBuffer commands = VK_NULL_HANDLE;
  VkResult code = queue.allocate(commands);
  bool agree = true;
  for (const uint32_t rows : {5u, kRows}) {
    shaders::MatvecArguments args{.values = buffer.address + places.values,
                                  .scales = buffer.address + places.scales,
                                  .x = buffer.address + places.x,
                                  .out_rows = buffer.address + places.results,
                                  .outputs = kOutputs,
                                  .columns = kColumns,
                                  .groups = kGroups,
                                  .group_columns = kGroup,
                                  .rows = rows,
                                  .scale = 1};
    if (code == VK_SUCCESS) code = queue.begin(commands, true);
    if (code != VK_SUCCESS) break;
    kernels.use_matrices(false);
    code = kernels.matvec(commands, WeightFormat::int4, Offsets::none, args);
    args.x_half = buffer.address + places.x_half;
    args.x_scale = buffer.address + places.x_scale;
    args.out_rows += places.result_bytes;
    VkResult variant = kernels.halve_x(commands, {.x = args.x, .x_half = args.x_half, .x_scale = args.x_scale,
                                                  .blocks = x_stride(kColumns) / 64}, rows);
    full_barrier(device.vk, commands);
    kernels.use_matrices(true);
    if (variant == VK_SUCCESS) variant = kernels.matvec(commands, WeightFormat::int4, Offsets::none, args);
    kernels.use_matrices(false);
    host_barrier(device.vk, commands);
    if (code == VK_SUCCESS) code = queue.end(commands);
    agree = agree && variant == VK_SUCCESS;
    if (code != VK_SUCCESS || !agree) break;
    code = queue.submit(commands, {});
    if (code == VK_SUCCESS) code = queue.wait(queue.submitted());
    if (code != VK_SUCCESS) break;
    const auto* plain = reinterpret_cast<const float*>(buffer.mapped + places.results);
    const auto* matrix = reinterpret_cast<const float*>(buffer.mapped + places.results + places.result_bytes);
    for (uint32_t i = 0; i < rows * kOutputs; ++i) {
      // 224 products of up to 8 * 0.5 * 4: rounding is below 1e-3, an element out of place is not.
      agree = agree && std::fabs(plain[i] - matrix[i]) <= 1e-3f;
    }
  }
  queue.free(commands);
  device.destroy(buffer);
  if (code != VK_SUCCESS) return fail(error_of(code, fmt::format("{}: checking matrix instructions", device.name())));
  return agree;
}

}  // namespace sluice::backend::vulkan
