// SPDX-License-Identifier: Apache-2.0
#include "api/kernel_report.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <initializer_list>

#include "sluice/sluice.hpp"
#include "storage/container.hpp"

namespace sluice::api {

namespace {

using backend::cuda::BenchShape;
using storage::PlaneKind;
using storage::Role;
using storage::Tensor;

constexpr uint32_t kMostRows = 2048;   // of one launch

std::string scheme_text(const Tensor& tensor) {
  std::string text(storage::name_of(tensor.scheme));
  if (tensor.group_elems != 0) text += fmt::format(" g{}", tensor.group_elems);
  if (tensor.plane(PlaneKind::zeros) != nullptr) text += " zeros";
  if (tensor.plane(PlaneKind::bias) != nullptr) text += " bias";
  return text;
}

void add_matrix(KernelShape& to, const Tensor& tensor) {
  to.shape.name += (to.shape.name.empty() ? "" : ", ") + std::string(storage::name_of(tensor.role));
  to.shape.cols = tensor.cols;
  to.shape.matrices.push_back({.scheme = tensor.scheme, .rows = tensor.rows, .group_elems = tensor.group_elems,
                               .has_zeros = tensor.plane(PlaneKind::zeros) != nullptr,
                               .has_bias = tensor.plane(PlaneKind::bias) != nullptr});
  const std::string scheme = scheme_text(tensor);
  if (to.scheme.find(scheme) == std::string::npos) to.scheme += (to.scheme.empty() ? "" : " + ") + scheme;
  for (const PlaneKind kind : {PlaneKind::values, PlaneKind::scales, PlaneKind::zeros, PlaneKind::bias}) {
    if (const storage::Plane* plane = tensor.plane(kind)) to.weight_bytes += plane->bytes;
  }
}

const Tensor* find(const storage::Manifest& manifest, Role role, int32_t layer) {
  const auto found = std::find_if(manifest.tensors.begin(), manifest.tensors.end(), [&](const Tensor& tensor) {
    return tensor.role == role && tensor.layer == layer;
  });
  return found == manifest.tensors.end() ? nullptr : &*found;
}

}  // namespace

std::vector<KernelShape> kernel_shapes(const storage::Manifest& manifest) {
  std::vector<KernelShape> shapes;
  const auto add = [&](int32_t layer, bool reads_norm, std::initializer_list<Role> roles) {
    KernelShape shape;
    shape.shape.reads_norm = reads_norm;
    for (const Role role : roles) {
      if (const Tensor* tensor = find(manifest, role, layer)) add_matrix(shape, *tensor);
    }
    const auto known = std::find_if(shapes.begin(), shapes.end(),
                                    [&](const KernelShape& other) { return other.shape == shape.shape; });
    if (!shape.shape.matrices.empty() && known == shapes.end()) shapes.push_back(std::move(shape));
  };
  for (int32_t layer = 0; layer < static_cast<int32_t>(manifest.hyper.layers); ++layer) {
    add(layer, true, {Role::q, Role::k, Role::v});
    add(layer, false, {Role::o});
    add(layer, true, {Role::gate, Role::up});
    add(layer, false, {Role::down});
  }
  add(-1, true, {Role::lm_head});
  return shapes;
}

}  // namespace sluice::api

namespace sluice {

Result<KernelReport> bench_kernels(const std::string& path, std::span<const uint32_t> rows,
                                   const std::function<void(const KernelReport&)>& on_time) {
  using backend::cuda::BenchShape;
  using backend::cuda::KernelBench;
  if (rows.empty() || std::any_of(rows.begin(), rows.end(), [](uint32_t m) { return m == 0 || m > api::kMostRows; })) {
    return fail(ErrorCode::usage,
                fmt::format("rows to measure with: at least one number, each 1 to {}", api::kMostRows));
  }
  SLUICE_TRY_ASSIGN(container, storage::Container::open(path));
  const std::vector<api::KernelShape> shapes = api::kernel_shapes(container.manifest());
  std::vector<BenchShape> bench_shapes;
  for (const api::KernelShape& shape : shapes) bench_shapes.push_back(shape.shape);
  SLUICE_TRY_ASSIGN(bench, KernelBench::open(0, bench_shapes, {rows.begin(), rows.end()}));

  KernelReport report{.device = bench->device_name(), .cublas = bench->cublas(), .times = {}};
  SLUICE_TRY_ASSIGN(read_before, bench->read_rate());
  report.read_before = read_before;
  // Many rows last, where they are given in order: for a while after such products the GPU runs slower.
  for (const uint32_t count : rows) {
    for (const api::KernelShape& shape : shapes) {
      SLUICE_TRY_ASSIGN(time, bench->time(shape.shape, count));
      report.times.push_back({.name = shape.shape.name, .scheme = shape.scheme, .outputs = shape.shape.outputs(),
                              .inputs = shape.shape.cols, .rows = count, .weight_bytes = shape.weight_bytes,
                              .seconds = time.seconds, .cublas_seconds = time.cublas_seconds});
      if (on_time) on_time(report);
    }
  }
  SLUICE_TRY_ASSIGN(read_after, bench->read_rate());
  report.read_after = read_after;
  return report;
}

}  // namespace sluice
