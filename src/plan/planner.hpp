// SPDX-License-Identifier: Apache-2.0
// Which tensor lives where, and what a pass will cost. A pure function: no I/O, no clock, no state.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "sluice/result.hpp"
#include "storage/manifest.hpp"

namespace sluice::plan {

// Home of a tensor for the life of a model. `rows`: an embedding, fetched row by row from the file, never in device memory.
enum class Tier : uint8_t { device, host, disk, rows };

// Bytes per second, as measured; 0 where unknown. A term of an unknown bandwidth is left out of the prediction.
struct Bandwidths {
  double disk = 0;
  double bus = 0;
  double device_memory = 0;
};

// Rows of a prefill pass where memory is not the point.
inline constexpr uint32_t kMostRows = 512;

// What the backend takes besides weights when a pass has up to `max_rows` rows.
struct FixedNeed {
  uint64_t kv_bytes = 0;
  uint64_t scratch_bytes = 0;
  uint64_t overhead_bytes = 0;        // whatever the number of rows: a GPU's context
};

struct Inputs {
  uint64_t device_budget_bytes = 0;
  uint64_t host_budget_bytes = 0;
  uint32_t max_rows = 0;              // 0: 512 if everything fits with it, else the largest power of two up to it whose
                                      // scratch is an eighth of the budget
  std::function<FixedNeed(uint32_t max_rows)> fixed_need;
  bool in_place = false;              // kernels read host memory and the mapped file where they are: nothing is streamed
  Bandwidths bandwidths;
  double compute_seconds = 0;         // of one decode pass, if known
};

// A streamed tensor's place in the stream ring, the same in every pass.
struct StreamItem {
  uint32_t tensor = 0;                // index into Manifest::tensors
  Tier tier = Tier::disk;             // disk or host
  uint64_t ring_offset = 0;           // bytes; a multiple of 4096
  uint64_t bytes = 0;                 // Tensor::padded_bytes()
  // The item may be written once the item this many places before it (counted through pass boundaries) was released:
  // the nearest one whose bytes overlap. At most the number of items: an item overlaps itself one pass ago.
  uint32_t distance = 0;
};

struct Plan {
  std::vector<Tier> tiers;            // by tensor
  std::vector<StreamItem> stream;     // in execution order
  uint32_t max_rows = 0;
  uint64_t kv_bytes = 0, scratch_bytes = 0, overhead_bytes = 0, ring_bytes = 0;
  uint64_t resident_bytes = 0;        // weights of the device tier, padded
  uint64_t host_bytes = 0, disk_bytes = 0;   // streamed in every pass, padded
  uint64_t smallest_device_bytes = 0; // the budget below which planning fails, at one row a pass
  bool in_place = false;

  uint64_t device_bytes() const { return kv_bytes + scratch_bytes + overhead_bytes + ring_bytes + resident_bytes; }

  double pass_seconds = 0;            // max over the stages; 0 if nothing is known
  std::string bound;                  // "disk", "bus", "device memory", "compute"; empty if nothing is known
};

// Places the tensors of `manifest`. Vectors are always resident. Matrices become resident evenly through the layers, so
// that copies have compute to hide behind; a matrix so large that streaming it would need a ring bigger than the room it
// takes is pinned first. No residual is resident while a base is streamed, whatever its size, but lm_head's beside its
// own base; none is in the host tier while a base is on disk. The prediction is
//   t = max(disk / B_disk, (host + disk) / B_bus, (resident + host + disk) / B_device, t_compute).
// In place there is no ring, no bus, and `stream` is empty; the tiers say where the bytes are.
// Error: budget, naming the smallest device budget that would do.
Result<Plan> make_plan(const storage::Manifest& manifest, const Inputs& inputs);

// Fills in pass_seconds and bound anew, for bandwidths that were measured after planning.
void predict(Plan& plan, const Bandwidths& bandwidths, double compute_seconds);

}  // namespace sluice::plan
