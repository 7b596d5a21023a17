// SPDX-License-Identifier: Apache-2.0
// The handler is process-wide: every case runs in a child of its own.
#include <signal.h>

#include <atomic>
#include <thread>

#include "base/units.hpp"
#include "storage/sigbus_guard.hpp"
#include "temp_file.hpp"

using namespace sluice;
using namespace sluice::storage;

namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;   // the sanitizer's handler was there before ours: it reports and exits
#else
constexpr bool kSanitized = false;
#endif

constexpr uint64_t kPage = 4096;
constexpr uint64_t kPages = 16;

bool died_of_sigbus(int status) {
  if (WIFSIGNALED(status)) return WTERMSIG(status) == SIGBUS;
  return kSanitized && WIFEXITED(status) && WEXITSTATUS(status) != 0;
}

Mapping map(const TempFile& file) {
  auto fd = open_file(file.path(), O_RDONLY);
  if (!fd) std::abort();
  auto mapping = Mapping::file(fd->get(), kPages * kPage, file.path());
  if (!mapping) std::abort();
  return std::move(*mapping);
}

void cut(const TempFile& file, uint64_t bytes) {
  if (::truncate(file.path().c_str(), static_cast<off_t>(bytes)) != 0) std::abort();
}

uint8_t peek(const Mapping& mapping, uint64_t offset) {
  return static_cast<uint8_t>(*const_cast<const volatile std::byte*>(mapping.data() + offset));
}

std::vector<std::byte> ones() { return std::vector<std::byte>(kPages * kPage, std::byte{1}); }

}  // namespace

TEST_CASE("a guarded mapping whose file shrinks reads zeros and says where") {
  const TempFile file(ones()), other(ones());
  const int status = in_child([&] {
    if (!SigbusGuard::install() || !SigbusGuard::install() || !SigbusGuard::installed()) return 1;
    Mapping mapping = map(file), untouched = map(other);
    GuardedRange range(mapping.bytes()), other_range(untouched.bytes());
    if (!range.active() || range.hit() || peek(mapping, 10 * kPage) != 1) return 2;
    cut(file, 4 * kPage + 100);
    if (peek(mapping, 10 * kPage + 5) != 0 || !range.hit() || range.hit_offset() != 10 * kPage) return 3;
    if (peek(mapping, 15 * kPage) != 0 || range.hit_offset() != 10 * kPage) return 4;
    if (peek(mapping, 6 * kPage) != 0 || range.hit_offset() != 6 * kPage) return 5;
    if (peek(mapping, 3 * kPage) != 1 || peek(mapping, 4 * kPage + 99) != 1) return 6;   // what the file still holds
    return other_range.hit() || peek(untouched, 15 * kPage) != 1 ? 7 : 0;
  });
  CHECK(exit_code(status) == 0);
}

TEST_CASE("without the handler nothing is guarded") {
  const TempFile file(ones());
  const int status = in_child([&] {
    Mapping mapping = map(file);
    const GuardedRange range(mapping.bytes());
    return range.active() || range.hit() || SigbusGuard::installed() ? 1 : 0;
  });
  CHECK(exit_code(status) == 0);
}

TEST_CASE("a fault outside guarded ranges ends the process as before") {
  const TempFile file(ones()), guarded_file(ones());
  const int status = in_child([&] {
    if (!SigbusGuard::install()) return 0;
    Mapping mapping = map(file), guarded = map(guarded_file);
    const GuardedRange range(guarded.bytes());
    cut(file, 0);
    return peek(mapping, 0) == 0 ? 0 : 0;
  });
  CHECK(died_of_sigbus(status));
}

TEST_CASE("a range that was given back is foreign again") {
  const TempFile file(ones());
  const int status = in_child([&] {
    if (!SigbusGuard::install()) return 0;
    Mapping mapping = map(file);
    { const GuardedRange range(mapping.bytes()); }
    cut(file, 0);
    return peek(mapping, 0) == 0 ? 0 : 0;
  });
  CHECK(died_of_sigbus(status));
}

TEST_CASE("a foreign fault goes to the handler that was there before") {
  const TempFile file(ones()), guarded_file(ones());
  for (const bool with_info : {false, true}) {
    const int status = in_child([&] {
      struct sigaction mine {};
      if (with_info) {
        mine.sa_flags = SA_SIGINFO;
        mine.sa_sigaction = [](int, siginfo_t* info, void*) { ::_exit(info->si_addr != nullptr ? 42 : 1); };
      } else {
        mine.sa_handler = [](int) { ::_exit(42); };
      }
      if (::sigaction(SIGBUS, &mine, nullptr) != 0 || !SigbusGuard::install()) return 1;
      Mapping mapping = map(file), guarded = map(guarded_file);
      const GuardedRange range(guarded.bytes());
      cut(guarded_file, 0);
      if (peek(guarded, 0) != 0 || !range.hit()) return 2;
      cut(file, 0);
      return static_cast<int>(peek(mapping, 0));
    });
    CHECK(exit_code(status) == 42);
  }
}

TEST_CASE("a SIGBUS sent from outside ends the process") {
  const int status = in_child([] {
    if (!SigbusGuard::install()) return 0;
    ::kill(::getpid(), SIGBUS);
    return 0;
  });
  CHECK(died_of_sigbus(status));
}

TEST_CASE("there is room for 64 ranges, and a range given back makes room") {
  const TempFile file(ones());
  const int status = in_child([&] {
    if (!SigbusGuard::install()) return 1;
    Mapping mapping = map(file);
    std::vector<GuardedRange> ranges;
    for (int i = 0; i < GuardedRange::kMaxRanges; ++i) {
      ranges.emplace_back(mapping.bytes());
      if (!ranges.back().active()) return 2;
    }
    if (GuardedRange(mapping.bytes()).active()) return 3;
    ranges.pop_back();
    return GuardedRange(mapping.bytes()).active() ? 0 : 4;
  });
  CHECK(exit_code(status) == 0);
}

TEST_CASE("many threads fault in one range while other ranges come and go") {
  const TempFile other(ones());
  for (int round = 0; round < 10; ++round) {
    const TempFile file(ones());
    const int status = in_child([&] {
      if (!SigbusGuard::install()) return 1;
      Mapping mapping = map(file), unrelated = map(other);
      const GuardedRange range(mapping.bytes());
      std::atomic<bool> stop{false}, was_cut{false};
      std::atomic<int> wrong{0};
      std::thread churn([&] {
        while (!stop) {
          const GuardedRange passing(unrelated.bytes());
          if (passing.hit()) ++wrong;
        }
      });
      std::vector<std::thread> readers;
      for (uint64_t t = 0; t < 4; ++t) {
        readers.emplace_back([&, t] {
          // Through the cut and ten passes beyond it, however late it comes.
          for (int after = 0; after < 10; after += was_cut ? 1 : 0) {
            for (uint64_t page = 0; page < kPages; ++page) {
              // The flag must be up by the time that anyone sees a zero.
              if (peek(mapping, (page * 5 + t) % kPages * kPage) == 0 && !range.hit()) ++wrong;
            }
          }
        });
      }
      cut(file, 3 * kPage);
      was_cut = true;
      for (auto& reader : readers) reader.join();
      stop = true;
      churn.join();
      if (wrong != 0) return 2;
      if (!range.hit()) return 3;
      return peek(mapping, 2 * kPage) == 1 ? 0 : 4;
    });
    CHECK(exit_code(status) == 0);
  }
}
