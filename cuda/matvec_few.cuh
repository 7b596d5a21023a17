// SPDX-License-Identifier: Apache-2.0
// Products of INT4 for 1 or 2 rows of activations on sm_90: decoding. Arguments, layout and the order of sums are those
// of matvec.cuh, so the bits are too; what differs is the schedule.
//
// Two blocks on a multiprocessor, of 544 threads with 56 registers: while one begins, ends or waits for its other
// warps, the second goes on, and a block of the next product begins where the first of them ends. For that activations
// lie in shared memory, each warp its own part, of two slabs at a time. At the memory's rate a multiprocessor has 2000
// cycles for a unit and issues 900 instructions a scheduler of which 690 unpack and multiply, so what is beside them is
// held small: a ring of two units, of two steps each, whose places are known to the compiler, and no descriptions of
// what lies there.
//
//   up to two slabs  A block takes row tiles one by one, all slabs of each: first some of its own, then the next one
//                    that nobody has taken, by a counter. The block that was first on a multiprocessor is ahead of
//                    the second all the way; with equal shares it ended after 45 of 62 us (57344 x 8192), and the
//                    second did not need the memory's rate alone. The counter is back at 0 when the last block has
//                    found nothing left.
//   more             Of equal shares, slab by slab: x in shared memory serves all row tiles of the block, and the slab
//                    behind is fetched meanwhile. Sums of the slabs before wait in shared memory.
//
// A group is what has one sum a row: the units of a row tile, or one unit of many slabs. Its sums lie in one of a few
// places, and one warp, another one each time, adds them when all have arrived at the group's barrier; nobody else
// waits. A warp is at most two units ahead of another, because the producer fills a place again when all have left it.
//
// The producer has at most `window` steps on their way. What is behind the ring's first steps in the queues of memory
// waits for all of them: with five in each block, 22 MB, the last stores of the kernel in front took 3 us to be seen.
#pragma once

#include "cuda/matvec.cuh"

namespace sluice::cuda {

namespace matvec {

inline constexpr uint32_t kFewRows = 2;  // of x at most
inline constexpr uint32_t kXSlabs = 2;   // whose x is in shared memory
inline constexpr uint32_t kLongWindow = 3;  // kWindow of products with many row tiles a block
inline constexpr uint32_t kFewRegisters = 56;
inline constexpr uint32_t kUnitSlots = 2;                        // units in the ring, of two steps
inline constexpr uint32_t kFewSlots = kUnitSlots * 2;
inline constexpr uint32_t kFewSumBytes = kMatvecWarps * 16 * kFewRows * 4;  // of a unit, all warps
inline constexpr uint32_t kFewSumUnits = 4;                      // places for a unit's sums
inline constexpr uint32_t kSoFarBytes = 16 * kFewRows * 4;       // of a row tile, slabs before this one
inline constexpr uint32_t kXPitch = kSliceTiles * 128 + 16;      // of a row of a warp's x, off the banks
inline constexpr uint32_t kXBytes = kMatvecWarps * kXPitch;      // of one row and one slab
inline constexpr uint32_t kFewValueBytes = kMatvecWarps * 2 * TileOf<WeightFormat::int4>::kBytes;  // of a step
inline constexpr uint32_t kNoTile = ~0u;

__device__ __forceinline__ uint32_t first_slab(const MatvecArgs& a) { return a.slabs == 2 ? blockIdx.x % 2 : 0; }

// A step's place in the ring: units one by one, of each its steps.
struct FewPlace {
  uint32_t unit = 0, parity = 0, step = 0;
  __device__ __forceinline__ uint32_t slot() const { return unit * 2 + step; }
  __device__ __forceinline__ void next(uint32_t steps) {
    if (++step != steps) return;
    step = 0;
    unit ^= 1;
    if (unit == 0) parity ^= 1;
  }
};

#if __CUDA_ARCH__ >= 900
// The ring's barriers are there: the producer's warp says so and goes on, the others wait for it.
__device__ __forceinline__ void barriers_arrive() { asm volatile("bar.arrive 1, %0;" ::"n"(kThreads) : "memory"); }
__device__ __forceinline__ void barriers_wait() { asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory"); }

// The producer's whole life, by one thread: every step of every unit and, where row tiles are taken one by one, which.
template <GroupForm kForm>
class FewProducer {
 public:
  __device__ __forceinline__ FewProducer(const MatvecArgs& a, uint32_t* tiles, uint32_t ring, uint32_t full,
                                         uint32_t empty)
      : a_(a), tiles_(tiles), ring_(ring), full_(full), empty_(empty), policy_(evict_first_policy()) {}

  __device__ __forceinline__ void run() {
    if (!a_.weights_early) wait();
    if (a_.slabs > kXSlabs) walk_slabs();
    else take_tiles();
  }

 private:
  using S = Step<WeightFormat::int4, kForm, false>;

  __device__ __forceinline__ void wait() {
    if (!waited_) wait_for_previous_kernel();
    waited_ = true;
  }

  __device__ __forceinline__ void wait_empty() {
    if (asked_ >= kUnitSlots * a_.steps) barrier_wait(empty_ + place_.slot() * 8, place_.parity ^ 1);
  }

  __device__ __forceinline__ void ask(uint32_t row_tile, uint32_t slab, uint32_t step) {
    const S s(a_, row_tile, slab, step);
    if (asked_ >= a_.window) {
      barrier_wait(full_ + here_.slot() * 8, here_.parity);
      here_.next(a_.steps);
    }
    wait_empty();
    ++asked_;
    const uint32_t slot = ring_ + place_.slot() * a_.slot.bytes, barrier = full_ + place_.slot() * 8;
    if (step == 0) tiles_[place_.unit] = row_tile;
    barrier_expect(barrier, s.bytes + s.groups * (32 + S::kExtraBytes));
    if (s.bytes != 0) bulk_copy(slot, s.values, s.bytes, barrier, policy_);
    if (s.groups != 0) bulk_copy(slot + kFewValueBytes, s.scales, s.groups * 32, barrier, policy_);
    if (S::kExtraBytes != 0 && s.groups != 0) {
      bulk_copy(slot + S::extra_at(a_), s.extra, s.groups * S::kExtraBytes, barrier, policy_);
    }
    place_.next(a_.steps);
  }

  __device__ __forceinline__ void walk_slabs() {
    const Walk share(a_);
#pragma unroll 1
    for (uint32_t slab = 0; slab < a_.slabs; ++slab) {
#pragma unroll 1
      for (uint32_t row_tile = share.first; row_tile < share.end; ++row_tile) {
#pragma unroll 1
        for (uint32_t step = 0; step < a_.steps; ++step) ask(row_tile, slab, step);
      }
    }
  }

  // Of two slabs every second block begins with the other one: a sum of two has no order, and all blocks begin at once.
  __device__ __forceinline__ void take_tiles() {
    uint32_t row_tile = blockIdx.x;
    while (row_tile < a_.row_tiles) {
#pragma unroll 1
      for (uint32_t i = 0; i < a_.slabs; ++i) {
#pragma unroll 1
        for (uint32_t step = 0; step < a_.steps; ++step) ask(row_tile, i ^ first_slab(a_), step);
      }
      row_tile = another();
    }
    wait_empty();
    tiles_[place_.unit] = kNoTile;
    barrier_arrive(full_ + place_.slot() * 8);
  }

  __device__ __forceinline__ uint32_t another() {
    if (++taken_ < a_.share) return blockIdx.x + taken_ * gridDim.x;
    if (a_.longer == 0) return kNoTile;
    wait();
    const uint32_t number = atomicAdd(a_.counters, 1);
    if (number + 1 == a_.longer + gridDim.x) *a_.counters = 0;  // every block has found nothing left once
    return a_.share * gridDim.x + number;
  }

  const MatvecArgs& a_;
  uint32_t* tiles_;
  uint32_t ring_, full_, empty_;
  uint64_t policy_;
  FewPlace place_, here_;  // the slot to ask for next; the one that must have come first
  uint32_t asked_ = 0, taken_ = 0;
  bool waited_ = false;
};
#endif

// A warp's activations, [2 slabs][warps][rows][kXPitch]. Operands of rows that are not there repeat the last one: what
// they give, nobody takes.
class XInShared {
 public:
  __device__ __forceinline__ XInShared(const MatvecArgs& a, uint8_t* memory, uint32_t warp, uint32_t lane)
      : mine_(shared_address(memory) + warp * a.rows * kXPitch),
        operands_(mine_ + min(lane & 7, a.rows - 1) * kXPitch + (lane >> 3) * 16) {}

  // Asks for a slab's. Nothing where there is no such slab.
  __device__ __forceinline__ void fetch(const MatvecArgs& a, uint32_t slab, uint32_t warp, uint32_t lane) const {
    if (slab < a.slabs) {
      const uint32_t tile = tile_in_slab<WeightFormat::int4>(a, warp, lane >> 3), first = first_tile_of(a, slab);
      const bool there = tile != ~0u && first + tile < a.col_tiles;
      const __half* x = a.x + (blockIdx.x & (a.x_copies - 1)) * a.x_copy_elems;
      const __half* from = there ? x + uint64_t{first + tile} * 64 + (lane & 7) * 8 : x;
      const uint32_t to = mine_ + slab % kXSlabs * a.rows * kXBytes + lane * 16;
#pragma unroll
      for (uint32_t row = 0; row < kFewRows; ++row) {
        if (row < a.rows) copy16(to + row * kXPitch, from + uint64_t{row} * a.ldx, there);
      }
    }
    copy_commit();
  }

  // What was asked for has come, and nobody reads the slab before it any more.
  __device__ __forceinline__ void wait() const {
    copy_wait<0>();
    __syncwarp();
  }

  // Address of the operands of a slab's first 32 columns; 64 bytes further those of the next.
  __device__ __forceinline__ uint32_t operands(const MatvecArgs& a, uint32_t slab) const {
    return operands_ + slab % kXSlabs * a.rows * kXBytes;
  }

 private:
  uint32_t mine_, operands_;
};

struct XAt {
  uint32_t at;
  template <uint32_t kTile, uint32_t kHalf>
  __device__ __forceinline__ void get(uint32_t (&b)[4]) const {
    load_operands(b, at + kTile * 128 + kHalf * 64);
  }
};

// Where in a slot a lane finds what it reads of its warp's share.
template <uint32_t kFold, GroupForm kForm>
class FewShare {
 public:
  __device__ __forceinline__ FewShare(const MatvecArgs& a, uint32_t warp, uint32_t lane) {
    const uint32_t first_tile = warp * a.step_tiles, g = lane >> 2, group = (first_tile << 6) >> a.group_shift;
    values_ = first_tile * TileOf<WeightFormat::int4>::kBytes + lane * 16;
    scales_ = kFewValueBytes + group * 32 + g * 2;
    extra_ = kForm == GroupForm::zeros ? a.slot.zeros + group * 16 + g : a.slot.bias + group * 32 + g * 2;
    // Groups of 128 may begin with either tile of a share.
    fold_groups_ = kFold != 64 ? 1 : (((first_tile + 1) << 6) >> a.group_shift) - group;
  }

  // One step of 128 columns, in the slot at `slot`. x: operands of the step; x_sums: of its first fold.
  __device__ __forceinline__ void multiply(uint32_t slot, const XAt& x, const float* x_sums, uint32_t t,
                                           float (&total)[4]) const {
    const uint32_t q = slot + values_;
    for_each<128 / kFold>([&](auto fold_number) {
      constexpr uint32_t fold = decltype(fold_number)::value;
      const uint32_t groups = fold * fold_groups_;
      float sum[4] = {0, 0, 0, 0};
      Int4Zero zero = kForm == GroupForm::bias ? int4_zero(0, 0) : int4_zero(8, 8);
      if constexpr (kForm == GroupForm::zeros) {
        zero = int4_zero(load_shared1(slot + extra_ + groups * 16), load_shared1(slot + extra_ + groups * 16 + 8));
      }
      uint4 w = {};
      for_each<kFold / 32>([&](auto half) {
        constexpr uint32_t i = fold * (kFold / 32) + decltype(half)::value;  // of 32 columns
        uint32_t b[4];
        x.template get<i / 2, i % 2>(b);
        if (i % 2 == 0 || decltype(half)::value == 0) w = load_shared16(q + i / 2 * 512);
        mma_f16(sum, fragment_int4(i % 2 == 0 ? w.x : w.z, zero), b[0], b[1]);
        mma_f16(sum, fragment_int4(i % 2 == 0 ? w.y : w.w, zero), b[2], b[3]);
      });
      const uint32_t s = slot + scales_ + groups * 32;
      add(total, load_shared_half(s), load_shared_half(s + 16), sum[0], sum[1], sum[2], sum[3]);
      if constexpr (kForm == GroupForm::bias) {
        const uint32_t b = slot + extra_ + groups * 32;
        const float2 xs = *reinterpret_cast<const float2*>(x_sums + fold * 8 + 2 * t);
        add(total, load_shared_half(b), load_shared_half(b + 16), xs.x, xs.y, xs.x, xs.y);
      }
    });
  }

 private:
  static __device__ __forceinline__ void add(float (&total)[4], float low, float high, float c0, float c1, float c2,
                                             float c3) {
    total[0] = fmaf(low, c0, total[0]);
    total[1] = fmaf(low, c1, total[1]);
    total[2] = fmaf(high, c2, total[2]);
    total[3] = fmaf(high, c3, total[3]);
  }

  uint32_t values_, scales_, extra_, fold_groups_;
};

template <uint32_t kFold, GroupForm kForm>
__global__ void __maxnreg__(kFewRegisters) matvec_few_kernel(const __grid_constant__ MatvecArgs a) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ uint64_t barriers[2 * kFewSlots];
  __shared__ uint32_t tiles[kUnitSlots];
  // Broadcast, so that the compiler knows it is one for all lanes and keeps addresses in uniform registers.
  const uint32_t warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  float* sums = reinterpret_cast<float*>(shared);  // [unit][warp][g][4]
  float* so_far = reinterpret_cast<float*>(shared + kFewSumUnits * kFewSumBytes);  // [row tile of the share][32]
  uint8_t* behind_sums = shared + kFewSumUnits * kFewSumBytes + a.kept * kSoFarBytes;
  float* x_sums = reinterpret_cast<float*>(behind_sums) + warp * kXSlabs * 64;
  uint8_t* x_memory = behind_sums + (kForm == GroupForm::bias ? kXSlabs * kXSumBytes : 0);
  uint8_t* ring = x_memory + min(a.slabs, kXSlabs) * a.rows * kXBytes;
  const uint32_t full = shared_address(barriers), empty = full + kFewSlots * 8;
  let_next_kernel_start();
  if (a.clear_ring) {
    // Parts of a slot that no step fills meet zero activations; they must not be NaN for that.
    for (uint32_t at = threadIdx.x * 16; at < kFewSlots * a.slot.bytes; at += kThreads * 16)
      *reinterpret_cast<uint4*>(ring + at) = make_uint4(0, 0, 0, 0);
    async_proxy_fence();
    __syncthreads();
  }
  if (warp == kMatvecWarps) {
    if (lane == 0) {
      for (uint32_t i = 0; i < kFewSlots; ++i) {
        barrier_init(full + i * 8, 1);
        barrier_init(empty + i * 8, kMatvecWarps);
      }
      barrier_init_fence();
    }
    __syncwarp();
    barriers_arrive();
    if (lane == 0) FewProducer<kForm>(a, tiles, shared_address(ring), full, empty).run();
    return;
  }
  barriers_wait();
  wait_for_previous_kernel();

  const XInShared x(a, x_memory, warp, lane);
  const FewShare<kFold, kForm> share(a, warp, lane);
  x.fetch(a, first_slab(a), warp, lane);
  x.wait();
  // The second one's not before: all blocks ask for the same few lines of L2.
  x.fetch(a, first_slab(a) ^ 1, warp, lane);
  const auto sum_x = [&](uint32_t slab) {
    if (kForm == GroupForm::bias) sum_activations<kFold>(XAt{x.operands(a, slab)}, lane, x_sums + slab % kXSlabs * 64);
  };
  sum_x(first_slab(a));

  const uint32_t slots = shared_address(ring), unit_bytes = 2 * a.slot.bytes;
  const auto wait_unit = [&](uint32_t unit, uint32_t parity) { barrier_wait(full + unit * 16, parity); };
  // A unit whose first step has come: its place in the ring, the parity of its barriers, where its sums go.
  const auto multiply_unit = [&](uint32_t unit, uint32_t parity, uint32_t slab, float* unit_sums) {
    const uint32_t slot = slots + unit * unit_bytes, operands = x.operands(a, slab), bars = full + unit * 16;
    const float* slab_sums = x_sums + slab % kXSlabs * 64;
    float total[4] = {0, 0, 0, 0};
    for_each<2>([&](auto step) {
      constexpr uint32_t kStep = decltype(step)::value;
      if (kStep != 0) {
        if (a.steps == 1) return;
        barrier_wait(bars + kStep * 8, parity);
      }
      share.multiply(slot + kStep * a.slot.bytes, XAt{operands + kStep * 256}, slab_sums + kStep * (128 / kFold) * 8,
                     lane & 3, total);
      __syncwarp();
      if (lane == 0) barrier_arrive(bars + (kFewSlots + kStep) * 8);
    });
    if ((lane & 3) == 0) {
      store_shared16(shared_address(unit_sums) + warp * 64 * kFewRows + lane * 4,
                     make_uint4(__float_as_uint(total[0]), __float_as_uint(total[1]), __float_as_uint(total[2]),
                                __float_as_uint(total[3])));
    }
  };
  // All warps' sums of a unit, a lane's output.
  const auto add_unit = [&](const float* unit_sums) {
    float sum = 0;
#pragma unroll
    for (uint32_t w = 0; w < kMatvecWarps; ++w) sum += unit_sums[w * 16 * kFewRows + lane];
    return sum;
  };
  constexpr uint32_t kUnitSums = kMatvecWarps * 16 * kFewRows;
  const uint32_t at = lane / 4 * 16 + lane % 4;  // of an output, as write_out counts
  // Of all warps but one each time: true for that one, when all have arrived.
  const auto adds = [&](uint32_t group) {
    if (warp == group % kMatvecWarps) {
      sums_wait(group % kQuarters);
      return true;
    }
    sums_arrive(group % kQuarters);
    return false;
  };
  if (a.slabs == 2) {
    const uint32_t slab = first_slab(a);
#pragma unroll 1
    for (uint32_t group = 0;; ++group) {
      wait_unit(0, group & 1);
      const uint32_t row_tile = tiles[0];
      if (row_tile == kNoTile) break;
      float* group_sums = sums + group % 2 * 2 * kUnitSums;
      multiply_unit(0, group & 1, slab, group_sums);
      if (group == 0) {
        x.wait();
        sum_x(slab ^ 1);
      }
      wait_unit(1, group & 1);
      multiply_unit(1, group & 1, slab ^ 1, group_sums + kUnitSums);
      if (adds(group)) write_out(a, row_tile, at, add_unit(group_sums) + add_unit(group_sums + kUnitSums));
    }
  } else if (a.slabs == 1) {
#pragma unroll 1
    for (uint32_t group = 0;; ++group) {
      const uint32_t unit = group % kUnitSlots, parity = group / kUnitSlots & 1;
      wait_unit(unit, parity);
      const uint32_t row_tile = tiles[unit];
      if (row_tile == kNoTile) break;
      float* group_sums = sums + group % kFewSumUnits * kUnitSums;
      multiply_unit(unit, parity, 0, group_sums);
      if (adds(group)) write_out(a, row_tile, at, add_unit(group_sums));
    }
  } else {
    const Walk walk(a);
    uint32_t group = 0;
    // Two row tiles at a time where the share is even: the ring's places are known to the compiler then.
    const uint32_t together = (walk.end - walk.first) % 2 == 0 ? 2 : 1;
#pragma unroll 1
    for (uint32_t slab = 0; slab < a.slabs; ++slab) {
      if (slab != 0) {
        x.wait();
        x.fetch(a, slab + 1, warp, lane);
        sum_x(slab);
      }
      float* kept = so_far + lane;
      const auto multiply_tile = [&](uint32_t row_tile, uint32_t unit, uint32_t parity, uint32_t sum_unit) {
        float* group_sums = sums + sum_unit * kUnitSums;
        wait_unit(unit, parity);
        multiply_unit(unit, parity, slab, group_sums);
        if (adds(group)) {
          float sum = add_unit(group_sums);
          if (slab != 0) sum += *kept;
          if (slab + 1 == a.slabs) write_out(a, row_tile, at, sum);
          else *kept = sum;
        }
        ++group;
        kept += 16 * kFewRows;
      };
#pragma unroll 1
      for (uint32_t row_tile = walk.first; row_tile < walk.end; row_tile += together) {
        const uint32_t turn = group / kUnitSlots, parity = turn & 1;
        if (together == 2) {
          multiply_tile(row_tile, 0, parity, parity * 2);
          multiply_tile(row_tile + 1, 1, parity, parity * 2 + 1);
        } else {
          multiply_tile(row_tile, group % kUnitSlots, parity, group % kFewSumUnits);
        }
      }
    }
  }
#endif
}

// Launches if there is room for a ring of two blocks; else `launched` is false.
template <uint32_t kFold, GroupForm kForm>
cudaError_t launch_few(MatvecArgs args, const MatmulCall& call, cudaStream_t stream, bool& launched) {
  uint32_t shared = 0, processors = 0;
  cudaError_t error = shared_limit_of_two(shared);
  if (error == cudaSuccess) error = multiprocessors(processors);
  if (error != cudaSuccess) return error;
  const uint32_t blocks = std::min(args.row_tiles, 2 * processors), groups = kMatvecWarps * 2 * 64 >> args.group_shift;
  args.slot.scales = kFewValueBytes;
  args.slot.zeros = args.slot.scales + groups * 32;
  args.slot.bias = args.slot.zeros + (kForm == GroupForm::zeros ? groups * 16 : 0);
  args.slot.bytes = (args.slot.bias + (kForm == GroupForm::bias ? groups * 32 : 0) + 127) / 128 * 128;
  args.share = args.row_tiles / blocks;
  args.longer = args.row_tiles % blocks;
  args.kept = args.slabs > kXSlabs ? args.share + 1 : 1;
  const uint32_t fixed = kFewSumUnits * kFewSumBytes + args.kept * kSoFarBytes +
                         (kForm == GroupForm::bias ? kXSlabs * kXSumBytes : 0) +
                         std::min(args.slabs, kXSlabs) * args.rows * kXBytes;
  launched = shared >= fixed + kFewSlots * args.slot.bytes;
  if (!launched) return cudaSuccess;
  args.window = std::min(kUnitSlots * args.steps,
                         args.slabs <= kXSlabs && args.row_tiles > 4 * blocks ? kLongWindow : kWindow);
  if (args.slabs <= kXSlabs) {
    // As many of a block's own as its ring has room for before it may ask what is left.
    args.share = std::max(1u, kUnitSlots / args.slabs);
    args.longer = args.row_tiles - std::min(args.row_tiles, args.share * blocks);
  }
  static std::atomic<uint64_t> seen{0};
  error = allow_shared(matvec_few_kernel<kFold, kForm>, fixed, seen, true);
  if (error != cudaSuccess) return error;
  return launch_grid(matvec_few_kernel<kFold, kForm>, args, dim3(blocks), kThreads,
                     fixed + kFewSlots * args.slot.bytes, call, stream);
}

}  // namespace matvec

}  // namespace sluice::cuda
