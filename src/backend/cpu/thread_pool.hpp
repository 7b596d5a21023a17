// SPDX-License-Identifier: Apache-2.0
// A fixed set of threads for parallel loops of microseconds.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "sluice/result.hpp"

namespace sluice::backend::cpu {

// Physical cores among the CPUs this process may run on; at least 1.
uint32_t physical_cores();

// `threads - 1` workers and the caller. One caller at a time; no call from inside a loop body.
class ThreadPool {
 public:
  // Error: out_of_memory, where the system refuses a thread.
  static Result<std::unique_ptr<ThreadPool>> create(uint32_t threads);
  ~ThreadPool();

  uint32_t threads() const { return threads_; }

  // body(first, last, thread), thread < threads(), over parts of 0..count that are `grain` long (the last one shorter);
  // a thread takes the next part when it is through with one, so that a thread whose core is taken away (the
  // prefetcher's work, other processes) holds up no more than one part. One call for all where one part is all there
  // is. Returns when all are done. Does not allocate.
  template <class Body>
  void parallel_for(uint32_t count, uint32_t grain, const Body& body) {
    run(count, grain, [](const void* context, uint32_t first, uint32_t last, uint32_t thread) {
      (*static_cast<const Body*>(context))(first, last, thread);
    }, &body);
  }

 private:
  using Call = void (*)(const void* context, uint32_t first, uint32_t last, uint32_t thread);

  explicit ThreadPool(uint32_t threads) : threads_(threads) {}
  void run(uint32_t count, uint32_t grain, Call call, const void* context);
  void take_parts(uint32_t thread);
  void work(uint32_t thread);

  uint32_t threads_;
  // The loop in progress: written while `open_` is false and nobody is active.
  uint32_t count_ = 0;
  uint32_t grain_ = 1;
  Call call_ = nullptr;
  const void* context_ = nullptr;
  bool stop_ = false;
  alignas(64) std::atomic<uint32_t> epoch_{0};    // loops begun: what idle workers wait for
  alignas(64) std::atomic<uint32_t> next_{0};     // first of the next part
  alignas(64) std::atomic<uint32_t> active_{0};   // workers that may be reading the loop
  std::atomic<bool> open_{false};                 // whether there is one to join
  std::vector<std::thread> workers_;
};

}  // namespace sluice::backend::cpu
