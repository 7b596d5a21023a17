// SPDX-License-Identifier: Apache-2.0
// The shaders (shaders/) as pipelines, and one function per operation that records it.
//
// A pipeline is made when its variant is first recorded and kept. Functions record into a command buffer, allocate
// nothing but pipelines, put no barrier, and return the driver's error. Arguments are in shaders/arguments.h;
// addresses must be of buffers of the same device, 16-byte aligned (`values`, `x`) or 4-byte aligned (all others). One
// thread at a time.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <span>

#include "backend/vulkan/device.hpp"
#include "backend/vulkan/queue.hpp"
#include "shaders/arguments.h"

namespace sluice::backend::vulkan {

enum class WeightFormat : uint8_t { int4, int8, f16, bf16, f32 };
enum class Offsets : uint8_t { none, zeros, bias };   // of int4: (q - 8) s, (q - z) s, q s + b

// Columns from one row of X to the next (shaders/arguments.h).
constexpr uint32_t x_stride(uint32_t columns) { return (columns + 63) / 64 * 64; }
// Place of a column in a row of X.
constexpr uint32_t x_place(uint32_t column) {
  return column / 16 * 16 + column % 8 / 2 * 4 + column % 16 / 8 * 2 + column % 2;
}

inline constexpr uint32_t kMostHeadDim = 256;
// Up to this many rows a row has the same bits whatever shares its pass.
inline constexpr uint32_t kSplitRows = 8;
// Bytes of the half form of X, and of its scales.
constexpr uint64_t x_half_bytes(uint64_t rows, uint32_t columns) { return (rows + 7) / 8 * 8 * x_stride(columns) * 2; }
constexpr uint64_t x_scale_bytes(uint64_t rows, uint32_t columns) { return (rows + 7) / 8 * 8 * x_stride(columns) / 64 * 4; }
// Positions that one workgroup of attention takes in a step; chunks are multiples of it.
inline constexpr uint32_t kAttentionStep = 128;

class Kernels {
 public:
  // `device` and `queue` must outlive the object; the queue is used in this call only. Error: out_of_memory, device.
  static Result<std::unique_ptr<Kernels>> create(Device& device, Queue& queue);
  ~Kernels();
  Kernels(const Kernels&) = delete;
  Kernels& operator=(const Kernels&) = delete;

  // Whether INT4 products go by matrix instructions where they are given the half form of X.
  bool uses_matrices() const { return uses_matrices_; }
  void use_matrices(bool use) { uses_matrices_ = use; }   // for comparison
  VkResult halve_x(VkCommandBuffer commands, const shaders::HalveArguments& args, uint32_t rows);
  VkResult matvec(VkCommandBuffer commands, WeightFormat format, Offsets offsets, const shaders::MatvecArguments& args);
  VkResult rms_norm(VkCommandBuffer commands, const shaders::RmsNormArguments& args, uint32_t rows);
  // head_dim: even, at most kMostHeadDim.
  VkResult head_norm_rope(VkCommandBuffer commands, const shaders::RopeArguments& args, uint32_t head_dim, uint32_t rows);
  // `chunks` workgroups a row and KV head; args.chunks is the stride of the partial results.
  VkResult attention(VkCommandBuffer commands, const shaders::AttentionArguments& args, uint32_t head_dim, uint32_t rows,
                     uint32_t chunks);
  VkResult attention_merge(VkCommandBuffer commands, const shaders::AttentionMergeArguments& args, uint32_t rows);
  VkResult swiglu(VkCommandBuffer commands, const shaders::SwigluArguments& args, uint32_t rows);
  VkResult select_rows(VkCommandBuffer commands, const shaders::SelectRowsArguments& args);
  VkResult gather_columns(VkCommandBuffer commands, const shaders::GatherColumnsArguments& args, uint32_t rows);
  VkResult memory_read(VkCommandBuffer commands, const shaders::MemoryReadArguments& args);

 private:
  enum class Shader : uint8_t {
    attention, attention_merge, gather_columns, halve_x, head_norm_rope, matmul_int4_matrix, matvec_f16, matvec_f32, matvec_int4,
    matvec_int4_matrix, matvec_int8, memory_read, rms_norm, select_rows, swiglu, count
  };
  static constexpr size_t kMostConstants = 4;
  using Constants = std::array<uint32_t, kMostConstants>;   // specialization constants 0, 1, ...
  struct Grid {
    uint32_t x = 1, y = 1, z = 1;
  };

  explicit Kernels(Device& device) : device_(device) {}
  static std::span<const uint32_t> words_of(Shader shader);
  static bool needs_matrices(Shader shader);
  VkResult int4(VkCommandBuffer commands, Offsets offsets, const shaders::MatvecArguments& args, uint32_t threads);
  VkResult pipeline(Shader shader, const Constants& constants, VkPipeline& out);
  VkResult dispatch(VkCommandBuffer commands, Shader shader, const Constants& constants, std::span<const std::byte> arguments,
                    const Grid& grid);
  template <class Arguments>
  VkResult dispatch(VkCommandBuffer commands, Shader shader, const Constants& constants, const Arguments& args,
                    const Grid& grid) {
    static_assert(sizeof(Arguments) <= 128);
    return dispatch(commands, shader, constants, std::as_bytes(std::span(&args, 1)), grid);
  }

  Device& device_;
  bool uses_matrices_ = false;
  VkPipelineLayout layout_ = VK_NULL_HANDLE;
  std::array<VkShaderModule, static_cast<size_t>(Shader::count)> modules_{};
  std::map<std::pair<Shader, Constants>, VkPipeline> pipelines_;
};

}  // namespace sluice::backend::vulkan
