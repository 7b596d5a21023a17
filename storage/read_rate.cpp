// SPDX-License-Identifier: Apache-2.0
#include "storage/read_rate.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>

#include "base/handles.hpp"
#include "base/units.hpp"

namespace sluice::storage {
namespace {

constexpr uint64_t kAlignment = 4096;

}  // namespace

Result<double> measure_read_rate(const std::string& path, uint64_t bytes, IoMode mode, uint32_t depth, uint32_t block) {
  if (block == 0 || block % kAlignment != 0 || block > kMiB) {
    return fail(ErrorCode::usage, fmt::format("a block of {} bytes: it must be a multiple of 4096, at most 1 MiB", block));
  }
  ReadQueueOptions options;
  options.mode = mode;
  options.depth = depth;
  SLUICE_TRY_ASSIGN(queue, ReadQueue::open(path, options));

  struct stat info {};
  if (::stat(path.c_str(), &info) != 0) {
    return fail(ErrorCode::io, fmt::format("{}: cannot ask for its size: {}", path, std::strerror(errno)), errno);
  }
  const uint64_t total = align_down(std::min<uint64_t>(bytes, static_cast<uint64_t>(info.st_size)), kAlignment);
  if (total == 0) return fail(ErrorCode::usage, fmt::format("{}: under 4096 bytes, too small to measure a drive", path));

  // Huge pages are faulted in by the registration or by the first read into each; the rate of a file of many times
  // depth * block does not show it, that of a small one would.
  SLUICE_TRY_ASSIGN(buffer, Mapping::anonymous(uint64_t{depth} * block, "measuring the drive"));
  std::fill(buffer.data(), buffer.data() + buffer.size(), std::byte{1});
  const std::span<std::byte> buffers[] = {buffer.bytes()};
  queue->register_buffers(buffers);

  // Read i goes to buffer i while the queue fills; from then on a finished read's buffer takes the next one.
  const auto begin = std::chrono::steady_clock::now();
  uint64_t next = 0;
  const auto start_next = [&](uint64_t slot) {
    const uint64_t size = std::min<uint64_t>(block, total - next);
    queue->start(next, {buffer.data() + slot * block, size}, slot);
    next += size;
  };
  for (uint64_t slot = 0; slot < depth && next < total; ++slot) start_next(slot);
  while (queue->in_flight() > 0) {
    SLUICE_TRY_ASSIGN(done, queue->wait());
    if (next < total) start_next(done.tag);
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  if (!queue->direct()) {
    return fail(ErrorCode::unsupported,
                fmt::format("{}: its file system does not take O_DIRECT, so the drive's own rate cannot be measured", path));
  }
  return static_cast<double>(total) / seconds;
}

}  // namespace sluice::storage
