// SPDX-License-Identifier: Apache-2.0
// GPTQ: rounds a matrix column by column and spreads each column's error over the columns that are still to come,
// weighted by the second moments of the inputs. Frantar et al., "GPTQ: Accurate Post-Training Quantization for
// Generative Pre-trained Transformers", 2022 (algorithm 1), with the column order of its act-order variant.
//
// Groups are those of the container, contiguous in the model's own column order, and their grids are fixed before the
// first column is rounded; so the order in which columns are rounded is free, leaves no trace in the file, and costs
// nothing at run time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "quant/rounding.hpp"
#include "sluice/result.hpp"
#include "storage/manifest.hpp"

namespace sluice::quant {

// The sum of x x^T over input rows x. cols^2 floats. One thread calls; the work is shared by `threads`, and the result
// depends on the order of calls alone.
class SecondMoments {
 public:
  explicit SecondMoments(uint32_t cols);
  // Of `count` rows, summed elsewhere: [cols][cols], the lower triangle counts.
  SecondMoments(uint32_t cols, uint64_t count, std::vector<float> sum);
  SecondMoments(SecondMoments&&) noexcept;
  SecondMoments& operator=(SecondMoments&&) noexcept;
  ~SecondMoments();

  // rows: FP32 [count][cols] row-major.
  void add(std::span<const float> rows, uint32_t count, uint32_t threads);
  uint32_t cols() const { return cols_; }
  uint64_t count() const { return count_; }

 private:
  friend class GptqFactor;
  uint32_t cols_ = 0;
  uint64_t count_ = 0;
  std::vector<float> sum_;  // [cols][cols], the lower triangle (row >= column) is valid
};

// Replaces the lower triangle of a symmetric matrix [n][n], row-major and of which it is all that is read, by the inverse
// of its Cholesky factor; false if it is not positive definite, and the triangle is lost then. `spare`: n^2
// floats, written to only where it is.
using InvertFactor = std::function<Result<bool>(std::span<float> matrix, std::span<float> spare, uint32_t n)>;
// By Eigen; the result does not depend on `threads`.
InvertFactor invert_on_host(uint32_t threads);

// What rounding needs of the moments: an order of the columns, and the Cholesky factor of their inverse in that order.
// Shared by all matrices of one input.
class GptqFactor {
 public:
  // Consumes the moments. `damp`: share of the mean diagonal that is added to the diagonal; where the matrix is not
  // positive definite all the same, ten and a hundred times as much are tried. Columns whose input is always zero are
  // rounded to nearest. Memory: twice cols^2 floats at the peak, once afterwards. Errors: numeric (an input that is not
  // finite; not positive definite with a hundred times the damping); those of `invert`. `what` begins the message.
  static Result<GptqFactor> create(SecondMoments moments, float damp, const std::string& what,
                                   const InvertFactor& invert = invert_on_host(1));
  GptqFactor(GptqFactor&&) noexcept;
  GptqFactor& operator=(GptqFactor&&) noexcept;
  ~GptqFactor();

  uint32_t cols() const { return static_cast<uint32_t>(order_.size()); }
  float damp() const { return damp_; }                             // that it took
  std::span<const float> importance() const { return diagonal_; }  // mean x^2 of each column, in the model's order
  std::span<const uint32_t> order() const { return order_; }       // columns by falling importance
  // Row i of the upper triangular factor U with U^T U = inverse, in the order above: valid from element i on.
  const float* row(uint32_t i) const { return factor_.data() + size_t{i} * order_.size(); }

 private:
  GptqFactor() = default;
  std::vector<uint32_t> order_;
  std::vector<float> diagonal_;
  std::vector<float> factor_;
  float damp_ = 0;
};

// Rounds rows of `tensor` (int4; its scale_exponent, group_elems and cols count) whose values are `weights`, row-major
// [tensor.rows][cols], finite. The planes have zeros where `symmetric` is false. Rows do not depend on each other.
Planes round_by_gptq(const storage::Tensor& tensor, std::span<const float> weights, const GptqFactor& factor,
                     bool symmetric, RoundingLoss& loss);

// Rounds what int4 `planes` leave of `weights` to a second nibble with scales of its own, spreading its errors as
// above, and adds the residual planes. GPTQ moves weights far from their nearest values where their inputs allow it, so
// rounding that residual to nearest would lose again what was gained. Returns RoundingLoss::fine_squares.
double add_residual_by_gptq(const storage::Tensor& tensor, std::span<const float> weights, const GptqFactor& factor,
                            Planes& planes);

}  // namespace sluice::quant
