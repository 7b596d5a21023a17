// SPDX-License-Identifier: Apache-2.0
#include "trace/evidence.hpp"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>

#include <fmt/format.h>

namespace sluice::trace {

StatFile::StatFile(const std::string& path) : fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {}

std::string_view StatFile::read() { return read(text_); }

std::string_view StatFile::read(std::span<char> buffer) {
  if (!fd_) return {};
  const ssize_t got = ::pread(fd_.get(), buffer.data(), buffer.size(), 0);
  return got > 0 ? std::string_view(buffer.data(), static_cast<size_t>(got)) : std::string_view();
}

namespace {

bool parse(std::string_view text, uint64_t& value) {
  const size_t begin = text.find_first_not_of(' ');
  if (begin == std::string_view::npos) return false;
  return std::from_chars(text.data() + begin, text.data() + text.size(), value).ec == std::errc{};
}

}  // namespace

bool number_after(std::string_view text, std::string_view name, uint64_t& value) {
  const size_t at = text.find(name);
  return at != std::string_view::npos && parse(text.substr(at + name.size()), value);
}

bool number_at(std::string_view text, size_t index, uint64_t& value) {
  for (size_t word = 0;; ++word) {
    const size_t begin = text.find_first_not_of(' ');
    if (begin == std::string_view::npos || text[begin] == '\n') return false;
    text.remove_prefix(begin);
    if (word == index) return parse(text, value);
    const size_t end = text.find_first_of(" \n");
    if (end == std::string_view::npos) return false;
    text.remove_prefix(end);
  }
}

// ---------------------------------------------------------------------------------------------------------- a token

TokenEvidence::TokenEvidence(Track& track, const std::string& weights, bool streams)
    : track_(track),
      streams_(streams),
      memory_("/proc/self/statm"),
      cpu_pressure_("/proc/pressure/cpu"),
      io_pressure_("/proc/pressure/io"),
      memory_pressure_("/proc/pressure/memory") {
  struct stat info = {};
  if (::stat(weights.c_str(), &info) == 0) {
    // One line for this drive, where /proc/diskstats has all of them.
    drive_ = StatFile(fmt::format("/sys/dev/block/{}:{}/stat", major(info.st_dev), minor(info.st_dev)));
  }
}

bool TokenEvidence::is_slow(uint64_t token_ticks) {
  constexpr double kSlow = 1.25, kPace = 1.0 / 16;
  const auto taken = static_cast<double>(token_ticks);
  const bool slow = taken > kSlow * usual_ticks_;
  // A slow token moves what is usual by no more than one that is twice as slow.
  usual_ticks_ = usual_ticks_ > 0 ? usual_ticks_ + kPace * (std::min(taken, 2 * usual_ticks_) - usual_ticks_) : taken;
  return slow;
}

void TokenEvidence::read(uint64_t token_ticks) {
  const uint64_t at = ticks();
  read_usage(at);
  if (streams_) read_drive(at);
  constexpr double kPace = 1.0 / 16, kPauses = 4096;
  constexpr uint32_t kOrdinaryReadings = 4;   // all files in one of them
  const bool slow = is_slow(token_ticks);
  if (!slow && static_cast<double>(at - files_read_at_) < kPauses * file_ticks_) return;
  const uint64_t begin = ticks();
  read_files(at);
  if (slow || ordinary_readings_++ % kOrdinaryReadings == 0) read_seldom_used_files(at);
  const auto taken = static_cast<double>(ticks() - begin);
  file_ticks_ = file_ticks_ > 0 ? file_ticks_ + kPace * (taken - file_ticks_) : taken;
  files_read_at_ = at;
}

void TokenEvidence::read_files(uint64_t at) {
  const auto self = static_cast<pid_t>(::syscall(SYS_gettid));
  if (self != thread_) {
    thread_ = self;
    schedule_ = StatFile("/proc/thread-self/schedstat");
  }
  uint64_t value = 0;
  if (number_at(schedule_.read(), 1, value)) track_.count(Counter::run_delay_ns, at, value);
  read_pressure(at, cpu_pressure_, Counter::psi_cpu_us);
  if (!streams_) read_drive(at);
}

// Of which the first is never 0 and says that the others were read (causes.cpp).
void TokenEvidence::read_seldom_used_files(uint64_t at) {
  uint64_t value = 0;
  if (number_at(memory_.read(), 1, value)) track_.count(Counter::resident_bytes, at, value * 4096);
  read_pressure(at, io_pressure_, Counter::psi_io_us);
  read_pressure(at, memory_pressure_, Counter::psi_memory_us);
}

// Documentation/block/stat.rst of Linux: reads, merged, sectors, ms, writes, merged, sectors, ms.
void TokenEvidence::read_drive(uint64_t at) {
  const std::string_view drive = drive_.read();
  constexpr struct {
    size_t word;
    Counter counter;
  } kDriveWords[] = {{0, Counter::disk_reads}, {2, Counter::disk_read_sectors}, {3, Counter::disk_read_ms},
                     {4, Counter::disk_writes}, {7, Counter::disk_write_ms}};
  uint64_t value = 0;
  for (const auto& [word, counter] : kDriveWords) {
    if (number_at(drive, word, value)) track_.count(counter, at, value);
  }
}

void TokenEvidence::read_usage(uint64_t at) {
  rusage process = {}, thread = {};
  ::getrusage(RUSAGE_SELF, &process);
  ::getrusage(RUSAGE_THREAD, &thread);
  const auto nanoseconds = [](const timeval& time) {
    return static_cast<uint64_t>(time.tv_sec) * 1'000'000'000u + static_cast<uint64_t>(time.tv_usec) * 1000u;
  };
  track_.count(Counter::minor_faults, at, static_cast<uint64_t>(process.ru_minflt));
  track_.count(Counter::major_faults, at, static_cast<uint64_t>(process.ru_majflt));
  track_.count(Counter::voluntary_switches, at, static_cast<uint64_t>(thread.ru_nvcsw));
  track_.count(Counter::forced_switches, at, static_cast<uint64_t>(thread.ru_nivcsw));
  track_.count(Counter::process_cpu_ns, at, nanoseconds(process.ru_utime) + nanoseconds(process.ru_stime));
  track_.count(Counter::thread_cpu_ns, at, nanoseconds(thread.ru_utime) + nanoseconds(thread.ru_stime));
}

// "some avg10=0.00 avg60=0.00 avg300=0.00 total=12345" (Documentation/accounting/psi.rst of Linux).
void TokenEvidence::read_pressure(uint64_t at, StatFile& file, Counter counter) {
  uint64_t value = 0;
  if (number_after(file.read(), "total=", value)) track_.count(counter, at, value);
}

// ---------------------------------------------------------------------------------------------------------- the
// machine

MachineEvidence::MachineEvidence(Track& track)
    : track_(track), vmstat_("/proc/vmstat"), stat_("/proc/stat"), ticks_per_second_(::sysconf(_SC_CLK_TCK)) {}

void MachineEvidence::read() {
  const uint64_t at = ticks();
  char buffer[16384];
  const std::string_view vmstat = vmstat_.read(buffer);
  constexpr struct {
    std::string_view names[2];   // added up
    Counter counter;
  } kLines[] = {{{"\npgsteal_kswapd ", "\npgsteal_direct "}, Counter::reclaimed_pages},
                {{"\npswpin ", ""}, Counter::swapped_pages},
                {{"\nworkingset_refault_file ", ""}, Counter::refaults}};
  for (const auto& line : kLines) {
    uint64_t sum = 0, value = 0;
    if (!number_after(vmstat, line.names[0], sum)) continue;
    if (!line.names[1].empty() && number_after(vmstat, line.names[1], value)) sum += value;
    track_.count(line.counter, at, sum);
  }
  // "cpu  user nice system idle iowait irq softirq steal ..." in units of 1 / ticks_per_second_.
  const std::string_view stat = stat_.read(std::span(buffer).first(256));
  uint64_t busy = 0, value = 0;
  for (const size_t word : {1, 2, 3, 6, 7}) {
    if (number_at(stat, word, value)) busy += value;
  }
  const auto milliseconds = [this](uint64_t units) { return units * 1000 / static_cast<uint64_t>(ticks_per_second_); };
  if (busy > 0) track_.count(Counter::busy_ms, at, milliseconds(busy));
  if (number_at(stat, 8, value)) track_.count(Counter::steal_ms, at, milliseconds(value));
}

}  // namespace sluice::trace
