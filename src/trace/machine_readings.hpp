// SPDX-License-Identifier: Apache-2.0
// Counters of the whole machine beside tokens. They are read five times a second, so that what one says of a token is
// said of its neighbours as well: only readings with slow tokens, held against readings without, say anything.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "trace/tokens.hpp"

namespace sluice::trace {

// How a counter grew in the readings that some tokens lie in, and in the ordinary ones, without a token like them.
struct Growth {
  double readings = 0;      // that the tokens lie in
  double sum = 0;           // over those
  double exceeding = 0;     // share of those in which it grew by more than `seldom`
  double others = 0;        // ordinary readings
  double usual = 0;         // of an ordinary reading, on average
  double seldom = 0;        // what one in 20 ordinary readings exceeds

  double beyond() const { return sum - readings * usual; }
  // Whether there are ordinary readings enough to tell anything.
  bool comparable() const { return others >= 5 && 4 * others >= readings; }
  // More where the tokens are: twice as much on average, and in two of five readings what one in 20 others exceeds.
  bool clearly_more() const { return comparable() && sum > 2 * readings * usual && exceeding >= 0.4; }
};

class MachineReadings {
 public:
  // `tokens` borrows: in order. `excess`: seconds of each beyond what is usual around it.
  MachineReadings(std::span<const Token* const> tokens, std::span<const double> excess);

  // `members`: indices of tokens, rising. An ordinary reading has no token with an excess of `like` seconds and more.
  Growth growth_of(Counter counter, std::span<const size_t> members, double like) const;

 private:
  struct Reading {
    size_t first = 0;         // token
    double slowest = 0;       // the largest excess of its tokens
  };
  std::span<const Token* const> tokens_;
  std::vector<Reading> readings_;
  std::vector<uint32_t> reading_of_;   // by token
};

}  // namespace sluice::trace
