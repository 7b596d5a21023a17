// SPDX-License-Identifier: Apache-2.0
#include "exec/embedding.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "base/check.hpp"
#include "base/half.hpp"

namespace sluice::exec {

namespace {

template <class T>
T element(std::span<const std::byte> row, size_t index) {
  T value;
  std::memcpy(&value, row.data() + index * sizeof(T), sizeof(T));
  return value;
}

}  // namespace

Result<RowCache> RowCache::create(uint32_t rows, uint64_t row_bytes) {
  RowCache cache;
  cache.row_bytes_ = row_bytes;
  const uint64_t slots = std::clamp<uint64_t>(kRowCacheBytes / row_bytes, 1, rows);
  cache.ids_.assign(slots, -1);
  SLUICE_TRY_ASSIGN(memory, Mapping::anonymous(slots * row_bytes, "embedding rows"));
  cache.memory_ = std::move(memory);
  return cache;
}

std::span<const std::byte> RowCache::find(int32_t id) const {
  if (id < 0 || ids_[slot(id)] != id) return {};
  return at(slot(id));
}

std::span<std::byte> RowCache::insert(int32_t id) {
  ids_[slot(id)] = id;
  return at(slot(id));
}

Result<Embedding> Embedding::open(const storage::Container& container, uint32_t max_rows,
                                  const storage::ReadQueueOptions& options) {
  const storage::Tensor* tensor = container.find(storage::Role::token_embedding);
  SLUICE_CHECK(tensor != nullptr);  // completeness is checked at open
  SLUICE_TRY_ASSIGN(reader, storage::RowReader::open(container, options));
  SLUICE_TRY_ASSIGN(cache, RowCache::create(tensor->rows, reader.value_row_bytes() + reader.scale_row_bytes()));
  return Embedding(std::move(reader), std::move(cache), *tensor, max_rows);
}

Embedding::Embedding(storage::RowReader reader, RowCache cache, const storage::Tensor& tensor, uint32_t max_rows)
    : reader_(std::move(reader)),
      cache_(std::move(cache)),
      scheme_(tensor.scheme),
      hidden_(tensor.cols),
      group_elems_(tensor.group_elems),
      scale_(std::ldexp(1.0f, tensor.scale_exponent)),
      values_(max_rows * reader_.value_row_bytes()),
      scales_(max_rows * reader_.scale_row_bytes()) {
  missing_.reserve(max_rows);
  missing_at_.reserve(max_rows);
}

Status Embedding::fetch(std::span<const int32_t> ids, std::span<float> out) {
  SLUICE_CHECK(out.size() == ids.size() * hidden_);
  const uint64_t value_bytes = reader_.value_row_bytes(), scale_bytes = reader_.scale_row_bytes();
  const auto out_row = [&](size_t row) { return out.subspan(row * hidden_, hidden_); };
  missing_.clear();
  missing_at_.clear();
  for (uint32_t row = 0; row < ids.size(); ++row) {
    const std::span<const std::byte> known = cache_.find(ids[row]);
    if (known.empty()) {
      missing_.push_back(ids[row]);
      missing_at_.push_back(row);
      continue;
    }
    convert_row(known.first(value_bytes), known.subspan(value_bytes), out_row(row));
  }
  if (missing_.empty()) return {};
  SLUICE_TRY(reader_.read(missing_, std::span(values_).first(missing_.size() * value_bytes),
                          std::span(scales_).first(missing_.size() * scale_bytes)));
  for (size_t i = 0; i < missing_.size(); ++i) {
    const std::span<const std::byte> values = std::span(values_).subspan(i * value_bytes, value_bytes);
    const std::span<const std::byte> scales = std::span(scales_).subspan(i * scale_bytes, scale_bytes);
    convert_row(values, scales, out_row(missing_at_[i]));
    const std::span<std::byte> kept = cache_.insert(missing_[i]);
    std::copy(values.begin(), values.end(), kept.begin());
    std::copy(scales.begin(), scales.end(), kept.begin() + static_cast<ptrdiff_t>(value_bytes));
  }
  return {};
}

// One loop a scheme, which become vectors: chosen per element, 512 rows of 8192 took 40 ms of a prefill pass.
void Embedding::convert_row(std::span<const std::byte> values, std::span<const std::byte> scales,
                            std::span<float> out) const {
  switch (scheme_) {
    case storage::Scheme::f32:
      for (size_t i = 0; i < hidden_; ++i) out[i] = element<float>(values, i) * scale_;
      return;
    case storage::Scheme::f16:
      for (size_t i = 0; i < hidden_; ++i) out[i] = float_from_half(element<uint16_t>(values, i)) * scale_;
      return;
    case storage::Scheme::bf16:
      for (size_t i = 0; i < hidden_; ++i) out[i] = float_from_bf16(element<uint16_t>(values, i)) * scale_;
      return;
    case storage::Scheme::int8:
      for (size_t begin = 0; begin < hidden_; begin += group_elems_) {
        const float scale = float_from_half(element<uint16_t>(scales, begin / group_elems_));
        const size_t end = std::min<size_t>(begin + group_elems_, hidden_);
        for (size_t i = begin; i < end; ++i) out[i] = static_cast<float>(element<int8_t>(values, i)) * scale * scale_;
      }
      return;
    case storage::Scheme::int4: SLUICE_CHECK(false);  // refused by the manifest's checks
  }
}

}  // namespace sluice::exec
