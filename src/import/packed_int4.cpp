// SPDX-License-Identifier: Apache-2.0
#include "import/packed_int4.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <span>
#include <utility>

#include "base/check.hpp"
#include "base/half.hpp"
#include "base/units.hpp"
#include "import/ggml_blocks.hpp"
#include "import/slabs.hpp"
#include "import/text.hpp"
#include "quant/layout.hpp"
#include "quant/rounding.hpp"

namespace sluice::import {
namespace {

constexpr uint32_t kAwqRows[8] = {0, 2, 4, 6, 1, 3, 5, 7};
constexpr uint8_t kSymmetricZero = 8;

// The eight nibbles of a word as eight bytes, nibble 0 first.
uint64_t spread_nibbles(uint32_t word) {
  uint64_t bytes = word;
  bytes = (bytes | bytes << 16) & 0x0000ffff0000ffffu;
  bytes = (bytes | bytes << 8) & 0x00ff00ff00ff00ffu;
  return (bytes | bytes << 4) & 0x0f0f0f0f0f0f0f0fu;
}

uint8_t nibble(uint32_t word, uint32_t index) { return static_cast<uint8_t>(word >> (4 * index) & 15u); }

// One matrix on its way: everything but the codes is row-major by output, [rows][groups] of the checkpoint.
struct Matrix {
  const SourceTensor& source;
  std::string label;  // "FILE: tensor NAME" for messages
  uint64_t groups = 0;
  std::vector<uint32_t> words;  // the packed codes, whole
  std::vector<float> scales;
  std::vector<uint8_t> zeros;  // empty: all 8
  std::vector<uint32_t> perm;  // empty: columns are in order

  const PackedInt4& packed() const { return *source.packed; }
};

template <class Element>
Result<std::vector<Element>> read_part(const std::vector<SourceFile>& files, const FilePart& part) {
  std::vector<Element> elements(part.bytes / sizeof(Element));
  SLUICE_TRY(read_exactly(files[part.file].fd.get(), std::as_writable_bytes(std::span(elements)), part.offset,
                          files[part.file].path));
  return elements;
}

// [groups][rows] into [rows][groups].
template <class Element>
std::vector<Element> transposed(const std::vector<Element>& from, uint64_t groups, uint64_t rows) {
  std::vector<Element> to(from.size());
  for (uint64_t g = 0; g < groups; ++g) {
    for (uint64_t n = 0; n < rows; ++n) to[n * groups + g] = from[g * rows + n];
  }
  return to;
}

Status read_scales(const std::vector<SourceFile>& files, Matrix& m) {
  SLUICE_TRY_ASSIGN(bytes, read_part<std::byte>(files, m.packed().scales));
  m.scales.resize(m.source.rows * m.groups);
  decode_to_float(m.packed().scale_type, bytes, m.scales);
  if (m.packed().packing != Packing::compressed) m.scales = transposed(m.scales, m.groups, m.source.rows);
  for (size_t i = 0; i < m.scales.size(); ++i) {
    if (std::isfinite(m.scales[i]) && m.scales[i] != 0) continue;
    return fail(ErrorCode::numeric,
                fmt::format("{}: the scale of row {}, group {} is {}; the checkpoint is damaged, download it again",
                            m.label, i / m.groups, i % m.groups, m.scales[i]));
  }
  return {};
}

Status read_zeros(const std::vector<SourceFile>& files, Matrix& m) {
  if (!m.packed().zeros) return {};
  SLUICE_TRY_ASSIGN(words, read_part<uint32_t>(files, *m.packed().zeros));
  const uint64_t rows = m.source.rows;
  m.zeros.resize(rows * m.groups);
  for (uint64_t n = 0; n < rows; ++n) {
    for (uint64_t g = 0; g < m.groups; ++g) {
      uint8_t& zero = m.zeros[n * m.groups + g];
      const uint32_t word =
          m.packed().packing == Packing::compressed ? words[n / 8 * m.groups + g] : words[(g * rows + n) / 8];
      switch (m.packed().packing) {
        case Packing::gptq_v1:
          zero = static_cast<uint8_t>(nibble(word, n % 8) + 1);
          break;
        case Packing::gptq_v2:
        case Packing::compressed:
          zero = nibble(word, n % 8);
          break;
        case Packing::awq:
          zero = nibble(word, static_cast<uint32_t>(std::find(kAwqRows, kAwqRows + 8, n % 8) - kAwqRows));
          break;
      }
    }
  }
  if (std::all_of(m.zeros.begin(), m.zeros.end(), [](uint8_t zero) { return zero == kSymmetricZero; })) m.zeros.clear();
  return {};
}

// Sorts the columns by group. Every group must then fill its place: the container counts groups by column.
Status read_group_index(const std::vector<SourceFile>& files, Matrix& m) {
  if (!m.packed().group_index) return {};
  SLUICE_TRY_ASSIGN(index, read_part<int32_t>(files, *m.packed().group_index));
  for (uint32_t k = 0; k < index.size(); ++k) {
    if (index[k] >= 0 && static_cast<uint64_t>(index[k]) < m.groups) continue;
    return fail(ErrorCode::corrupt,
                fmt::format("{}: g_idx puts column {} into group {}, there are {}", m.label, k, index[k], m.groups));
  }
  std::vector<uint32_t> perm(index.size());
  std::iota(perm.begin(), perm.end(), 0u);
  std::stable_sort(perm.begin(), perm.end(), [&](uint32_t a, uint32_t b) { return index[a] < index[b]; });
  for (uint32_t k = 0; k < perm.size(); ++k) {
    const auto group = static_cast<int32_t>(k / m.packed().group_elems);
    if (index[perm[k]] == group) continue;
    return fail(ErrorCode::corrupt, fmt::format("{}: g_idx gives group {} more or fewer than {} columns", m.label,
                                                std::min(group, index[perm[k]]), m.packed().group_elems));
  }
  if (!std::is_sorted(perm.begin(), perm.end())) m.perm = std::move(perm);
  return {};
}

// The power of two that moves the scales to where FP16 holds them exactly, and the scales as such.
Result<std::pair<int32_t, std::vector<uint16_t>>> exact_halves(const Matrix& m) {
  storage::Tensor as_halves;
  as_halves.name = m.label;
  as_halves.scheme = storage::Scheme::f16;
  as_halves.cols = static_cast<uint32_t>(m.groups);
  SLUICE_TRY_ASSIGN(extent, quant::measure(as_halves, 0, m.scales));
  // Scales stay below 512, so that codes times a scale fit FP16 as well.
  constexpr int kLargestExponent = 8;
  const int32_t shifted = std::ilogb(extent.max_abs) - kLargestExponent;
  const bool as_is = quant::fits_half(extent, 0) && extent.max_abs < 512.0f;
  if (!as_is && (!quant::fits_half(extent, shifted) || shifted < -126 || shifted > 126)) {
    return fail(
        ErrorCode::unsupported,
        fmt::format("{}: its scales, up to {} in magnitude, have more range or more bits than FP16 with a common "
                    "power of two; storing them would round the weights again: import the F16 or BF16 original",
                    m.label, extent.max_abs));
  }
  const int32_t exponent = as_is ? 0 : shifted;
  std::vector<uint16_t> halves(m.scales.size());
  std::transform(m.scales.begin(), m.scales.end(), halves.begin(),
                 [&](float scale) { return half_from_float(std::ldexp(scale, -exponent)); });
  return std::pair(exponent, std::move(halves));
}

// Codes of rows [first, first + rows), row-major [rows][cols], columns as in the checkpoint.
void unpack_codes(const Matrix& m, uint32_t first, uint32_t rows, std::vector<uint8_t>& codes) {
  const uint64_t cols = m.source.cols, outputs = m.source.rows;
  switch (m.packed().packing) {
    case Packing::gptq_v1:
    case Packing::gptq_v2:
      for (uint64_t r = 0; r < cols / 8; ++r) {
        for (uint64_t n = 0; n < rows; ++n) {
          const uint64_t bytes = spread_nibbles(m.words[r * outputs + first + n]);
          std::memcpy(&codes[n * cols + 8 * r], &bytes, 8);
        }
      }
      return;
    case Packing::awq:
      for (uint64_t k = 0; k < cols; ++k) {
        for (uint64_t n = 0; n < rows; n += 8) {
          const uint32_t word = m.words[(k * outputs + first + n) / 8];
          for (uint32_t i = 0; i < 8; ++i) codes[(n + kAwqRows[i]) * cols + k] = nibble(word, i);
        }
      }
      return;
    case Packing::compressed: {
      const uint64_t row_words = ceil_div(cols, 8);
      for (uint64_t n = 0; n < rows; ++n) {
        for (uint64_t r = 0; r < row_words; ++r) {
          const uint64_t bytes = spread_nibbles(m.words[(first + n) * row_words + r]);
          std::memcpy(&codes[n * cols + 8 * r], &bytes, std::min<uint64_t>(8, cols - 8 * r));
        }
      }
      return;
    }
  }
}

void sort_columns(const Matrix& m, uint32_t rows, std::vector<uint8_t>& codes) {
  if (m.perm.empty()) return;
  std::vector<uint8_t> row(m.source.cols);
  for (uint64_t n = 0; n < rows; ++n) {
    uint8_t* codes_of_row = codes.data() + n * m.source.cols;
    std::memcpy(row.data(), codes_of_row, row.size());
    for (uint64_t k = 0; k < row.size(); ++k) codes_of_row[k] = row[m.perm[k]];
  }
}

// Parameters of the checkpoint's groups for rows [first, first + rows), in the container's groups: a longer group
// repeats.
template <class Element>
std::vector<Element> in_container_groups(const Matrix& m, const std::vector<Element>& of_checkpoint, uint32_t first,
                                         uint32_t rows, uint32_t group_elems) {
  const uint64_t groups = ceil_div(m.source.cols, group_elems);
  std::vector<Element> out(rows * groups);
  for (uint64_t n = 0; n < rows; ++n) {
    for (uint64_t g = 0; g < groups; ++g) {
      out[n * groups + g] = of_checkpoint[(first + n) * m.groups + g * group_elems / m.packed().group_elems];
    }
  }
  return out;
}

uint32_t container_group(const PackedInt4& packed, uint32_t cols) {
  if (packed.group_elems >= cols) return 128;
  for (const uint32_t group : {128u, 64u}) {
    if (packed.group_elems % group == 0) return group;
  }
  SLUICE_CHECK(packed.group_elems % 32 == 0);  // others are refused when the folder is opened
  return 32;
}

}  // namespace

Status write_packed_tensor(const std::vector<SourceFile>& files, const SourceTensor& source, uint32_t threads,
                           storage::ContainerWriter& writer) {
  const PackedInt4& packed = *source.packed;
  Matrix m{.source = source,
           .label = fmt::format("{}: tensor {}", files[packed.codes.file].path, in_quotes(source.source_name)),
           .groups = ceil_div(source.cols, packed.group_elems),
           .words = {},
           .scales = {},
           .zeros = {},
           .perm = {}};
  SLUICE_TRY(read_scales(files, m));
  SLUICE_TRY(read_zeros(files, m));
  SLUICE_TRY(read_group_index(files, m));
  SLUICE_TRY_ASSIGN(scales, exact_halves(m));
  SLUICE_TRY_ASSIGN(words, read_part<uint32_t>(files, packed.codes));
  m.words = std::move(words);

  storage::Tensor tensor;
  tensor.name = source.name;
  tensor.role = source.role;
  tensor.layer = source.layer;
  tensor.rows = source.rows;
  tensor.cols = source.cols;
  tensor.scheme = storage::Scheme::int4;
  tensor.layout = storage::Layout::tile16x64;
  tensor.group_elems = container_group(packed, source.cols);
  tensor.scale_exponent = scales.first;
  const uint32_t slab_rows = slab_rows_of(source.cols);
  const auto work = [&](uint64_t slab) -> Result<quant::Planes> {
    const auto first = static_cast<uint32_t>(slab * slab_rows);
    storage::Tensor part = tensor;
    part.rows = std::min(slab_rows, source.rows - first);
    std::vector<uint8_t> codes(uint64_t{part.rows} * part.cols);
    unpack_codes(m, first, part.rows, codes);
    sort_columns(m, part.rows, codes);
    const auto scales_here = in_container_groups(m, scales.second, first, part.rows, part.group_elems);
    std::vector<uint8_t> zeros_here;
    if (!m.zeros.empty()) zeros_here = in_container_groups(m, m.zeros, first, part.rows, part.group_elems);
    return quant::lay_out_codes(part, {.values = codes, .scales = scales_here, .bias = {}, .zeros = zeros_here});
  };
  return write_in_slabs(tensor, ceil_div(source.rows, slab_rows), threads, work, writer, m.perm);
}

}  // namespace sluice::import
