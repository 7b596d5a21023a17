// SPDX-License-Identifier: Apache-2.0
#include "trace/injection.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <ctime>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <optional>

#include <fmt/format.h>

#include "base/handles.hpp"

namespace sluice::trace {
namespace {

constexpr std::array<const char*, static_cast<size_t>(Fault::count)> kFaultNames = {
    "read", "copy", "compute", "sampling", "callback", "preempt", "alloc", "compete", "evict", "prefill"};
constexpr std::array<const char*, static_cast<size_t>(InjectionClock::count)> kClockNames = {"token", "time", "bytes"};
// As much in flight as twice the prefetcher's 32 requests of 512 KiB.
constexpr size_t kCompetingRead = 4 << 20;
constexpr size_t kCompetitors = 8;

std::string list_of_faults() {
  std::string text;
  for (const char* name : kFaultNames) text += (text.empty() ? "" : ", ") + std::string(name);
  return text;
}

std::optional<double> number(std::string_view text) {
  double value = 0;
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), value);
  if (parsed.ec != std::errc{} || parsed.ptr != text.data() + text.size()) return std::nullopt;
  return value;
}

// Seconds that this thread has computed: a fault of so much work takes longer where something else runs on the core.
double thread_seconds() {
  timespec time = {};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

void spin(double seconds) {
  for (const double until = thread_seconds() + seconds; thread_seconds() < until;) {
  }
}

}  // namespace

const char* name_of(Fault fault) { return kFaultNames[static_cast<size_t>(fault)]; }
const char* name_of(InjectionClock clock) { return kClockNames[static_cast<size_t>(clock)]; }

Result<Injection> parse_injection(std::string_view text) {
  const auto refuse = [&](const std::string& what) {
    return fail(ErrorCode::usage,
                fmt::format("--inject {}: {}; write it as read:period=16,ms=30,jitter=0.03,clock=token", text, what));
  };
  Injection injection;
  const size_t colon = std::min(text.find(':'), text.size());
  const std::string_view kind = text.substr(0, colon);
  const auto* found = std::find(kFaultNames.begin(), kFaultNames.end(), kind);
  if (found == kFaultNames.end()) return refuse(fmt::format("there is no fault \"{}\" ({})", kind, list_of_faults()));
  injection.fault = static_cast<Fault>(found - kFaultNames.begin());
  std::string_view rest = colon < text.size() ? text.substr(colon + 1) : std::string_view();
  while (!rest.empty()) {
    const std::string_view setting = rest.substr(0, std::min(rest.find(','), rest.size()));
    rest.remove_prefix(std::min(rest.size(), setting.size() + 1));
    const size_t equals = std::min(setting.find('='), setting.size());
    const std::string_view name = setting.substr(0, equals),
                           value = setting.substr(std::min(setting.size(), equals + 1));
    const std::optional<double> amount = number(value);
    const auto* clock = std::find(kClockNames.begin(), kClockNames.end(), value);
    if (name == "clock" && clock != kClockNames.end())
      injection.clock = static_cast<InjectionClock>(clock - kClockNames.begin());
    else if (name == "period" && amount && *amount > 0) injection.period = *amount;
    else if (name == "ms" && amount && *amount > 0 && *amount <= 60000) injection.ms = *amount;
    else if (name == "jitter" && amount && *amount >= 0 && *amount < 0.5) injection.jitter = *amount;
    else return refuse(fmt::format("\"{}\" is not understood", setting));
  }
  return injection;
}

Status check_place(const Injection& injection, const FaultPlaces& places) {
  const auto refuse = [&](const char* what) {
    return fail(ErrorCode::usage, fmt::format("--inject {}: {}", name_of(injection.fault), what));
  };
  if (injection.fault == Fault::read && !places.drive) {
    return refuse("no weights are streamed from the drive here, so no read can be late; lower --device-memory and "
                  "--host-memory");
  }
  if (injection.fault == Fault::copy && !places.host) {
    return refuse("no weights are in host memory here, so no copy out of it can be late; lower --device-memory and "
                  "give --host-memory");
  }
  if (injection.fault == Fault::evict && !places.mapped) {
    return refuse("no weights are mapped here, so there is nothing to drop; give --io mmap without --device-memory");
  }
  if (injection.clock == InjectionClock::bytes && !places.drive) {
    return refuse("clock=bytes counts what is streamed from the drive, and here nothing is; give clock=token or "
                  "clock=time");
  }
  return {};
}

Injector::Injector(const std::string& weights, Track& track) : track_(track), started_ns_(steady_ns()) {
  std::error_code unknown;
  const std::filesystem::path path = std::filesystem::canonical(weights, unknown);
  weights_ = unknown ? weights : path.string();
}

Result<std::unique_ptr<Injector>> Injector::create(std::vector<Injection> injections, const std::string& weights,
                                                   Track& track) {
  std::unique_ptr<Injector> self(new Injector(weights, track));
  for (const Injection& injection : injections) {
    Due due{.injection = injection,
            .next = injection.period,
            .place = injection.period,
            .random = std::mt19937_64(self->due_.size() + 1)};
    self->due_.push_back(std::move(due));
    if (injection.fault == Fault::compete && !self->competing_file_) SLUICE_TRY(self->prepare_competitors());
  }
  return self;
}

Status Injector::prepare_competitors() {
  Result<UniqueFd> file = open_file(weights_, O_RDONLY | O_DIRECT | O_CLOEXEC);
  if (!file && file.error().os_code == EINVAL) {
    return fail(ErrorCode::usage, fmt::format("--inject compete: the file system of {} has no direct reads, so nobody "
                                              "can compete for its drive; put the file on another one", weights_),
                EINVAL);
  }
  if (!file) return fail(std::move(file.error()));
  SLUICE_TRY_ASSIGN(buffer, Mapping::anonymous(kCompetitors * kCompetingRead, "competing reads"));
  std::fill(buffer.bytes().begin(), buffer.bytes().end(), std::byte{1});
  competing_file_ = std::move(*file);
  read_buffer_ = std::move(buffer);
  return {};
}

Injector::~Injector() { stop(); }

void Injector::stop() {
  stopping_ = true;
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

void Injector::on_token(uint64_t bytes) {
  ++tokens_;
  for (Due& due : due_) {
    double now = static_cast<double>(tokens_);
    if (due.injection.clock == InjectionClock::time) now = static_cast<double>(steady_ns() - started_ns_) * 1e-6;
    if (due.injection.clock == InjectionClock::bytes) now = static_cast<double>(bytes) / (1 << 20);
    if (now < due.place) continue;
    while (due.place <= now) {
      due.next += due.injection.period;
      due.place =
          due.next + std::normal_distribution<double>(0, 1)(due.random) * due.injection.jitter * due.injection.period;
      if (due.injection.jitter == 0) continue;
      due.place = std::max(due.place, due.next - 0.5 * due.injection.period);
    }
    begin(due.injection);
  }
}

// What acts at its place is marked there (take), everything else here.
void Injector::begin(const Injection& injection) {
  const uint64_t at = ticks();
  const double seconds = injection.ms * 1e-3;
  const auto ns = static_cast<uint64_t>(seconds * 1e9);
  switch (injection.fault) {
    case Fault::read:
    case Fault::copy:
    case Fault::compute:
    case Fault::sampling:
    case Fault::callback:
    case Fault::alloc: pending_ns_[static_cast<size_t>(injection.fault)] += ns; return;
    case Fault::preempt:
      for (unsigned i = 0; i < 3 * std::max(1u, std::thread::hardware_concurrency()); ++i)
        start_thread(seconds, [this](uint64_t until_ns) { burn(until_ns); });
      break;
    case Fault::compete:
      for (size_t i = 0; i < read_buffer_.size() / kCompetingRead; ++i) {
        const std::span<std::byte> buffer = read_buffer_.bytes().subspan(i * kCompetingRead, kCompetingRead);
        start_thread(seconds, [this, buffer](uint64_t until_ns) { compete(until_ns, buffer); });
      }
      break;
    case Fault::evict:
      if (!evict()) return;
      break;
    case Fault::prefill:
      if (!rival_) return;
      start_prefill(seconds);
      break;
    case Fault::count: return;
  }
  mark(injection.fault, at, ns);
}

void Injector::mark(Fault fault, uint64_t begin_ticks, uint64_t ns) {
  const std::lock_guard lock(marking_);
  track_.record(Kind::injected, begin_ticks, ticks(), static_cast<uint16_t>(fault), 0, ns);
}

void Injector::take(Fault fault) {
  std::atomic<uint64_t>& pending = pending_ns_[static_cast<size_t>(fault)];
  if (pending.load(std::memory_order_relaxed) == 0) return;
  const uint64_t ns = pending.exchange(0);
  if (ns == 0) return;   // another thread took it
  const uint64_t at = ticks();
  if (fault == Fault::compute) spin(static_cast<double>(ns) * 1e-9);
  else if (fault == Fault::alloc) touch_memory(static_cast<double>(ns) * 1e-9);
  else std::this_thread::sleep_for(std::chrono::nanoseconds(ns));
  mark(fault, at, ns);
}

void Injector::start_thread(double seconds, std::function<void(uint64_t until_ns)> work) {
  const uint64_t until = steady_ns() + static_cast<uint64_t>(seconds * 1e9);
  constexpr size_t kMostThreads = 256;
  if (threads_.size() >= kMostThreads) {   // the oldest has ended long ago, unless faults lie on top of each other
    threads_.front().join();
    threads_.erase(threads_.begin());
  }
  threads_.emplace_back(std::move(work), until);
}

// Where this user may, ahead of everything: on a busy machine three more tasks a core are not noticed otherwise.
void Injector::burn(uint64_t until_ns) {
  (void)::setpriority(PRIO_PROCESS, static_cast<id_t>(::syscall(SYS_gettid)), -10);
  while (!stopping_ && steady_ns() < until_ns) {
  }
}

// The other session asks for its turn before the decoding one goes on, however long a thread takes to start.
void Injector::start_prefill(double seconds) {
  constexpr uint64_t kLongestStart = 20'000'000;
  rival_came_ = false;
  start_thread(seconds, [this](uint64_t until_ns) {
    rival_came_ = true;
    while (!stopping_ && rival_ && rival_() && steady_ns() < until_ns) {
    }
  });
  for (const uint64_t begin = steady_ns(); !rival_came_ && steady_ns() - begin < kLongestStart;) std::this_thread::yield();
}

// Large reads all over the container, around the page cache.
void Injector::compete(uint64_t until_ns, std::span<std::byte> buffer) {
  struct stat info = {};
  if (::fstat(competing_file_.get(), &info) != 0) return;
  const off_t size = info.st_size;
  std::mt19937_64 random(until_ns);
  while (!stopping_ && steady_ns() < until_ns) {
    const auto offset = static_cast<off_t>(random() % static_cast<uint64_t>(std::max<off_t>(1, size / 4096)) * 4096);
    if (::pread(competing_file_.get(), buffer.data(), buffer.size(), offset) < 0) return;
  }
}

void Injector::touch_memory(double seconds) {
  constexpr uint64_t kPiece = 4 << 20;
  for (const double until = thread_seconds() + seconds; thread_seconds() < until;) {
    void* memory = ::mmap(nullptr, kPiece, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return;
    ::madvise(memory, kPiece, MADV_NOHUGEPAGE);
    for (uint64_t at = 0; at < kPiece; at += 4096) static_cast<volatile char*>(memory)[at] = 1;
    ::munmap(memory, kPiece);
  }
}

// Every mapping of the container in this process, out of its page tables, then out of the page cache.
bool Injector::evict() {
  bool dropped = false;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    unsigned long begin = 0, end = 0;
    if (line.find(weights_) == std::string::npos || std::sscanf(line.c_str(), "%lx-%lx", &begin, &end) != 2) continue;
    dropped = ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED) == 0 || dropped;
  }
  Result<UniqueFd> file = open_file(weights_, O_RDONLY);
  if (file) (void)::posix_fadvise(file->get(), 0, 0, POSIX_FADV_DONTNEED);
  return dropped;
}

}  // namespace sluice::trace
