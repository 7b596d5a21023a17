// SPDX-License-Identifier: Apache-2.0
// Move-only owners of what the operating system hands out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

#include "sluice/result.hpp"

namespace sluice {

// A file descriptor, closed on destruction. -1 is empty.
class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept;
  ~UniqueFd() { reset(); }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  void reset();

 private:
  int fd_ = -1;
};

// A mapping of memory, unmapped on destruction.
class Mapping {
 public:
  Mapping() = default;
  Mapping(Mapping&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Mapping& operator=(Mapping&& other) noexcept;
  ~Mapping() { reset(); }

  // Zeroed anonymous memory of `bytes` (rounded up to 2 MiB, on huge pages where the kernel gives them).
  static Result<Mapping> anonymous(uint64_t bytes, const std::string& what);
  // The first `bytes` of a file, read-only. `path` is for the message.
  static Result<Mapping> file(int fd, uint64_t bytes, const std::string& path);

  std::byte* data() const { return data_; }
  uint64_t size() const { return size_; }
  std::span<std::byte> bytes() const { return {data_, size_}; }
  void reset();

 private:
  std::byte* data_ = nullptr;
  uint64_t size_ = 0;
};

// Opens `path` with open(2) flags; the message of a failure names the path and the reason.
Result<UniqueFd> open_file(const std::string& path, int flags);

// As open_file, and holds the file's lock (flock(2), exclusive) until it is closed; file systems that know no locks
// give none. A file that its last holder removes or renames between opening and locking is not taken.
// Errors: those of open_file; usage, with EWOULDBLOCK (another holds it).
Result<UniqueFd> open_locked(const std::string& path, int flags);

// Whether `path` is a name of the open file, no symbolic link to it.
bool is_named(const UniqueFd& fd, const std::string& path);

// Reads exactly `out.size()` bytes at `offset`, however many calls it takes. A file that ends early is `corrupt`.
Status read_exactly(int fd, std::span<std::byte> out, uint64_t offset, const std::string& path);

}  // namespace sluice
