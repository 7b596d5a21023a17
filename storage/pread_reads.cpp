// SPDX-License-Identifier: Apache-2.0
// RawReads by a fixed pool of threads that call pread, for where io_uring is refused. As many reads reach the drive at
// once as there are threads.
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#include "base/check.hpp"
#include "storage/read_queue.hpp"

namespace sluice::storage {
namespace {

// First in, first out; never grows.
template <class T>
class FixedFifo {
 public:
  explicit FixedFifo(size_t capacity) : items_(capacity) {}
  bool empty() const { return count_ == 0; }
  void push(const T& item) {
    SLUICE_CHECK(count_ < items_.size());
    items_[(first_ + count_++) % items_.size()] = item;
  }
  T pop() {
    SLUICE_CHECK(count_ > 0);
    const T item = items_[first_];
    first_ = (first_ + 1) % items_.size();
    --count_;
    return item;
  }

 private:
  std::vector<T> items_;
  size_t first_ = 0;
  size_t count_ = 0;
};

class PreadReads final : public RawReads {
 public:
  PreadReads(int fd, uint32_t depth, uint32_t threads) : fd_(fd), depth_(depth), jobs_(depth), results_(depth) {
    // Signals belong to the threads of the program around us: its Ctrl-C handler must not run on one of these.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    workers_.reserve(threads);
    for (uint32_t i = 0; i < threads; ++i) {
      try {
        workers_.emplace_back([this] { work(); });
      } catch (const std::system_error&) {
        break;  // a limit on threads: fewer are slower; with none, reap() reads
      }
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  // What is being read is finished, what is only queued is dropped: nothing is written to a buffer after this.
  ~PreadReads() override {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    work_to_do_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  int submit(std::span<const RawRead> reads) override {
    SLUICE_CHECK(in_flight_ + reads.size() <= depth_);
    in_flight_ += static_cast<uint32_t>(reads.size());
    {
      const std::lock_guard lock(mutex_);
      for (const RawRead& read : reads) jobs_.push(read);
    }
    if (reads.size() == 1) work_to_do_.notify_one();
    else work_to_do_.notify_all();
    return 0;
  }

  size_t reap(std::span<RawResult> out) override {
    SLUICE_CHECK(in_flight_ > 0 && !out.empty());
    std::unique_lock lock(mutex_);
    if (workers_.empty() && results_.empty()) results_.push(read_one(jobs_.pop()));
    result_ready_.wait(lock, [this] { return !results_.empty(); });
    size_t count = 0;
    while (count < out.size() && !results_.empty()) out[count++] = results_.pop();
    in_flight_ -= static_cast<uint32_t>(count);
    return count;
  }

  bool ready() override {
    const std::lock_guard lock(mutex_);
    return !results_.empty();
  }

  uint32_t depth() const override { return depth_; }
  const char* name() const override { return "pread"; }
  bool register_buffers(std::span<const std::span<std::byte>>) override { return true; }  // pread needs none

 private:
  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      work_to_do_.wait(lock, [this] { return stop_ || !jobs_.empty(); });
      if (stop_) return;
      const RawRead job = jobs_.pop();
      lock.unlock();
      const RawResult result = read_one(job);
      lock.lock();
      results_.push(result);
      result_ready_.notify_one();
    }
  }

  RawResult read_one(const RawRead& read) const {
    const ssize_t n = ::pread(fd_, read.dest, read.bytes, static_cast<off_t>(read.offset));
    return {read.slot, n < 0 ? -errno : static_cast<int32_t>(n)};
  }

  const int fd_;
  const uint32_t depth_;
  uint32_t in_flight_ = 0;  // the caller's thread alone: submitted, not yet reaped

  std::mutex mutex_;        // guards what follows
  std::condition_variable work_to_do_;
  std::condition_variable result_ready_;
  FixedFifo<RawRead> jobs_;
  FixedFifo<RawResult> results_;
  bool stop_ = false;

  std::vector<std::thread> workers_;
};

}  // namespace

std::unique_ptr<RawReads> make_pread_reads(int fd, uint32_t depth, uint32_t threads) {
  return std::make_unique<PreadReads>(fd, depth, threads);
}

}  // namespace sluice::storage
