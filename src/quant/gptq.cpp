// SPDX-License-Identifier: Apache-2.0
#include "quant/gptq.hpp"

#include <fmt/format.h>

#include <Eigen/Cholesky>
#include <Eigen/Core>
#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <future>
#include <numeric>

#include "base/check.hpp"
#include "base/half.hpp"
#include "base/units.hpp"
#include "quant/grid.hpp"
#include "quant/layout.hpp"

namespace sluice::quant {
namespace {

using Eigen::Index;
using ColMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::ColMajor>;
using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

constexpr uint32_t kMomentBlock = 256;  // of the matrix of moments that a thread adds to at a time
constexpr Index kInverseBlock = 256;    // columns of an inverse that a thread computes at a time
constexpr Index kColumnBlock = 64;      // columns whose errors wait before they reach the columns behind the block
constexpr uint32_t kRowSlab = 64;       // rows rounded together: a column of them stays in two cache lines per vector

// work(0) to work(count - 1), by so many threads.
template <class Work>
void share_work(size_t count, uint32_t threads, const Work& work) {
  std::atomic<size_t> next{0};
  const auto take = [&] {
    for (size_t i = next++; i < count; i = next++) work(i);
  };
  std::vector<std::future<void>> helpers;
  for (uint32_t t = 1; t < threads && t < count; ++t) helpers.push_back(std::async(std::launch::async, take));
  take();
  for (std::future<void>& helper : helpers) helper.get();
}

// Rows of one slab in the order of rounding: [cols][rows], so that a column is contiguous.
struct Slab {
  const storage::Tensor& tensor;
  const GptqFactor& factor;
  std::span<const float> weights;  // of the whole tensor
  uint32_t first = 0, rows = 0;
  float unscale = 1;  // 2^-scale_exponent
};

// Grids of every (row, group) of the slab.
std::vector<Int4Grid> find_grids(const Slab& slab, bool symmetric) {
  const uint32_t cols = slab.tensor.cols, group = slab.tensor.group_elems;
  const uint64_t groups = ceil_div(cols, group);
  std::vector<Int4Grid> grids(slab.rows * groups);
  const int clip_steps = slab.tensor.is_residual ? kResidualClipSteps : kClipSteps;
  std::vector<float> shifted(group);
  for (uint64_t row = 0; row < slab.rows; ++row) {
    for (uint64_t g = 0; g < groups; ++g) {
      const uint64_t begin = g * group, count = std::min<uint64_t>(group, cols - begin);
      const float* from = slab.weights.data() + (slab.first + row) * cols + begin;
      for (uint64_t k = 0; k < count; ++k) shifted[k] = from[k] * slab.unscale;
      grids[row * groups + g] =
          find_int4_grid(std::span(shifted).first(count), slab.factor.importance().subspan(begin, count), symmetric,
                         clip_steps);
    }
  }
  return grids;
}

// Rounds one slab; codes are row-major in the model's column order.
RoundingLoss round_slab(const Slab& slab, const std::vector<Int4Grid>& grids, uint8_t* codes) {
  const Index cols = slab.tensor.cols, rows = slab.rows;
  const uint64_t groups = ceil_div(slab.tensor.cols, slab.tensor.group_elems);
  const std::span<const uint32_t> order = slab.factor.order();
  ColMajor w(rows, cols);
  for (Index j = 0; j < cols; ++j) {
    for (Index r = 0; r < rows; ++r) {
      w(r, j) =
          slab.weights[(slab.first + static_cast<uint64_t>(r)) * slab.tensor.cols + order[static_cast<size_t>(j)]] *
          slab.unscale;
    }
  }
  RoundingLoss loss;
  ColMajor errors(rows, kColumnBlock);
  for (Index begin = 0; begin < cols; begin += kColumnBlock) {
    const Index end = std::min(cols, begin + kColumnBlock);
    for (Index j = begin; j < end; ++j) {
      const float* u = slab.factor.row(static_cast<uint32_t>(j));
      const uint32_t column = order[static_cast<size_t>(j)];
      const uint64_t group = column / slab.tensor.group_elems;
      const float inverse = 1.0f / u[j];
      for (Index r = 0; r < rows; ++r) {
        const Int4Grid& grid = grids[static_cast<uint64_t>(r) * groups + group];
        const uint8_t code = grid.code(w(r, j));
        codes[static_cast<uint64_t>(r) * slab.tensor.cols + column] = code;
        const float error = (w(r, j) - grid.value(code)) * inverse;
        errors(r, j - begin) = error;
        loss.output_squares += static_cast<double>(error) * static_cast<double>(error);
      }
      for (Index later = j + 1; later < end; ++later) w.col(later) -= errors.col(j - begin) * u[later];
    }
    if (end == cols) break;
    // Rows begin..end of U, columns behind the block.
    const Eigen::Map<const RowMajor, 0, Eigen::OuterStride<>> u(slab.factor.row(static_cast<uint32_t>(begin)) + end,
                                                                end - begin, cols - end, Eigen::OuterStride<>(cols));
    w.rightCols(cols - end).noalias() -= errors.leftCols(end - begin) * u;
  }
  return loss;
}

}  // namespace

SecondMoments::SecondMoments(uint32_t cols) : cols_(cols), sum_(size_t{cols} * cols) {}
SecondMoments::SecondMoments(uint32_t cols, uint64_t count, std::vector<float> sum)
    : cols_(cols), count_(count), sum_(std::move(sum)) {
  SLUICE_CHECK(sum_.size() == size_t{cols} * cols);
}
SecondMoments::SecondMoments(SecondMoments&&) noexcept = default;
SecondMoments& SecondMoments::operator=(SecondMoments&&) noexcept = default;
SecondMoments::~SecondMoments() = default;

// Blocks of the lower triangle are independent sums, so who computes one does not matter.
void SecondMoments::add(std::span<const float> rows, uint32_t count, uint32_t threads) {
  SLUICE_CHECK(rows.size() == size_t{count} * cols_);
  const Eigen::Map<const RowMajor> x(rows.data(), count, cols_);
  Eigen::Map<RowMajor> sum(sum_.data(), cols_, cols_);
  const uint32_t across = static_cast<uint32_t>(ceil_div(cols_, kMomentBlock));
  std::vector<std::pair<uint32_t, uint32_t>> blocks;
  for (uint32_t i = 0; i < across; ++i) {
    for (uint32_t j = 0; j <= i; ++j) blocks.emplace_back(i * kMomentBlock, j * kMomentBlock);
  }
  share_work(blocks.size(), threads, [&](size_t number) {
    const auto [i, j] = blocks[number];
    const Index height = std::min(kMomentBlock, cols_ - i), width = std::min(kMomentBlock, cols_ - j);
    sum.block(i, j, height, width).noalias() += x.middleCols(i, height).transpose() * x.middleCols(j, width);
  });
  count_ += count;
}

GptqFactor::GptqFactor(GptqFactor&&) noexcept = default;
GptqFactor& GptqFactor::operator=(GptqFactor&&) noexcept = default;
GptqFactor::~GptqFactor() = default;

// A block of columns of the inverse is zero above its first row, and does not depend on the others.
InvertFactor invert_on_host(uint32_t threads) {
  return [threads](std::span<float> matrix, std::span<float> spare, uint32_t n) -> Result<bool> {
    SLUICE_CHECK(matrix.size() == size_t{n} * n && spare.size() == matrix.size());
    Eigen::Map<RowMajor> factor(matrix.data(), n, n), inverse(spare.data(), n, n);
    const Eigen::LLT<Eigen::Ref<RowMajor>, Eigen::Lower> llt(factor);
    if (llt.info() != Eigen::Success) return false;
    inverse.setIdentity();
    share_work(ceil_div(n, kInverseBlock), threads, [&](size_t block) {
      const Index first = static_cast<Index>(block) * kInverseBlock, rows = n - first;
      auto columns = inverse.block(first, first, rows, std::min<Index>(kInverseBlock, rows));
      factor.bottomRightCorner(rows, rows).triangularView<Eigen::Lower>().solveInPlace(columns);
    });
    std::copy(spare.begin(), spare.end(), matrix.begin());
    return true;
  };
}

Result<GptqFactor> GptqFactor::create(SecondMoments moments, float damp, const std::string& what,
                                      const InvertFactor& invert) {
  const size_t cols = moments.cols_;
  GptqFactor self;
  self.diagonal_.resize(cols);
  const float per_row = moments.count_ == 0 ? 1.0f : 1.0f / static_cast<float>(moments.count_);
  double mean = 0;
  for (size_t k = 0; k < cols; ++k) {
    self.diagonal_[k] = moments.sum_[k * cols + k] * per_row;
    mean += static_cast<double>(self.diagonal_[k]) / static_cast<double>(cols);
  }
  if (!std::isfinite(mean)) {
    return fail(ErrorCode::numeric,
                fmt::format("{}: the inputs that the calibration text gives are not finite; verify the "
                            "checkpoint",
                            what));
  }
  if (mean == 0) mean = 1;  // no input at all: every column is rounded to nearest
  self.order_.resize(cols);
  std::iota(self.order_.begin(), self.order_.end(), 0u);
  std::stable_sort(self.order_.begin(), self.order_.end(),
                   [&](uint32_t a, uint32_t b) { return self.diagonal_[a] > self.diagonal_[b]; });

  // With J the reversal of rows, J H J = L L^T gives H = R R^T with R = J L J upper triangular, so U = inverse(R) is
  // upper triangular and U^T U = inverse(H): one factorization and one triangular solve.
  self.factor_.resize(cols * cols);
  for (const float share : {damp, 10 * damp, 100 * damp}) {
    for (size_t i = 0; i < cols; ++i) {
      const uint32_t a = self.order_[cols - 1 - i];
      for (size_t j = 0; j <= i; ++j) {
        const uint32_t b = self.order_[cols - 1 - j];
        float value = moments.sum_[size_t{std::max(a, b)} * cols + std::min(a, b)] * per_row;
        if (i == j) value = (value == 0 ? static_cast<float>(mean) : value) + share * static_cast<float>(mean);
        self.factor_[i * cols + j] = value;
      }
    }
    // A failure leaves the moments as they are.
    SLUICE_TRY_ASSIGN(positive, invert(self.factor_, moments.sum_, static_cast<uint32_t>(cols)));
    if (!positive) continue;
    self.damp_ = share;
    std::reverse(self.factor_.begin(), self.factor_.end());  // both rows and columns
    return self;
  }
  return fail(ErrorCode::numeric,
              fmt::format("{}: the inputs' second moments are not positive definite even with damping "
                          "{}; use more calibration text, or more damping",
                          what, 100 * damp));
}

Planes round_by_gptq(const storage::Tensor& tensor, std::span<const float> weights, const GptqFactor& factor,
                     bool symmetric, RoundingLoss& loss) {
  SLUICE_CHECK(tensor.scheme == storage::Scheme::int4 && factor.cols() == tensor.cols);
  SLUICE_CHECK(weights.size() == uint64_t{tensor.rows} * tensor.cols);
  const uint64_t groups = ceil_div(tensor.cols, tensor.group_elems);
  std::vector<uint8_t> codes(weights.size()), zeros(symmetric ? 0 : tensor.rows * groups);
  std::vector<uint16_t> scales(tensor.rows * groups);
  for (uint32_t first = 0; first < tensor.rows; first += kRowSlab) {
    const Slab slab{tensor,
                    factor,
                    weights,
                    first,
                    std::min(kRowSlab, tensor.rows - first),
                    std::ldexp(1.0f, -tensor.scale_exponent)};
    const std::vector<Int4Grid> grids = find_grids(slab, symmetric);
    loss.merge(round_slab(slab, grids, codes.data() + uint64_t{first} * tensor.cols));
    for (size_t i = 0; i < grids.size(); ++i) {
      scales[first * groups + i] = half_from_float(grids[i].scale);
      if (!symmetric) zeros[first * groups + i] = static_cast<uint8_t>(grids[i].zero);
    }
    for (uint64_t row = 0; row < slab.rows; ++row) {
      for (uint64_t k = 0; k < tensor.cols; ++k) {
        const uint64_t at = (first + row) * tensor.cols + k;
        const double weight = static_cast<double>(weights[at]) * static_cast<double>(slab.unscale);
        const double error =
            weight - static_cast<double>(grids[row * groups + k / tensor.group_elems].value(codes[at]));
        loss.error_squares += error * error;
        loss.weight_squares += weight * weight;
      }
    }
  }
  return lay_out_codes(tensor, {.values = codes, .scales = scales, .bias = {}, .zeros = zeros});
}

double add_residual_by_gptq(const storage::Tensor& tensor, std::span<const float> weights, const GptqFactor& factor,
                            Planes& planes) {
  std::vector<float> left = dequantize(tensor, planes.values, planes.scales, planes.zeros, planes.bias);
  std::transform(weights.begin(), weights.end(), left.begin(), left.begin(), std::minus<>());
  RoundingLoss loss;
  Planes second = round_by_gptq(tensor.residual(), left, factor, true, loss);
  planes.residual = std::move(second.values);
  planes.residual_scales = std::move(second.scales);
  return loss.error_squares;
}

}  // namespace sluice::quant
