// SPDX-License-Identifier: Apache-2.0
// The operations of a pass on a Vulkan device: which shader takes which memory. The arithmetic is in shaders/.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "backend/vulkan/vulkan_backend.hpp"
#include "base/check.hpp"
#include "base/units.hpp"

namespace sluice::backend::vulkan {

using storage::Scheme;

namespace {

WeightFormat format_of(Scheme scheme) {
  switch (scheme) {
    case Scheme::int4: return WeightFormat::int4;
    case Scheme::int8: return WeightFormat::int8;
    case Scheme::f16: return WeightFormat::f16;
    case Scheme::bf16: return WeightFormat::bf16;
    case Scheme::f32: return WeightFormat::f32;
  }
  return WeightFormat::f32;
}

uint64_t value_bytes(const Weight& weight) {
  const uint64_t tiles = ceil_div(weight.rows, 16);
  switch (weight.scheme) {
    case Scheme::int4: return tiles * ceil_div(weight.cols, 64) * 512;
    case Scheme::int8: return tiles * ceil_div(weight.cols, 64) * 1024;
    case Scheme::f16:
    case Scheme::bf16: return tiles * ceil_div(weight.cols, 16) * 512;
    case Scheme::f32: return uint64_t{weight.rows} * weight.cols * sizeof(float);
  }
  return 0;
}

const char* name_of(OpKind kind) {
  switch (kind) {
    case OpKind::rms_norm: return "RMSNorm";
    case OpKind::matmul: return "a matrix product";
    case OpKind::head_norm_rope: return "RoPE";
    case OpKind::attention: return "attention";
    case OpKind::swiglu: return "SwiGLU";
    case OpKind::select_rows: return "selecting rows";
  }
  return "an operation";
}

}  // namespace

VkDeviceAddress VulkanBackend::vector(const Op& op, int index, uint32_t width) const {
  return op.has_vector[index] ? at(op.vectors[index], uint64_t{width} * sizeof(float)) : 0;
}

// Every command needs what the one before it wrote. The first one of a pass clears the queries of all.
Status VulkanBackend::record(const Command& command, VkCommandBuffer commands) {
  const Functions& vk = device_->vk;
  const bool timed = command.query != PassClock::kNoQuery;
  if (timed && command.kind == CommandKind::begin_pass) vk.vkCmdResetQueryPool(commands, queries_, 0, clock_.queries());
  uint32_t query = command.query;
  // The segment's begin: its submission waits for the event before any of its commands.
  if (timed && command.awaited) vk.vkCmdWriteTimestamp(commands, VK_PIPELINE_STAGE_TOP_OF_PIPE_BIT, queries_, query++);
  full_barrier(vk, commands);
  SLUICE_TRY(record_work(command, commands));
  if (timed) vk.vkCmdWriteTimestamp(commands, VK_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT, queries_, query);
  return {};
}

Status VulkanBackend::record_work(const Command& command, VkCommandBuffer commands) {
  if (command.kind == CommandKind::begin_pass) {
    begin(commands, command.rows);
    return {};
  }
  if (command.kind == CommandKind::copy_logits) {
    const VkBufferCopy region{.srcOffset = scratch_.slots[static_cast<size_t>(Slot::logits)], .dstOffset = 0,
                              .size = uint64_t{command.rows} * shape_.vocab * sizeof(float)};
    device_->vk.vkCmdCopyBuffer(commands, scratch_memory_.handle, readback_.handle, 1, &region);
    host_barrier(device_->vk, commands);
    return {};
  }
  const Op& op = command.op;
  VkResult code = VK_ERROR_UNKNOWN;
  switch (op.kind) {
    case OpKind::rms_norm: code = rms_norm(commands, op, command.rows); break;
    case OpKind::matmul: code = matmul(commands, op, command.rows); break;
    case OpKind::head_norm_rope: code = head_norm_rope(commands, op, command.rows); break;
    case OpKind::attention: code = attention(commands, op, command.rows); break;
    case OpKind::swiglu: code = swiglu(commands, command.rows); break;
    case OpKind::select_rows: code = select_rows(commands, command.rows); break;
  }
  if (code == VK_SUCCESS) [[likely]] return {};
  return check(code, fmt::format("recording {} of layer {}", name_of(op.kind), op.layer));
}

void VulkanBackend::begin(VkCommandBuffer commands, uint32_t rows) const {
  const VkBufferCopy regions[] = {
      {.srcOffset = 0, .dstOffset = scratch_.slots[static_cast<size_t>(Slot::residual)],
       .size = uint64_t{rows} * shape_.hidden * sizeof(float)},
      {.srcOffset = upload_table_, .dstOffset = scratch_.table, .size = uint64_t{3} * shape_.max_rows * sizeof(uint32_t)},
      {.srcOffset = upload_angles_, .dstOffset = scratch_.angles, .size = uint64_t{rows} * shape_.rotary_dims * sizeof(float)}};
  const uint32_t count = shape_.rotary_dims > 0 ? 3 : 2;
  device_->vk.vkCmdCopyBuffer(commands, upload_.handle, scratch_memory_.handle, count, regions);
}

VkResult VulkanBackend::rms_norm(VkCommandBuffer commands, const Op& op, uint32_t rows) const {
  SLUICE_CHECK(op.in == Slot::residual && op.out[0] == Slot::normed);
  return kernels_->rms_norm(commands, {.in_rows = slot(Slot::residual),
                                       .weight = vector(op, 0, shape_.hidden),
                                       .x = slot(Slot::normed),
                                       .width = shape_.hidden,
                                       .has_weight = op.has_vector[0],
                                       .eps = shape_.norm_eps}, rows);
}

// Matrices that take the input in the same order share its gathered and its half form.
VkResult VulkanBackend::matmul(VkCommandBuffer commands, const Op& op, uint32_t rows) const {
  SLUICE_CHECK(op.weight_count >= 1 && op.weight_count <= kMaxWeights);
  SLUICE_CHECK(op.in == Slot::normed || op.in == Slot::attended || op.in == Slot::gate);
  const VkDeviceAddress x = op.in == Slot::gate ? scratch(scratch_.gate_x) : slot(op.in);
  for (int first = 0, last = 0; first < op.weight_count; first = last) {
    const Weight& weight = op.weights[first];
    for (last = first + 1; last < op.weight_count && same_order(weight, op.weights[last]);) ++last;
    if (first > 0) full_barrier(device_->vk, commands);   // those before may still read what is written here
    VkDeviceAddress ordered = x;
    if (weight.has_perm) {
      SLUICE_CHECK(shape_.gathers && weight.cols == width(op.in));
      ordered = scratch(scratch_.gathered);
      const VkResult code = kernels_->gather_columns(
          commands, {.x = x, .perm = at(weight.perm, uint64_t{weight.cols} * sizeof(uint32_t)), .gathered = ordered,
                     .width = weight.cols}, rows);
      if (code != VK_SUCCESS) return code;
      full_barrier(device_->vk, commands);
    }
    if (const VkResult code = multiply(commands, op, first, last, ordered, rows); code != VK_SUCCESS) return code;
  }
  return VK_SUCCESS;
}

// Weights [first, last) of the operation. They write different slots: no barrier between them.
VkResult VulkanBackend::multiply(VkCommandBuffer commands, const Op& op, int first, int last, VkDeviceAddress x,
                                 uint32_t rows) const {
  const bool any_int4 = std::any_of(op.weights + first, op.weights + last,
                                    [](const Weight& weight) { return weight.scheme == Scheme::int4; });
  const bool halved = any_int4 && kernels_->uses_matrices();
  if (halved) {
    const VkResult code = kernels_->halve_x(commands, {.x = x, .x_half = scratch(scratch_.x_half),
                                                       .x_scale = scratch(scratch_.x_scale),
                                                       .blocks = x_stride(width(op.in)) / 64}, rows);
    if (code != VK_SUCCESS) return code;
    full_barrier(device_->vk, commands);
  }
  for (int i = first; i < last; ++i) {
    const Weight& weight = op.weights[i];
    SLUICE_CHECK(weight.cols == width(op.in) && weight.rows == width(op.out[i]) && op.in != op.out[i]);
    SLUICE_CHECK(op.out[i] != Slot::logits || rows <= shape_.max_logit_rows);
    shaders::MatvecArguments args{.values = at(weight.values, value_bytes(weight)),
                                  .x = x,
                                  .vector = vector(op, i, weight.rows),
                                  .out_rows = slot(op.out[i]),
                                  .x_half = halved ? scratch(scratch_.x_half) : 0,
                                  .x_scale = scratch(scratch_.x_scale),
                                  .outputs = weight.rows,
                                  .columns = weight.cols,
                                  .rows = rows,
                                  .has_vector = op.has_vector[i],
                                  .accumulate = op.accumulate,
                                  .scale = weight.scale};
    Offsets offsets = Offsets::none;
    if (weight.scheme == Scheme::int4 || weight.scheme == Scheme::int8) {
      args.group_columns = weight.group_elems;
      args.groups = static_cast<uint32_t>(ceil_div(weight.cols, weight.group_elems));
      const uint64_t parameters = ceil_div(weight.rows, 16) * args.groups * 16;
      args.scales = at(weight.scales, parameters * 2);
      if (weight.has_zeros) args.offsets = at(weight.zeros, parameters), offsets = Offsets::zeros;
      if (weight.has_bias) args.offsets = at(weight.bias, parameters * 2), offsets = Offsets::bias;
    }
    const VkResult code = kernels_->matvec(commands, format_of(weight.scheme), offsets, args);
    if (code != VK_SUCCESS) return code;
  }
  return VK_SUCCESS;
}

// Also stores k and v.
VkResult VulkanBackend::head_norm_rope(VkCommandBuffer commands, const Op& op, uint32_t rows) const {
  const uint32_t norms = (op.has_vector[0] ? 1u : 0u) | (op.has_vector[1] ? 2u : 0u);
  return kernels_->head_norm_rope(commands, {.q = slot(Slot::q),
                                             .k = slot(Slot::k),
                                             .v = slot(Slot::v),
                                             .q_norm = vector(op, 0, shape_.head_dim),
                                             .k_norm = vector(op, 1, shape_.head_dim),
                                             .angles = scratch(scratch_.angles),
                                             .table = scratch(scratch_.table),
                                             .cache = kv_.address,
                                             .max_rows = shape_.max_rows,
                                             .heads = shape_.heads,
                                             .kv_heads = shape_.kv_heads,
                                             .pairs = shape_.rotary_dims / 2,
                                             .layer = op.layer,
                                             .layers = shape_.layers,
                                             .blocks_per_session = shape_.context / kKvBlockTokens,
                                             .norms = norms,
                                             .eps = shape_.norm_eps}, shape_.head_dim, rows);
}

// Few rows: the past is cut into chunks, so that the device has enough to do. Many: one workgroup goes through all of
// it.
VkResult VulkanBackend::attention(VkCommandBuffer commands, const Op& op, uint32_t rows) const {
  const uint32_t chunks = commands_->kind().chunks;
  const uint32_t stride = chunks == 0 ? 0 : scratch_.chunks;
  const VkResult code =
      kernels_->attention(commands, {.q = slot(Slot::q),
                                     .attended = slot(Slot::attended),
                                     .partial_out = scratch(scratch_.partial_out),
                                     .partial_sum = scratch(scratch_.partial_sum),
                                     .table = scratch(scratch_.table),
                                     .cache = kv_.address,
                                     .max_rows = shape_.max_rows,
                                     .heads = shape_.heads,
                                     .kv_heads = shape_.kv_heads,
                                     .layer = op.layer,
                                     .layers = shape_.layers,
                                     .blocks_per_session = shape_.context / kKvBlockTokens,
                                     .x_stride = x_stride(width(Slot::attended)),
                                     .chunk_positions = scratch_.chunk_positions,
                                     .chunks = stride,
                                     .scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(shape_.head_dim)))},
                          shape_.head_dim, rows, std::max(chunks, 1u));
  if (code != VK_SUCCESS || chunks == 0) return code;
  full_barrier(device_->vk, commands);
  return kernels_->attention_merge(commands, {.partial_out = scratch(scratch_.partial_out),
                                              .partial_sum = scratch(scratch_.partial_sum),
                                              .attended = slot(Slot::attended),
                                              .table = scratch(scratch_.table),
                                              .max_rows = shape_.max_rows,
                                              .heads = shape_.heads,
                                              .head_dim = shape_.head_dim,
                                              .x_stride = x_stride(width(Slot::attended)),
                                              .chunk_positions = scratch_.chunk_positions,
                                              .chunks = stride}, rows);
}

VkResult VulkanBackend::swiglu(VkCommandBuffer commands, uint32_t rows) const {
  return kernels_->swiglu(commands, {.gate = slot(Slot::gate), .up = slot(Slot::up), .x = scratch(scratch_.gate_x),
                                     .width = shape_.ffn}, rows);
}

VkResult VulkanBackend::select_rows(VkCommandBuffer commands, uint32_t rows) const {
  return kernels_->select_rows(commands, {.rows = slot(Slot::residual), .table = scratch(scratch_.table),
                                          .max_rows = shape_.max_rows, .selected = rows, .width = shape_.hidden});
}

}  // namespace sluice::backend::vulkan
