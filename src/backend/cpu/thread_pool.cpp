// SPDX-License-Identifier: Apache-2.0
#include "backend/cpu/thread_pool.hpp"

#include <fmt/format.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <set>
#include <string>
#include <system_error>
#include <utility>

namespace sluice::backend::cpu {

namespace {

// The gaps between the loops of a pass are a few microseconds; a sleeping thread takes about 50 to come back.
constexpr std::chrono::microseconds kSpin{40};

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Waits until done(value) and returns the value: spins first, then sleeps.
template <class Done>
uint32_t wait(const std::atomic<uint32_t>& value, const Done& done) {
  uint32_t seen = value.load(std::memory_order_seq_cst);
  if (done(seen)) return seen;
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      relax();
      seen = value.load(std::memory_order_seq_cst);
      if (done(seen)) return seen;
    }
  } while (std::chrono::steady_clock::now() < end);
  while (!done(seen)) {
    value.wait(seen, std::memory_order_seq_cst);
    seen = value.load(std::memory_order_seq_cst);
  }
  return seen;
}

int read_topology(int cpu, const char* name) {
  const std::string path = fmt::format("/sys/devices/system/cpu/cpu{}/topology/{}", cpu, name);
  std::FILE* file = std::fopen(path.c_str(), "re");
  if (file == nullptr) return -1;
  int value = -1;
  if (std::fscanf(file, "%d", &value) != 1) value = -1;
  std::fclose(file);
  return value;
}

}  // namespace

uint32_t physical_cores() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (::sched_getaffinity(0, sizeof allowed, &allowed) != 0) {  // more than 1024 CPUs
    return std::max(1u, std::thread::hardware_concurrency());
  }
  std::set<std::pair<int, int>> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    const int core = read_topology(cpu, "core_id");
    // Where the topology is hidden, every CPU counts.
    cores.insert(core < 0 ? std::pair{-1, cpu} : std::pair{read_topology(cpu, "physical_package_id"), core});
  }
  return std::max<uint32_t>(1, static_cast<uint32_t>(cores.size()));
}

Result<std::unique_ptr<ThreadPool>> ThreadPool::create(uint32_t threads) {
  std::unique_ptr<ThreadPool> pool(new ThreadPool(std::max(1u, threads)));
  pool->workers_.reserve(pool->threads_ - 1);
  for (uint32_t thread = 1; thread < pool->threads_; ++thread) {
    try {
      pool->workers_.emplace_back([self = pool.get(), thread] { self->work(thread); });
    } catch (const std::system_error& error) {
      return fail(ErrorCode::out_of_memory,
                  fmt::format("cannot start compute thread {} of {}: {}; ask for fewer threads", thread, pool->threads_,
                              error.what()), error.code().value());
    }
  }
  return pool;
}

ThreadPool::~ThreadPool() {
  stop_ = true;
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::take_parts(uint32_t thread) {
  for (;;) {
    const uint32_t first = next_.fetch_add(grain_, std::memory_order_relaxed);
    if (first >= count_) return;
    call_(context_, first, std::min(count_, first + grain_), thread);
  }
}

void ThreadPool::run(uint32_t count, uint32_t grain, Call call, const void* context) {
  if (count == 0) return;
  if (threads_ == 1 || count <= grain) {
    call(context, 0, count, 0);
    return;
  }
  count_ = count;
  grain_ = std::max(1u, grain);
  call_ = call;
  context_ = context;
  next_.store(0, std::memory_order_relaxed);
  open_.store(true, std::memory_order_seq_cst);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  take_parts(0);
  // Every part is taken. Those who are at one are waited for; a worker that is still waking up is not: either it sees
  // that the loop is closed, or it is seen here as active (both sides write, then read, in one order).
  open_.store(false, std::memory_order_seq_cst);
  wait(active_, [](uint32_t active) { return active == 0; });
}

void ThreadPool::work(uint32_t thread) {
  uint32_t epoch = 0;
  for (;;) {
    epoch = wait(epoch_, [epoch](uint32_t now) { return now != epoch; });
    if (stop_) return;
    active_.fetch_add(1, std::memory_order_seq_cst);
    if (open_.load(std::memory_order_seq_cst)) take_parts(thread);
    if (active_.fetch_sub(1, std::memory_order_seq_cst) == 1) active_.notify_one();
  }
}

}  // namespace sluice::backend::cpu
