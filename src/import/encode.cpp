// SPDX-License-Identifier: Apache-2.0
#include "import/encode.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "base/check.hpp"
#include "base/half.hpp"
#include "import/ggml_blocks.hpp"
#include "import/slabs.hpp"
#include "import/text.hpp"
#include "quant/layout.hpp"
#include "quant/rounding.hpp"

namespace sluice::import {
namespace {

using storage::Layout;
using storage::PlaneKind;
using storage::Role;
using storage::Scheme;
using storage::Tensor;

constexpr uint32_t kKeptGroup = 32;  // of ggml's blocks, and of what is requantized from its K formats

Weights weights_for(const SourceTensor& source, const Options& options, bool tied) {
  const bool embedding = source.role == Role::token_embedding;
  const bool head = source.role == Role::lm_head;
  std::optional<Weights> asked = embedding ? options.embeddings : head ? options.lm_head : std::nullopt;
  if (head && tied && !asked) asked = options.embeddings;
  if (asked) return *asked == Weights::int4 && embedding ? Weights::int8 : *asked;
  if ((embedding || head) && options.weights == Weights::int4) return Weights::int8;
  return options.weights;
}

// `keep`: the same values where a scheme has them, else the nearest scheme that loses little.
Target keep_target(SourceType type, bool embedding) {
  switch (type) {
    case SourceType::f32: return {Scheme::f32, 0, Conversion::narrowest, false};
    case SourceType::f16: return {Scheme::f16, 0, Conversion::copy, false};
    case SourceType::bf16: return {Scheme::bf16, 0, Conversion::copy, false};
    case SourceType::q8_0: return {Scheme::int8, kKeptGroup, Conversion::copy, false};
    case SourceType::q4_0: return {embedding ? Scheme::int8 : Scheme::int4, kKeptGroup, Conversion::copy, false};
    case SourceType::q4_1:
      // int8 has no bias; FP16 holds q * d + m to its own rounding, and rows are read a few at a time.
      if (embedding) return {Scheme::f16, 0, Conversion::round, false};
      return {Scheme::int4, kKeptGroup, Conversion::copy, false};
    case SourceType::q2_k:
    case SourceType::q3_k:
    case SourceType::q4_k: return {embedding ? Scheme::int8 : Scheme::int4, kKeptGroup, Conversion::round, true};
    case SourceType::q5_0:
    case SourceType::q5_1:
    case SourceType::q5_k:
    case SourceType::q6_k: return {Scheme::int8, kKeptGroup, Conversion::round, true};
    case SourceType::gptq:
    case SourceType::awq:
    case SourceType::compressed: break;  // import/packed_int4.hpp
  }
  return {};
}

Layout layout_of(const SourceTensor& source, Scheme scheme) {
  if (source.vector || source.role == Role::token_embedding || scheme == Scheme::f32) return Layout::rows;
  return scheme == Scheme::int4 || scheme == Scheme::int8 ? Layout::tile16x64 : Layout::tile16x16;
}

// Row of the checkpoint that holds row `row` of the model.
uint32_t source_row(const SourceTensor& source, uint32_t row) {
  const uint32_t dim = source.permuted_head_dim;
  if (dim == 0) return row;
  const uint32_t in_head = row % dim, half = in_head / (dim / 2), pair = in_head % (dim / 2);
  return row - in_head + 2 * pair + half;
}

// Bytes of consecutive rows of the model, permutation undone.
Result<std::vector<std::byte>> read_rows(const SourceFile& file, const SourceTensor& source, uint32_t first,
                                         uint32_t rows) {
  // Permuted rows stay within their head, so the heads around these rows hold them.
  const uint32_t unit = std::max(source.permuted_head_dim, 1u);
  const uint32_t begin = first / unit * unit;
  const uint32_t end = static_cast<uint32_t>(
      std::min<uint64_t>(source.rows, align_up(uint64_t{first} + rows, unit)));
  const uint64_t row_bytes = source.row_bytes();
  std::vector<std::byte> bytes((end - begin) * row_bytes);
  SLUICE_TRY(read_exactly(file.fd.get(), bytes, source.offset + begin * row_bytes, file.path));
  if (source.permuted_head_dim == 0) return bytes;
  std::vector<std::byte> ordered(rows * row_bytes);
  for (uint32_t r = 0; r < rows; ++r) {
    std::memcpy(ordered.data() + r * row_bytes, bytes.data() + (source_row(source, first + r) - begin) * row_bytes,
                row_bytes);
  }
  return ordered;
}

Unexpected not_finite(const SourceFile& file, const SourceTensor& source, const char* what, uint64_t row, uint64_t col) {
  return fail(ErrorCode::numeric,
              fmt::format("{}: tensor {}: the {} at row {}, column {} is not a finite number; the checkpoint is damaged, "
                          "download it again", file.path, in_quotes(source.source_name), what, row, col));
}

// Rows of a slab: whole heads, for a permuted head would be read twice otherwise.
uint32_t slab_rows(const SourceTensor& source) {
  const uint32_t rows = slab_rows_of(source.cols);
  if (source.permuted_head_dim == 0) return rows;
  const uint32_t unit = std::lcm(source.permuted_head_dim, storage::kTileRows);
  return std::max(rows / unit, 1u) * unit;
}

// Everything a worker needs; one per tensor, read-only while workers run.
struct Job {
  const SourceFile& file;
  const SourceTensor& source;
  Conversion conversion;
  Tensor tensor;           // as it will be in the container
  uint32_t rows_each;      // of a slab: a multiple of 16
  bool residual = false;

  uint64_t slabs() const { return ceil_div(source.rows, rows_each); }
  uint32_t first_row(uint64_t slab) const { return static_cast<uint32_t>(slab * rows_each); }
  Tensor slab_tensor(uint64_t slab) const {
    Tensor part = tensor;
    part.rows = std::min(rows_each, source.rows - first_row(slab));
    return part;
  }
};

Result<std::vector<float>> read_floats(const Job& job, uint64_t slab) {
  return read_matrix_rows(job.file, job.source, job.first_row(slab), job.slab_tensor(slab).rows);
}

Result<quant::Planes> copy_codes(const Job& job, uint64_t slab) {
  const Tensor part = job.slab_tensor(slab);
  const uint64_t groups_per_row = part.cols / kBlockElems;
  SLUICE_TRY_ASSIGN(bytes, read_rows(job.file, job.source, job.first_row(slab), part.rows));
  std::vector<uint8_t> codes(uint64_t{part.rows} * part.cols);
  std::vector<uint16_t> scales(part.rows * groups_per_row);
  std::vector<uint16_t> bias(job.source.type == SourceType::q4_1 ? scales.size() : 0);
  decode_to_codes(job.source.type, bytes, codes, scales, bias);
  const auto check = [&](std::span<const uint16_t> halves, const char* what) -> Status {
    for (size_t i = 0; i < halves.size(); ++i) {
      if ((halves[i] & 0x7c00u) != 0x7c00u) continue;
      return not_finite(job.file, job.source, what, job.first_row(slab) + i / groups_per_row,
                        i % groups_per_row * kBlockElems);
    }
    return {};
  };
  SLUICE_TRY(check(scales, "scale of the block"));
  SLUICE_TRY(check(bias, "minimum of the block"));
  if (job.source.type == SourceType::q4_0 && part.scheme == Scheme::int8) {
    for (uint8_t& code : codes) code = static_cast<uint8_t>(code - 8);  // (q - 8) d is an int8 code times d
  }
  return quant::lay_out_codes(part, {codes, scales, bias});
}

Result<quant::Planes> copy_halves(const Job& job, uint64_t slab) {
  const Tensor part = job.slab_tensor(slab);
  SLUICE_TRY_ASSIGN(bytes, read_rows(job.file, job.source, job.first_row(slab), part.rows));
  std::vector<uint16_t> elements(bytes.size() / 2);
  std::memcpy(elements.data(), bytes.data(), bytes.size());
  const uint16_t exponent = part.scheme == Scheme::bf16 ? 0x7f80u : 0x7c00u;
  const auto bad = std::find_if(elements.begin(), elements.end(),
                                [&](uint16_t bits) { return (bits & exponent) == exponent; });
  if (bad != elements.end()) {
    const auto at = static_cast<uint64_t>(bad - elements.begin());
    return not_finite(job.file, job.source, "weight", job.first_row(slab) + at / part.cols, at % part.cols);
  }
  return quant::lay_out_halves(part, elements);
}

// `losses`: one place per slab, or empty.
Result<quant::Planes> encode_slab(const Job& job, uint64_t slab, std::span<quant::RoundingLoss> losses) {
  if (job.conversion == Conversion::copy) {
    return is_plain(job.source.type) ? copy_halves(job, slab) : copy_codes(job, slab);
  }
  SLUICE_TRY_ASSIGN(weights, read_floats(job, slab));
  const Tensor part = job.slab_tensor(slab);
  quant::Planes planes = quant::round_rows(part, weights);
  quant::RoundingLoss loss;
  if (!losses.empty()) loss = quant::loss_of(part, weights, planes);
  if (job.residual) loss.fine_squares = quant::add_residual(part, weights, planes);
  if (!losses.empty()) losses[slab] = loss;
  return planes;
}

// Norms and biases: FP32, whatever they were.
Status write_vector(const SourceFile& file, const SourceTensor& source, storage::ContainerWriter& writer) {
  SLUICE_TRY_ASSIGN(values, read_vector(file, source));
  SLUICE_TRY(writer.begin_tensor(tensor_of(source, Scheme::f32, 0)));
  SLUICE_TRY(writer.write_plane(PlaneKind::values, std::as_bytes(std::span(values))));
  return writer.end_tensor();
}

}  // namespace

Target choose_target(const SourceTensor& source, const Options& options, bool tied) {
  if (source.vector) return {};
  const bool embedding = source.role == Role::token_embedding;
  const SourceType type = source.type;
  switch (weights_for(source, options, tied)) {
    case Weights::keep: return keep_target(type, embedding);
    case Weights::f16:
      return {Scheme::f16, 0, type == SourceType::f16 ? Conversion::copy : Conversion::round, false};
    case Weights::int8:
      // Rounding again what int8 holds exactly could only lose, so it keeps its groups of 32.
      if (type == SourceType::q8_0 || type == SourceType::q4_0) {
        return {Scheme::int8, kKeptGroup, Conversion::copy, false};
      }
      return {Scheme::int8, options.group_elems, Conversion::round, !is_plain(type)};
    case Weights::int4:
      if (type == SourceType::q4_0 || type == SourceType::q4_1) {
        return {Scheme::int4, kKeptGroup, Conversion::copy, false};
      }
      return {Scheme::int4, options.group_elems, Conversion::round, !is_plain(type)};
  }
  return {};
}

Result<std::vector<float>> read_matrix_rows(const SourceFile& file, const SourceTensor& source, uint32_t first,
                                            uint32_t rows) {
  SLUICE_TRY_ASSIGN(bytes, read_rows(file, source, first, rows));
  std::vector<float> weights(uint64_t{rows} * source.cols);
  decode_to_float(source.type, bytes, weights);
  return weights;
}

Result<std::vector<float>> read_vector(const SourceFile& file, const SourceTensor& source) {
  std::vector<std::byte> bytes(source.row_bytes());
  SLUICE_TRY(read_exactly(file.fd.get(), bytes, source.offset, file.path));
  std::vector<float> stored(source.cols), values(source.cols);
  decode_to_float(source.type, bytes, stored);
  for (uint32_t i = 0; i < source.cols; ++i) values[i] = stored[source_row(source, i)];
  for (uint32_t i = 0; i < source.cols; ++i) {
    if (!std::isfinite(values[i])) return not_finite(file, source, "value", 0, source_row(source, i));
  }
  return values;
}

Tensor tensor_of(const SourceTensor& source, Scheme scheme, uint32_t group_elems) {
  Tensor tensor;
  tensor.name = source.name;
  tensor.role = source.role;
  tensor.layer = source.layer;
  tensor.rows = source.rows;
  tensor.cols = source.cols;
  tensor.scheme = scheme;
  tensor.group_elems = group_elems;
  tensor.layout = layout_of(source, scheme);
  return tensor;
}

// The first of two walks, for what rounds.
Result<quant::Extent> measure_matrix(const SourceFile& file, const SourceTensor& source, const Tensor& tensor,
                                     uint32_t threads) {
  const Job job{file, source, Conversion::round, tensor, slab_rows(source)};
  quant::Extent extent;
  const auto work = [&](uint64_t slab) -> Result<quant::Extent> {
    SLUICE_TRY_ASSIGN(weights, read_floats(job, slab));
    Tensor part = job.slab_tensor(slab);
    part.name = file.path + ": tensor " + in_quotes(source.source_name);
    return quant::measure(part, job.first_row(slab), weights);
  };
  SLUICE_TRY(in_order(job.slabs(), threads, work, [&](const quant::Extent& part) -> Status {
    extent.merge(part);
    return {};
  }));
  return extent;
}

Tensor narrowest_tensor(const SourceTensor& source, const quant::Extent& of_f16) {
  Tensor tensor = tensor_of(source, Scheme::f16, 0);
  const int32_t exponent = quant::choose_scale_exponent(tensor, of_f16);
  if (!quant::fits_half(of_f16, exponent)) {
    return tensor_of(source, of_f16.fits_bf16 ? Scheme::bf16 : Scheme::f32, 0);
  }
  tensor.scale_exponent = exponent;
  return tensor;
}

Status write_tensor(const SourceFile& file, const SourceTensor& source, const Target& target, uint32_t threads,
                    storage::ContainerWriter& writer, quant::RoundingLoss* loss) {
  SLUICE_CHECK(source.cols % block_elems(source.type) == 0);
  if (source.vector) return write_vector(file, source, writer);
  Job job{file, source, target.conversion, tensor_of(source, target.scheme, target.group_elems), slab_rows(source),
          target.residual};
  if (job.residual) job.tensor.residual_group_elems = quant::kResidualGroup;
  if (job.conversion == Conversion::narrowest) {
    SLUICE_TRY_ASSIGN(extent, measure_matrix(file, source, tensor_of(source, Scheme::f16, 0), threads));
    job.tensor = narrowest_tensor(source, extent);
  } else if (job.conversion == Conversion::round) {
    SLUICE_TRY_ASSIGN(extent, measure_matrix(file, source, job.tensor, threads));
    job.tensor.scale_exponent = quant::choose_scale_exponent(job.tensor, extent);
  }
  std::vector<quant::RoundingLoss> losses(loss != nullptr ? job.slabs() : 0);
  const auto work = [&](uint64_t slab) { return encode_slab(job, slab, losses); };
  SLUICE_TRY(write_in_slabs(job.tensor, job.slabs(), threads, work, writer));
  for (const quant::RoundingLoss& part : losses) loss->merge(part.times_exponent(job.tensor.scale_exponent));
  return {};
}

}  // namespace sluice::import
