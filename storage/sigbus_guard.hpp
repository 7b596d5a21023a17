// SPDX-License-Identifier: Apache-2.0
// Survives a mapped file that shrinks. Reading a mapping past the end of its file raises SIGBUS; with the guard installed,
// such a fault inside a guarded range maps zeros from the faulting page to the end of that range, sets the range's flag,
// and lets the reader go on. Whoever computes from the range asks hit() before it believes a result.
//
// The handler is process-wide, the only such thing in Sluice, and therefore opt-in: the CLI installs it, a library does
// not. Faults elsewhere go to the handler that was there before, or end the process as they would have.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

namespace sluice::storage {

class SigbusGuard {
 public:
  // Installs the handler once per process; true if it is in place. Any thread.
  static bool install();
  static bool installed();
};

// One guarded mapping, given back on destruction. Guarding costs nothing until a fault. Any thread may ask hit().
class GuardedRange {
 public:
  GuardedRange() = default;
  // Guards `mapping`: a whole read-only file mapping, which must outlive this object. If the handler is not installed, or
  // all kMaxRanges are taken, the range is not guarded: active() is false.
  explicit GuardedRange(std::span<const std::byte> mapping);
  GuardedRange(GuardedRange&& other) noexcept : slot_(std::exchange(other.slot_, -1)) {}
  GuardedRange& operator=(GuardedRange&& other) noexcept;
  ~GuardedRange() { reset(); }

  bool active() const { return slot_ >= 0; }
  // Whether a fault put zeros into the range; stays true. The file shrank, or its drive failed while a page came in.
  bool hit() const;
  // Offset in the mapping of the lowest page that became zeros, for the message. Only after hit().
  uint64_t hit_offset() const;
  void reset();

  static constexpr int kMaxRanges = 64;

 private:
  int slot_ = -1;
};

}  // namespace sluice::storage
