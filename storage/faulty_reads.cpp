// SPDX-License-Identifier: Apache-2.0
// Seeded faults over a real reader. What goes wrong with a read is drawn when it is submitted, so that one seed and one
// order of submissions give the same faults whichever reader stands below and however it orders completions.
//
// A faulted read leaves garbage in the part of its buffer that it does not vouch for: whoever uses those bytes, or skips
// the retry, computes something visibly wrong instead of finding the right bytes there by luck.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>

#include "base/check.hpp"
#include "storage/read_queue.hpp"

namespace sluice::storage {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint32_t kSectorBytes = 512;  // a drive's smallest sector: where real short reads are cut

enum class Fault : uint8_t { none, short_read, eintr, eagain, eio, bit_flip, einval };

class FaultyReads final : public RawReads {
 public:
  FaultyReads(std::unique_ptr<RawReads> inner, const FaultPlan& plan)
      : inner_(std::move(inner)), plan_(plan), random_(plan.seed), slots_(inner_->depth()), einval_left_(plan.einval_first) {
    held_.reserve(inner_->depth());
  }

  int submit(std::span<const RawRead> reads) override {
    const int error = inner_->submit(reads);
    if (error < 0) return error;
    for (const RawRead& read : reads) plan_faults(read);
    inner_in_flight_ += static_cast<uint32_t>(reads.size());
    return 0;
  }

  size_t reap(std::span<RawResult> out) override {
    SLUICE_CHECK(inner_in_flight_ + held_.size() > 0 && !out.empty());
    size_t count = 0;
    for (;;) {
      count += release_due(out.subspan(count));
      if (count > 0) return count;
      if (inner_in_flight_ == 0) {
        const auto due = [](const Held& a, const Held& b) { return a.due < b.due; };
        std::this_thread::sleep_until(std::min_element(held_.begin(), held_.end(), due)->due);
        continue;
      }
      const size_t reaped = inner_->reap(out);
      inner_in_flight_ -= static_cast<uint32_t>(reaped);
      for (size_t i = 0; i < reaped; ++i) {
        const RawResult result = apply(out[i]);
        const uint32_t delay_us = slots_[result.slot].delay_us;
        if (delay_us == 0) out[count++] = result;
        else held_.push_back({result, Clock::now() + std::chrono::microseconds(delay_us)});
      }
      if (count > 0) return count;
    }
  }

  bool ready() override { return inner_->ready(); }

  uint32_t depth() const override { return inner_->depth(); }
  const char* name() const override { return inner_->name(); }
  bool register_buffers(std::span<const std::span<std::byte>> buffers) override {
    return inner_->register_buffers(buffers);
  }

 private:
  struct Slot {
    RawRead read;
    Fault fault = Fault::none;
    uint32_t in_a_row = 0;   // faults since this slot last finished a read unharmed
    uint32_t delay_us = 0;
    uint64_t detail = 0;     // random bits: where to cut, which bit to flip
  };
  struct Held {
    RawResult result;
    Clock::time_point due;
  };

  // splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014).
  uint64_t next_random() {
    uint64_t z = (random_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  double next_unit() { return static_cast<double>(next_random() >> 11) * 0x1p-53; }

  void plan_faults(const RawRead& read) {
    Slot& slot = slots_[read.slot];
    slot.read = read;
    slot.fault = Fault::none;
    slot.delay_us = 0;
    slot.detail = next_random();
    double at = next_unit();
    const double delay_at = next_unit();
    if (submitted_++ < plan_.after_reads) return;
    if (delay_at < plan_.delay) slot.delay_us = 1 + static_cast<uint32_t>(slot.detail % (plan_.delay_us + 1));
    if (einval_left_ > 0) {
      --einval_left_;
      slot.fault = Fault::einval;
      return;
    }

    struct Rate { double rate; Fault fault; };
    const Rate rates[] = {{plan_.eio, Fault::eio}, {plan_.bit_flip, Fault::bit_flip},
                          {plan_.short_read, Fault::short_read}, {plan_.eintr, Fault::eintr},
                          {plan_.eagain, Fault::eagain}};
    for (const Rate& candidate : rates) {
      if (at < candidate.rate) {
        slot.fault = candidate.fault;
        break;
      }
      at -= candidate.rate;
    }
    // EIO and a flipped bit are not retried, so there is no end of retries to guard.
    const bool is_retried = slot.fault == Fault::short_read || slot.fault == Fault::eintr || slot.fault == Fault::eagain;
    if (!is_retried) slot.in_a_row = 0;
    else if (++slot.in_a_row > plan_.max_in_a_row) {
      slot.in_a_row = 0;
      slot.fault = Fault::none;
    }
  }

  // What the caller is told of a read that the kernel finished with `result`.
  RawResult apply(RawResult result) {
    const Slot& slot = slots_[result.slot];
    if (result.result <= 0) return result;  // a real failure needs no help
    const auto bytes = static_cast<uint32_t>(result.result);
    switch (slot.fault) {
      case Fault::none: break;
      case Fault::eintr: return failed(slot, result, EINTR);
      case Fault::eagain: return failed(slot, result, EAGAIN);
      case Fault::eio: return failed(slot, result, EIO);
      case Fault::einval: return failed(slot, result, EINVAL);
      case Fault::bit_flip: {
        const uint64_t bit = slot.detail % (uint64_t{bytes} * 8);
        slot.read.dest[bit / 8] ^= static_cast<std::byte>(1u << (bit % 8));
        break;
      }
      case Fault::short_read: {
        const uint32_t cuts = (bytes - 1) / kSectorBytes;  // whole sectors that leave at least one byte out
        if (cuts == 0) break;
        const uint32_t kept = static_cast<uint32_t>(1 + slot.detail % cuts) * kSectorBytes;
        scribble(slot, kept);
        result.result = static_cast<int32_t>(kept);
        break;
      }
    }
    return result;
  }

  RawResult failed(const Slot& slot, RawResult result, int error) {
    scribble(slot, 0);
    result.result = -error;
    return result;
  }

  static void scribble(const Slot& slot, uint32_t from) { std::memset(slot.read.dest + from, 0xA5, slot.read.bytes - from); }

  size_t release_due(std::span<RawResult> out) {
    if (held_.empty()) return 0;
    const Clock::time_point now = Clock::now();
    size_t count = 0;
    for (size_t i = 0; i < held_.size() && count < out.size();) {
      if (held_[i].due > now) {
        ++i;
        continue;
      }
      out[count++] = held_[i].result;
      held_[i] = held_.back();
      held_.pop_back();
    }
    return count;
  }

  std::unique_ptr<RawReads> inner_;
  const FaultPlan plan_;
  uint64_t random_;
  uint64_t submitted_ = 0;
  uint32_t inner_in_flight_ = 0;
  std::vector<Slot> slots_;
  std::vector<Held> held_;   // finished below, not yet told
  uint64_t einval_left_;
};

}  // namespace

std::unique_ptr<RawReads> make_faulty_reads(std::unique_ptr<RawReads> inner, const FaultPlan& plan) {
  return std::make_unique<FaultyReads>(std::move(inner), plan);
}

}  // namespace sluice::storage
