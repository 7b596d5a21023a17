// SPDX-License-Identifier: Apache-2.0
// Which kernel a product goes to.
#include "cuda/matmul.cuh"
#include "cuda/matmul.hpp"
#include "cuda/matvec.cuh"

namespace sluice::cuda {
namespace {

constexpr uint32_t kMatvecRows = 8;

bool is_grouped(WeightFormat format) { return format == WeightFormat::int4 || format == WeightFormat::int8; }
bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// How K is cut for the matvec (matvec.cuh): depends on K, the format, the group and the device alone, so that sums have
// one order for 1 to 8 rows.
struct Cut {
  uint32_t slabs, steps, step_tiles, fold;
};

uint32_t ceil_div(uint32_t value, uint32_t by) { return (value + by - 1) / by; }

Cut cut_columns(const MatmulWeight& weight, uint32_t major) {
  const uint32_t tiles = ceil_div(weight.cols, 64);
  const uint32_t share = share_tiles(weight.format, major);
  Cut cut = {};
  cut.slabs = ceil_div(tiles, kMatvecWarps * kSliceTiles);
  const uint32_t slab_tiles = ceil_div(tiles, cut.slabs);
  cut.steps = ceil_div(slab_tiles, kMatvecWarps * share);
  cut.step_tiles = ceil_div(slab_tiles, kMatvecWarps * cut.steps);
  cut.fold = is_grouped(weight.format) ? weight.group_elems : 64;
  if (cut.fold == 128 && cut.step_tiles % 2 != 0) cut.fold = 64;
  return cut;
}

bool valid_part(const MatmulCall& call, const MatmulPart& part) {
  const MatmulWeight& w = part.weight;
  if (w.rows == 0 || w.cols == 0 || w.cols != call.part[0].weight.cols || w.values == nullptr) return false;
  if (part.out == nullptr || part.ldo < w.rows) return false;
  if (w.format == WeightFormat::f32) return true;
  if (!aligned16(w.values) || !aligned16(w.scales) || !aligned16(w.zeros) || !aligned16(w.bias)) return false;
  if (!is_grouped(w.format)) return true;
  if (w.scales == nullptr || (w.zeros != nullptr && w.bias != nullptr)) return false;
  if (w.format == WeightFormat::int8 && (w.zeros != nullptr || w.bias != nullptr)) return false;
  return w.group_elems == 32 || w.group_elems == 64 || w.group_elems == 128;
}

bool valid(const MatmulCall& call) {
  if (call.x == nullptr || !aligned16(call.x) || call.rows == 0 || call.rows > kMatmulMaxRows) return false;
  if (call.parts == 0 || call.parts > kMatmulParts) return false;
  if (call.x_copies == 0 || (call.x_copies & (call.x_copies - 1)) != 0 || call.x_copy_elems % 8 != 0) return false;
  if (call.ldx % 64 != 0 || call.ldx < call.part[0].weight.cols) return false;
  for (uint32_t i = 0; i < call.parts; ++i) {
    if (!valid_part(call, call.part[i])) return false;
  }
  return true;
}

// Whether all parts can share a launch: the same format, groups and planes.
bool same_kind(const MatmulCall& call) {
  const MatmulWeight& first = call.part[0].weight;
  for (uint32_t i = 1; i < call.parts; ++i) {
    const MatmulWeight& w = call.part[i].weight;
    if (w.format != first.format || (is_grouped(first.format) && w.group_elems != first.group_elems)) return false;
    if ((w.zeros != nullptr) != (first.zeros != nullptr) || (w.bias != nullptr) != (first.bias != nullptr))
      return false;
  }
  return first.format != WeightFormat::f32;
}

MatmulCall part_alone(const MatmulCall& call, uint32_t part) {
  MatmulCall one = call;
  one.parts = 1;
  one.part[0] = call.part[part];
  return one;
}

uint32_t row_tiles_of(const MatmulCall& call) {
  uint32_t tiles = 0;
  for (uint32_t i = 0; i < call.parts; ++i) tiles += (call.part[i].weight.rows + 15) / 16;
  return tiles;
}

// Whether blocks of the matvec own rows (matvec.cuh). Then nobody waits for anybody, but every block reads all of x:
// worth it up to about 0.4 bytes of x for each byte of weights (measured on an H100 at K = 8192, 14336, 28672). Sums
// have the same order either way.
bool owns_rows(const Cut& cut, const MatmulCall& call, uint32_t processors) {
  return cut.slabs == 1 || 5 * call.rows * processors <= 8 * row_tiles_of(call);
}

cudaError_t run_matvec(const MatmulCall& call, cudaStream_t stream) {
  const MatmulWeight& first = call.part[0].weight;
  uint32_t processors = 0, major = 0;
  cudaError_t error = multiprocessors(processors);
  if (error == cudaSuccess) error = compute_major(major);
  if (error != cudaSuccess) return error;
  const Cut cut = cut_columns(first, major);
  MatvecArgs args = {};
  for (uint32_t i = 0, tile = 0; i < call.parts; ++i) {
    const MatmulPart& from = call.part[i];
    MatvecArgs::Part& part = args.part[i];
    part.values = static_cast<const uint8_t*>(from.weight.values);
    part.scales = reinterpret_cast<const uint8_t*>(from.weight.scales);
    part.zeros = from.weight.zeros;
    part.bias = reinterpret_cast<const uint8_t*>(from.weight.bias);
    part.out = from.out;
    part.vector = from.vector;
    part.ldo = from.ldo;
    part.rows = from.weight.rows;
    part.scale = from.weight.scale;
    part.first_tile = tile;
    tile += (from.weight.rows + 15) / 16;
  }
  args.x = call.x;
  args.x_copies = call.x_copies;
  args.x_copy_elems = call.x_copy_elems;
  args.row_scale = call.row_scale;
  args.counters = static_cast<uint32_t*>(call.workspace);
  args.partial = reinterpret_cast<float*>(static_cast<uint8_t*>(call.workspace) + kMatmulCounterBytes);
  args.ldx = call.ldx;
  args.rows = call.rows;
  args.parts = call.parts;
  args.row_tiles = row_tiles_of(call);
  args.slabs = cut.slabs;
  args.owns_rows = owns_rows(cut, call, processors);
  args.units = args.row_tiles * cut.slabs;
  args.col_tiles = (first.cols + 63) / 64;
  args.steps = cut.steps;
  args.step_tiles = cut.step_tiles;
  if (is_grouped(first.format)) {
    args.groups = (first.cols + first.group_elems - 1) / first.group_elems;
    args.group_shift = first.group_elems == 32 ? 5 : first.group_elems == 64 ? 6 : 7;
  }
  args.accumulate = call.accumulate;
  args.weights_early = call.weights_early && call.programmatic;
  switch (first.format) {
    case WeightFormat::int4:
      return matvec_int4(args, cut.fold, call, stream);
    case WeightFormat::int8:
      return matvec_int8(args, cut.fold, call, stream);
    default:
      return matvec_half(args, first.format == WeightFormat::bf16, call, stream);
  }
}

cudaError_t run_matmul(const MatmulCall& call, cudaStream_t stream) {
  const MatmulWeight& first = call.part[0].weight;
  MatmulArgs args = {};
  for (uint32_t i = 0; i < call.parts; ++i) {
    const MatmulPart& from = call.part[i];
    MatmulArgs::Part& part = args.part[i];
    part.values = static_cast<const uint8_t*>(from.weight.values);
    part.scales = from.weight.scales;
    part.zeros = from.weight.zeros;
    part.bias = from.weight.bias;
    part.out = from.out;
    part.vector = from.vector;
    part.ldo = from.ldo;
    part.rows = from.weight.rows;
    part.scale = from.weight.scale;
    part.first_block = args.blocks;
    args.blocks += (from.weight.rows + kMatmulBlockRows - 1) / kMatmulBlockRows;
  }
  args.x = call.x;
  args.row_scale = call.row_scale;
  args.ldx = call.ldx;
  args.rows = call.rows;
  args.parts = call.parts;
  args.col_tiles = (first.cols + 63) / 64;
  args.group_elems = first.group_elems;
  if (is_grouped(first.format)) args.groups = (first.cols + first.group_elems - 1) / first.group_elems;
  args.accumulate = call.accumulate;
  args.weights_early = call.weights_early && call.programmatic;
  switch (first.format) {
    case WeightFormat::int4:
      return matmul_int4(args, call, stream);
    case WeightFormat::int8:
      return matmul_int8(args, call, stream);
    default:
      return matmul_half(args, first.format == WeightFormat::bf16, call, stream);
  }
}

// One launch: parts of one kind.
cudaError_t run_together(const MatmulCall& call, cudaStream_t stream) {
  if (call.part[0].weight.format == WeightFormat::f32) return matmul_float(call, call.part[0], stream);
  if (call.workspace_bytes < matmul_workspace_bytes(call) || row_tiles_of(call) > kMatmulCounterBytes / 4) {
    return cudaErrorInvalidValue;
  }
  if (call.rows <= kMatvecRows) return run_matvec(call, stream);
  return wgmma_serves(call) ? matmul_int4_wgmma(call, stream) : run_matmul(call, stream);
}

}  // namespace

uint64_t matmul_workspace_bytes(const MatmulCall& call) {
  uint64_t bytes = 0;
  if (call.parts > 1 && !same_kind(call)) {
    for (uint32_t i = 0; i < call.parts; ++i) bytes = std::max(bytes, matmul_workspace_bytes(part_alone(call, i)));
    return bytes;
  }
  uint32_t processors = 0, major = 0;
  if (multiprocessors(processors) != cudaSuccess || compute_major(major) != cudaSuccess) return kMatmulCounterBytes;
  if (call.rows <= kMatvecRows) {
    const Cut cut = cut_columns(call.part[0].weight, major);
    const uint32_t copies = cut.slabs == 1 ? 0 : owns_rows(cut, call, processors) ? 1 : cut.slabs;
    bytes = uint64_t{copies} * row_tiles_of(call) * 128 * sizeof(float);
  } else if (wgmma_serves(call)) {
    bytes = wgmma_workspace_bytes(call);
  }
  return kMatmulCounterBytes + bytes;
}

cudaError_t matmul(const MatmulCall& call, cudaStream_t stream) {
  if (!valid(call)) return cudaErrorInvalidValue;
  if (call.parts == 1 || same_kind(call)) return run_together(call, stream);
  for (uint32_t i = 0; i < call.parts; ++i) {
    const cudaError_t error = run_together(part_alone(call, i), stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace sluice::cuda
