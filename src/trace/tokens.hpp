// SPDX-License-Identifier: Apache-2.0
// A trace as one row per token: how long it took, and what each part of it took.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "sluice/result.hpp"
#include "trace/trace_file.hpp"

namespace sluice::trace {

// What a token's time is divided into. Every nanosecond belongs to one of them.
enum class Part : uint8_t {
  disk_wait, copy_wait, turn_wait, embed, norm, matmul, rope, attention, activation, lm_head, finish,
  session,    // what the session does around its passes
  sampling, detokenize, callback, evidence,
  pass_gap,   // inside a pass and in none of its parts
  gap,        // inside the token and in none of its parts
  count,
};
inline constexpr size_t kParts = static_cast<size_t>(Part::count);
const char* name_of(Part part);

struct Token {
  double begin = 0, end = 0;             // seconds since the trace began
  std::array<double, kParts> seconds{};
  uint32_t session = 0;                  // number of its track
  uint32_t prompt_tokens = 0;            // that its passes read; 1 when decoding
  uint64_t context = 0;                  // tokens of the sequence, itself included
  // Growth of each counter since it was last read for a token of the same session, 0 where it was not read for this one;
  // readings (see record.hpp) as they are.
  std::array<double, static_cast<size_t>(Counter::count)> counters{};
  double covered = 0;                    // seconds in which run_delay_ns and psi_cpu_us grew; 0: not read for this one
  double prepared = 0;                   // seconds, of those above, in which its passes recorded commands (Kind::prepare)
  bool decoded = false;                  // one row after another generated token: what ITL is about

  double total() const { return end - begin; }
  double operator[](Part part) const { return seconds[static_cast<size_t>(part)]; }
  double operator[](Counter counter) const { return counters[static_cast<size_t>(counter)]; }
  // Share of the token that named parts explain, 1 for all of it; what they exceed it by counts against them.
  double accounted() const;
};

struct Tokens {
  std::vector<Token> all;                // by end
  std::array<bool, static_cast<size_t>(Counter::count)> counted{};   // counters that the trace has
};

// Joins the tracks of a trace. Tokens whose passes were dropped keep the time in `gap`. Error: unsupported, if it has
// no tokens.
Result<Tokens> tokens_of(const Trace& trace);

}  // namespace sluice::trace
