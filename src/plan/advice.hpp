// SPDX-License-Identifier: Apache-2.0
// Which quantization a device and a workload ask for. A pure function over candidates that were planned.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace sluice::plan {

enum class Workload : uint8_t { general, math, code };

std::string_view name_of(Workload workload);  // "general", "math", "code"

// The mean KL divergence, in nats, up to which a quantization is good enough. A conversation forgives another word
// (0.2); a program is wrong by one token (0.1); a proof or a calculation builds on thousands of its own tokens (0.01).
double loss_limit(Workload workload);

// One way to quantize the model, planned for the device.
struct Candidate {
  std::string recipe;
  bool residual = false;  // the file has residuals; loss and rate are those of precision fine
  double kl = 0;          // mean divergence from the model as it was, nats
  bool fits = false;
  bool streams = false;          // weights cross the bus in every pass
  double tokens_per_second = 0;  // 0: unknown
};

struct Decision {
  std::optional<size_t> candidate;   // nothing: none fits
  std::vector<std::string> reasons;  // one sentence each
};

// 1. What does not fit falls out; of the rest, what loses more than the workload allows (all but the least lossy if all
// do).
// 2. If some reach `wanted` tokens a second: of those the least loss, where less than a tenth of the limit counts as
// none;
//    of equals the fastest.
// 3. If none does: the fastest. Within a tenth of it, a streamed file with residuals is preferred, since it runs at
// INT4's
//    speed whenever a prompt does not need them, then the least loss.
Decision choose(std::span<const Candidate> candidates, Workload workload, double wanted);

}  // namespace sluice::plan
