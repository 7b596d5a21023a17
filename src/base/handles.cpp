// SPDX-License-Identifier: Apache-2.0
#include "base/handles.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>

#include "base/units.hpp"

namespace sluice {

UniqueFd& UniqueFd::operator=(UniqueFd&& other) noexcept {
  if (this != &other) {
    reset();
    fd_ = std::exchange(other.fd_, -1);
  }
  return *this;
}

void UniqueFd::reset() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  if (this != &other) {
    reset();
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
  }
  return *this;
}

void Mapping::reset() {
  if (data_ != nullptr) ::munmap(data_, size_);
  data_ = nullptr;
  size_ = 0;
}

Result<Mapping> Mapping::anonymous(uint64_t bytes, const std::string& what) {
  constexpr uint64_t kHugePage = 2 * kMiB;
  const uint64_t size = bytes >= kHugePage ? align_up(bytes, kHugePage) : align_up(bytes, 4096);
  void* data = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    return fail(ErrorCode::out_of_memory,
                fmt::format("cannot allocate {} for {}: {}", format_bytes(bytes), what, std::strerror(errno)), errno);
  }
  if (size >= kHugePage) ::madvise(data, size, MADV_HUGEPAGE);  // a hint: refusal costs speed, nothing else
  Mapping mapping;
  mapping.data_ = static_cast<std::byte*>(data);
  mapping.size_ = size;
  return mapping;
}

Result<Mapping> Mapping::file(int fd, uint64_t bytes, const std::string& path) {
  void* data = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) {
    return fail(ErrorCode::io, fmt::format("{}: cannot map {}: {}", path, format_bytes(bytes), std::strerror(errno)),
                errno);
  }
  Mapping mapping;
  mapping.data_ = static_cast<std::byte*>(data);
  mapping.size_ = bytes;
  return mapping;
}

Result<UniqueFd> open_file(const std::string& path, int flags) {
  int fd = -1;
  do {
    fd = ::open(path.c_str(), flags | O_CLOEXEC, 0644);
  } while (fd < 0 && errno == EINTR);
  if (fd < 0) {
    const ErrorCode code = errno == ENOENT ? ErrorCode::not_found : ErrorCode::io;
    return fail(code, fmt::format("{}: cannot open: {}", path, std::strerror(errno)), errno);
  }
  return UniqueFd(fd);
}

Result<UniqueFd> open_locked(const std::string& path, int flags) {
  // A lock is asked for again: whoever clears leftovers away holds each for a moment.
  for (int attempt = 0; attempt < 16; ++attempt) {
    SLUICE_TRY_ASSIGN(fd, open_file(path, flags));
    if (::flock(fd.get(), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      continue;
    }
    if (is_named(fd, path)) return fd;
  }
  return fail(ErrorCode::usage, fmt::format("{}: another process holds it; wait until it ends", path), EWOULDBLOCK);
}

bool is_named(const UniqueFd& fd, const std::string& path) {
  struct stat opened = {}, named = {};
  return ::fstat(fd.get(), &opened) == 0 && ::lstat(path.c_str(), &named) == 0 && opened.st_ino == named.st_ino &&
         opened.st_dev == named.st_dev;
}

Status read_exactly(int fd, std::span<std::byte> out, uint64_t offset, const std::string& path) {
  size_t done = 0;
  while (done < out.size()) {
    const ssize_t n = ::pread(fd, out.data() + done, out.size() - done, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      return fail(ErrorCode::io, fmt::format("{}: read at offset {} failed: {}", path, offset + done, std::strerror(errno)),
                  errno);
    }
    if (n == 0) {
      return fail(ErrorCode::corrupt, fmt::format("{}: file ends at offset {}, {} more bytes expected", path,
                                                  offset + done, out.size() - done));
    }
    done += static_cast<size_t>(n);
  }
  return {};
}

}  // namespace sluice
