// SPDX-License-Identifier: Apache-2.0
// Spikes that come at equal distances on one of three clocks: the number of tokens, the time, the bytes read.
//
// What drives a train shows in the clock that it keeps: a buffer that is full every so many tokens, a timer, a drive
// that pauses every so many bytes. On the wrong clock the same events drift.
//
//   spikes --by height: 6, 9, 13.5 ... deviations--> events --every period, three clocks--> best grid --shuffles-->
//   train
//
// A grid (period P, phase) is scored by how many of its K places hold an event, share c, against the share q that as
// many events thrown at random onto the same tokens would fill: K * KL(c || q) nats, less 1.5 ln K for the number of
// grids that there are. Twice the period leaves every other event out, half of it every other place empty, so both
// score lower. The same search over events that are shuffled among all tokens gives the scores of chance; their Gumbel
// tail gives p.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace sluice::trace {

enum class Clock : uint8_t { token, time, bytes };
inline constexpr size_t kClocks = 3;
const char* name_of(Clock clock);

// Where each token stands on each clock; ascending. A clock that stands still or is missing is an empty array.
struct Clocks {
  std::array<std::vector<double>, kClocks>
      at;  // token: 0, 1, ...; time: seconds; bytes: bytes, all at the token's begin
  const std::vector<double>& operator[](Clock clock) const { return at[static_cast<size_t>(clock)]; }
};

struct Train {
  Clock clock = Clock::token;
  // Clocks on which the same events fit as well, within what the data can tell: the runs of both clocks are
  // proportional.
  std::vector<Clock> also;
  double period = 0, phase = 0;          // in the clock's unit; places are phase + k * period, 0 <= phase < period
  double jitter = 0;                     // root mean square of the distance from the places, as a share of the period
  double places = 0, filled = 0;         // of the grid within the series; of them those with a spike
  double p_value = 1;                    // of the best grid in a series without a train
  std::vector<size_t> members;           // indices of its spikes
};

struct TrainOptions {
  uint32_t shuffles = 39;
  double most_p = 2e-3;
  uint32_t most_trains = 4;
  uint64_t seed = 1;                     // of the shuffles
};

// `scores`: of every token, from baseline_of(); `spikes`: indices of those that stand out. Finds trains of at least six
// places and six members, the most significant first; a spike belongs to one train at most.
std::vector<Train> trains_of(std::span<const double> scores, std::span<const size_t> spikes, const Clocks& clocks,
                             const TrainOptions& options = {});

}  // namespace sluice::trace
