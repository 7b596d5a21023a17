// SPDX-License-Identifier: Apache-2.0
#include "storage/read_queue.hpp"

#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <new>
#include <thread>

#include "base/units.hpp"
#include "storage/read_rate.hpp"
#include "temp_file.hpp"

using namespace sluice;
using namespace sluice::storage;

namespace {

std::atomic<uint64_t> g_allocations{0};

constexpr uint64_t kFileBytes = 6 * kMiB;
constexpr IoMode kModes[] = {IoMode::uring, IoMode::pread};

const char* name_of(IoMode mode) { return mode == IoMode::uring ? "uring" : mode == IoMode::pread ? "pread" : "auto"; }

std::unique_ptr<ReadQueue> must_open(const std::string& path, const ReadQueueOptions& options) {
  auto queue = ReadQueue::open(path, options);
  if (!queue) FAIL(queue.error().message);
  return std::move(*queue);
}

bool uring_works(const std::string& path) {
  ReadQueueOptions options;
  options.mode = IoMode::uring;
  return ReadQueue::open(path, options).has_value();
}

LogHook collect(std::vector<std::string>& lines) {
  return [&lines](LogLevel, std::string_view line) { lines.emplace_back(line); };
}

Mapping buffers(uint64_t bytes) {
  auto mapping = Mapping::anonymous(bytes, "test buffers");
  REQUIRE(mapping.has_value());
  return std::move(*mapping);
}

// `count` reads of random places and sizes, as many in flight as the queue takes; every one is compared with `content`.
// Returns how many differed; stops at the first error.
Result<int> read_at_random(ReadQueue& queue, const std::vector<std::byte>& content, Mapping& memory, uint64_t seed,
                           int count) {
  struct Read { uint64_t offset; uint64_t bytes; };
  std::vector<Read> reads(queue.depth());
  std::vector<uint32_t> free;
  for (uint32_t i = 0; i < queue.depth(); ++i) free.push_back(i);
  int differing = 0;
  for (int started = 0, finished = 0; finished < count;) {
    while (started < count && !free.empty()) {
      const uint32_t slot = free.back();
      free.pop_back();
      const uint64_t pages = content.size() / 4096;
      const uint64_t size = 1 + next_random(seed) % std::min<uint64_t>(pages, 256);
      const uint64_t first = next_random(seed) % (pages - size + 1);
      reads[slot] = {first * 4096, size * 4096};
      REQUIRE(queue.start(reads[slot].offset, memory.bytes().subspan(slot * kMiB, reads[slot].bytes), slot));
      ++started;
    }
    SLUICE_TRY_ASSIGN(done, queue.wait());
    const auto slot = static_cast<uint32_t>(done.tag);
    if (done.completed_ns < done.submitted_ns || done.submitted_ns == 0) ++differing;
    if (std::memcmp(memory.data() + slot * kMiB, content.data() + reads[slot].offset, reads[slot].bytes) != 0) ++differing;
    free.push_back(slot);
    ++finished;
  }
  return differing;
}

// A filter that answers `error` to system call `number`, and, if `flag` is given, only where argument 2 has that bit.
bool refuse_syscall(uint32_t number, uint32_t error, uint32_t flag = 0) {
  sock_filter code[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 3),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args[2])),
      BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, flag, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (error & SECCOMP_RET_DATA)),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  if (flag == 0) code[3] = BPF_STMT(BPF_LD | BPF_IMM, 0);   // no condition: on to the refusal
  const sock_fprog program{sizeof code / sizeof code[0], code};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

bool drop_capabilities() {
  __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct none[2] = {};
  return ::syscall(SYS_capset, &header, none) == 0;
}

}  // namespace

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kCounts = false;   // the sanitizer has its own operator new
#else
constexpr bool kCounts = true;
// Counted. Not inlined, or g++ takes malloc and delete for a mismatched pair.
[[gnu::noinline]] void* operator new(size_t bytes) {
  g_allocations.fetch_add(1, std::memory_order_relaxed);
  void* memory = std::malloc(bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }
#endif

TEST_CASE("reads of any place, size and depth return the file, in every mode") {
  const auto content = random_bytes(kFileBytes, 1);
  const TempFile file(content);
  for (const IoMode mode : {IoMode::automatic, IoMode::uring, IoMode::pread}) {
    if (mode == IoMode::uring && !uring_works(file.path())) {
      WARN("io_uring is refused here: not tested");
      continue;
    }
    for (const bool direct : {true, false}) {
      for (const bool registered : {true, false}) {
        for (const uint32_t depth : {1u, 3u, 8u, 32u}) {
          CAPTURE(name_of(mode), direct, registered, depth);
          ReadQueueOptions options;
          options.mode = mode;
          options.direct = direct;
          options.depth = depth;
          auto memory = buffers(depth * kMiB);
          auto queue = must_open(file.path(), options);
          REQUIRE(queue->depth() == depth);
          if (registered) {
            const std::span<std::byte> spans[] = {memory.bytes()};
            queue->register_buffers(spans);
          }
          const auto differing = read_at_random(*queue, content, memory, depth, 60);
          REQUIRE(differing.has_value());
          CHECK(*differing == 0);
          CHECK(queue->in_flight() == 0);
          CHECK(queue->bytes_read() > 0);
        }
      }
    }
  }
}

TEST_CASE("a full queue takes no more, and counts what it read") {
  const auto content = random_bytes(kFileBytes, 2);
  const TempFile file(content);
  for (const IoMode mode : {IoMode::automatic, IoMode::pread}) {
    auto memory = buffers(4 * 4096);
    ReadQueueOptions options;
    options.mode = mode;
    options.depth = 4;
    auto queue = must_open(file.path(), options);
    for (uint64_t i = 0; i < 4; ++i) CHECK(queue->start(i * 8192, memory.bytes().subspan(i * 4096, 4096), i));
    CHECK_FALSE(queue->start(0, memory.bytes().first(4096), 9));
    CHECK(queue->in_flight() == 4);
    REQUIRE(queue->flush().has_value());
    for (int i = 0; i < 4; ++i) REQUIRE(queue->wait().has_value());
    CHECK(queue->bytes_read() == 4 * 4096);
    for (uint64_t i = 0; i < 4; ++i) {
      CHECK(std::memcmp(memory.data() + i * 4096, content.data() + i * 8192, 4096) == 0);
    }
  }
}

TEST_CASE("a read that is done is ready, and one that is taken or not begun is not") {
  const TempFile file(random_bytes(kFileBytes, 2));
  for (const IoMode mode : {IoMode::automatic, IoMode::pread}) {
    auto memory = buffers(2 * 4096);
    ReadQueueOptions options;
    options.mode = mode;
    options.depth = 2;
    auto queue = must_open(file.path(), options);
    CHECK_FALSE(queue->ready());
    for (uint64_t i = 0; i < 2; ++i) REQUIRE(queue->start(i * 8192, memory.bytes().subspan(i * 4096, 4096), i));
    REQUIRE(queue->flush().has_value());
    for (int i = 0; i < 2; ++i) {
      while (!queue->ready()) std::this_thread::yield();
      REQUIRE(queue->wait().has_value());
    }
    CHECK_FALSE(queue->ready());
  }
}

TEST_CASE("the drive reads as many bytes as the queue counts") {
  const auto content = random_bytes(kFileBytes, 3);
  const TempFile file(content);
  for (const IoMode mode : kModes) {
    if (mode == IoMode::uring && !uring_works(file.path())) continue;
    CAPTURE(name_of(mode));
    ReadQueueOptions options;
    options.mode = mode;
    auto memory = buffers(32 * kMiB);
    auto queue = must_open(file.path(), options);
    const uint64_t before = bytes_read_from_drives();
    const auto differing = read_at_random(*queue, content, memory, 4, 100);
    REQUIRE(differing.has_value());
    if (!queue->direct()) {
      WARN("no O_DIRECT in the test folder: read_bytes not compared");
      continue;
    }
    CHECK(bytes_read_from_drives() - before == queue->bytes_read());
  }
}

TEST_CASE("short, interrupted, refused and late reads still deliver the right bytes") {
  const auto content = random_bytes(kFileBytes, 5);
  const TempFile file(content);
  struct Kind { const char* name; FaultPlan plan; };
  std::vector<Kind> kinds(6);
  kinds[0].name = "short"; kinds[0].plan.short_read = 0.6;
  kinds[1].name = "EINTR"; kinds[1].plan.eintr = 0.6;
  kinds[2].name = "EAGAIN"; kinds[2].plan.eagain = 0.6;
  kinds[3].name = "late"; kinds[3].plan.delay = 0.5; kinds[3].plan.delay_us = 300;
  kinds[4].name = "all"; kinds[4].plan.short_read = 0.3; kinds[4].plan.eintr = 0.2; kinds[4].plan.eagain = 0.2;
  kinds[4].plan.delay = 0.2; kinds[4].plan.delay_us = 300;
  kinds[5].name = "always short"; kinds[5].plan.short_read = 1; kinds[5].plan.max_in_a_row = 12;
  for (const IoMode mode : kModes) {
    if (mode == IoMode::uring && !uring_works(file.path())) continue;
    for (Kind& kind : kinds) {
      uint64_t retries = 0;
      for (uint64_t seed = 1; seed <= 20; ++seed) {
        CAPTURE(name_of(mode), kind.name, seed);
        kind.plan.seed = seed;
        ReadQueueOptions options;
        options.mode = mode;
        options.direct = seed % 4 != 0;
        options.depth = static_cast<uint32_t>(1 + seed % 16);
        options.faults = &kind.plan;
        auto memory = buffers(options.depth * kMiB);
        auto queue = must_open(file.path(), options);
        const auto differing = read_at_random(*queue, content, memory, seed, 25);
        REQUIRE(differing.has_value());
        CHECK(*differing == 0);
        retries += queue->retries();
      }
      std::printf("%s, %s: seeds 1..20, %llu retries\n", name_of(mode), kind.name, static_cast<unsigned long long>(retries));
      CHECK((retries > 0) == (std::string(kind.name) != "late"));
    }
  }
}

TEST_CASE("late reads come back out of order") {
  const auto content = random_bytes(kFileBytes, 6);
  const TempFile file(content);
  FaultPlan plan;
  plan.delay = 0.5;
  plan.delay_us = 3000;
  ReadQueueOptions options;
  options.faults = &plan;
  auto memory = buffers(32 * 4096);
  auto queue = must_open(file.path(), options);
  for (uint64_t i = 0; i < 32; ++i) REQUIRE(queue->start(i * 4096, memory.bytes().subspan(i * 4096, 4096), i));
  std::vector<uint64_t> tags;
  for (int i = 0; i < 32; ++i) {
    const auto done = queue->wait();
    REQUIRE(done.has_value());
    tags.push_back(done->tag);
  }
  CHECK_FALSE(std::is_sorted(tags.begin(), tags.end()));
  CHECK(std::memcmp(memory.data(), content.data(), memory.size()) == 0);
}

TEST_CASE("EIO is a typed error that names file and offset, and the queue lives on") {
  const auto content = random_bytes(kFileBytes, 7);
  const TempFile file(content);
  for (const IoMode mode : kModes) {
    if (mode == IoMode::uring && !uring_works(file.path())) continue;
    FaultPlan plan;
    plan.eio = 1;
    plan.after_reads = 2;
    ReadQueueOptions options;
    options.mode = mode;
    options.faults = &plan;
    auto memory = buffers(3 * 4096);
    auto queue = must_open(file.path(), options);
    for (uint64_t i = 0; i < 3; ++i) REQUIRE(queue->start(i * 4096, memory.bytes().subspan(i * 4096, 4096), i));
    int good = 0;
    for (int i = 0; i < 3; ++i) {
      const auto done = queue->wait();
      if (done) {
        ++good;
        continue;
      }
      CHECK(done.error().code == ErrorCode::io);
      CHECK(done.error().os_code == EIO);
      CHECK(done.error().message.find(file.path()) != std::string::npos);
      CHECK(done.error().message.find("4096 bytes at offset 8192 failed: Input/output error") != std::string::npos);
    }
    CHECK(good == 2);
    CHECK(queue->in_flight() == 0);
    CHECK(queue->retries() == 0);
  }
}

TEST_CASE("an EAGAIN that never ends is an error, not a hang") {
  const TempFile file(random_bytes(8192, 8));
  FaultPlan plan;
  plan.eagain = 1;
  plan.max_in_a_row = ~0u;
  ReadQueueOptions options;
  options.faults = &plan;
  auto memory = buffers(8192);
  auto queue = must_open(file.path(), options);
  REQUIRE(queue->start(0, memory.bytes(), 0));
  const auto done = queue->wait();
  REQUIRE_FALSE(done.has_value());
  CHECK(done.error().code == ErrorCode::io);
  CHECK(done.error().os_code == EAGAIN);
}

TEST_CASE("the injector flips exactly one bit of each read it is told to") {
  const auto content = random_bytes(64 * 4096, 9);
  const TempFile file(content);
  FaultPlan plan;
  plan.bit_flip = 1;
  ReadQueueOptions options;
  options.faults = &plan;
  auto memory = buffers(4096);
  auto queue = must_open(file.path(), options);
  for (uint64_t i = 0; i < 64; ++i) {
    REQUIRE(queue->start(i * 4096, memory.bytes(), i));
    REQUIRE(queue->wait().has_value());
    int bits = 0;
    for (size_t at = 0; at < 4096; ++at) {
      bits += __builtin_popcount(static_cast<unsigned>(memory.data()[at] ^ content[i * 4096 + at]));
    }
    CHECK(bits == 1);
  }
}

TEST_CASE("a file that ends inside a read is corrupt, and the message says where") {
  for (const IoMode mode : kModes) {
    for (const bool direct : {true, false}) {
      for (const double short_reads : {0.0, 0.7}) {
        // Whole before the read, at a page boundary in it, at a sector, at an odd byte, before its offset, empty.
        for (const uint64_t end : {65536u, 32768u, 20480u + 512u, 20480u + 1234u, 16385u, 4096u, 100u, 0u}) {
          const TempFile file(random_bytes(128 * 1024, 10));
          if (mode == IoMode::uring && !uring_works(file.path())) continue;
          CAPTURE(name_of(mode), direct, short_reads, end);
          FaultPlan plan;
          plan.short_read = short_reads;
          plan.seed = end + 1;
          ReadQueueOptions options;
          options.mode = mode;
          options.direct = direct;
          options.faults = &plan;
          auto memory = buffers(49152);
          auto queue = must_open(file.path(), options);
          REQUIRE(::truncate(file.path().c_str(), static_cast<off_t>(end)) == 0);
          REQUIRE(queue->start(16384, memory.bytes(), 1));
          const auto done = queue->wait();
          if (end >= 65536) {
            CHECK(done.has_value());
            continue;
          }
          REQUIRE_FALSE(done.has_value());
          CHECK(done.error().code == ErrorCode::corrupt);
          const std::string expected = file.path() + ": file ends at byte " + std::to_string(end) +
                                       " while reading offset 16384: it shrank since it was opened; restore it and open "
                                       "the model again";
          CHECK(done.error().message == expected);
          CHECK(queue->in_flight() == 0);
        }
      }
    }
  }
}

TEST_CASE("a file cut while it streams ends in one typed error") {
  for (const IoMode mode : kModes) {
    const auto content = random_bytes(kFileBytes, 11);
    const TempFile file(content);
    if (mode == IoMode::uring && !uring_works(file.path())) continue;
    CAPTURE(name_of(mode));
    ReadQueueOptions options;
    options.mode = mode;
    auto memory = buffers(32 * kMiB);
    auto queue = must_open(file.path(), options);
    std::thread cutter([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(30));
      if (::truncate(file.path().c_str(), 1'000'001) != 0) std::abort();
    });
    const auto differing = read_at_random(*queue, content, memory, 12, 1'000'000);
    cutter.join();
    REQUIRE_FALSE(differing.has_value());
    CHECK(differing.error().code == ErrorCode::corrupt);
    CHECK(differing.error().message.find("file ends at byte 1000001") != std::string::npos);
    queue->drain();
    CHECK(queue->in_flight() == 0);
  }
}

TEST_CASE("drained and destroyed queues leave buffers alone") {
  const auto content = random_bytes(kFileBytes, 13);
  const TempFile file(content);
  for (const IoMode mode : kModes) {
    if (mode == IoMode::uring && !uring_works(file.path())) continue;
    for (const bool late : {false, true}) {
      FaultPlan plan;
      plan.delay = 1;
      ReadQueueOptions options;
      options.mode = mode;
      options.faults = late ? &plan : nullptr;
      auto memory = buffers(16 * 4096);
      auto queue = must_open(file.path(), options);
      const auto start = [&](uint64_t i) { return queue->start(i * 4096, memory.bytes().subspan(i * 4096, 4096), i); };
      for (uint64_t i = 0; i < 8; ++i) REQUIRE(start(i));
      REQUIRE(queue->flush().has_value());
      for (uint64_t i = 8; i < 16; ++i) REQUIRE(start(i));   // queued only
      REQUIRE(queue->flush().has_value());
      REQUIRE(queue->wait().has_value());
      queue->drain();
      CHECK(queue->in_flight() == 0);
      queue->drain();
      for (uint64_t i = 0; i < 16; ++i) REQUIRE(start(i));
      REQUIRE(queue->flush().has_value());
      queue.reset();
      std::memset(memory.data(), 0x11, memory.size());
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      CHECK(std::all_of(memory.data(), memory.data() + memory.size(), [](std::byte b) { return b == std::byte{0x11}; }));
    }
  }
}

TEST_CASE("reads started by a thread that has ended can be waited for by another") {
  const auto content = random_bytes(kFileBytes, 14);
  const TempFile file(content);
  for (const IoMode mode : kModes) {
    if (mode == IoMode::uring && !uring_works(file.path())) continue;
    for (const bool direct : {true, false}) {
      CAPTURE(name_of(mode), direct);
      ReadQueueOptions options;
      options.mode = mode;
      options.direct = direct;
      auto memory = buffers(32 * 128 * kKiB);
      auto queue = must_open(file.path(), options);
      for (int round = 0; round < 10; ++round) {
        std::thread([&] {
          for (uint64_t i = 0; i < 32; ++i) {
            queue->start(i * 128 * kKiB, memory.bytes().subspan(i * 128 * kKiB, 128 * kKiB), i);
          }
          (void)queue->flush().has_value();
        }).join();
        REQUIRE(queue->in_flight() == 32);
        for (int i = 0; i < 32; ++i) REQUIRE(queue->wait().has_value());
        REQUIRE(std::memcmp(memory.data(), content.data(), memory.size()) == 0);
      }
    }
  }
}

TEST_CASE("nothing is allocated after open") {
  const auto content = random_bytes(kFileBytes, 15);
  const TempFile file(content);
  for (const IoMode mode : kModes) {
    if (mode == IoMode::uring && !uring_works(file.path())) continue;
    FaultPlan plan;
    plan.short_read = 0.3;
    plan.delay = 0.3;
    plan.delay_us = 100;
    ReadQueueOptions options;
    options.mode = mode;
    options.faults = &plan;
    auto memory = buffers(32 * 4096);
    auto queue = must_open(file.path(), options);
    const std::span<std::byte> spans[] = {memory.bytes()};
    queue->register_buffers(spans);
    const uint64_t before = g_allocations.load();
    uint64_t finished = 0;
    for (uint64_t i = 0; i < 500; ++i) {
      while (!queue->start(i * 4096, memory.bytes().subspan((i % 32) * 4096, 4096), i)) finished += queue->wait().has_value();
    }
    while (queue->in_flight() > 0) finished += queue->wait().has_value();
    const uint64_t after = g_allocations.load();
    CHECK(finished == 500);
    if (kCounts) CHECK(after - before == 0);
    else WARN("allocations are not counted under the sanitizer");
  }
}

TEST_CASE("where O_DIRECT is refused at the first reads, the queue goes on buffered with one log line") {
  const auto content = random_bytes(kFileBytes, 16);
  const TempFile file(content);
  for (const IoMode mode : kModes) {
    if (mode == IoMode::uring && !uring_works(file.path())) continue;
    FaultPlan plan;
    plan.einval_first = 8;
    std::vector<std::string> lines;
    ReadQueueOptions options;
    options.mode = mode;
    options.depth = 8;
    options.faults = &plan;
    options.log = collect(lines);
    auto memory = buffers(8 * kMiB);
    auto queue = must_open(file.path(), options);
    if (!queue->direct()) {
      WARN("no O_DIRECT in the test folder: not tested");
      continue;
    }
    const auto differing = read_at_random(*queue, content, memory, 17, 40);
    REQUIRE(differing.has_value());
    CHECK(*differing == 0);
    CHECK_FALSE(queue->direct());
    REQUIRE(lines.size() == 1);
    CHECK(lines[0] == file.path() + ": its file system does not take O_DIRECT; reads are buffered");
  }
}

TEST_CASE("EINVAL of a buffered read is an error") {
  const TempFile file(random_bytes(4096, 18));
  FaultPlan plan;
  plan.einval_first = 1;
  ReadQueueOptions options;
  options.direct = false;
  options.faults = &plan;
  auto memory = buffers(4096);
  auto queue = must_open(file.path(), options);
  REQUIRE(queue->start(0, memory.bytes(), 0));
  const auto done = queue->wait();
  REQUIRE_FALSE(done.has_value());
  CHECK(done.error().os_code == EINVAL);
}

TEST_CASE("where O_DIRECT is refused at opening, the queue opens buffered with one log line") {
  const auto content = random_bytes(kFileBytes, 19);
  const TempFile file(content);
  auto memory = buffers(32 * kMiB);
  const int status = in_child([&] {
    if (!refuse_syscall(SYS_openat, EINVAL, O_DIRECT)) return 10;
    std::vector<std::string> lines;
    ReadQueueOptions options;
    options.log = collect(lines);
    auto queue = ReadQueue::open(file.path(), options);
    if (!queue) return 11;
    if ((*queue)->direct() || lines.size() != 1) return 12;
    const auto differing = read_at_random(**queue, content, memory, 20, 40);
    if (!differing || *differing != 0) return 13;
    const auto rate = measure_read_rate(file.path(), kFileBytes, IoMode::automatic, 8, 512 * kKiB);
    return !rate && rate.error().code == ErrorCode::unsupported ? 0 : 14;
  });
  CHECK(exit_code(status) == 0);
}

TEST_CASE("where io_uring is refused, auto reads by pread with one log line and uring by name is unsupported") {
  const auto content = random_bytes(kFileBytes, 21);
  const TempFile file(content);
  auto memory = buffers(32 * kMiB);
  for (const int number : {SYS_io_uring_setup, SYS_io_uring_enter, SYS_io_uring_register}) {
    for (const int error : {EPERM, ENOSYS}) {
      CAPTURE(number, error);
      const int status = in_child([&] {
        if (!refuse_syscall(static_cast<uint32_t>(number), static_cast<uint32_t>(error))) return 10;
        std::vector<std::string> lines;
        ReadQueueOptions options;
        options.log = collect(lines);
        auto queue = ReadQueue::open(file.path(), options);
        if (!queue) return 11;
        if (std::string((*queue)->name()) != "pread" || lines.size() != 1) return 12;
        const auto differing = read_at_random(**queue, content, memory, 22, 40);
        if (!differing || *differing != 0) return 13;
        options.mode = IoMode::uring;
        const auto named = ReadQueue::open(file.path(), options);
        if (named || named.error().code != ErrorCode::unsupported) return 14;
        return named.error().message.find("--io=pread") != std::string::npos && lines.size() == 1 ? 0 : 15;
      });
      CHECK(exit_code(status) == 0);
    }
  }
}

TEST_CASE("buffers that the memlock limit refuses are read unregistered, with one log line") {
  const auto content = random_bytes(kFileBytes, 23);
  const TempFile file(content);
  if (!uring_works(file.path())) {
    WARN("io_uring is refused here: not tested");
    return;
  }
  auto memory = buffers(32 * kMiB);
  // With 1 MiB the ring fits and the buffers do not. With nothing at all, Linux 6.14 and later refuse the ring as well
  // (auto goes on by pread); earlier ones only the buffers.
  for (const uint64_t limit : {kMiB, uint64_t{0}}) {
    CAPTURE(limit);
    const int status = in_child([&] {
      const rlimit memlock{limit, limit};
      if (::setrlimit(RLIMIT_MEMLOCK, &memlock) != 0 || !drop_capabilities()) return 10;
      std::vector<std::string> lines;
      ReadQueueOptions options;
      options.mode = limit > 0 ? IoMode::uring : IoMode::automatic;
      options.log = collect(lines);
      auto queue = ReadQueue::open(file.path(), options);
      if (!queue) return 11;
      const std::span<std::byte> spans[] = {memory.bytes()};
      (*queue)->register_buffers(spans);
      if (lines.size() != 1 || lines[0].find("memlock") == std::string::npos) return 12;
      const auto differing = read_at_random(**queue, content, memory, 24, 40);
      return differing && *differing == 0 && lines.size() == 1 ? 0 : 13;
    });
    CHECK(exit_code(status) == 0);
  }
}

TEST_CASE("a file on tmpfs is read whether or not it takes O_DIRECT") {
  if (::access("/dev/shm", W_OK) != 0) return;
  const auto content = random_bytes(kFileBytes, 25);
  const TempFile file(content, "/dev/shm");
  for (const IoMode mode : {IoMode::automatic, IoMode::pread}) {
    std::vector<std::string> lines;
    ReadQueueOptions options;
    options.mode = mode;
    options.log = collect(lines);
    auto memory = buffers(32 * kMiB);
    auto queue = must_open(file.path(), options);
    const auto differing = read_at_random(*queue, content, memory, 26, 40);
    REQUIRE(differing.has_value());
    CHECK(*differing == 0);
    CHECK(lines.size() == (queue->direct() ? 0u : 1u));
  }
}

TEST_CASE("what cannot be opened says so") {
  ReadQueueOptions options;
  const auto missing = ReadQueue::open("./no-such-file", options);
  REQUIRE_FALSE(missing.has_value());
  CHECK(missing.error().code == ErrorCode::not_found);
  CHECK(missing.error().message.find("./no-such-file") != std::string::npos);

  const TempFile file(random_bytes(4096, 27));
  options.mode = IoMode::mmap;
  CHECK(ReadQueue::open(file.path(), options).error().code == ErrorCode::usage);
  options.mode = IoMode::automatic;
  options.depth = 0;
  CHECK(ReadQueue::open(file.path(), options).error().code == ErrorCode::usage);
}

TEST_CASE("the raw read rate of a file is a positive number, and nonsense is refused") {
  const TempFile file(random_bytes(kFileBytes, 28));
  for (const IoMode mode : {IoMode::automatic, IoMode::pread}) {
    const auto rate = measure_read_rate(file.path(), kFileBytes, mode, 8, 512 * kKiB);
    if (!rate && rate.error().code == ErrorCode::unsupported) {
      WARN(rate.error().message);
      continue;
    }
    REQUIRE(rate.has_value());
    CHECK(*rate > 0);
  }
  CHECK(measure_read_rate(file.path(), kFileBytes, IoMode::automatic, 8, 1000).error().code == ErrorCode::usage);
  CHECK(measure_read_rate(file.path(), 10, IoMode::automatic, 8, 4096).error().code == ErrorCode::usage);
}
