// SPDX-License-Identifier: Apache-2.0
#include "backend/vulkan/kernels.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "backend/vulkan/matrix_check.hpp"
#include "backend/vulkan/vulkan_error.hpp"
#include "base/check.hpp"
#include "base/units.hpp"

namespace sluice::backend::vulkan {

namespace {

constexpr uint32_t kArgumentBytes = 128;

constexpr uint32_t kAttention[] = {
#include "shaders/attention.inc"
};
constexpr uint32_t kAttentionMerge[] = {
#include "shaders/attention_merge.inc"
};
constexpr uint32_t kGatherColumns[] = {
#include "shaders/gather_columns.inc"
};
constexpr uint32_t kHalveX[] = {
#include "shaders/halve_x.inc"
};
constexpr uint32_t kHeadNormRope[] = {
#include "shaders/head_norm_rope.inc"
};
constexpr uint32_t kMatmulInt4Matrix[] = {
#include "shaders/matmul_int4_matrix.inc"
};
constexpr uint32_t kMatvecF16[] = {
#include "shaders/matvec_f16.inc"
};
constexpr uint32_t kMatvecF32[] = {
#include "shaders/matvec_f32.inc"
};
constexpr uint32_t kMatvecInt4[] = {
#include "shaders/matvec_int4.inc"
};
constexpr uint32_t kMatvecInt4Matrix[] = {
#include "shaders/matvec_int4_matrix.inc"
};
constexpr uint32_t kMatvecInt8[] = {
#include "shaders/matvec_int8.inc"
};
constexpr uint32_t kMemoryRead[] = {
#include "shaders/memory_read.inc"
};
constexpr uint32_t kRmsNorm[] = {
#include "shaders/rms_norm.inc"
};
constexpr uint32_t kSelectRows[] = {
#include "shaders/select_rows.inc"
};
constexpr uint32_t kSwiglu[] = {
#include "shaders/swiglu.inc"
};

uint32_t blocks(uint64_t count, uint32_t by) { return static_cast<uint32_t>(ceil_div(count, by)); }

}  // namespace

std::span<const uint32_t> Kernels::words_of(Shader shader) {
  switch (shader) {
    case Shader::attention: return kAttention;
    case Shader::attention_merge: return kAttentionMerge;
    case Shader::gather_columns: return kGatherColumns;
    case Shader::halve_x: return kHalveX;
    case Shader::head_norm_rope: return kHeadNormRope;
    case Shader::matmul_int4_matrix: return kMatmulInt4Matrix;
    case Shader::matvec_f16: return kMatvecF16;
    case Shader::matvec_f32: return kMatvecF32;
    case Shader::matvec_int4: return kMatvecInt4;
    case Shader::matvec_int4_matrix: return kMatvecInt4Matrix;
    case Shader::matvec_int8: return kMatvecInt8;
    case Shader::memory_read: return kMemoryRead;
    case Shader::rms_norm: return kRmsNorm;
    case Shader::select_rows: return kSelectRows;
    case Shader::swiglu: return kSwiglu;
    case Shader::count: break;
  }
  return {};
}

bool Kernels::needs_matrices(Shader shader) {
  return shader == Shader::halve_x || shader == Shader::matmul_int4_matrix || shader == Shader::matvec_int4_matrix;
}

Result<std::unique_ptr<Kernels>> Kernels::create(Device& device, Queue& queue) {
  std::unique_ptr<Kernels> self(new Kernels(device));
  const VkPushConstantRange range{.stageFlags = VK_SHADER_STAGE_COMPUTE_BIT, .offset = 0, .size = kArgumentBytes};
  const VkPipelineLayoutCreateInfo layout{.sType = VK_STRUCTURE_TYPE_PIPELINE_LAYOUT_CREATE_INFO,
                                          .pushConstantRangeCount = 1,
                                          .pPushConstantRanges = &range};
  VkResult code = device.vk.vkCreatePipelineLayout(device.handle(), &layout, nullptr, &self->layout_);
  for (size_t i = 0; i < self->modules_.size() && code == VK_SUCCESS; ++i) {
    if (needs_matrices(static_cast<Shader>(i)) && !device.has_matrices()) continue;
    const std::span<const uint32_t> words = words_of(static_cast<Shader>(i));
    const VkShaderModuleCreateInfo module{.sType = VK_STRUCTURE_TYPE_SHADER_MODULE_CREATE_INFO,
                                          .codeSize = words.size_bytes(),
                                          .pCode = words.data()};
    code = device.vk.vkCreateShaderModule(device.handle(), &module, nullptr, &self->modules_[i]);
  }
  if (code != VK_SUCCESS) return fail(error_of(code, fmt::format("{}: loading shaders", device.name())));
  if (device.has_matrices()) {
    SLUICE_TRY_ASSIGN(agree, matrix_variant_agrees(device, queue, *self));
    self->uses_matrices_ = agree;
  }
  return self;
}

Kernels::~Kernels() {
  const Functions& vk = device_.vk;
  for (const auto& [key, pipeline] : pipelines_) vk.vkDestroyPipeline(device_.handle(), pipeline, nullptr);
  for (const VkShaderModule module : modules_) {
    if (module != VK_NULL_HANDLE) vk.vkDestroyShaderModule(device_.handle(), module, nullptr);
  }
  if (layout_ != VK_NULL_HANDLE) vk.vkDestroyPipelineLayout(device_.handle(), layout_, nullptr);
}

VkResult Kernels::pipeline(Shader shader, const Constants& constants, VkPipeline& out) {
  const auto found = pipelines_.find({shader, constants});
  if (found != pipelines_.end()) {
    out = found->second;
    return VK_SUCCESS;
  }
  // A shader ignores the constants that it does not declare.
  std::array<VkSpecializationMapEntry, kMostConstants> entries;
  for (uint32_t i = 0; i < entries.size(); ++i) {
    entries[i] = {.constantID = i, .offset = i * uint32_t{sizeof(uint32_t)}, .size = sizeof(uint32_t)};
  }
  const VkSpecializationInfo special{.mapEntryCount = kMostConstants, .pMapEntries = entries.data(),
                                     .dataSize = sizeof constants, .pData = constants.data()};
  const VkComputePipelineCreateInfo info{
      .sType = VK_STRUCTURE_TYPE_COMPUTE_PIPELINE_CREATE_INFO,
      .stage = {.sType = VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_CREATE_INFO,
                .stage = VK_SHADER_STAGE_COMPUTE_BIT,
                .module = modules_[static_cast<size_t>(shader)],
                .pName = "main",
                .pSpecializationInfo = &special},
      .layout = layout_};
  const VkResult code = device_.vk.vkCreateComputePipelines(device_.handle(), VK_NULL_HANDLE, 1, &info, nullptr, &out);
  if (code == VK_SUCCESS) pipelines_.emplace(std::pair(shader, constants), out);
  return code;
}

VkResult Kernels::dispatch(VkCommandBuffer commands, Shader shader, const Constants& constants,
                           std::span<const std::byte> arguments, const Grid& grid) {
  VkPipeline pipe = VK_NULL_HANDLE;
  const VkResult code = pipeline(shader, constants, pipe);
  if (code != VK_SUCCESS) return code;
  const Functions& vk = device_.vk;
  const uint32_t* most = device_.limits().maxComputeWorkGroupCount;
  SLUICE_CHECK(grid.x <= most[0] && grid.y <= most[1] && grid.z <= most[2]);
  vk.vkCmdBindPipeline(commands, VK_PIPELINE_BIND_POINT_COMPUTE, pipe);
  vk.vkCmdPushConstants(commands, layout_, VK_SHADER_STAGE_COMPUTE_BIT, 0, static_cast<uint32_t>(arguments.size()),
                        arguments.data());
  vk.vkCmdDispatch(commands, grid.x, grid.y, grid.z);
  return VK_SUCCESS;
}

VkResult Kernels::matvec(VkCommandBuffer commands, WeightFormat format, Offsets offsets, const shaders::MatvecArguments& args) {
  // Slices of K that a workgroup adds up. By the shape of W alone: the order of additions must not depend on the rows.
  const uint32_t threads = args.columns >= 2048 ? 256 : 128;
  if (format == WeightFormat::int4) return int4(commands, offsets, args, threads);
  uint32_t rows = 1;
  while (rows < std::min(args.rows, kSplitRows)) rows *= 2;
  const Grid grid{.x = blocks(args.outputs, 16), .y = blocks(args.rows, rows)};
  switch (format) {
    case WeightFormat::int8: return dispatch(commands, Shader::matvec_int8, {threads, rows}, args, grid);
    case WeightFormat::f16: return dispatch(commands, Shader::matvec_f16, {threads, rows, 0}, args, grid);
    case WeightFormat::bf16: return dispatch(commands, Shader::matvec_f16, {threads, rows, 1}, args, grid);
    case WeightFormat::f32: return dispatch(commands, Shader::matvec_f32, {threads, rows}, args, grid);
    case WeightFormat::int4: break;
  }
  return VK_ERROR_UNKNOWN;
}

VkResult Kernels::int4(VkCommandBuffer commands, Offsets offsets, const shaders::MatvecArguments& args, uint32_t threads) {
  const uint32_t span = args.group_columns == 32 ? 32 : 64, kind = static_cast<uint32_t>(offsets);
  if (!uses_matrices_ || args.x_half == 0) {
    uint32_t rows = 1;
    while (rows < std::min(args.rows, kSplitRows)) rows *= 2;
    return dispatch(commands, Shader::matvec_int4, {threads, rows, kind, span}, args,
                    {.x = blocks(args.outputs, 16), .y = blocks(args.rows, rows)});
  }
  if (args.rows <= kSplitRows) {
    return dispatch(commands, Shader::matvec_int4_matrix, {threads, 0, kind, span}, args, {.x = blocks(args.outputs, 16)});
  }
  constexpr uint32_t kThreads = 128, kOutputs = kThreads / 32 * 32;
  const uint32_t row_tiles = args.rows <= 16 ? 2 : args.rows <= 32 ? 4 : 8;
  return dispatch(commands, Shader::matmul_int4_matrix, {kThreads, row_tiles, kind, span}, args,
                  {.x = blocks(args.outputs, kOutputs), .y = blocks(args.rows, 8 * row_tiles)});
}

VkResult Kernels::halve_x(VkCommandBuffer commands, const shaders::HalveArguments& args, uint32_t rows) {
  return dispatch(commands, Shader::halve_x, {}, args, {.x = blocks(args.blocks, 8), .y = rows});
}

VkResult Kernels::rms_norm(VkCommandBuffer commands, const shaders::RmsNormArguments& args, uint32_t rows) {
  return dispatch(commands, Shader::rms_norm, {}, args, {.x = rows});
}

VkResult Kernels::head_norm_rope(VkCommandBuffer commands, const shaders::RopeArguments& args, uint32_t head_dim,
                                 uint32_t rows) {
  return dispatch(commands, Shader::head_norm_rope, {head_dim}, args, {.x = args.heads + args.kv_heads, .y = rows});
}

VkResult Kernels::attention(VkCommandBuffer commands, const shaders::AttentionArguments& args, uint32_t head_dim,
                            uint32_t rows, uint32_t chunks) {
  const uint32_t group = args.heads / args.kv_heads;
  const uint32_t heads = blocks(group, blocks(group, 8));   // of a workgroup, evenly
  return dispatch(commands, Shader::attention, {head_dim, heads}, args,
                  {.x = args.kv_heads * blocks(group, heads), .y = rows, .z = chunks});
}

VkResult Kernels::attention_merge(VkCommandBuffer commands, const shaders::AttentionMergeArguments& args, uint32_t rows) {
  return dispatch(commands, Shader::attention_merge, {}, args, {.x = args.heads, .y = rows});
}

VkResult Kernels::swiglu(VkCommandBuffer commands, const shaders::SwigluArguments& args, uint32_t rows) {
  return dispatch(commands, Shader::swiglu, {}, args, {.x = blocks(args.width, 256), .y = rows});
}

VkResult Kernels::select_rows(VkCommandBuffer commands, const shaders::SelectRowsArguments& args) {
  return dispatch(commands, Shader::select_rows, {}, args, {.x = blocks(args.width, 256)});
}

VkResult Kernels::gather_columns(VkCommandBuffer commands, const shaders::GatherColumnsArguments& args, uint32_t rows) {
  return dispatch(commands, Shader::gather_columns, {}, args, {.x = blocks(x_stride(args.width), 256), .y = rows});
}

// Enough workgroups for any GPU to be full.
VkResult Kernels::memory_read(VkCommandBuffer commands, const shaders::MemoryReadArguments& args) {
  return dispatch(commands, Shader::memory_read, {}, args, {.x = 4096});
}

}  // namespace sluice::backend::vulkan
