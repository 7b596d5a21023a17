// SPDX-License-Identifier: Apache-2.0
// ReadQueue: whole reads or typed errors, on top of what a kernel really answers.
//
// A read of [0, bytes) relative to its offset may come back in parts. With O_DIRECT every request must begin at a
// multiple of 4096, but a part may end anywhere: a drive cuts at its sectors (512), the end of the file at any byte.
// So a retry begins at the last multiple of 4096 that the parts so far reach, and reads a few bytes again:
//
//   offset 0     4096     8192     12288    16384 = bytes
//          |--------|----x                          first answer: 5632 bytes (`reached` = 5632)
//                   |--------------|                retry from `done` = 4096; answer: 8192 (`reached` = 12288)
//                                  |--------|       retry from `done` = 12288; answer: 4096: complete
//
// A part that reaches no further than the parts before (cut inside its first 4096 bytes again) is a try without
// progress; so are EINTR and EAGAIN. kMaxTries of those in a row are an error.
//
//   End of the file at byte 6000:
//          |--------|----x                          answer: 6000 bytes, less than asked: is the file shorter than the read?
//                                                   fstat says 6000 < 16384: `corrupt`, at once
//   End of the file before the retry's begin:       answer: 0, same question, same answer
//   fstat says that the file is long enough:        it was cut for another reason, or has grown again: retry
//
// A block device reports size 0 to fstat; for anything but a regular file only the answer 0 means the end.
#include "storage/read_queue.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <ctime>

#include "base/check.hpp"
#include "base/units.hpp"

namespace sluice::storage {
namespace {

constexpr uint32_t kAlignment = 4096;
constexpr uint64_t kMaxReadBytes = kMiB;
constexpr uint32_t kMaxDepth = 1024;
constexpr uint32_t kMaxPreadThreads = 32;
constexpr uint32_t kMaxTries = 1000;       // without progress; from kPatientTries on with a pause of 1 ms: a second in all
constexpr uint32_t kPatientTries = 8;

// What a failed read means. The one place where errno of a read is interpreted.
enum class Action { retry, retry_smaller, retry_buffered, give_up };
struct Meaning {
  Action action = Action::give_up;
  ErrorCode code = ErrorCode::io;
  const char* remedy = "";
};

Meaning meaning_of(int error) {
  switch (error) {
    case EINTR:      // a signal came before any byte did
    case ECANCELED:  // io_uring gives up what a thread had queued when that thread ends
      return {Action::retry, ErrorCode::io, "the system keeps interrupting it"};
    case EAGAIN:     // the drive's queue is full: seen for large direct reads
      return {Action::retry_smaller, ErrorCode::io, "the drive stays busy; try again, with a smaller read depth if it lasts"};
    case EINVAL:     // O_DIRECT refused by the file system, or an alignment wider than 4096
      return {Action::retry_buffered, ErrorCode::io, "the file system does not read at such offsets; copy the file to another one"};
    case EIO:        // the drive could not deliver
    case ENODATA:    // the same, as some drivers say "medium error"
    case EREMOTEIO:  // the same, from the far side of a bus
    case EILSEQ:     // block integrity: the drive delivered bytes whose check failed
      return {Action::give_up, ErrorCode::io, "check the drive (dmesg, smartctl) and restore the file from where it came"};
    case ENXIO:      // the drive is gone
    case ENODEV:
    case ETIMEDOUT:  // it, or the network, does not answer
      return {Action::give_up, ErrorCode::io, "the drive or the network went away; bring it back and open the model again"};
    case ESTALE:     // a network file system: the file was replaced
      return {Action::give_up, ErrorCode::io, "the file was replaced on its server; open the model again"};
    case ENOMEM:     // pages for the read could not be pinned
      return {Action::give_up, ErrorCode::out_of_memory, "free some memory or lower the budgets"};
    case EISDIR: return {Action::give_up, ErrorCode::usage, "name a file"};
    case EACCES:     // network file systems check again at each read
    case EPERM: return {Action::give_up, ErrorCode::io, "check the permissions of the file"};
    case EBADF:      // a descriptor or buffer of ours is not what we think
    case EFAULT: return {Action::give_up, ErrorCode::internal, "this is a bug in Sluice; please report it"};
    default: return {Action::give_up, ErrorCode::io, "check the drive and the file, and open the model again"};
  }
}

uint64_t now_ns() {
  return static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count());
}

void pause_1ms() {
  const timespec pause{0, 1'000'000};
  ::nanosleep(&pause, nullptr);
}

// A cold 1 GiB in order, 512 KiB at depth 32, MB/s with the hint SEQUENTIAL, RANDOM (no readahead), none; medians of 9 on
// a 2-core virtual machine: io_uring 2229, 1650, 1243; pread 2213, 1861, 1883.
void prepare_buffered(int fd) { ::posix_fadvise(fd, 0, 0, POSIX_FADV_SEQUENTIAL); }

void log_no_direct(const LogHook& log, const std::string& path) {
  log_info(log, fmt::format("{}: its file system does not take O_DIRECT; reads are buffered", path));
}

class FileReadQueue final : public ReadQueue {
 public:
  FileReadQueue(std::string path, UniqueFd fd, bool direct, std::unique_ptr<RawReads> raw, LogHook log)
      : path_(std::move(path)), fd_(std::move(fd)), log_(std::move(log)), raw_(std::move(raw)), direct_(direct),
        slots_(raw_->depth()), reaped_(raw_->depth()) {
    free_.reserve(raw_->depth());
    queued_.reserve(raw_->depth());
    for (uint32_t slot = raw_->depth(); slot-- > 0;) free_.push_back(slot);
  }

  ~FileReadQueue() override { drain(); }

  bool start(uint64_t offset, std::span<std::byte> dest, uint64_t tag) override {
    SLUICE_CHECK(offset % kAlignment == 0 && dest.size() % kAlignment == 0);
    SLUICE_CHECK(reinterpret_cast<uintptr_t>(dest.data()) % kAlignment == 0);
    SLUICE_CHECK(!dest.empty() && dest.size() <= kMaxReadBytes);
    if (free_.empty()) return false;
    const uint32_t index = free_.back();
    free_.pop_back();
    const auto bytes = static_cast<uint32_t>(dest.size());
    slots_[index] = Slot{.offset = offset, .dest = dest.data(), .bytes = bytes, .asked = bytes, .tag = tag};
    queued_.push_back({offset, dest.data(), bytes, index});
    return true;
  }

  Status flush() override {
    if (queued_.empty()) return {};
    const uint64_t now = now_ns();
    for (const RawRead& read : queued_) {
      slots_[read.slot].submitted_ns = now;
      slots_[read.slot].was_direct = direct_;
    }
    const int error = raw_->submit(queued_);
    if (error < 0) {
      const uint64_t offset = queued_.front().offset;
      for (const RawRead& read : queued_) free_.push_back(read.slot);
      queued_.clear();
      return not_submitted(offset, -error);
    }
    in_kernel_ += static_cast<uint32_t>(queued_.size());
    queued_.clear();
    return {};
  }

  Result<ReadDone> wait() override {
    SLUICE_TRY(flush());
    SLUICE_CHECK(in_flight() > 0);
    for (;;) {
      if (next_reaped_ == reaped_count_) {
        reaped_count_ = raw_->reap(reaped_);
        next_reaped_ = 0;
        reaped_ns_ = now_ns();
      }
      const RawResult result = reaped_[next_reaped_++];
      --in_kernel_;
      SLUICE_TRY_ASSIGN(is_complete, advance(result));
      if (!is_complete) continue;
      const Slot& slot = slots_[result.slot];
      bytes_read_ += slot.bytes;
      free_.push_back(result.slot);
      return ReadDone{slot.tag, slot.submitted_ns, reaped_ns_};
    }
  }

  bool ready() override { return next_reaped_ < reaped_count_ || raw_->ready(); }

  uint32_t in_flight() const override { return depth() - static_cast<uint32_t>(free_.size()); }
  uint32_t depth() const override { return raw_->depth(); }
  bool direct() const override { return direct_; }
  const char* name() const override { return raw_->name(); }
  uint64_t bytes_read() const override { return bytes_read_; }
  uint64_t retries() const override { return retries_; }

  void register_buffers(std::span<const std::span<std::byte>> buffers) override {
    if (raw_->register_buffers(buffers)) return;
    uint64_t bytes = 0;
    for (const auto& buffer : buffers) bytes += buffer.size();
    log_info(log_, fmt::format("{} does not take {} of read buffers (the memlock limit, most likely: ulimit -l); reading "
                               "goes on with unregistered ones", raw_->name(), format_bytes(bytes)));
  }

  void drain() override {
    for (const RawRead& read : queued_) free_.push_back(read.slot);
    queued_.clear();
    for (;;) {
      for (; next_reaped_ < reaped_count_; ++next_reaped_) {
        free_.push_back(reaped_[next_reaped_].slot);
        --in_kernel_;
      }
      if (in_kernel_ == 0) return;
      reaped_count_ = raw_->reap(reaped_);
      next_reaped_ = 0;
    }
  }

 private:
  struct Slot {
    uint64_t offset = 0;
    std::byte* dest = nullptr;
    uint32_t bytes = 0;
    uint32_t done = 0;      // where the request in the kernel begins; a multiple of 4096
    uint32_t asked = 0;     // its size
    uint32_t reached = 0;   // the furthest that any part came
    uint32_t tries = 0;     // without progress since then
    bool was_direct = false;
    uint64_t tag = 0;
    uint64_t submitted_ns = 0;
  };

  // Takes in one answer. True: the read is complete. False: the rest went to the kernel again. Error: the slot is free.
  Result<bool> advance(const RawResult& result) {
    Slot& slot = slots_[result.slot];
    auto next = result.result >= 0 ? after_bytes(slot, static_cast<uint32_t>(result.result))
                                   : after_error(slot, -result.result);
    if (next && !*next) {
      if (auto status = resubmit(slot, result.slot); !status) next = fail(std::move(status.error()));
    }
    if (!next) free_.push_back(result.slot);
    return next;
  }

  Result<bool> after_bytes(Slot& slot, uint32_t got) {
    SLUICE_CHECK(got <= slot.asked);
    const uint32_t reached = slot.done + got;
    if (reached == slot.bytes) return true;
    if (got < slot.asked) SLUICE_TRY(check_end_of_file(slot, got));
    if (reached > slot.reached) {
      slot.reached = reached;
      slot.tries = 0;
    } else if (++slot.tries >= kMaxTries) {
      return fail(ErrorCode::io, fmt::format("{}: reading {} bytes at offset {} does not get past byte {}; check the drive",
                                             path_, slot.bytes, slot.offset, slot.offset + slot.reached));
    }
    slot.done = static_cast<uint32_t>(align_down(reached, kAlignment));
    slot.asked = slot.bytes - slot.done;
    return false;
  }

  Result<bool> after_error(Slot& slot, int error) {
    const Meaning meaning = meaning_of(error);
    if (meaning.action == Action::retry_buffered && slot.was_direct) {
      read_buffered_from_now_on();
      return false;
    }
    const bool is_retried = meaning.action == Action::retry || meaning.action == Action::retry_smaller;
    if (!is_retried || ++slot.tries >= kMaxTries) {
      return fail(meaning.code, fmt::format("{}: reading {} bytes at offset {} failed: {}; {}", path_, slot.bytes,
                                            slot.offset, std::strerror(error), meaning.remedy), error);
    }
    if (meaning.action == Action::retry_smaller) {
      slot.asked = std::max<uint32_t>(kAlignment, static_cast<uint32_t>(align_down(slot.asked / 2, kAlignment)));
    }
    return false;
  }

  Status resubmit(Slot& slot, uint32_t index) {
    ++retries_;
    if (slot.tries > kPatientTries) pause_1ms();
    slot.was_direct = direct_;
    const RawRead rest{slot.offset + slot.done, slot.dest + slot.done, slot.asked, index};
    const int error = raw_->submit({&rest, 1});
    if (error < 0) return not_submitted(rest.offset, -error);
    ++in_kernel_;
    return {};
  }

  // After a short part: an error if the file no longer holds the whole read.
  Status check_end_of_file(const Slot& slot, uint32_t got) const {
    struct stat info {};
    if (::fstat(fd_.get(), &info) != 0) {
      return fail(ErrorCode::io, fmt::format("{}: cannot ask for its size: {}", path_, std::strerror(errno)), errno);
    }
    const bool is_regular = S_ISREG(info.st_mode);
    const auto file_bytes = static_cast<uint64_t>(info.st_size);
    if (is_regular ? file_bytes >= slot.offset + slot.bytes : got > 0) return {};
    const uint64_t end = is_regular ? file_bytes : slot.offset + slot.done;
    return fail(ErrorCode::corrupt,
                fmt::format("{}: file ends at byte {} while reading offset {}: it shrank since it was opened; restore it "
                            "and open the model again", path_, end, slot.offset));
  }

  void read_buffered_from_now_on() {
    if (!direct_) return;  // another read in flight found out first
    direct_ = false;
    const int flags = ::fcntl(fd_.get(), F_GETFL);
    ::fcntl(fd_.get(), F_SETFL, flags & ~O_DIRECT);
    prepare_buffered(fd_.get());
    log_no_direct(log_, path_);
  }

  Status not_submitted(uint64_t offset, int error) const {
    return fail(ErrorCode::io, fmt::format("{}: the system takes no read at offset {} from {}: {}; open the model again, "
                                           "with --io=pread if it lasts", path_, offset, raw_->name(), std::strerror(error)),
                error);
  }

  const std::string path_;
  UniqueFd fd_;                       // outlives raw_, which reads from it
  const LogHook log_;
  std::unique_ptr<RawReads> raw_;
  bool direct_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> free_;        // slots with no read
  std::vector<RawRead> queued_;       // started, not flushed
  uint32_t in_kernel_ = 0;            // flushed, result not taken in
  std::vector<RawResult> reaped_;     // [next_reaped_, reaped_count_) wait to be taken in
  size_t next_reaped_ = 0;
  size_t reaped_count_ = 0;
  uint64_t reaped_ns_ = 0;
  uint64_t bytes_read_ = 0;
  uint64_t retries_ = 0;
};

}  // namespace

Result<std::unique_ptr<ReadQueue>> ReadQueue::open(const std::string& path, const ReadQueueOptions& options) {
  if (options.mode == IoMode::mmap || options.depth == 0 || options.depth > kMaxDepth) {
    return fail(ErrorCode::usage, fmt::format("{}: a read queue takes --io=auto, uring or pread and a depth from 1 to {}",
                                              path, kMaxDepth));
  }

  UniqueFd fd;
  bool direct = options.direct;
  if (direct) {
    auto opened = open_file(path, O_RDONLY | O_DIRECT);
    if (opened) fd = std::move(*opened);
    else if (opened.error().os_code != EINVAL) return fail(std::move(opened.error()));  // EINVAL: no O_DIRECT here
    else direct = false;
  }
  if (!fd) {
    SLUICE_TRY_ASSIGN(buffered, open_file(path, O_RDONLY));
    fd = std::move(buffered);
    prepare_buffered(fd.get());
    if (options.direct) log_no_direct(options.log, path);
  }

  std::unique_ptr<RawReads> raw;
  if (options.mode != IoMode::pread) {
    auto uring = make_uring_reads(fd.get(), options.depth);
    if (uring) {
      raw = std::move(*uring);
    } else if (options.mode == IoMode::uring) {
      return fail(ErrorCode::unsupported, fmt::format("{}: {}; use --io=pread or --io=auto", path, uring.error().message),
                  uring.error().os_code);
    } else {
      log_info(options.log, fmt::format("{}; reading with a pool of pread threads", uring.error().message));
    }
  }
  if (!raw) raw = make_pread_reads(fd.get(), options.depth, std::min(options.depth, kMaxPreadThreads));
  if (options.faults != nullptr) raw = make_faulty_reads(std::move(raw), *options.faults);
  return std::unique_ptr<ReadQueue>(
      std::make_unique<FileReadQueue>(path, std::move(fd), direct, std::move(raw), options.log));
}

}  // namespace sluice::storage
