// SPDX-License-Identifier: Apache-2.0
// Kernels between the matrices: RMSNorm, RoPE, SwiGLU, FP16 stores. Arguments in kernels.hpp; all FP32, any alignment,
// any width: what does not fill a vector is done one by one.
#include "backend/cpu/simd_targets.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/elementwise.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#include <hwy/contrib/math/math-inl.h>

#include <algorithm>
#include <cmath>

#include "backend/cpu/kernels.hpp"
#include "base/half.hpp"

HWY_BEFORE_NAMESPACE();
namespace sluice::backend::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

void RmsNormRow(const float* in, const float* weight, uint32_t width, float eps, float* out) {
  const hn::CappedTag<float, 16> d;
  const size_t lanes = hn::Lanes(d);
  auto even = hn::Zero(d), odd = hn::Zero(d);
  size_t i = 0;
  for (; i + 2 * lanes <= width; i += 2 * lanes) {
    const auto x0 = hn::LoadU(d, in + i), x1 = hn::LoadU(d, in + i + lanes);
    even = hn::MulAdd(x0, x0, even);
    odd = hn::MulAdd(x1, x1, odd);
  }
  double sum = hn::GetLane(hn::SumOfLanes(d, hn::Add(even, odd)));
  for (; i < width; ++i) sum += double{in[i]} * double{in[i]};
  const auto factor = static_cast<float>(1.0 / std::sqrt(sum / width + double{eps}));
  const auto factors = hn::Set(d, factor);
  i = 0;
  for (; i + lanes <= width; i += lanes) {
    auto x = hn::Mul(hn::LoadU(d, in + i), factors);
    if (weight != nullptr) x = hn::Mul(x, hn::LoadU(d, weight + i));
    hn::StoreU(x, d, out + i);
  }
  for (; i < width; ++i) out[i] = in[i] * factor * (weight != nullptr ? weight[i] : 1.0f);
}

void RopeHead(float* head, const float* cos, const float* sin, uint32_t rotary_dims) {
  const hn::CappedTag<float, 16> d;
  const size_t lanes = hn::Lanes(d);
  const size_t pairs = rotary_dims / 2;
  size_t i = 0;
  for (; i + lanes <= pairs; i += lanes) {
    const auto a = hn::LoadU(d, head + i), b = hn::LoadU(d, head + pairs + i);
    const auto c = hn::LoadU(d, cos + i), s = hn::LoadU(d, sin + i);
    hn::StoreU(hn::NegMulAdd(b, s, hn::Mul(a, c)), d, head + i);
    hn::StoreU(hn::MulAdd(a, s, hn::Mul(b, c)), d, head + pairs + i);
  }
  for (; i < pairs; ++i) {
    const float a = head[i], b = head[pairs + i];
    head[i] = a * cos[i] - b * sin[i];
    head[pairs + i] = b * cos[i] + a * sin[i];
  }
}

template <class D>
HWY_INLINE hn::Vec<D> silu_times(D d, hn::Vec<D> gate, hn::Vec<D> up) {
  // exp(88) is finite, and x / (1 + exp(88)) is 0 to 38 digits.
  const auto power = hn::Exp(d, hn::Min(hn::Neg(gate), hn::Set(d, 88.0f)));
  return hn::Mul(hn::Div(gate, hn::Add(hn::Set(d, 1.0f), power)), up);
}

void Swiglu(float* gate, const float* up, size_t count) {
  const hn::CappedTag<float, 16> d;
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    hn::StoreU(silu_times(d, hn::LoadU(d, gate + i), hn::LoadU(d, up + i)), d, gate + i);
  }
  if (i == count) return;
  alignas(64) float g[16] = {}, u[16] = {};
  std::copy(gate + i, gate + count, g);
  std::copy(up + i, up + count, u);
  hn::Store(silu_times(d, hn::Load(d, g), hn::Load(d, u)), d, g);
  std::copy(g, g + (count - i), gate + i);
}

void StoreHalf(const float* in, uint32_t count, uint16_t* out, size_t out_stride) {
  size_t i = 0;
#if HWY_TARGET != HWY_SSE4 && HWY_TARGET != HWY_SCALAR  // there Highway's conversion knows no infinities and NaNs
  const hn::CappedTag<float, 16> d;
  const hn::Rebind<hwy::float16_t, decltype(d)> d16;
  const size_t lanes = hn::Lanes(d);
  const auto most = hn::Set(d, 65504.0f);
  for (; i + lanes <= count; i += lanes) {
    const auto x = hn::LoadU(d, in + i);
    const auto clamped = hn::IfThenElse(hn::IsFinite(x), hn::Min(hn::Max(x, hn::Neg(most)), most), x);
    const auto half = hn::DemoteTo(d16, clamped);
    if (out_stride == 1) {
      hn::StoreU(half, d16, reinterpret_cast<hwy::float16_t*>(out) + i);
      continue;
    }
    alignas(32) uint16_t bits[16];
    hn::StoreU(half, d16, reinterpret_cast<hwy::float16_t*>(bits));
    for (size_t k = 0; k < lanes; ++k) out[(i + k) * out_stride] = bits[k];
  }
#endif
  for (; i < count; ++i) {
    out[i * out_stride] = half_from_float(std::isfinite(in[i]) ? std::clamp(in[i], -65504.0f, 65504.0f) : in[i]);
  }
}

const char* Target() { return hwy::TargetName(HWY_TARGET); }

}  // namespace HWY_NAMESPACE
}  // namespace sluice::backend::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sluice::backend::cpu {
HWY_EXPORT(RmsNormRow);
HWY_EXPORT(RopeHead);
HWY_EXPORT(Swiglu);
HWY_EXPORT(StoreHalf);
HWY_EXPORT(Target);

void rms_norm_row(const float* in, const float* weight, uint32_t width, float eps, float* out) {
  HWY_DYNAMIC_DISPATCH(RmsNormRow)(in, weight, width, eps, out);
}
void rope_head(float* head, const float* cos, const float* sin, uint32_t rotary_dims) {
  HWY_DYNAMIC_DISPATCH(RopeHead)(head, cos, sin, rotary_dims);
}
void swiglu(float* gate, const float* up, size_t count) { HWY_DYNAMIC_DISPATCH(Swiglu)(gate, up, count); }
void store_half(const float* in, uint32_t count, uint16_t* out, size_t out_stride) {
  HWY_DYNAMIC_DISPATCH(StoreHalf)(in, count, out, out_stride);
}
const char* simd_target() { return HWY_DYNAMIC_DISPATCH(Target)(); }
}  // namespace sluice::backend::cpu
#endif
