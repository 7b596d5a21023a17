// SPDX-License-Identifier: Apache-2.0
// Attention of up to four queries over one KV head: softmax(q K^T * scale) V, online over blocks of 64 positions.
//
//   argument   shape                                  type    layout
//   queries    count x [head_dim] in and out          FP32
//   k          blocks x [head_dim][64]                FP16    transposed: 64 positions of one dimension are 128 B
//   v          blocks x [64][head_dim]                FP16
//
// Per block: 64 scores a query in registers (lanes are positions), their maximum, exp, and the weighted sum of V rows.
// The block's FP16 values are converted once for all queries. A query's operations are the same whatever others share
// the call: its own maximum rescales its own sums (Milakov and Gimelshein, arXiv:1805.02867).
#include "backend/cpu/simd_targets.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/attention.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#include <hwy/contrib/math/math-inl.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "backend/backend.hpp"
#include "backend/cpu/kernels.hpp"
#include "base/half.hpp"

HWY_BEFORE_NAMESPACE();
namespace sluice::backend::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
namespace {

// What is known of one query so far: sum over positions of exp(score - maximum), and of that times V.
struct alignas(64) Running {
  float values[kMaxHeadDim];
  float weights[kKvBlockTokens];  // of the block at hand
  float maximum;
  float sum;
};

template <class D>
HWY_INLINE hn::Vec<D> load_halves(D d, const uint16_t* p) {
#if HWY_TARGET == HWY_SSE4 || HWY_TARGET == HWY_SCALAR  // there Highway's conversion makes finite numbers of NaNs
  const hn::RebindToUnsigned<D> du;
  const hn::Rebind<uint16_t, D> d16;
  const auto bits = hn::PromoteTo(du, hn::LoadU(d16, p));
  const auto magnitude = hn::ShiftLeft<13>(hn::And(bits, hn::Set(du, 0x7fffu)));
  const auto finite = hn::BitCast(du, hn::Mul(hn::BitCast(d, magnitude), hn::Set(d, 0x1p112f)));
  const auto special = hn::VecFromMask(du, hn::Eq(hn::And(bits, hn::Set(du, 0x7c00u)), hn::Set(du, 0x7c00u)));
  const auto sign = hn::ShiftLeft<16>(hn::And(bits, hn::Set(du, 0x8000u)));
  return hn::BitCast(d, hn::Or(hn::Or(finite, sign), hn::And(special, hn::Set(du, 0x7f800000u))));
#else
  const hn::Rebind<hwy::float16_t, D> d16;
  return hn::PromoteTo(d, hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(p)));
#endif
}

// Scores of the 64 positions of a block, into weights.
template <size_t Count>
HWY_INLINE void score_block(const Query* queries, const uint16_t* k, uint32_t head_dim, float scale, Running* running) {
  const hn::CappedTag<float, 16> d;
  constexpr size_t kLanes = hn::MaxLanes(hn::CappedTag<float, 16>());
  constexpr size_t kVectors = kLanes >= 16 ? 4 : 2;  // at once: with 4 queries 16 accumulators, or 8 of 16 registers
  for (size_t first = 0; first < kKvBlockTokens; first += kVectors * kLanes) {
    hn::Vec<decltype(d)> acc[Count][kVectors];
    for (size_t q = 0; q < Count; ++q) {
      for (size_t i = 0; i < kVectors; ++i) acc[q][i] = hn::Zero(d);
    }
    for (uint32_t dim = 0; dim < head_dim; ++dim) {
      hn::Vec<decltype(d)> key[kVectors];
      for (size_t i = 0; i < kVectors; ++i) key[i] = load_halves(d, k + dim * kKvBlockTokens + first + i * kLanes);
      for (size_t q = 0; q < Count; ++q) {
        const auto x = hn::Set(d, queries[q].q[dim]);
        for (size_t i = 0; i < kVectors; ++i) acc[q][i] = hn::MulAdd(key[i], x, acc[q][i]);
      }
    }
    for (size_t q = 0; q < Count; ++q) {
      for (size_t i = 0; i < kVectors; ++i) {
        hn::Store(hn::Mul(acc[q][i], hn::Set(d, scale)), d, running[q].weights + first + i * kLanes);
      }
    }
  }
}

// Scores to exp(score - maximum) with the maximum brought up to date; positions past `count` get weight 0. A NaN stays.
HWY_NOINLINE void weigh_block(uint32_t count, uint32_t head_dim, Running& run) {
  const hn::CappedTag<float, 16> d;
  const size_t lanes = hn::Lanes(d);
  const float lowest = -std::numeric_limits<float>::infinity();
  std::fill(run.weights + count, run.weights + kKvBlockTokens, lowest);
  auto largest = hn::Set(d, run.maximum);
  for (size_t i = 0; i < kKvBlockTokens; i += lanes) largest = hn::Max(largest, hn::Load(d, run.weights + i));
  const float maximum = hn::GetLane(hn::MaxOfLanes(d, largest));
  if (run.maximum != lowest && maximum > run.maximum) {
    const float shrink = std::exp(run.maximum - maximum);
    run.sum *= shrink;
    for (uint32_t dim = 0; dim < head_dim; ++dim) run.values[dim] *= shrink;
  }
  run.maximum = maximum;
  auto sum = hn::Zero(d);
  for (size_t i = 0; i < kKvBlockTokens; i += lanes) {
    const auto x = hn::Sub(hn::Load(d, run.weights + i), hn::Set(d, maximum));
    const auto weight = hn::IfThenElse(hn::IsNaN(x), x, hn::Exp(d, x));  // Exp makes 0 of a NaN
    sum = hn::Add(sum, weight);
    hn::Store(weight, d, run.weights + i);
  }
  run.sum += hn::GetLane(hn::SumOfLanes(d, sum));
}

// Dimensions [first, head_dim) of values += weights * V.
HWY_NOINLINE void add_tail(const uint16_t* v, uint32_t first, uint32_t count, uint32_t head_dim, Running& run) {
  for (uint32_t dim = first; dim < head_dim; ++dim) {
    for (uint32_t p = 0; p < count; ++p) run.values[dim] += run.weights[p] * float_from_half(v[p * head_dim + dim]);
  }
}

// values += weights * V over positions [0, counts[q]) of the block.
template <size_t Count>
HWY_INLINE void add_block(const uint16_t* v, const uint32_t* counts, uint32_t positions, uint32_t head_dim,
                          Running* running) {
  const hn::CappedTag<float, 16> d;
  constexpr size_t kLanes = hn::MaxLanes(hn::CappedTag<float, 16>());
  constexpr size_t kVectors = kLanes >= 16 ? 4 : 2;
  uint32_t dim = 0;
  const auto run_dims = [&]<size_t Vectors>() HWY_ATTR {
    hn::Vec<decltype(d)> acc[Count][Vectors];
    for (size_t q = 0; q < Count; ++q) {
      for (size_t i = 0; i < Vectors; ++i) acc[q][i] = hn::LoadU(d, running[q].values + dim + i * kLanes);
    }
    for (uint32_t p = 0; p < positions; ++p) {
      hn::Vec<decltype(d)> value[Vectors];
      for (size_t i = 0; i < Vectors; ++i) value[i] = load_halves(d, v + p * head_dim + dim + i * kLanes);
      for (size_t q = 0; q < Count; ++q) {
        if (p >= counts[q]) continue;  // 0 * V of a later position is not 0 if V is not finite
        const auto weight = hn::Set(d, running[q].weights[p]);
        for (size_t i = 0; i < Vectors; ++i) acc[q][i] = hn::MulAdd(value[i], weight, acc[q][i]);
      }
    }
    for (size_t q = 0; q < Count; ++q) {
      for (size_t i = 0; i < Vectors; ++i) hn::StoreU(acc[q][i], d, running[q].values + dim + i * kLanes);
    }
    dim += static_cast<uint32_t>(Vectors * kLanes);
  };
  while (dim + kVectors * kLanes <= head_dim) run_dims.template operator()<kVectors>();
  while (dim + kLanes <= head_dim) run_dims.template operator()<1>();
  for (size_t q = 0; q < Count; ++q) add_tail(v, dim, counts[q], head_dim, running[q]);
}

template <size_t Count>
HWY_NOINLINE void attend_group(const Query* queries, const KvHead& kv, uint32_t head_dim, float scale) {
  Running running[Count];
  uint32_t last = 0;
  for (size_t q = 0; q < Count; ++q) {
    std::fill(running[q].values, running[q].values + head_dim, 0.0f);
    running[q].maximum = -std::numeric_limits<float>::infinity();
    running[q].sum = 0;
    last = std::max(last, queries[q].position);
  }
  for (uint32_t block = 0; block <= last / kKvBlockTokens; ++block) {
    const size_t at = kv.blocks[block] * kv.block_stride;
    score_block<Count>(queries, kv.k + at, head_dim, scale, running);
    uint32_t counts[Count], positions = 0;
    for (size_t q = 0; q < Count; ++q) {
      const uint32_t first = block * kKvBlockTokens;
      counts[q] = queries[q].position < first ? 0 : std::min(queries[q].position - first + 1, kKvBlockTokens);
      positions = std::max(positions, counts[q]);
      if (counts[q] != 0) weigh_block(counts[q], head_dim, running[q]);
    }
    add_block<Count>(kv.v + at, counts, positions, head_dim, running);
  }
  for (size_t q = 0; q < Count; ++q) {
    const float inverse = 1.0f / running[q].sum;
    for (uint32_t dim = 0; dim < head_dim; ++dim) queries[q].out[dim] = running[q].values[dim] * inverse;
  }
}

}  // namespace

void Attend(const Query* queries, uint32_t count, const KvHead& kv, uint32_t head_dim, float scale) {
  switch (count) {
    case 1: return attend_group<1>(queries, kv, head_dim, scale);
    case 2: return attend_group<2>(queries, kv, head_dim, scale);
    case 3: return attend_group<3>(queries, kv, head_dim, scale);
    default: return attend_group<4>(queries, kv, head_dim, scale);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace sluice::backend::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice::backend::cpu {
HWY_EXPORT(Attend);

void attend(const Query* queries, uint32_t count, const KvHead& kv, uint32_t head_dim, float scale) {
  HWY_DYNAMIC_DISPATCH(Attend)(queries, count, kv, head_dim, scale);
}
}  // namespace sluice::backend::cpu
#endif
