// SPDX-License-Identifier: Apache-2.0
// A tensor of 128256 x 8192 is 4 GB as floats, so import never holds a whole one. Rows go through in slabs of about a
// million weights: read, decode, encode on worker threads, append in order on the caller's. That works because every
// plane is row-tile major, so the planes of a slab are consecutive pieces of the tensor's planes. `values` streams to
// the file; scales and the like, a thirtieth of it, wait in memory until the values are complete.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <future>
#include <utility>
#include <vector>

#include "base/units.hpp"
#include "quant/rounding.hpp"
#include "sluice/result.hpp"
#include "storage/container_writer.hpp"
#include "storage/manifest.hpp"

namespace sluice::import {

inline constexpr uint64_t kSlabElements = 1u << 20;

// Rows of a slab of a matrix with `cols` columns: whole tiles, at least one.
inline uint32_t slab_rows_of(uint32_t cols) {
  const uint64_t rows = align_down(kSlabElements / std::max(cols, 1u), storage::kTileRows);
  return static_cast<uint32_t>(std::max<uint64_t>(rows, storage::kTileRows));
}

// Runs work(0), work(1), ... on up to `threads` threads and take(result) here, in that order; no more than threads + 1
// results exist at a time. The first error ends it.
template <class Work, class Take>
Status in_order(uint64_t count, uint32_t threads, const Work& work, const Take& take) {
  using Outcome = decltype(work(uint64_t{0}));
  std::deque<std::future<Outcome>> running;  // a future of std::async waits for its thread when it goes
  uint64_t started = 0;
  for (uint64_t taken = 0; taken < count; ++taken) {
    while (started < count && running.size() <= threads) {
      running.push_back(std::async(std::launch::async, work, started++));
    }
    Outcome outcome = running.front().get();
    running.pop_front();
    if (!outcome) return fail(std::move(outcome.error()));
    SLUICE_TRY(take(*outcome));
  }
  return {};
}

// Writes `tensor` out of what work(slab), which gives Result<quant::Planes>, makes of slabs 0 to count - 1. `perm`: u32
// per column, or empty. Errors: those of the work and of the writer.
template <class Work>
Status write_in_slabs(const storage::Tensor& tensor, uint64_t count, uint32_t threads, const Work& work,
                      storage::ContainerWriter& writer, std::span<const uint32_t> perm = {}) {
  using storage::PlaneKind;
  quant::Planes rest;  // all planes but `values`
  const auto append = [](std::vector<std::byte>& to, const std::vector<std::byte>& from) {
    to.insert(to.end(), from.begin(), from.end());
  };
  SLUICE_TRY(writer.begin_tensor(tensor));
  SLUICE_TRY(writer.begin_plane(PlaneKind::values));
  SLUICE_TRY(in_order(count, threads, work, [&](const quant::Planes& planes) -> Status {
    append(rest.scales, planes.scales);
    append(rest.zeros, planes.zeros);
    append(rest.bias, planes.bias);
    append(rest.residual, planes.residual);
    append(rest.residual_scales, planes.residual_scales);
    append(rest.row_sums, planes.row_sums);
    return writer.append(planes.values);
  }));
  SLUICE_TRY(writer.end_plane());
  const std::pair<PlaneKind, std::span<const std::byte>> others[] = {{PlaneKind::scales, rest.scales},
                                                                     {PlaneKind::zeros, rest.zeros},
                                                                     {PlaneKind::bias, rest.bias},
                                                                     {PlaneKind::perm, std::as_bytes(perm)},
                                                                     {PlaneKind::residual, rest.residual},
                                                                     {PlaneKind::residual_scales, rest.residual_scales},
                                                                     {PlaneKind::row_sums, rest.row_sums}};
  for (const auto& [kind, bytes] : others) {
    if (!bytes.empty()) SLUICE_TRY(writer.write_plane(kind, bytes));
  }
  return writer.end_tensor();
}

}  // namespace sluice::import
