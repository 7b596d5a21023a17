// SPDX-License-Identifier: Apache-2.0
// Kernels between the matrices. Arguments and shapes: elementwise.hpp.
//
//   kernel           grid                          block   bytes moved per row
//   begin_pass       (hidden / 1024, rows)         256     4 hidden over the bus, 4 hidden written
//   rms_norm         (rows, copies)                1024    8 hidden read, 2 hidden written, of each copy
//   swiglu           (width / 2048, rows)          256     8 width read, 2 width written
//   select_rows      (width / 256)                 256     8 width for a row that moves
//   gather_columns   (width / 512, rows)           256     2 width read here and there, 4 width of perm, 2 width written
//   finish_pass      (logits / 4096)               256     4 a logit over the bus, 16 a kernel of the pass
//   stamp            1                             1       8
//
// With programmatic stream serialization a kernel lets the next one start at once, and touches nothing that another kernel
// wrote before grid_wait(). Sums are taken in an order that depends on the width alone, so a row's bits do not depend on
// the rows beside it.
#include "cuda/elementwise.hpp"

#include "cuda/stamps.cuh"

namespace sluice::cuda {
namespace {

constexpr uint32_t kBlock = 256, kNormBlock = 1024;
constexpr uint32_t kSwigluPerThread = 8;
constexpr uint32_t kSwigluPerBlock = kBlock * kSwigluPerThread;
// Magnitudes from here on are scaled down; below, rounding to half cannot reach infinity (65520 would).
constexpr float kHalfLimit = 65504.0f;

__device__ __forceinline__ void grid_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void grid_let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The power of two that brings `largest` to at most 2^15, or 1 where FP16 holds it. Infinity and NaN stay what they are,
// so that they reach the logits and are reported there.
__device__ __forceinline__ float scale_for(float largest) {
  if (largest <= kHalfLimit || !isfinite(largest)) return 1.0f;
  return exp2f(static_cast<float>(ilogbf(largest) - 14));
}

__device__ __forceinline__ float warp_sum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
  for (int offset = 16; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

struct SumAndMax {
  float sum;
  float max;
};

// Of all threads of a block whose size is a multiple of 32; every thread gets the result.
__device__ SumAndMax block_reduce(SumAndMax mine) {
  __shared__ SumAndMax warps[32];
  __syncthreads();  // a call before may still read `warps`
  mine = {warp_sum(mine.sum), warp_max(mine.max)};
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
  __syncthreads();
  const uint32_t count = blockDim.x / 32, lane = threadIdx.x % 32;
  const SumAndMax part = lane < count ? warps[lane] : SumAndMax{0.0f, 0.0f};
  return {warp_sum(part.sum), warp_max(part.max)};
}

// Four columns from column 4 * i on; columns past `width` are 0.
template <bool kAligned>
__device__ __forceinline__ float4 load4(const float* row, uint32_t i, uint32_t width) {
  if (kAligned) return reinterpret_cast<const float4*>(row)[i];
  const uint32_t c = 4 * i;
  return {row[c], c + 1 < width ? row[c + 1] : 0.0f, c + 2 < width ? row[c + 2] : 0.0f,
          c + 3 < width ? row[c + 3] : 0.0f};
}

__device__ __forceinline__ void store4(__half* row, uint32_t i, float4 v) {
  const __half2 low = __floats2half2_rn(v.x, v.y), high = __floats2half2_rn(v.z, v.w);
  uint2 bits;
  bits.x = *reinterpret_cast<const uint32_t*>(&low);
  bits.y = *reinterpret_cast<const uint32_t*>(&high);
  reinterpret_cast<uint2*>(row)[i] = bits;
}

__device__ __forceinline__ float4 times(float4 v, float f) { return {v.x * f, v.y * f, v.z * f, v.w * f}; }
__device__ __forceinline__ float4 times(float4 a, float4 b) { return {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w}; }
__device__ __forceinline__ float largest_of(float4 v) {
  return fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
}

template <bool kAligned>
__global__ void begin_pass_kernel(BeginPass a) {
  grid_let_next_start();
  const uint32_t row = blockIdx.y;
  grid_wait();  // the pass before may still read what is written here
  stamp_begin(a.stamp);
  const uint32_t i = blockIdx.x * kBlock + threadIdx.x;
  const float* in = a.host_embeddings + size_t{row} * a.hidden;
  float* out = a.residual + size_t{row} * a.hidden;
  if (kAligned) {
    if (4 * i < a.hidden) reinterpret_cast<float4*>(out)[i] = reinterpret_cast<const float4*>(in)[i];
  } else {
    for (uint32_t c = 4 * i; c < min(4 * i + 4, a.hidden); ++c) out[c] = in[c];
  }
  if (blockIdx.x != 0) return;
  const uint32_t position = a.host_table[a.table_stride + row];
  if (threadIdx.x == 0) {
    a.table.sessions[row] = a.host_table[row];
    a.table.positions[row] = position;
    a.table.selected[row] = a.host_table[2 * a.table_stride + row];
  }
  for (uint32_t p = threadIdx.x; p < a.pairs; p += kBlock) {
    double sine, cosine;
    sincos(static_cast<double>(a.inverse_frequencies[p]) * position, &sine, &cosine);
    a.angles[size_t{row} * a.pairs + p] = make_float2(static_cast<float>(cosine * a.attention_factor),
                                                      static_cast<float>(sine * a.attention_factor));
  }
}

// A pass waits for every norm: as many threads as there are, and a block for each copy. Weights are under way while the
// kernel before ends: they come from memory, which the product behind this one keeps busy by then.
template <bool kAligned>
__global__ void __launch_bounds__(kNormBlock) rms_norm_kernel(RmsNorm a) {
  constexpr uint32_t kHeld = 2;  // vectors a thread that stay in registers
  grid_let_next_start();
  const uint32_t row = blockIdx.x, vectors = (a.width + 3) / 4;
  const float* in = a.in + size_t{row} * a.width;
  const auto weight_of = [&](uint32_t i) {
    return a.weight == nullptr ? float4{1.0f, 1.0f, 1.0f, 1.0f} : load4<kAligned>(a.weight, i, a.width);
  };
  float4 weights[kHeld], held[kHeld];
#pragma unroll
  for (uint32_t k = 0; k < kHeld; ++k) {
    const uint32_t i = threadIdx.x + k * kNormBlock;
    weights[k] = i < vectors ? weight_of(i) : float4{};
  }
  grid_wait();
  stamp_begin(a.stamp);
  SumAndMax part{0.0f, 0.0f};
  const auto add = [&](float4 x, float4 weight) {
    part.sum += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
    part.max = fmaxf(part.max, largest_of(times(x, weight)));
  };
#pragma unroll
  for (uint32_t k = 0; k < kHeld; ++k) {
    const uint32_t i = threadIdx.x + k * kNormBlock;
    held[k] = i < vectors ? load4<kAligned>(in, i, a.width) : float4{};
  }
#pragma unroll
  for (uint32_t k = 0; k < kHeld; ++k) add(held[k], weights[k]);
  for (uint32_t i = threadIdx.x + kHeld * kNormBlock; i < vectors; i += kNormBlock) {
    add(load4<kAligned>(in, i, a.width), weight_of(i));
  }
  const SumAndMax all = block_reduce(part);
  const float factor = 1.0f / sqrtf(all.sum / static_cast<float>(a.width) + a.eps);
  const float scale = scale_for(all.max * factor);
  __half* out = a.out + (size_t{blockIdx.y} * a.rows + row) * x_stride(a.width);
  const auto write = [&](uint32_t i, float4 x, float4 weight) {
    store4(out, i, i < vectors ? times(times(x, weight), factor / scale) : float4{});
  };
  const uint32_t padded = x_stride(a.width) / 4;
#pragma unroll
  for (uint32_t k = 0; k < kHeld; ++k) {
    const uint32_t i = threadIdx.x + k * kNormBlock;
    if (i < padded) write(i, held[k], weights[k]);
  }
  for (uint32_t i = threadIdx.x + kHeld * kNormBlock; i < padded; i += kNormBlock) {
    write(i, i < vectors ? load4<kAligned>(in, i, a.width) : float4{}, i < vectors ? weight_of(i) : float4{});
  }
  if (threadIdx.x == 0 && blockIdx.y == 0) {
    a.row_scale[row] = scale;
    stamp_end(a.stamp);
  }
}

__device__ __forceinline__ float silu_times(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

template <bool kAligned>
__device__ __forceinline__ float4 swiglu4(const Swiglu& a, uint32_t row, uint32_t i) {
  const float4 g = load4<kAligned>(a.gate + size_t{row} * a.width, i, a.width);
  const float4 u = load4<kAligned>(a.up + size_t{row} * a.width, i, a.width);
  return {silu_times(g.x, u.x), silu_times(g.y, u.y), silu_times(g.z, u.z), silu_times(g.w, u.w)};
}

// Several blocks share a row and write it as if its scale were 1. Where a value does not fit, the block that ends last
// writes the whole row again with the scale that the largest value needs: rare enough to be slow. The largest value is
// found by an atomic maximum, whose result does not depend on the order.
template <bool kAligned>
__global__ void swiglu_kernel(Swiglu a) {
  grid_let_next_start();
  grid_wait();
  stamp_begin(a.stamp);
  const uint32_t row = blockIdx.y, vectors = (a.width + 3) / 4, padded = x_stride(a.width) / 4;
  __half* out = a.out + size_t{row} * x_stride(a.width);
  float largest = 0.0f;
#pragma unroll
  for (uint32_t k = 0; k < kSwigluPerThread / 4; ++k) {
    const uint32_t i = (blockIdx.x * (kSwigluPerThread / 4) + k) * kBlock + threadIdx.x;
    if (i >= padded) break;
    float4 y = {0.0f, 0.0f, 0.0f, 0.0f};
    if (i < vectors) y = swiglu4<kAligned>(a, row, i);
    largest = fmaxf(largest, largest_of(y));
    store4(out, i, y);
  }
  largest = block_reduce({0.0f, largest}).max;
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    if (largest > kHalfLimit) atomicMax(&a.sync[row].x, __float_as_uint(largest));
    __threadfence();  // this block's maximum, and below its stores, before its count
    is_last = atomicAdd(&a.sync[row].y, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  largest = __uint_as_float(__ldcg(&a.sync[row].x));
  const float scale = scale_for(largest);
  __syncthreads();  // all have read the maximum
  if (threadIdx.x == 0) {
    a.sync[row] = make_uint2(0, 0);
    a.row_scale[row] = scale;
    stamp_end(a.stamp);  // early in the rare case below
  }
  if (scale == 1.0f) return;
  for (uint32_t i = threadIdx.x; i < vectors; i += kBlock) {
    store4(out, i, times(swiglu4<kAligned>(a, row, i), 1.0f / scale));
  }
}

// A thread owns a column and goes through the rows in order: a row is read before anything can be written over it.
__global__ void select_rows_kernel(SelectRows a) {
  grid_let_next_start();
  const uint32_t column = blockIdx.x * kBlock + threadIdx.x;
  grid_wait();
  stamp_begin(a.stamp);
  if (column >= a.width) return;
  for (uint32_t r = 0; r < a.selected_rows; ++r) {
    const uint32_t from = a.selected[r];
    if (from != r) a.rows[size_t{r} * a.width + column] = a.rows[size_t{from} * a.width + column];
  }
}

// Two columns a thread: what is written is as wide as X is padded.
__global__ void gather_columns_kernel(GatherColumns a) {
  grid_let_next_start();
  const uint32_t stride = x_stride(a.width), column = 2 * (blockIdx.x * kBlock + threadIdx.x);
  if (column >= stride) return;
  grid_wait();
  const __half* from = a.x + size_t{blockIdx.y} * stride;
  __half2 pair = __half2half2(__ushort_as_half(0));
  if (column < a.width) pair.x = from[min(a.perm[column], a.width - 1)];
  if (column + 1 < a.width) pair.y = from[min(a.perm[column + 1], a.width - 1)];
  reinterpret_cast<__half2*>(a.out + size_t{blockIdx.y} * stride)[column / 2] = pair;
}

constexpr uint32_t kLogitsPerThread = 16;

// The stores cross the bus and need no answer. The first block sends the stamps, its own among them.
__global__ void finish_pass_kernel(FinishPass a) {
  grid_wait();
  if (blockIdx.x == 0 && a.stamp_count != 0) {
    if (threadIdx.x == 0) a.stamps[a.stamp_count - 1].begin_ns = gpu_clock_ns();
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < a.stamp_count; i += kBlock) a.host_stamps[i] = a.stamps[i];
  }
  const uint64_t quads = a.logit_count / 4;
  const uint64_t first = uint64_t{blockIdx.x} * kBlock * (kLogitsPerThread / 4) + threadIdx.x;
#pragma unroll
  for (uint32_t k = 0; k < kLogitsPerThread / 4; ++k) {
    const uint64_t i = first + k * kBlock;
    if (i < quads) reinterpret_cast<float4*>(a.host_logits)[i] = reinterpret_cast<const float4*>(a.logits)[i];
  }
  const uint64_t rest = 4 * quads + threadIdx.x;
  if (blockIdx.x == 0 && rest < a.logit_count) a.host_logits[rest] = a.logits[rest];
}

__global__ void stamp_kernel(Stamp* stamp, bool end) { (end ? stamp->end_ns : stamp->begin_ns) = gpu_clock_ns(); }

uint32_t ceil_div(uint32_t value, uint32_t by) { return (value + by - 1) / by; }

bool is_aligned(uint32_t width) { return width % 4 == 0; }

template <class Args>
cudaError_t launch(void (*kernel)(Args), dim3 grid, uint32_t block, const Args& args, cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(block);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = args.programmatic ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace

cudaError_t launch_begin_pass(const BeginPass& args, cudaStream_t stream) {
  if (args.rows == 0 || args.hidden == 0) return cudaErrorInvalidValue;
  const dim3 grid(ceil_div(args.hidden, 4 * kBlock), args.rows);
  return launch(is_aligned(args.hidden) ? begin_pass_kernel<true> : begin_pass_kernel<false>, grid, kBlock, args, stream);
}

cudaError_t launch_rms_norm(const RmsNorm& args, cudaStream_t stream) {
  if (args.rows == 0 || args.width == 0) return cudaErrorInvalidValue;
  return launch(is_aligned(args.width) ? rms_norm_kernel<true> : rms_norm_kernel<false>, dim3(args.rows, args.copies),
                kNormBlock, args, stream);
}

cudaError_t launch_swiglu(const Swiglu& args, cudaStream_t stream) {
  if (args.rows == 0 || args.width == 0) return cudaErrorInvalidValue;
  const dim3 grid(ceil_div(x_stride(args.width), kSwigluPerBlock), args.rows);
  return launch(is_aligned(args.width) ? swiglu_kernel<true> : swiglu_kernel<false>, grid, kBlock, args, stream);
}

cudaError_t launch_select_rows(const SelectRows& args, cudaStream_t stream) {
  if (args.width == 0 || args.selected_rows == 0) return cudaErrorInvalidValue;
  return launch(select_rows_kernel, dim3(ceil_div(args.width, kBlock)), kBlock, args, stream);
}

cudaError_t launch_gather_columns(const GatherColumns& args, cudaStream_t stream) {
  if (args.width == 0 || args.rows == 0) return cudaErrorInvalidValue;
  return launch(gather_columns_kernel, dim3(ceil_div(x_stride(args.width), 2 * kBlock), args.rows), kBlock, args, stream);
}

cudaError_t launch_finish_pass(const FinishPass& args, cudaStream_t stream) {
  if (args.logit_count / (kBlock * kLogitsPerThread) > 0x7ffffffeu) return cudaErrorInvalidValue;
  const auto blocks = static_cast<uint32_t>(args.logit_count / (kBlock * kLogitsPerThread)) + 1;
  return launch(finish_pass_kernel, dim3(blocks), kBlock, args, stream);
}

cudaError_t launch_stamp(Stamp* stamp, bool end, cudaStream_t stream) {
  if (stamp == nullptr) return cudaErrorInvalidValue;
  stamp_kernel<<<1, 1, 0, stream>>>(stamp, end);
  return cudaGetLastError();
}

cudaError_t probe_kernels() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, select_rows_kernel);
}

}  // namespace sluice::cuda
