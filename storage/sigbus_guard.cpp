// SPDX-License-Identifier: Apache-2.0
// Everything the handler touches is a lock-free atomic in a fixed table, or a bare system call. Slots are claimed and
// given back by any thread while other threads fault; a slot's `version` is odd while it changes, and the handler
// believes only a begin and end that it read under one even version.
#include "storage/sigbus_guard.hpp"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>

#include "base/check.hpp"

namespace sluice::storage {
namespace {

struct Slot {
  std::atomic<bool> taken{false};
  std::atomic<uint32_t> version{0};
  std::atomic<uintptr_t> begin{0};   // [begin, end); empty while no range is here
  std::atomic<uintptr_t> end{0};
  std::atomic<uintptr_t> zeros_from{0};   // lowest page mapped to zeros; 0: none
};
static_assert(std::atomic<uintptr_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);

enum State : int { kAbsent, kInstalling, kInstalled, kRefused };

Slot g_slots[GuardedRange::kMaxRanges];
std::atomic<int> g_state{kAbsent};
struct sigaction g_previous;   // written before the handler can run
uintptr_t g_page_bytes = 4096;

void set_range(Slot& slot, uintptr_t begin, uintptr_t end) {
  slot.version.fetch_add(1);
  slot.begin.store(begin);
  slot.end.store(end);
  slot.version.fetch_add(1);
}

// The guarded slot that `address` is in, and its end; null if there is none.
Slot* find_slot(uintptr_t address, uintptr_t* end_out) {
  for (Slot& slot : g_slots) {
    const uint32_t version = slot.version.load();
    const uintptr_t begin = slot.begin.load();
    const uintptr_t end = slot.end.load();
    if (version % 2 != 0 || slot.version.load() != version) continue;
    if (address < begin || address >= end) continue;
    *end_out = end;
    return &slot;
  }
  return nullptr;
}

bool map_zeros(uintptr_t address) {
  uintptr_t end = 0;
  Slot* slot = find_slot(address, &end);
  if (slot == nullptr) return false;
  const uintptr_t page = address / g_page_bytes * g_page_bytes;
  // The flag first: no thread may compute from the zeros and find it unset. The lowest page wins.
  uintptr_t lowest = slot->zeros_from.load();
  while ((lowest == 0 || page < lowest) && !slot->zeros_from.compare_exchange_weak(lowest, page)) {
  }
  void* const zeros = ::mmap(reinterpret_cast<void*>(page), end - page, PROT_READ,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
  return zeros != MAP_FAILED;
}

void pass_on(int signal_number, siginfo_t* info, void* context) {
  if ((g_previous.sa_flags & SA_SIGINFO) != 0) {
    g_previous.sa_sigaction(signal_number, info, context);
    return;
  }
  if (g_previous.sa_handler != SIG_DFL && g_previous.sa_handler != SIG_IGN) {
    g_previous.sa_handler(signal_number);
    return;
  }
  if (g_previous.sa_handler == SIG_IGN && info->si_code <= 0) return;   // sent by kill(2), and ignored as before
  // The default action: returning runs into the same fault again, now unhandled, and the core shows the right place. A
  // signal from kill(2) would not come again by itself.
  ::signal(SIGBUS, SIG_DFL);
  if (info->si_code <= 0) ::raise(SIGBUS);
}

void on_sigbus(int signal_number, siginfo_t* info, void* context) {
  const int saved_errno = errno;
  // si_code > 0: a fault, so si_addr is an address. BUS_ADRALN (misaligned access) no mapping cures.
  const bool is_fault = info->si_code > 0 && info->si_code != BUS_ADRALN;
  if (!is_fault || !map_zeros(reinterpret_cast<uintptr_t>(info->si_addr))) pass_on(signal_number, info, context);
  errno = saved_errno;
}

}  // namespace

bool SigbusGuard::install() {
  int expected = kAbsent;
  if (g_state.compare_exchange_strong(expected, kInstalling)) {
    const long page_bytes = ::sysconf(_SC_PAGESIZE);
    if (page_bytes > 0) g_page_bytes = static_cast<uintptr_t>(page_bytes);
    // Ask first, set second: the handler must find g_previous complete if it runs at once.
    struct sigaction action {};
    action.sa_sigaction = on_sigbus;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    const bool ok = ::sigaction(SIGBUS, nullptr, &g_previous) == 0 && ::sigaction(SIGBUS, &action, nullptr) == 0;
    g_state.store(ok ? kInstalled : kRefused);
    return ok;
  }
  while (g_state.load() == kInstalling) {
  }
  return installed();
}

bool SigbusGuard::installed() { return g_state.load() == kInstalled; }

GuardedRange::GuardedRange(std::span<const std::byte> mapping) {
  if (!SigbusGuard::installed() || mapping.empty()) return;
  const auto begin = reinterpret_cast<uintptr_t>(mapping.data());
  SLUICE_CHECK(begin % g_page_bytes == 0);
  for (int i = 0; i < kMaxRanges; ++i) {
    bool expected = false;
    if (!g_slots[i].taken.compare_exchange_strong(expected, true)) continue;
    g_slots[i].zeros_from.store(0);
    // The last page of a mapping is whole, whatever its size says.
    const uintptr_t end = (begin + mapping.size() + g_page_bytes - 1) / g_page_bytes * g_page_bytes;
    set_range(g_slots[i], begin, end);
    slot_ = i;
    return;
  }
}

GuardedRange& GuardedRange::operator=(GuardedRange&& other) noexcept {
  if (this != &other) {
    reset();
    slot_ = std::exchange(other.slot_, -1);
  }
  return *this;
}

bool GuardedRange::hit() const { return slot_ >= 0 && g_slots[slot_].zeros_from.load() != 0; }

uint64_t GuardedRange::hit_offset() const {
  if (slot_ < 0) return 0;
  const uintptr_t from = g_slots[slot_].zeros_from.load();
  return from == 0 ? 0 : from - g_slots[slot_].begin.load();
}

void GuardedRange::reset() {
  if (slot_ < 0) return;
  Slot& slot = g_slots[slot_];
  set_range(slot, 0, 0);
  slot.taken.store(false);
  slot_ = -1;
}

}  // namespace sluice::storage
