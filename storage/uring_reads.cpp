// SPDX-License-Identifier: Apache-2.0
// RawReads by io_uring. Reads of one batch cost one system call; a wait costs one only if nothing has finished yet.
//
// The ring is set up plainly. IORING_SETUP_SINGLE_ISSUER would bind it to its first thread (EEXIST to every other), and a
// ReadQueue may be handed from thread to thread. Nor would it save anything: reading 2 GiB at depth 32, medians of 5
// interleaved runs on a 2-core virtual machine (Linux 6.18), plain / single issuer / and deferred task work:
// 512 KiB 2393 / 2380 / 2351 MB/s, 4 KiB 311 / 319 / 325 MB/s, the same CPU time within 1%.
#include <fmt/format.h>
#include <liburing.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>

#include "base/check.hpp"
#include "base/units.hpp"
#include "storage/read_queue.hpp"

namespace sluice::storage {
namespace {

constexpr uint64_t kMaxFixedBytes = kGiB;  // the kernel refuses a larger fixed buffer with EFAULT
constexpr int kSubmitTries = 1000;         // with 1 ms between them: a second of memory pressure

class UringReads final : public RawReads {
 public:
  explicit UringReads(uint32_t depth) : depth_(depth) { unsubmitted_.reserve(depth); }

  ~UringReads() override {
    if (!ring_is_up_) return;
    // The kernel writes into the callers' buffers until a read completes, whatever becomes of the ring.
    RawResult dropped;
    while (in_flight_ > 0) reap({&dropped, 1});
    io_uring_queue_exit(&ring_);
  }

  // 0 or -errno; called once, before anything else.
  int set_up(int fd) {
    if (const int error = io_uring_queue_init(depth_, &ring_, 0); error < 0) return error;
    ring_is_up_ = true;
    if (const int error = probe(); error < 0) return error;
    // A registered file saves the kernel a reference count per read. Refused (memlock on old kernels): the plain one does.
    file_is_registered_ = io_uring_register_files(&ring_, &fd, 1) == 0;
    fd_ = file_is_registered_ ? 0 : fd;
    return 0;
  }

  int submit(std::span<const RawRead> reads) override {
    SLUICE_CHECK(in_flight_ + reads.size() <= depth_);
    if (broken_ != 0) return broken_;
    for (const RawRead& read : reads) prepare(read);

    size_t submitted = 0;
    for (int tries = 0; submitted < reads.size();) {
      const int n = io_uring_submit(&ring_);
      if (n > 0) {
        submitted += static_cast<size_t>(n);
        continue;
      }
      // EINTR: a signal. EAGAIN: no memory for a request just now. EBUSY: completions must be taken first, which cannot
      // be with at most `depth` in flight, but costs nothing to treat alike. All three left the batch in the ring.
      if ((n == 0 || n == -EINTR || n == -EAGAIN || n == -EBUSY) && ++tries < kSubmitTries) {
        if (n != -EINTR) pause_1ms();
        continue;
      }
      // What the ring still holds must never reach the kernel: its owner has been told that it failed.
      broken_ = n == 0 ? -EAGAIN : n;
      break;
    }
    if (submitted == 0 && broken_ != 0) return broken_;
    for (size_t i = submitted; i < reads.size(); ++i) unsubmitted_.push_back({reads[i].slot, broken_});
    in_flight_ += static_cast<uint32_t>(reads.size());
    return 0;
  }

  size_t reap(std::span<RawResult> out) override {
    SLUICE_CHECK(in_flight_ > 0 && !out.empty());
    size_t count = 0;
    while (!unsubmitted_.empty() && count < out.size()) {
      out[count++] = unsubmitted_.back();
      unsubmitted_.pop_back();
    }
    io_uring_cqe* cqe = nullptr;
    if (count == 0) {
      wait_for_one();
      io_uring_peek_cqe(&ring_, &cqe);
      SLUICE_CHECK(cqe != nullptr);
    }
    while (count < out.size() && io_uring_peek_cqe(&ring_, &cqe) == 0) {
      out[count++] = {static_cast<uint32_t>(cqe->user_data), cqe->res};
      io_uring_cqe_seen(&ring_, cqe);
    }
    in_flight_ -= static_cast<uint32_t>(count);
    return count;
  }

  bool ready() override { return !unsubmitted_.empty() || io_uring_cq_ready(&ring_) > 0; }

  uint32_t depth() const override { return depth_; }
  const char* name() const override { return "io_uring"; }

  // ENOMEM (RLIMIT_MEMLOCK), EPERM (a security module), EFAULT (memory that cannot be pinned, such as a file mapping),
  // EOPNOTSUPP (the same on newer kernels): whatever it is, plain reads into the same memory work.
  bool register_buffers(std::span<const std::span<std::byte>> buffers) override {
    if (!fixed_.empty()) io_uring_unregister_buffers(&ring_);
    fixed_.clear();
    for (const std::span<std::byte> buffer : buffers) {
      for (size_t begin = 0; begin < buffer.size(); begin += kMaxFixedBytes) {
        fixed_.push_back({buffer.data() + begin, std::min<size_t>(kMaxFixedBytes, buffer.size() - begin)});
      }
    }
    if (fixed_.empty()) return true;
    if (io_uring_register_buffers(&ring_, fixed_.data(), static_cast<unsigned>(fixed_.size())) == 0) return true;
    fixed_.clear();
    return false;
  }

 private:
  // One no-operation there and back: some sandboxes allow io_uring_setup and refuse io_uring_enter. Kernels before 5.6
  // have io_uring without IORING_OP_READ.
  int probe() {
    io_uring_probe* known = io_uring_get_probe_ring(&ring_);
    const bool can_read = known != nullptr && io_uring_opcode_supported(known, IORING_OP_READ) != 0;
    io_uring_free_probe(known);
    if (!can_read) return -ENOSYS;

    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    io_uring_prep_nop(sqe);
    int submitted = 0;
    do {
      submitted = io_uring_submit(&ring_);
    } while (submitted == -EINTR);
    if (submitted != 1) return submitted < 0 ? submitted : -EAGAIN;
    wait_for_one();
    io_uring_cqe* cqe = nullptr;
    io_uring_peek_cqe(&ring_, &cqe);
    SLUICE_CHECK(cqe != nullptr);
    const int result = cqe->res;
    io_uring_cqe_seen(&ring_, cqe);
    return result;
  }

  void prepare(const RawRead& read) {
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    SLUICE_CHECK(sqe != nullptr);
    const int buffer = fixed_buffer_of(read);
    if (buffer >= 0) io_uring_prep_read_fixed(sqe, fd_, read.dest, read.bytes, read.offset, buffer);
    else io_uring_prep_read(sqe, fd_, read.dest, read.bytes, read.offset);
    if (file_is_registered_) io_uring_sqe_set_flags(sqe, IOSQE_FIXED_FILE);
    sqe->user_data = read.slot;
  }

  // Which registered buffer holds all of the read; -1: none. There are a few dozen at most.
  int fixed_buffer_of(const RawRead& read) const {
    for (size_t i = 0; i < fixed_.size(); ++i) {
      const auto* begin = static_cast<const std::byte*>(fixed_[i].iov_base);
      if (read.dest >= begin && read.dest + read.bytes <= begin + fixed_[i].iov_len) return static_cast<int>(i);
    }
    return -1;
  }

  void wait_for_one() {
    for (;;) {
      io_uring_cqe* cqe = nullptr;
      const int error = io_uring_wait_cqe(&ring_, &cqe);
      if (error == 0) return;
      // A signal, or no memory for the wait just now. Anything else means that the ring itself is not what we set up.
      SLUICE_CHECK(error == -EINTR || error == -EAGAIN || error == -EBUSY);
      if (error != -EINTR) pause_1ms();
    }
  }

  static void pause_1ms() {
    const timespec pause{0, 1'000'000};
    ::nanosleep(&pause, nullptr);
  }

  uint32_t depth_;
  uint32_t in_flight_ = 0;
  io_uring ring_{};
  bool ring_is_up_ = false;
  bool file_is_registered_ = false;
  int fd_ = -1;                          // the file, or its index among registered files
  int broken_ = 0;                       // -errno of a submission that failed for good
  std::vector<iovec> fixed_;             // registered buffers, by index
  std::vector<RawResult> unsubmitted_;   // reads of a batch that failed half-way, to be reaped with its error
};

}  // namespace

Result<std::unique_ptr<RawReads>> make_uring_reads(int fd, uint32_t depth) {
  auto reads = std::make_unique<UringReads>(depth);
  const int error = reads->set_up(fd);
  if (error == 0) return std::unique_ptr<RawReads>(std::move(reads));
  const char* remedy = "";
  switch (-error) {
    case EPERM:    // kernel.io_uring_disabled, or seccomp with EPERM
    case EACCES:   // a security module
      remedy = " (kernel.io_uring_disabled is set, or a container's seccomp profile forbids it)";
      break;
    case ENOSYS:   // built without it, seccomp with ENOSYS, or older than 5.6
      remedy = " (this kernel or sandbox does not have it)";
      break;
    case ENOMEM:   // before 5.12 rings counted against the memlock limit
      remedy = " (raise the memlock limit: ulimit -l)";
      break;
    default: break;
  }
  return fail(ErrorCode::unsupported, fmt::format("io_uring is refused: {}{}", std::strerror(-error), remedy), -error);
}

}  // namespace sluice::storage
