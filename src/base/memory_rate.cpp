// SPDX-License-Identifier: Apache-2.0
#include "base/memory_rate.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <numeric>
#include <span>
#include <system_error>
#include <thread>
#include <vector>

#include "base/handles.hpp"

namespace sluice {

namespace {

// Sum of 8-byte words, in 8 independent chains so that loads and not additions are what it waits for.
uint64_t sum_words(std::span<const uint64_t> words) {
  uint64_t sums[8] = {};
  for (size_t i = 0; i + 8 <= words.size(); i += 8) {
    for (size_t k = 0; k < 8; ++k) sums[k] += words[i + k];
  }
  return std::accumulate(std::begin(sums), std::end(sums), uint64_t{0});
}

// What the threads of one measurement share.
struct Rounds {
  int count = 0;
  std::atomic<int> current{0};
  std::atomic<uint32_t> finished{0};
  std::atomic<uint64_t> sink{0};   // keeps the sums from being optimised away
};

// One thread's share of every round; threads wait for each other so that a round is read by all of them at once.
void read_rounds(std::span<const uint64_t> share, Rounds& rounds) {
  for (int mine = 1; mine <= rounds.count; ++mine) {
    while (rounds.current.load(std::memory_order_acquire) < mine) std::this_thread::yield();
    rounds.sink.fetch_add(sum_words(share), std::memory_order_relaxed);
    rounds.finished.fetch_add(1, std::memory_order_release);
  }
}

}  // namespace

double memory_read_rate(uint32_t threads, uint64_t bytes, int rounds) {
  using Clock = std::chrono::steady_clock;
  if (threads == 0) threads = std::max(1u, std::thread::hardware_concurrency());
  Result<Mapping> memory = Mapping::anonymous(bytes, "measuring memory");
  if (!memory) return 0;
  std::memset(memory->data(), 1, memory->size());   // untouched pages are all one page of zeros
  const std::span words(reinterpret_cast<const uint64_t*>(memory->data()), memory->size() / sizeof(uint64_t));
  const size_t share = words.size() / threads;

  Rounds shared;
  shared.count = rounds;
  std::vector<std::thread> pool;
  try {
    for (uint32_t i = 0; i < threads; ++i) {
      pool.emplace_back([&shared, part = words.subspan(i * share, share)] { read_rounds(part, shared); });
    }
  } catch (const std::system_error&) {
    // Measured with as many as could be started.
  }
  double best = 0;
  for (int round = 1; round <= rounds; ++round) {
    shared.finished = 0;
    const auto start = Clock::now();
    shared.current.store(round, std::memory_order_release);
    while (shared.finished.load(std::memory_order_acquire) < pool.size()) std::this_thread::yield();
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    best = std::max(best, static_cast<double>(pool.size() * share * sizeof(uint64_t)) / seconds);
  }
  for (std::thread& thread : pool) thread.join();
  return best;
}

}  // namespace sluice
