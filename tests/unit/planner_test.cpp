// SPDX-License-Identifier: Apache-2.0
#include "plan/planner.hpp"

#include <random>

#include "catch.hpp"

namespace {

using namespace sluice;
using namespace sluice::plan;
using storage::Layout;
using storage::Manifest;
using storage::PlaneKind;
using storage::Role;
using storage::Scheme;
using storage::Tensor;

constexpr uint64_t kVectorBytes = 4096;

// A model of `layers` layers, each a norm and two matrices of `matrix_bytes`, behind an embedding, before an lm_head.
Manifest manifest_of(uint32_t layers, uint64_t matrix_bytes, uint64_t head_bytes) {
  Manifest manifest;
  uint64_t offset = 4096;
  const auto add = [&](Role role, int32_t layer, uint64_t bytes, bool is_vector) {
    Tensor tensor;
    tensor.role = role;
    tensor.layer = layer;
    tensor.rows = is_vector ? 1 : 16;
    tensor.cols = 64;
    tensor.scheme = is_vector ? Scheme::f32 : Scheme::int4;
    tensor.layout = is_vector ? Layout::rows : Layout::tile16x64;
    tensor.planes.push_back({.kind = PlaneKind::values, .part = 0, .offset = offset, .bytes = bytes, .block_sums = {}});
    offset += tensor.padded_bytes();
    manifest.tensors.push_back(tensor);
  };
  add(Role::token_embedding, -1, head_bytes, false);
  for (uint32_t i = 0; i < layers; ++i) {
    add(Role::attn_norm, static_cast<int32_t>(i), 64, true);
    add(Role::q, static_cast<int32_t>(i), matrix_bytes, false);
    add(Role::down, static_cast<int32_t>(i), matrix_bytes, false);
  }
  add(Role::lm_head, -1, head_bytes, false);
  return manifest;
}

Inputs inputs_of(uint64_t device, uint64_t host) {
  Inputs inputs;
  inputs.device_budget_bytes = device;
  inputs.host_budget_bytes = host;
  inputs.fixed_need = [](uint32_t rows) { return FixedNeed{.kv_bytes = 1 * kMiB, .scratch_bytes = rows * 4096ull}; };
  return inputs;
}

// Replays three passes: when an item is written, everything its bytes overlap must have been released.
void check_ring(const Plan& plan) {
  const size_t n = plan.stream.size();
  for (size_t global = 0; global < 3 * n; ++global) {
    const StreamItem& item = plan.stream[global % n];
    REQUIRE(item.ring_offset + item.bytes <= plan.ring_bytes);
    REQUIRE(item.distance >= 1);
    REQUIRE(item.distance <= n);
    for (size_t back = 1; back < item.distance && back <= global; ++back) {
      const StreamItem& live = plan.stream[(global - back) % n];
      const bool disjoint = live.ring_offset + live.bytes <= item.ring_offset || item.ring_offset + item.bytes <= live.ring_offset;
      REQUIRE(disjoint);
    }
  }
}

}  // namespace

TEST_CASE("planner keeps everything resident when it fits") {
  const Manifest manifest = manifest_of(4, 2 * kMiB, 8 * kMiB);
  const auto plan = make_plan(manifest, inputs_of(1 * kGiB, 0));
  REQUIRE(plan);
  CHECK(plan->stream.empty());
  CHECK(plan->ring_bytes == 0);
  CHECK(plan->resident_bytes == 4 * (2 * 2 * kMiB + kVectorBytes) + 8 * kMiB);
  CHECK(plan->tiers.front() == Tier::rows);
  CHECK(plan->max_rows == 512);
}

TEST_CASE("planner stays within its budgets and counts every byte once, whatever they are") {
  const Manifest manifest = manifest_of(20, 2 * kMiB, 24 * kMiB);
  const uint64_t matrices = 20 * 2 * 2 * kMiB + 24 * kMiB;
  std::mt19937_64 random(7);
  int planned = 0;
  for (int round = 0; round < 300; ++round) {
    const uint64_t device = random() % (150 * kMiB);
    const uint64_t host = random() % (60 * kMiB);
    CAPTURE(round, device, host);
    const auto plan = make_plan(manifest, inputs_of(device, host));
    if (!plan) {
      REQUIRE(plan.error().code == ErrorCode::budget);
      continue;
    }
    ++planned;
    REQUIRE(plan->device_bytes() <= device);
    REQUIRE(plan->host_bytes <= host);
    REQUIRE(plan->resident_bytes + plan->host_bytes + plan->disk_bytes == matrices + 20 * kVectorBytes);
    check_ring(*plan);
  }
  CHECK(planned > 200);
}

TEST_CASE("planner names the smallest budget, and that budget works") {
  const Manifest manifest = manifest_of(6, 2 * kMiB, 24 * kMiB);
  const auto refused = make_plan(manifest, inputs_of(1 * kMiB, 0));
  REQUIRE_FALSE(refused);
  CHECK(refused.error().code == ErrorCode::budget);

  const auto roomy = make_plan(manifest, inputs_of(1 * kGiB, 0));
  REQUIRE(roomy);
  const uint64_t smallest = roomy->smallest_device_bytes;
  const auto least = make_plan(manifest, inputs_of(smallest, 0));
  REQUIRE(least);
  check_ring(*least);
  CHECK_FALSE(make_plan(manifest, inputs_of(smallest - 1, 0)));
}

TEST_CASE("planner spreads resident tensors through the layers") {
  const Manifest manifest = manifest_of(40, 2 * kMiB, 2 * kMiB);
  const auto plan = make_plan(manifest, inputs_of(80 * kMiB, 0));
  REQUIRE(plan);
  // About half is resident: no run of six matrices in a row is all resident or all streamed.
  int run = 0;
  int longest = 0;
  Tier last = Tier::rows;
  for (size_t i = 0; i < plan->tiers.size(); ++i) {
    if (manifest.tensors[i].is_vector() || plan->tiers[i] == Tier::rows) continue;
    run = plan->tiers[i] == last ? run + 1 : 1;
    last = plan->tiers[i];
    longest = std::max(longest, run);
  }
  CHECK(longest <= 5);
}

TEST_CASE("planner predicts the slowest stage") {
  const Manifest manifest = manifest_of(10, 2 * kMiB, 2 * kMiB);
  Inputs inputs = inputs_of(20 * kMiB, 8 * kMiB);
  inputs.bandwidths = {.disk = 1e9, .bus = 50e9, .device_memory = 4e12};
  const auto plan = make_plan(manifest, inputs);
  REQUIRE(plan);
  CHECK(plan->bound == "disk");
  CHECK(plan->pass_seconds == Approx(static_cast<double>(plan->disk_bytes) / 1e9));
  inputs.compute_seconds = 10;
  const auto slow = make_plan(manifest, inputs);
  REQUIRE(slow);
  CHECK(slow->bound == "compute");
}
