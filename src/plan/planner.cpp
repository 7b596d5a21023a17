// SPDX-License-Identifier: Apache-2.0
#include "plan/planner.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "base/check.hpp"
#include "base/units.hpp"

namespace sluice::plan {

namespace {

using storage::Manifest;
using storage::Role;
using storage::Tensor;

// A ring of four of the largest streamed tensor lets the copy engine run ahead while one is in use and one is landing;
// more of it only takes room from resident weights.
constexpr uint64_t kRingTensors = 4;
constexpr uint64_t kMinRingBytes = 4 * kMiB;

// Chooses items, in order, so that about `budget` bytes are taken and the taken ones are spread evenly: each item earns
// credit in proportion to its size, and is taken when the credit covers it. Never exceeds `budget`.
template <class Size, class Take>
uint64_t take_evenly(const std::vector<uint32_t>& items, uint64_t budget, Size size, Take take) {
  uint64_t total = 0;
  for (const uint32_t item : items) total += size(item);
  if (total == 0) return 0;

  const double share = std::min(1.0, static_cast<double>(budget) / static_cast<double>(total));
  double credit = 0;
  uint64_t taken = 0;
  std::vector<uint32_t> left;
  for (const uint32_t item : items) {
    credit += share * static_cast<double>(size(item));
    // Half an item of credit is enough: rounding to nearest keeps the spread even and the sum close to the budget.
    if (credit >= 0.5 * static_cast<double>(size(item)) && taken + size(item) <= budget) {
      credit -= static_cast<double>(size(item));
      taken += size(item);
      take(item);
    } else {
      left.push_back(item);
    }
  }
  for (const uint32_t item : left) {  // what rounding left over
    if (taken + size(item) > budget) continue;
    taken += size(item);
    take(item);
  }
  return taken;
}

// The same for matrices, of which the bases come first: residuals have what is left once `budget` holds every base.
// Otherwise what is left, less than the smallest base not taken, stays unused.
template <class Take>
uint64_t take_bases_first(const Manifest& manifest, const std::vector<uint32_t>& items, uint64_t budget, Take take) {
  const auto size = [&](uint32_t i) { return manifest.tensors[i].padded_bytes(); };
  std::vector<uint32_t> bases, residuals;
  for (const uint32_t i : items) (manifest.tensors[i].is_residual ? residuals : bases).push_back(i);
  size_t left = bases.size();
  const uint64_t taken = take_evenly(bases, budget, size, [&](uint32_t i) {
    --left;
    take(i);
  });
  return left > 0 ? taken : taken + take_evenly(residuals, budget - taken, size, take);
}

struct Placement {
  std::vector<bool> resident;   // by tensor
  uint64_t resident_bytes = 0;  // of matrices
  uint64_t ring_bytes = 0;
};

// Pins every matrix larger than `largest_streamed`, gives the ring what the rest needs, and fills the remaining room.
// False: does not fit.
bool place(const Manifest& manifest, const std::vector<uint32_t>& matrices, uint64_t room, uint64_t largest_streamed,
           Placement& out) {
  const auto size = [&](uint32_t i) { return manifest.tensors[i].padded_bytes(); };
  out = {};
  out.resident.assign(manifest.tensors.size(), false);

  std::vector<uint32_t> rest;
  uint64_t pinned = 0;
  for (const uint32_t i : matrices) {
    if (size(i) > largest_streamed) {
      pinned += size(i);
      out.resident[i] = true;
    } else {
      rest.push_back(i);
    }
  }
  if (pinned + largest_streamed > room) return false;

  // Up to two tensors the ring comes first: with room for one, nothing lands while it is in use. Then it shares, until it
  // has what it wants.
  const uint64_t wanted_ring = std::max(kMinRingBytes, kRingTensors * largest_streamed);
  const uint64_t spare = room - pinned - largest_streamed;
  const uint64_t second = std::min(spare, largest_streamed);
  out.ring_bytes = rest.empty() ? 0 : std::min(wanted_ring, largest_streamed + second + (spare - second) / 2);
  out.ring_bytes = align_down(out.ring_bytes, storage::kPlaneAlignment);
  out.resident_bytes = pinned + take_bases_first(manifest, rest, room - pinned - out.ring_bytes,
                                                 [&](uint32_t i) { out.resident[i] = true; });
  return true;
}

// Whether no residual is resident while a base is streamed. lm_head's may be beside its own base: the pair is pinned
// where a ring for it would take more room from the layers' bases.
bool bases_come_first(const Manifest& manifest, const std::vector<uint32_t>& matrices,
                      const std::vector<bool>& resident) {
  bool base_streamed = false, residual_resident = false;
  for (const uint32_t i : matrices) {
    const Tensor& tensor = manifest.tensors[i];
    if (!tensor.is_residual) base_streamed |= !resident[i];
    else residual_resident |= resident[i] && (tensor.layer >= 0 || !resident[i - 1]);
  }
  return !base_streamed || !residual_resident;
}

// Gives each streamed tensor its place and finds, for each, the nearest earlier one that it overwrites.
void schedule_ring(std::vector<StreamItem>& stream, uint64_t ring_bytes) {
  uint64_t at = 0;
  for (StreamItem& item : stream) {
    SLUICE_CHECK(item.bytes <= ring_bytes);
    if (at + item.bytes > ring_bytes) at = 0;  // none straddles the wrap
    item.ring_offset = at;
    at += item.bytes;
  }
  const size_t n = stream.size();
  for (size_t i = 0; i < n; ++i) {
    for (size_t back = 1; back <= n; ++back) {
      const StreamItem& earlier = stream[(i + n - back) % n];
      if (stream[i].ring_offset < earlier.ring_offset + earlier.bytes &&
          earlier.ring_offset < stream[i].ring_offset + stream[i].bytes) {
        stream[i].distance = static_cast<uint32_t>(back);
        break;
      }
    }
  }
}

// `weight_bytes`: all that could be resident.
uint32_t choose_rows(const Inputs& inputs, uint64_t weight_bytes) {
  if (inputs.max_rows != 0) return inputs.max_rows;
  uint32_t rows = kMostRows;
  const FixedNeed most = inputs.fixed_need(rows);
  if (most.kv_bytes + most.scratch_bytes + most.overhead_bytes + weight_bytes <= inputs.device_budget_bytes) return rows;
  while (rows > 1 && inputs.fixed_need(rows).scratch_bytes > inputs.device_budget_bytes / 8) rows /= 2;
  return rows;
}

}  // namespace

void predict(Plan& plan, const Bandwidths& bandwidths, double compute_seconds) {
  plan.pass_seconds = 0;
  plan.bound.clear();
  const auto stage = [&](double seconds, const char* name) {
    if (seconds <= plan.pass_seconds) return;
    plan.pass_seconds = seconds;
    plan.bound = name;
  };
  const auto transfer = [&](double bytes, double bandwidth, const char* name) {
    if (bandwidth > 0) stage(bytes / bandwidth, name);
  };
  const auto streamed = static_cast<double>(plan.host_bytes + plan.disk_bytes);
  if (!plan.in_place) {  // in place, how much of the file the page cache holds is the kernel's business
    transfer(static_cast<double>(plan.disk_bytes), bandwidths.disk, "disk");
    transfer(streamed, bandwidths.bus, "bus");
  }
  transfer(static_cast<double>(plan.resident_bytes) + streamed, bandwidths.device_memory, "device memory");
  stage(compute_seconds, "compute");
}

Result<Plan> make_plan(const Manifest& manifest, const Inputs& inputs) {
  Plan plan;
  plan.in_place = inputs.in_place;
  plan.tiers.assign(manifest.tensors.size(), Tier::disk);

  // Sort tensors into rows, vectors and matrices.
  std::vector<uint32_t> matrices;
  std::set<uint64_t> sizes;
  uint64_t vector_bytes = 0;
  for (uint32_t i = 0; i < manifest.tensors.size(); ++i) {
    const Tensor& tensor = manifest.tensors[i];
    if (tensor.role == Role::token_embedding) {
      plan.tiers[i] = Tier::rows;
    } else if (tensor.is_vector()) {
      plan.tiers[i] = Tier::device;
      vector_bytes += tensor.padded_bytes();
    } else {
      matrices.push_back(i);
      sizes.insert(tensor.padded_bytes());
    }
  }

  // The smallest budget: one row a pass, and a ring for the largest matrix. Pinning it would take as much, and a ring.
  const auto fixed_bytes = [&](uint32_t rows) {
    const FixedNeed need = inputs.fixed_need(rows);
    return need.kv_bytes + need.scratch_bytes + need.overhead_bytes + vector_bytes;
  };
  const uint64_t least_weights = matrices.empty() || inputs.in_place ? 0 : *sizes.rbegin();
  uint64_t matrix_bytes = 0;
  for (const uint32_t i : matrices) matrix_bytes += manifest.tensors[i].padded_bytes();
  const uint64_t smallest_fixed = fixed_bytes(inputs.max_rows != 0 ? inputs.max_rows : 1);
  plan.smallest_device_bytes = smallest_fixed + least_weights;
  if (inputs.device_budget_bytes < plan.smallest_device_bytes) {
    return fail(ErrorCode::budget,
                fmt::format("a device budget of {} is too small: KV cache and scratch (and a GPU's context) take {}, the "
                            "stream ring at least {}; give at least --device-memory {}K or a shorter --context",
                            format_bytes(inputs.device_budget_bytes), format_bytes(smallest_fixed),
                            format_bytes(least_weights), ceil_div(plan.smallest_device_bytes, kKiB)));
  }

  plan.max_rows = choose_rows(inputs, vector_bytes + (inputs.in_place ? 0 : matrix_bytes));
  while (plan.max_rows > 1 && inputs.max_rows == 0 &&
         fixed_bytes(plan.max_rows) + least_weights > inputs.device_budget_bytes) {
    plan.max_rows /= 2;
  }
  const FixedNeed need = inputs.fixed_need(plan.max_rows);
  plan.kv_bytes = need.kv_bytes;
  plan.scratch_bytes = need.scratch_bytes;
  plan.overhead_bytes = need.overhead_bytes;
  const uint64_t room = inputs.device_budget_bytes - fixed_bytes(plan.max_rows);

  // Everything fits, or of the choices of pinned matrices that put bases first the one with the fewest bytes to stream.
  // There is one: a ring for the largest pins nothing.
  Placement best;
  if (matrix_bytes <= room) {
    best.resident.assign(manifest.tensors.size(), true);
    best.resident_bytes = matrix_bytes;
  } else if (inputs.in_place) {
    best.resident.assign(manifest.tensors.size(), false);
    best.resident_bytes = take_bases_first(manifest, matrices, room, [&](uint32_t i) { best.resident[i] = true; });
  } else {
    for (const uint64_t largest : sizes) {
      Placement candidate;
      if (!place(manifest, matrices, room, largest, candidate)) continue;
      if (!bases_come_first(manifest, matrices, candidate.resident)) continue;
      if (best.resident.empty() || candidate.resident_bytes > best.resident_bytes) best = std::move(candidate);
    }
    SLUICE_CHECK(!best.resident.empty());
  }
  plan.ring_bytes = best.ring_bytes;
  plan.resident_bytes = vector_bytes + best.resident_bytes;

  // The rest: as much as the host budget holds in RAM, evenly; what is left stays on disk.
  std::vector<uint32_t> streamed;
  for (const uint32_t i : matrices) {
    if (best.resident[i]) plan.tiers[i] = Tier::device;
    else streamed.push_back(i);
  }
  const auto size = [&](uint32_t i) { return manifest.tensors[i].padded_bytes(); };
  plan.host_bytes = take_bases_first(manifest, streamed, inputs.host_budget_bytes,
                                     [&](uint32_t i) { plan.tiers[i] = Tier::host; });
  for (const uint32_t i : streamed) {
    if (plan.tiers[i] == Tier::disk) plan.disk_bytes += size(i);
    if (inputs.in_place) continue;
    plan.stream.push_back({.tensor = i, .tier = plan.tiers[i], .ring_offset = 0, .bytes = size(i), .distance = 0});
  }
  schedule_ring(plan.stream, plan.ring_bytes);
  predict(plan, inputs.bandwidths, inputs.compute_seconds);
  return plan;
}

}  // namespace sluice::plan
