// SPDX-License-Identifier: Apache-2.0
// Why tokens were slow: what of their time was more than usual, and which counters moved with it.
//
// A rule names a cause only where the time and a counter, or a part of the time that can have no other cause, agree.
// The rest is unknown: a wrong name costs its reader more than none. A counter that was not read has not stood still:
// what rests on it is not said, or the evidence says that it is not counted.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "trace/machine_readings.hpp"
#include "trace/tokens.hpp"

namespace sluice::trace {

enum class Cause : uint8_t {
  unknown,
  disk_tail,        // reads that took long, with nobody else known at the drive: itself, its heat, its housekeeping
  competing_reads,  // the drive also served others
  page_faults,      // pages that had been dropped were read again, or memory had to be reclaimed first
  bus,              // copies into device memory took long
  scheduling,       // the host ran something else on the core, or its hypervisor did
  allocation,       // fresh memory: KV or allocator growth
  compute,          // operations took long by themselves: a stalled device, clocks that nobody tells
  gpu_clock,        // operations took long while the GPU held its clock down for power or heat
  interference,     // another session's pass or prompt came first
  consumer,         // whoever takes the tokens was slow
  preparation,      // commands of a new kind of pass were recorded (graphs)
  count,
};
const char* name_of(Cause cause);       // "disk_tail"
const char* text_of(Cause cause);       // "the drive answered late"

// What a rule rests on. `confirmed` needs a second run with the suspect out of the way.
enum class Grade : uint8_t { unknown, correlated, confirmed };
const char* name_of(Grade grade);

struct Finding {
  Cause cause = Cause::unknown;
  Grade grade = Grade::unknown;
  std::array<double, kParts> excess{};  // seconds beyond the usual, summed over the tokens, by part
  double excess_seconds = 0;            // of the whole tokens
  std::string evidence;                 // "93% of the excess is disk_wait; others read 61 MiB meanwhile"
};

using Counted = std::array<bool, static_cast<size_t>(Counter::count)>;

// Every token's parts and counters beside what is usual around it.
class Attribution {
 public:
  // `tokens` borrows: all decoded ones, in order. `counted`: the counters that their trace has (Tokens::counted).
  Attribution(std::span<const Token* const> tokens, const Counted& counted);

  // The common cause of the tokens with these indices.
  Finding explain(std::span<const size_t> members) const;

 private:
  struct Sums;
  // What a rule says; without a cause, what is known.
  struct Claim {
    Cause cause = Cause::unknown;
    std::string evidence;
  };
  void measure_what_is_usual();
  std::vector<double> excess_of_each() const;
  Sums sums_of(std::span<const size_t> members) const;
  Claim claim(const Sums& sums) const;
  std::optional<Claim> memory_claim(const Sums& sums) const;
  std::optional<Claim> steal_claim(const Sums& sums) const;
  std::optional<Claim> untold_steal(const Sums& sums) const;
  Claim drive_claim(const Sums& sums) const;
  Claim operations_claim(const Sums& sums) const;
  std::string what_did_not_move(const Sums& sums) const;
  bool counted(Counter counter) const { return counted_[static_cast<size_t>(counter)]; }

  std::span<const Token* const> tokens_;
  Counted counted_;
  std::array<std::vector<double>, kParts> usual_;   // by part and token
  std::vector<double> usual_total_;
  std::vector<double> usual_prepared_;
  std::array<std::vector<double>, static_cast<size_t>(Counter::count)> usual_counts_;
  std::vector<double> grown_;            // by token: bytes that became resident since they were last counted
  std::vector<double> memory_covered_;   // by token: seconds in which its psi_memory_us grew; 0: not read for it
  MachineReadings machine_;
  double foreign_total_ = 0;    // bytes that others read from the drive
  double foreign_rate_ = 0;     // ... a second, on ordinary tokens
  double stream_rate_ = 0;      // bytes a second that this model streams, on ordinary tokens
  double delay_rate_ = 0;       // share of ordinary time in which the thread waited for a core
  double delay_per_work_ = 0;   // ... and how long for a second of its work
  double cpu_pressure_ = 0;                         // share of ordinary time in which some task waited for a core
  double memory_pressure_ = 0;                      // ... stalled for memory
  double gpu_slowed_ = 0;                           // share of ordinary tokens in which the GPU held its clock down
};

}  // namespace sluice::trace
