// SPDX-License-Identifier: Apache-2.0
#include "exec/embedding.hpp"

#include <cmath>
#include <cstring>
#include <utility>

#include "base/check.hpp"
#include "base/half.hpp"

namespace sluice::exec {

namespace {

template <class T>
T element(const std::byte* at, size_t index) {
  T value;
  std::memcpy(&value, at + index * sizeof(T), sizeof(T));
  return value;
}

}  // namespace

Result<Embedding> Embedding::open(const storage::Container& container, uint32_t max_rows,
                                  const storage::ReadQueueOptions& options) {
  const storage::Tensor* tensor = container.find(storage::Role::token_embedding);
  SLUICE_CHECK(tensor != nullptr);  // completeness is checked at open
  SLUICE_TRY_ASSIGN(reader, storage::RowReader::open(container, options));
  return Embedding(std::move(reader), *tensor, max_rows);
}

Embedding::Embedding(storage::RowReader reader, const storage::Tensor& tensor, uint32_t max_rows)
    : reader_(std::move(reader)),
      scheme_(tensor.scheme),
      hidden_(tensor.cols),
      group_elems_(tensor.group_elems),
      scale_(std::ldexp(1.0f, tensor.scale_exponent)),
      values_(max_rows * reader_.value_row_bytes()),
      scales_(max_rows * reader_.scale_row_bytes()) {}

Status Embedding::fetch(std::span<const int32_t> ids, std::span<float> out) {
  SLUICE_CHECK(out.size() == ids.size() * hidden_);
  SLUICE_TRY(reader_.read(ids, std::span(values_).first(ids.size() * reader_.value_row_bytes()),
                          std::span(scales_).first(ids.size() * reader_.scale_row_bytes())));
  for (size_t row = 0; row < ids.size(); ++row) {
    const std::byte* values = values_.data() + row * reader_.value_row_bytes();
    const std::byte* scales = scales_.data() + row * reader_.scale_row_bytes();
    float* to = out.data() + row * hidden_;
    for (size_t i = 0; i < hidden_; ++i) {
      switch (scheme_) {
        case storage::Scheme::f32: to[i] = element<float>(values, i); break;
        case storage::Scheme::f16: to[i] = float_from_half(element<uint16_t>(values, i)); break;
        case storage::Scheme::bf16: to[i] = float_from_bf16(element<uint16_t>(values, i)); break;
        case storage::Scheme::int8:
          to[i] = static_cast<float>(element<int8_t>(values, i)) *
                  float_from_half(element<uint16_t>(scales, i / group_elems_));
          break;
        case storage::Scheme::int4: SLUICE_CHECK(false);  // refused by the manifest's checks
      }
      to[i] *= scale_;
    }
  }
  return {};
}

}  // namespace sluice::exec
