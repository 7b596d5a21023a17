// SPDX-License-Identifier: Apache-2.0
// How the kernel of matvec.cuh is launched: what lies in shared memory, and how many blocks there are.
#pragma once

#include "cuda/matvec_few.cuh"

namespace sluice::cuda {

namespace matvec {

// x in registers, one block on a multiprocessor.
template <WeightFormat kFormat, uint32_t kFold, GroupForm kForm>
cudaError_t launch_one(MatvecArgs& args, const MatmulCall& call, uint32_t major, cudaStream_t stream) {
  constexpr uint32_t kTile = TileOf<kFormat>::kBytes;
  constexpr bool kGrouped = kFormat == WeightFormat::int4 || kFormat == WeightFormat::int8;
  const uint32_t share = share_tiles(kFormat, major) * (major >= 9 && merges_steps<kFormat> ? 2 : 1);
  const uint32_t slot_values = kMatvecWarps * share * kTile, slab_tiles = kMatvecWarps * args.steps * args.step_tiles;
  const uint32_t groups = kGrouped ? kMatvecWarps * share * 64 >> args.group_shift : 0;
  args.slot.scales = slot_values;
  args.slot.zeros = args.slot.scales + groups * 32;
  args.slot.bias = args.slot.zeros + (kForm == GroupForm::zeros ? groups * 16 : 0);
  args.slot.bytes = args.slot.bias + (kForm == GroupForm::bias ? groups * 32 : 0);
  args.slot.bytes = (args.slot.bytes + 127) / 128 * 128;
  args.x_bytes = major < 9 ? 0 : (args.rows * (slab_tiles * 128 + 16) + 127) / 128 * 128;
  const uint32_t sets = major < 9 ? 1 : kSumSets;
  const uint32_t fixed = sets * kSumBytes + kListBytes + (kForm == GroupForm::bias ? kXSumBytes : 0) + args.x_bytes;
  static std::atomic<uint64_t> seen{0};
  uint32_t processors = 0, shared = 0;
  cudaError_t error = multiprocessors(processors);
  if (error == cudaSuccess) error = shared_limit(shared);
  if (error == cudaSuccess) error = allow_shared(matvec_kernel<kFormat, kFold, kForm>, fixed, seen);
  if (error != cudaSuccess) return error;
  if (shared < fixed + args.slot.bytes) return cudaErrorInvalidConfiguration;
  args.depth = std::min({kMostDepth, kMostRingBytes / slot_values, (shared - fixed) / args.slot.bytes});
  args.window = std::min(kWindow, args.depth);
  // Divided here: a division takes a block a quarter of a microsecond, before it has asked for anything.
  const uint32_t walked = args.owns_rows ? args.row_tiles : args.units;
  const uint32_t blocks = std::min(walked, processors);
  args.share = walked / blocks;
  args.longer = walked % blocks;
  return launch_grid(matvec_kernel<kFormat, kFold, kForm>, args, dim3(blocks), kThreads,
                     fixed + args.depth * args.slot.bytes, call, stream);
}

}  // namespace matvec

// Fills in the arguments that depend on the format and launches.
template <WeightFormat kFormat, uint32_t kFold, GroupForm kForm = GroupForm::symmetric>
cudaError_t launch_matvec(MatvecArgs& args, const MatmulCall& call, cudaStream_t stream) {
  constexpr uint32_t kTile = TileOf<kFormat>::kBytes;
  constexpr uint32_t kColTiles = kFormat == WeightFormat::int4 || kFormat == WeightFormat::int8 ? 64 : 16;
  uint32_t major = 0;
  cudaError_t error = compute_major(major);
  if (error != cudaSuccess) return error;
  const uint32_t cols = call.part[0].weight.cols, slab_tiles = kMatvecWarps * args.steps * args.step_tiles;
  args.value_row_bytes = (cols + kColTiles - 1) / kColTiles * (kTile * kColTiles / 64);
  args.clear_ring = args.step_tiles != share_tiles(kFormat, major) || args.col_tiles != args.slabs * slab_tiles ||
                    cols % 64 != 0;
  if constexpr (kFormat == WeightFormat::int4) {
    if (major >= 9 && args.rows <= matvec::kFewRows && args.owns_rows) {
      bool launched = false;
      error = matvec::launch_few<kFold, kForm>(args, call, stream, launched);
      if (launched || error != cudaSuccess) return error;
    }
  }
  return matvec::launch_one<kFormat, kFold, kForm>(args, call, major, stream);
}

}  // namespace sluice::cuda
