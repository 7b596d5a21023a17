// SPDX-License-Identifier: Apache-2.0
// What a container holds, as floats, for the tests of import.
#pragma once

#include <cstring>
#include <vector>

#include "catch.hpp"
#include "quant/rounding.hpp"
#include "storage/container.hpp"

namespace sluice::test {

inline std::vector<std::byte> read_plane(const storage::Container& container, const storage::Tensor& tensor,
                                         storage::PlaneKind kind) {
  const storage::Plane* plane = tensor.plane(kind);
  if (plane == nullptr) return {};
  std::vector<std::byte> bytes(plane->bytes);
  REQUIRE(read_exactly(container.fd(), bytes, plane->offset, container.path()));
  return bytes;
}

inline std::vector<float> stored_weights(const storage::Container& container, storage::Role role, int32_t layer) {
  using storage::PlaneKind;
  const storage::Tensor* tensor = container.find(role, layer);
  REQUIRE(tensor != nullptr);
  return quant::dequantize(*tensor, read_plane(container, *tensor, PlaneKind::values),
                           read_plane(container, *tensor, PlaneKind::scales),
                           read_plane(container, *tensor, PlaneKind::zeros),
                           read_plane(container, *tensor, PlaneKind::bias));
}

// Equal numbers; zeros may differ in sign, for an integer code has one zero.
inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] == 0 && b[i] == 0) continue;
    if (std::memcmp(&a[i], &b[i], sizeof(float)) != 0) {
      UNSCOPED_INFO("element " << i << ": " << a[i] << " and " << b[i]);
      return false;
    }
  }
  return true;
}

}  // namespace sluice::test
