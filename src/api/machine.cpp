// SPDX-License-Identifier: Apache-2.0
// What this machine can do: bandwidths for the planner and for comparison, and the findings of `sluice doctor`.
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <system_error>
#include <thread>

#include <fmt/format.h>

#include "backend/cpu/kernels.hpp"
#include "backend/cuda/rates.hpp"
#include "backend/vulkan/devices.hpp"
#include "base/handles.hpp"
#include "base/memory_rate.hpp"
#include "base/units.hpp"
#include "exec/weights.hpp"
#include "sluice/sluice.hpp"
#include "storage/container.hpp"
#include "storage/read_queue.hpp"
#include "storage/read_rate.hpp"

namespace sluice {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint64_t kSampleBytes = 256 * kMiB;   // larger than any cache
constexpr int kRounds = 3;                      // the best one counts: a ceiling is what is possible

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::string rate_text(double bytes_per_second) { return fmt::format("{:.2f} GB/s", bytes_per_second / 1e9); }

Finding good(std::string name, std::string value) { return {std::move(name), true, std::move(value), {}}; }
Finding bad(std::string name, std::string value, std::string remedy) {
  return {std::move(name), false, std::move(value), std::move(remedy)};
}

// The first line of a file of /proc or /sys; empty if it cannot be read.
std::string first_line(const char* path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// The value after "name:" in /proc/meminfo or /proc/cpuinfo.
std::string proc_value(const char* path, std::string_view name) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(':');
    if (colon == std::string::npos || !line.starts_with(name)) continue;
    if (line.find_first_not_of(" \t", name.size()) != colon) continue;
    const size_t start = line.find_first_not_of(" \t", colon + 1);
    return start == std::string::npos ? std::string() : line.substr(start);
  }
  return {};
}

storage::IoMode mode_of(Io io) {
  switch (io) {
    case Io::uring: return storage::IoMode::uring;
    case Io::pread: return storage::IoMode::pread;
    default: return storage::IoMode::automatic;  // what a mapping could reach at best is the drive's own rate
  }
}

Finding kernel_finding() {
  utsname names = {};
  int major = 0, minor = 0;
  if (::uname(&names) != 0 || std::sscanf(names.release, "%d.%d", &major, &minor) != 2) {
    return bad("kernel", "unknown", "run Sluice on Linux 5.10 or newer");
  }
  const std::string value = fmt::format("{} {} {}", names.sysname, names.release, names.machine);
  if (major > 5 || (major == 5 && minor >= 6)) return good("kernel", value);
  return bad("kernel", value + ", which has no usable io_uring",
             "update to Linux 5.10 or newer; until then a pool of pread threads reads");
}

// A file in `folder` that nobody can name: it is gone whatever becomes of the process.
Result<UniqueFd> nameless_file(const std::string& folder) {
  std::string name = folder + "/.sluice-doctor-XXXXXX";
  UniqueFd fd(::mkostemp(name.data(), O_CLOEXEC));
  if (!fd) {
    const int code = errno;
    return fail(ErrorCode::io, fmt::format("{}: cannot create a file in it: {}", folder, std::strerror(code)), code);
  }
  ::unlink(name.c_str());
  return fd;
}

// Bytes that no drive can compress or recognise as equal.
Status fill_with_noise(int fd, uint64_t bytes, const std::string& folder) {
  std::vector<uint64_t> words(kMiB / sizeof(uint64_t));
  uint64_t state = 0x9e3779b97f4a7c15u;
  for (uint64_t done = 0; done < bytes; done += kMiB) {
    for (uint64_t& word : words) {
      state ^= state << 13;
      state ^= state >> 7;
      state ^= state << 17;
      word = state;
    }
    const char* data = reinterpret_cast<const char*>(words.data());
    for (uint64_t at = 0; at < kMiB;) {
      const ssize_t n = ::pwrite(fd, data + at, kMiB - at, static_cast<off_t>(done + at));
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) {
        const int code = n < 0 ? errno : ENOSPC;
        return fail(ErrorCode::io, fmt::format("{}: cannot write {} there: {}", folder, format_bytes(bytes),
                                               std::strerror(code)), code);
      }
      at += static_cast<uint64_t>(n);
    }
  }
  if (::fsync(fd) != 0) {
    const int code = errno;
    return fail(ErrorCode::io, fmt::format("{}: cannot write {} there: {}", folder, format_bytes(bytes),
                                           std::strerror(code)), code);
  }
  return {};
}

// io_uring itself, and whether its buffers can be registered under this user's memlock limit.
void uring_findings(int fd, std::vector<Finding>& findings) {
  Result<std::unique_ptr<storage::RawReads>> uring = storage::make_uring_reads(fd, exec::kReadDepth);
  if (!uring) {
    const std::string disabled = first_line("/proc/sys/kernel/io_uring_disabled");
    const bool by_sysctl = disabled == "1" || disabled == "2";
    findings.push_back(
        bad("io_uring", uring.error().message,
            by_sysctl ? "sysctl -w kernel.io_uring_disabled=0; until then a pool of pread threads reads"
                      : "allow the io_uring system calls in the container's seccomp profile, or update the kernel; "
                        "until then a pool of pread threads reads"));
    return;
  }
  findings.push_back(good("io_uring", "available"));

  rlimit limit = {};
  ::getrlimit(RLIMIT_MEMLOCK, &limit);
  const uint64_t ring_bytes = exec::kStagingSlots * storage::kBlockBytes;
  const std::string allowed = limit.rlim_cur == RLIM_INFINITY ? "unlimited" : format_bytes(limit.rlim_cur);
  Result<Mapping> ring = Mapping::anonymous(ring_bytes, "the staging ring");
  const std::span<std::byte> buffers[] = {ring ? ring->bytes() : std::span<std::byte>()};
  if (ring && (*uring)->register_buffers(buffers)) {
    findings.push_back(good("memlock", fmt::format("{}; a staging ring of {} can be registered", allowed,
                                                   format_bytes(ring_bytes))));
  } else {
    findings.push_back(bad("memlock", fmt::format("{}; too little to register a staging ring of {}", allowed,
                                                  format_bytes(ring_bytes)),
                           "ulimit -l unlimited, or memlock in /etc/security/limits.conf; until then the kernel pins "
                           "the buffer anew for every read"));
  }
}

Finding direct_finding(const std::string& path, const std::string& folder) {
  const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC));
  if (fd) return good("O_DIRECT", "accepted in " + folder);
  return bad("O_DIRECT", fmt::format("refused in {}: {}", folder, std::strerror(errno)),
             "keep containers on ext4, xfs or btrfs on the drive itself, not on tmpfs or overlayfs; until then reads "
             "go through the page cache");
}

// Everything that needs a file in `folder`.
void disk_findings(const std::string& folder, std::vector<Finding>& findings) {
  const std::string elsewhere = "choose another folder with --folder";
  Result<UniqueFd> fd = nameless_file(folder);
  if (!fd) {
    findings.push_back(bad("disk read", fd.error().message, elsewhere));
    return;
  }
  uring_findings(fd->get(), findings);
  const std::string path = fmt::format("/proc/self/fd/{}", fd->get());
  Finding direct = direct_finding(path, folder);
  const bool is_direct = direct.ok;
  findings.push_back(std::move(direct));
  if (Status filled = fill_with_noise(fd->get(), kSampleBytes, folder); !filled) {
    findings.push_back(bad("disk read", filled.error().message, elsewhere));
    return;
  }
  if (!is_direct) {
    findings.push_back(bad("disk read", "not measured: without O_DIRECT it would be the page cache", elsewhere));
    return;
  }
  Result<double> rate = measure_disk(path, kSampleBytes);
  if (rate) findings.push_back(good("disk read", fmt::format("{} in {}, {} KiB x {}", rate_text(*rate), folder,
                                                             storage::kBlockBytes / kKiB, exec::kReadDepth)));
  else findings.push_back(bad("disk read", "in " + folder + ": " + rate.error().message, elsewhere));
}

Finding memory_finding() {
  const auto bytes_of = [](std::string_view name) {
    return std::strtoull(proc_value("/proc/meminfo", name).c_str(), nullptr, 10) * kKiB;
  };
  const uint64_t total = bytes_of("MemTotal"), available = bytes_of("MemAvailable");
  const std::string value = fmt::format("{}, {} available", format_bytes(total), format_bytes(available));
  if (available >= kGiB) return good("memory", value);
  return bad("memory", value, "end other programs; under 1 GiB leaves hardly room for a KV cache and rings");
}

Finding huge_page_finding() {
  const std::string modes = first_line("/sys/kernel/mm/transparent_hugepage/enabled");
  if (modes.find("[always]") != std::string::npos || modes.find("[madvise]") != std::string::npos) {
    return good("huge pages", modes);
  }
  return bad("huge pages", modes.empty() ? "not in this kernel" : modes,
             "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled; until then every buffer takes 4 KiB pages");
}

Finding cpu_finding() {
  std::string model = proc_value("/proc/cpuinfo", "model name");
  if (model.empty()) model = "unknown model";
  std::istringstream flags(proc_value("/proc/cpuinfo", "flags"));
  std::string features;
  bool avx2 = false, x86 = false;
  for (std::string flag; flags >> flag;) {
    x86 = true;
    avx2 = avx2 || flag == "avx2";
    for (const char* named : {"avx2", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8"}) {
      if (flag == named) features += (features.empty() ? "" : " ") + flag;
    }
  }
  const std::string value =
      fmt::format("{}, {} threads, kernels for {}{}{}", model, std::thread::hardware_concurrency(),
                  backend::cpu::simd_target(), features.empty() ? "" : ", has ", features);
  if (!x86 || avx2) return good("cpu", value);
  return bad("cpu", value,
             "the kernels are slow without AVX2; in a virtual machine, pass the host's CPU model through");
}

// A machine without a GPU is in order: that is one finding without a remedy. Result: whether CUDA works.
bool cuda_findings(std::vector<Finding>& findings) {
  using backend::cuda::Rates;
  const Result<Rates> rates = backend::cuda::measure_rates(0, backend::cuda::RateDetail::all);
  if (!rates) {
    const bool absent = rates.error().code == ErrorCode::not_found;
    if (absent) findings.push_back(good("CUDA", rates.error().message));
    else findings.push_back(bad("CUDA", rates.error().message, "see nvidia-smi: what else uses the GPU, and its health"));
    return false;
  }
  findings.push_back(good("CUDA", fmt::format("{}, sm_{}{}, {} of {} free, driver for CUDA {}.{}", rates->device,
                                              rates->major, rates->minor, format_bytes(rates->free_bytes),
                                              format_bytes(rates->total_bytes), rates->driver / 1000,
                                              rates->driver % 1000 / 10)));
  findings.push_back(good("device memory read", rate_text(rates->read)));
  std::string copies;
  for (const Rates::Copy& copy : rates->copies) {
    copies += fmt::format("{}{} KiB: {}", copies.empty() ? "" : ", ", copy.chunk_bytes / kKiB, rate_text(copy.rate));
  }
  findings.push_back(good("host to device, pinned", copies));
  findings.push_back(good("copy beside kernel", fmt::format("copy {} ({:.0f}%), read {} ({:.0f}%)",
                                                            rate_text(rates->copy_beside_read),
                                                            100 * rates->copy_beside_read / rates->bus(),
                                                            rate_text(rates->read_beside_copy),
                                                            100 * rates->read_beside_copy / rates->read)));
  return true;
}

// One finding a device, with what it lacks. Result: the GPU that `--backend auto` would take, if CUDA does not work.
std::string vulkan_findings(std::vector<Finding>& findings) {
  const Result<std::vector<backend::vulkan::DeviceReport>> devices = backend::vulkan::list_devices({});
  if (!devices) {
    findings.push_back(good("Vulkan", devices.error().message));
    return {};
  }
  if (devices->empty()) findings.push_back(good("Vulkan", "no driver shows a device"));
  std::string gpu;
  for (const backend::vulkan::DeviceReport& device : *devices) {
    const std::string text = fmt::format("{} ({}), {}, {}, Vulkan {}, {}", device.name, device.kind,
                                         format_bytes(device.memory_bytes), device.driver, device.version, device.features);
    if (!device.missing.empty()) {
      findings.push_back(bad("Vulkan", text + "; lacks " + device.missing, "update the GPU's driver"));
      continue;
    }
    findings.push_back(good("Vulkan", text + (device.software ? "; runs by name only (--backend vulkan)" : "")));
    if (gpu.empty() && !device.software) gpu = device.name;
  }
  return gpu;
}

Finding choice_finding(bool cuda, const std::string& vulkan_gpu) {
  if (cuda) return good("backend auto", "cuda");
  if (!vulkan_gpu.empty()) return good("backend auto", fmt::format("vulkan on {}: CUDA does not work here", vulkan_gpu));
  return good("backend auto", "cpu: neither CUDA nor Vulkan finds a GPU that works");
}

}  // namespace

Result<double> measure_disk(const std::string& path, uint64_t bytes, Io io) {
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored)) {
    SLUICE_TRY_ASSIGN(fd, nameless_file(path));
    SLUICE_TRY(fill_with_noise(fd.get(), bytes, path));
    return measure_disk(fmt::format("/proc/self/fd/{}", fd.get()), bytes, io);
  }
  return storage::measure_read_rate(path, bytes, mode_of(io), exec::kReadDepth, static_cast<uint32_t>(storage::kBlockBytes));
}

double measure_memory_copy() {
  Result<Mapping> from = Mapping::anonymous(kSampleBytes, "measuring memory");
  Result<Mapping> to = Mapping::anonymous(kSampleBytes, "measuring memory");
  if (!from || !to) return 0;
  // Untouched pages are all one page of zeros.
  std::memset(from->data(), 1, kSampleBytes);
  std::memset(to->data(), 2, kSampleBytes);
  double best = 0;
  for (int round = 0; round < kRounds; ++round) {
    const auto start = Clock::now();
    std::memcpy(to->data(), from->data(), kSampleBytes);
    best = std::max(best, static_cast<double>(kSampleBytes) / seconds_since(start));
  }
  return best;
}

double measure_memory_read(uint32_t threads) { return memory_read_rate(threads, kSampleBytes, kRounds); }

Result<DeviceRates> measure_device(const std::string& backend) {
  if (backend == "vulkan") {
    SLUICE_TRY_ASSIGN(rates, backend::vulkan::measure_rates({}));
    return DeviceRates{.device = rates.device, .read = rates.read, .bus = rates.bus};
  }
  if (backend != "cpu") {
    Result<backend::cuda::Rates> rates = backend::cuda::measure_rates(0, backend::cuda::RateDetail::bandwidths);
    if (rates) return DeviceRates{.device = rates->device, .read = rates->read, .bus = rates->bus()};
    if (backend != "auto") return fail(std::move(rates.error()));
  }
  return DeviceRates{.device = "cpu", .read = measure_memory_read(0), .bus = measure_memory_copy()};
}

std::vector<Finding> examine_machine(const std::string& folder) {
  std::vector<Finding> findings;
  findings.push_back(kernel_finding());
  disk_findings(folder, findings);
  findings.push_back(memory_finding());
  findings.push_back(huge_page_finding());
  findings.push_back(cpu_finding());
  const auto measured = [&findings](const char* name, double rate) {
    if (rate > 0) findings.push_back(good(name, rate_text(rate)));
    else findings.push_back(bad(name, "not measured: no memory for it", "free 512 MiB of memory"));
  };
  measured("memory copy, one thread", measure_memory_copy());
  measured("memory read, all threads", measure_memory_read(0));
  const bool cuda = cuda_findings(findings);
  findings.push_back(choice_finding(cuda, vulkan_findings(findings)));
  return findings;
}

}  // namespace sluice
