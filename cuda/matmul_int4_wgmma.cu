// SPDX-License-Identifier: Apache-2.0
// INT4 weights, 9 to 2048 rows of activations, on sm_90a: wgmma with the weights in registers.
//
// argument    shape                              type      layout, alignment
// values      N x K                              int4      tile16x64, 16 B
// scales      [ceil(N/16)][ceil(K/group)][16]    FP16      16 B;  zeros u8 or bias FP16 the same, optional
// x           [M][ldx]                           FP16      row-major, 16 B
// x_sums      [ceil(K/group)][M rounded up to 4] FP32      workspace, only with a bias: sums of x over each group
// out         [M][ldo]                           FP32
// partial     [2 clusters][4 or 8][kRows/2][128] FP32      workspace, only where K is split
//
// wgmma.m64nNk16 takes A from the registers of four warps, each with 16 rows in the very fragments that tile16x64
// holds, so a warp unpacks its nibbles as for mma.sync. B is x, K-major in shared memory with the 128-byte swizzle,
// where the tensor copy engine puts it. A block makes tiles of 256 rows of W x 32 or 64 rows of x, or 128 x 128:
//
//     warpgroup 0: one thread asks for stages of 128 columns:   x 2 x [kRows][64], values 1 KiB per row tile, scales
//                  (of x one half, for itself and its neighbour: a cluster of two blocks with the same rows of x,
//                  which halves what x costs the L2 cache)
//     the others: 64 rows of W each; per group of columns: wgmma into a fresh sum, total += scale * sum
//
// How unpacking and scaling hide behind products is in matmul_int4_wgmma.cuh.
//
// Schedule. Pairs of tiles go round the clusters in whole waves, the row blocks of x fastest, so that weights come out
// of L2 but once. What is left for a last, partial wave is cut: its pairs' stages, laid end to end, are shared out
// evenly, and each cluster does its share first, before the whole pairs, so that joining parts hides behind them.
//
//     cluster 0    | pair 0, stages 0..26 | whole pair 28 | whole pair 94 |         QKV 10240 x 8192, 512 rows:
//     cluster 1    | pair 0, 27..53       | whole pair 29 | ...                     160 pairs, 66 clusters, 64 stages
//     cluster 2    | pair 0, 54..63 | pair 1, 0..17 | ...
//
// The cluster that comes last to a pair adds its parts in order: no float atomics, the same bits in every run.
//
// Geometry: at most one block of 640 or 384 threads per multiprocessor, in pairs; an odd tile's partner works on zeros.
// Bytes moved: values + scales once from memory.
// Compiled: kRows 32, 64, 128 with groups of 32, 64, 128. With a bias another kernel sums x over groups before.
#include "cuda/matmul_int4_wgmma.cuh"
#include "cuda/matmul_launch.hpp"

// Clusters of two blocks; the attribute is an error on architectures that have none.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define SLUICE_PAIRS
#else
#define SLUICE_PAIRS __cluster_dims__(2, 1, 1)
#endif

namespace sluice::cuda {
namespace {

using namespace wgmma;

template <uint32_t kRows>
inline constexpr uint32_t kThreads = 128 + 128 * kMultipliers<kRows>;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Leaves this cluster's totals of a cut pair in the workspace; true for the last of the pair's clusters, whose `total`
// is then the sum. A share meets two pairs at most: two places for each cluster.
template <uint32_t kRows>
__device__ __forceinline__ bool join_parts(const WgmmaArgs& a, uint32_t pair, uint32_t warpgroup, uint32_t thread,
                                           uint32_t* last, float (&total)[kRows / 2]) {
  constexpr uint32_t kCount = kRows / 2, kTiles = 2 * kMultipliers<kRows>;
  const uint32_t mine = blockIdx.x / 2, begin = pair * a.stages;
  const uint32_t tile = cluster_rank() * kMultipliers<kRows> + warpgroup;
  const auto place = [&](uint32_t cluster) {
    const bool second = Work::share(a, cluster) < begin;
    return a.partial + ((cluster * 2 + second) * kTiles + tile) * uint64_t{128 * kCount} + thread;
  };
  const uint32_t first = Work::owner(a, begin), end = Work::owner(a, begin + a.stages - 1) + 1;
#pragma unroll
  for (uint32_t i = 0; i < kCount; ++i) place(mine)[i * 128] = total[i];
  fence_device();
  asm volatile("bar.sync %0, 128;" ::"r"(1 + warpgroup) : "memory");
  if (thread == 0) {
    uint32_t* counter = a.counters + pair * kTiles + tile;
    last[warpgroup] = atomicAdd(counter, 1) == end - first - 1;
    if (last[warpgroup]) *counter = 0;
    fence_device();
  }
  asm volatile("bar.sync %0, 128;" ::"r"(1 + warpgroup) : "memory");
  if (last[warpgroup] == 0) return false;
#pragma unroll
  for (uint32_t i = 0; i < kCount; ++i) total[i] = 0;
  for (uint32_t cluster = first; cluster < end; ++cluster) {
    const float* part = place(cluster);
#pragma unroll
    for (uint32_t i = 0; i < kCount; ++i) total[i] += __ldcg(part + i * 128);
  }
  return true;
}

// Loads of all outputs first, then stores: in between, each would wait for the one before.
template <uint32_t kRows>
__device__ __forceinline__ void write_tile(const WgmmaArgs& a, const Tile& tile, uint32_t row, uint32_t lane,
                                           float (&total)[kRows / 2]) {
  const WgmmaArgs::Part& p = a.part[tile.part];
  const uint32_t n = row + lane / 4, m = tile.x_row + lane % 4 * 2, ldo = p.ldo;
  const bool there[2] = {n < p.rows, n + 8 < p.rows};
#pragma unroll
  for (uint32_t i = 0; i < kRows / 2; ++i) total[i] *= p.scale;
  if (a.row_scale != nullptr) {
#pragma unroll
    for (uint32_t i = 0; i < kRows / 8; ++i) {
      const float s0 = a.row_scale[min(m + i * 8, a.rows - 1)], s1 = a.row_scale[min(m + i * 8 + 1, a.rows - 1)];
      total[4 * i] *= s0;
      total[4 * i + 1] *= s1;
      total[4 * i + 2] *= s0;
      total[4 * i + 3] *= s1;
    }
  }
  if (p.vector != nullptr) {
    const float v0 = there[0] ? p.vector[n] : 0, v8 = there[1] ? p.vector[n + 8] : 0;
#pragma unroll
    for (uint32_t i = 0; i < kRows / 2; ++i) total[i] += i / 2 % 2 == 0 ? v0 : v8;
  }
  float* out = p.out + uint64_t{m} * ldo + n;
  if (a.accumulate) {
#pragma unroll
    for (uint32_t i = 0; i < kRows / 2; ++i) {
      const uint32_t down = i / 4 * 8 + i % 2;
      if (m + down < a.rows && there[i / 2 % 2]) total[i] += out[uint64_t{down} * ldo + i / 2 % 2 * 8];
    }
  }
#pragma unroll
  for (uint32_t i = 0; i < kRows / 2; ++i) {
    const uint32_t down = i / 4 * 8 + i % 2;
    if (m + down < a.rows && there[i / 2 % 2]) out[uint64_t{down} * ldo + i / 2 % 2 * 8] = total[i];
  }
}

#endif

template <uint32_t kRows, uint32_t kGroup>
__global__ void SLUICE_PAIRS __launch_bounds__(kThreads<kRows>, 1)
    matmul_int4_wgmma_kernel(const __grid_constant__ WgmmaArgs a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Stage<kRows, kGroup>;
  extern __shared__ uint8_t shared[];
  __shared__ uint64_t barriers[2 * S::kCount];
  __shared__ uint32_t last[kMultipliers<kRows>];
  uint8_t* stages = shared + (1024 - shared_address(shared) % 1024) % 1024;
  const uint32_t full = shared_address(barriers), empty = full + S::kCount * 8;
  let_next_kernel_start();
  if (threadIdx.x == 0) {
    for (uint32_t i = 0; i < S::kCount; ++i) {
      barrier_init(full + i * 8, 1);
      barrier_init(empty + i * 8, 2 * S::kRowTiles);  // warps of both blocks
    }
    barrier_init_fence();
    async_proxy_fence();
  }
  cluster_sync();
  if (threadIdx.x < 128) {
    if constexpr (kMultipliers<kRows> == 2) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    else asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 0) produce<kRows, kGroup>(a, shared_address(stages), full, empty);
    __syncwarp();
  } else {
    if constexpr (kMultipliers<kRows> == 2) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    else asm volatile("setmaxnreg.inc.sync.aligned.u32 112;");
    wait_for_previous_kernel();
    const uint32_t warpgroup = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    Place<S::kCount> place;
    if (kRows == 128 && warpgroup == 1) pass_turn(warpgroup);
    Work work(a);
    for (Item item; work.next(a, item);) {
      float total[kRows / 2];
      const bool whole = item.end - item.first == a.stages;
      Walk<kRows, kGroup> walk = {};
      walk.stages = stages;
      walk.full = full;
      walk.empty = empty;
      walk.warpgroup = warpgroup;
      walk.tile = warpgroup * 4 + warp;
      walk.lane = lane;
      walk.has_zeros = a.has_zeros;
      walk.has_bias = a.has_bias;
      walk.zero = a.has_bias ? int4_zero(0, 0) : int4_zero(8, 8);
      walk.left = item.end - item.first;
      walk.place = place;
      multiply_item<kRows, kGroup>(walk, total);
      place = walk.place;
      if (!whole && !join_parts<kRows>(a, item.pair, warpgroup, threadIdx.x % 128, last, total)) continue;
      const Tile tile(a, item.pair, kRows);
      write_tile<kRows>(a, tile, tile.block * S::kRowTiles * 16 + warpgroup * 64 + warp * 16, lane, total);
    }
    if (kRows == 128 && warpgroup == 0) wait_turn(warpgroup);  // the turn that is left over
  }
  cluster_sync();  // neither leaves while the other may still write to it
#else
  __trap();  // the dispatcher calls this on compute capability 9.0 only, where the build has sm_90a
#endif
}

// Sums of x over each group of columns, for weights with a bias: out[group][stride], in a fixed order. A warp takes 256
// columns of a row, 8 a lane. Geometry: (ceil(ldx / 1024), rows) blocks of 128 threads.
struct GroupSumArgs {
  const __half* x;
  float* out;
  uint32_t ldx, groups, group_elems, stride;
};

__global__ void __launch_bounds__(128) group_sums_kernel(const __grid_constant__ GroupSumArgs a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const uint32_t column = blockIdx.x * 1024 + threadIdx.x * 8, row = blockIdx.y;
  float sum = 0;
  if (column < a.ldx) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(a.x + uint64_t{row} * a.ldx + column));
    for (const uint32_t pair : {v.x, v.y, v.z, v.w}) {
      const float2 x = __half22float2(half2_of(pair));
      sum += x.x + x.y;
    }
  }
  for (uint32_t step = 1; step < a.group_elems / 8; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  const uint32_t group = column / a.group_elems;
  if (column % a.group_elems == 0 && group < a.groups) a.out[uint64_t{group} * a.stride + row] = sum;
}

// cuTensorMapEncodeTiled, which lives in the driver: found at run time, so that nothing links to it.
using EncodeTiled = decltype(&cuTensorMapEncodeTiled);
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = {};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(found)
                                                                         : nullptr;
  }();
  return function;
}

struct Plane {
  CUtensorMapDataType type;
  const void* at;
  uint64_t width, height, row_bytes;  // elements, rows
  uint32_t box_width, box_height;
  CUtensorMapSwizzle swizzle;
};

bool encode(CUtensorMap& map, const Plane& plane) {
  const cuuint64_t sizes[2] = {plane.width, plane.height}, strides[1] = {plane.row_bytes};
  const cuuint32_t box[2] = {plane.box_width, plane.box_height}, steps[2] = {1, 1};
  return encode_tiled()(&map, plane.type, 2, const_cast<void*>(plane.at), sizes, strides, box, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, plane.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

uint32_t rows_of_tile(uint32_t rows) { return rows <= 32 ? 32 : rows <= 64 ? 64 : 128; }
uint32_t row_tiles_of_block(uint32_t rows) { return 4 * (rows <= 64 ? kMultipliers<64> : kMultipliers<128>); }
uint32_t blocks_of(const MatmulWeight& w, uint32_t rows) {
  return (w.rows + row_tiles_of_block(rows) * 16 - 1) / (row_tiles_of_block(rows) * 16);
}

// Who does what, see the top of the file.
struct Schedule {
  uint32_t row_blocks = 0, pairs = 0, stages = 0;
  uint32_t clusters = 0, split_pairs = 0, split_clusters = 0;
};

// A share has at least 4 stages and an eighth of K. Cutting must save what joining the parts costs: about the time of
// 4 stages.
Schedule schedule_of(const MatmulCall& call, uint32_t processors) {
  constexpr uint32_t kLeast = 4, kMostParts = 8, kJoinStages = 4;
  Schedule s;
  uint32_t blocks = 0;
  for (uint32_t i = 0; i < call.parts; ++i) blocks += blocks_of(call.part[i].weight, call.rows);
  const uint32_t tile_rows = rows_of_tile(call.rows), most = std::max(1u, processors / 2);
  s.row_blocks = (call.rows + tile_rows - 1) / tile_rows;
  s.pairs = (blocks + 1) / 2 * s.row_blocks;
  s.stages = (call.part[0].weight.cols + kStageCols - 1) / kStageCols;
  s.clusters = std::min(s.pairs, most);
  const uint32_t rest = s.pairs % most, stages = rest * s.stages;
  const uint32_t sharing = std::min(most, stages / std::max(kLeast, (s.stages + kMostParts - 1) / kMostParts));
  if (sharing > rest && (stages + sharing - 1) / sharing + kJoinStages < s.stages) {
    s.split_pairs = rest;
    s.split_clusters = sharing;
    s.clusters = std::max(sharing, s.pairs == rest ? 0 : most);
  }
  return s;
}

uint64_t partial_bytes(const Schedule& s, uint32_t rows) {
  return uint64_t{s.split_clusters} * 2 * 2 * row_tiles_of_block(rows) * 16 * rows_of_tile(rows) * sizeof(float);
}

// Floats from one group's sums of x to the next one's.
uint32_t sums_stride(const MatmulCall& call) { return (call.rows + 3) / 4 * 4; }
uint32_t groups_of(const MatmulWeight& w) { return (w.cols + w.group_elems - 1) / w.group_elems; }

cudaError_t sum_groups(const MatmulCall& call, float* out, cudaStream_t stream) {
  const MatmulWeight& w = call.part[0].weight;
  const GroupSumArgs args = {call.x, out, call.ldx, groups_of(w), w.group_elems, sums_stride(call)};
  return launch_grid(group_sums_kernel, args, dim3((call.ldx + 1023) / 1024, call.rows), 128, 0, call, stream);
}

template <uint32_t kRows, uint32_t kGroup>
cudaError_t launch(const WgmmaArgs& args, uint32_t clusters, const MatmulCall& call, cudaStream_t stream) {
  using S = Stage<kRows, kGroup>;
  static std::atomic<uint64_t> seen{0};
  const uint32_t shared = S::kCount * S::kBytes + 1024;
  const cudaError_t error = allow_shared(matmul_int4_wgmma_kernel<kRows, kGroup>, shared, seen);
  if (error != cudaSuccess) return error;
  return launch_grid(matmul_int4_wgmma_kernel<kRows, kGroup>, args, dim3(clusters * 2), kThreads<kRows>, shared,
                     call, stream);
}

template <uint32_t kRows>
cudaError_t launch_rows(const WgmmaArgs& args, uint32_t clusters, const MatmulCall& call, cudaStream_t stream) {
  switch (call.part[0].weight.group_elems) {
    case 32:
      return launch<kRows, 32>(args, clusters, call, stream);
    case 64:
      return launch<kRows, 64>(args, clusters, call, stream);
    default:
      return launch<kRows, 128>(args, clusters, call, stream);
  }
}

// All tensor maps; false where the driver refuses one.
bool encode_maps(WgmmaArgs& args, const MatmulCall& call, const float* x_sums) {
  const MatmulWeight& first = call.part[0].weight;
  const uint64_t tiles64 = (first.cols + 63) / 64, groups = groups_of(first);
  const uint32_t stage_groups = kStageCols / first.group_elems, tile_rows = rows_of_tile(call.rows);
  const uint32_t block_tiles = row_tiles_of_block(call.rows);
  bool good = encode(args.x, {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, call.x, tiles64 * 64, call.rows, uint64_t{call.ldx} * 2,
                              64, tile_rows, CU_TENSOR_MAP_SWIZZLE_128B});
  if (args.has_bias) {
    good = good &&
           encode(args.x_sums, {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, x_sums, call.rows, groups,
                                uint64_t{sums_stride(call)} * 4, tile_rows, stage_groups, CU_TENSOR_MAP_SWIZZLE_NONE});
  }
  for (uint32_t i = 0; i < call.parts; ++i) {
    const MatmulWeight& w = call.part[i].weight;
    const uint64_t row_tiles = (w.rows + 15) / 16;
    const auto group_plane = [&](CUtensorMap& map, CUtensorMapDataType type, const void* at, uint32_t bytes) {
      return encode(map, {type, at, groups * 16, row_tiles, groups * 16 * bytes, stage_groups * 16,
                          block_tiles,
                          CU_TENSOR_MAP_SWIZZLE_NONE});
    };
    good = good && encode(args.part[i].values, {CU_TENSOR_MAP_DATA_TYPE_UINT32, w.values, tiles64 * 128, row_tiles,
                                                tiles64 * 512, 256, block_tiles,
                                                CU_TENSOR_MAP_SWIZZLE_NONE});
    good = good && group_plane(args.part[i].scales, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, w.scales, 2);
    if (args.has_bias) good = good && group_plane(args.part[i].extra, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, w.bias, 2);
    if (args.has_zeros) good = good && group_plane(args.part[i].extra, CU_TENSOR_MAP_DATA_TYPE_UINT8, w.zeros, 1);
  }
  return good;
}

}  // namespace

bool wgmma_serves(const MatmulCall& call) {
  if (call.part[0].weight.format != WeightFormat::int4) return false;
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) return false;
  return major == 9 && minor == 0 && encode_tiled() != nullptr;
}

uint64_t wgmma_workspace_bytes(const MatmulCall& call) {
  uint32_t processors = 0;
  if (multiprocessors(processors) != cudaSuccess) return 0;
  const MatmulWeight& w = call.part[0].weight;
  const uint64_t sums = w.bias == nullptr ? 0 : uint64_t{groups_of(w)} * sums_stride(call) * sizeof(float);
  return partial_bytes(schedule_of(call, processors), call.rows) + sums;
}

cudaError_t matmul_int4_wgmma(const MatmulCall& call, cudaStream_t stream) {
  uint32_t processors = 0;
  cudaError_t error = multiprocessors(processors);
  if (error != cudaSuccess) return error;
  const Schedule schedule = schedule_of(call, processors);
  uint8_t* behind_counters = static_cast<uint8_t*>(call.workspace) + kMatmulCounterBytes;
  float* x_sums = reinterpret_cast<float*>(behind_counters + partial_bytes(schedule, call.rows));
  WgmmaArgs args = {};
  args.has_zeros = call.part[0].weight.zeros != nullptr;
  args.has_bias = call.part[0].weight.bias != nullptr;
  if (!encode_maps(args, call, x_sums)) return cudaErrorInvalidValue;
  for (uint32_t i = 0, blocks = 0; i < call.parts; ++i) {
    const MatmulPart& from = call.part[i];
    WgmmaArgs::Part& part = args.part[i];
    part.out = from.out;
    part.vector = from.vector;
    part.ldo = from.ldo;
    part.rows = from.weight.rows;
    part.first_block = blocks;
    part.scale = from.weight.scale;
    blocks += blocks_of(from.weight, call.rows);
  }
  args.row_scale = call.row_scale;
  args.counters = static_cast<uint32_t*>(call.workspace);
  args.partial = reinterpret_cast<float*>(behind_counters);
  args.rows = call.rows;
  args.parts = call.parts;
  args.row_blocks = schedule.row_blocks;
  args.pairs = schedule.pairs;
  args.stages = schedule.stages;
  args.split_pairs = schedule.split_pairs;
  args.split_clusters = schedule.split_clusters;
  args.accumulate = call.accumulate;
  args.weights_early = call.weights_early && call.programmatic;
  if (args.has_bias) error = sum_groups(call, x_sums, stream);
  if (error != cudaSuccess) return error;
  switch (rows_of_tile(call.rows)) {
    case 32:
      return launch_rows<32>(args, schedule.clusters, call, stream);
    case 64:
      return launch_rows<64>(args, schedule.clusters, call, stream);
    default:
      return launch_rows<128>(args, schedule.clusters, call, stream);
  }
}

}  // namespace sluice::cuda
