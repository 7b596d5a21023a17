// SPDX-License-Identifier: Apache-2.0
// Files and child processes for tests of the disk path.
#pragma once

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "base/handles.hpp"
#include "catch.hpp"

// A file with the given bytes in $TMPDIR, or else in the working directory (Meson: the build folder, on a real drive).
class TempFile {
 public:
  explicit TempFile(const std::vector<std::byte>& content, std::string folder = {}) {
    if (folder.empty()) {
      const char* tmpdir = std::getenv("TMPDIR");
      folder = tmpdir != nullptr ? tmpdir : ".";
    }
    path_ = folder + "/sluice-test-XXXXXX";
    int fd = ::mkstemp(path_.data());
    if (fd < 0) {   // a build folder that an ordinary user may not write to
      path_ = "/tmp/sluice-test-XXXXXX";
      fd = ::mkstemp(path_.data());
    }
    REQUIRE(fd >= 0);
    const sluice::UniqueFd owner(fd);
    size_t done = 0;
    while (done < content.size()) {
      const ssize_t n = ::write(fd, content.data() + done, content.size() - done);
      REQUIRE(n > 0);
      done += static_cast<size_t>(n);
    }
    REQUIRE(::fsync(fd) == 0);
  }
  ~TempFile() { ::unlink(path_.c_str()); }
  TempFile(const TempFile&) = delete;
  TempFile& operator=(const TempFile&) = delete;

  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// splitmix64: the same bytes for the same seed, everywhere.
inline uint64_t next_random(uint64_t& state) {
  uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

inline std::vector<std::byte> random_bytes(size_t bytes, uint64_t seed) {
  std::vector<std::byte> out(bytes);
  for (size_t at = 0; at < bytes; at += 8) {
    const uint64_t word = next_random(seed);
    std::memcpy(out.data() + at, &word, std::min<size_t>(8, bytes - at));
  }
  return out;
}

// Runs `body` in a forked child and returns what waitpid says of it. `body` returns the exit status; no test macros in
// it. For what cannot be undone in a process: limits, seccomp filters, signal handlers.
template <class Body>
int in_child(Body body) {
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) ::_exit(body());
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return status;
}
// Its exit status, or minus the signal that ended it.
inline int exit_code(int status) { return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status); }

inline uint64_t bytes_read_from_drives() {
  FILE* file = std::fopen("/proc/self/io", "r");
  if (file == nullptr) return 0;
  unsigned long long value = 0;
  char line[128];
  while (std::fgets(line, sizeof line, file) != nullptr) {
    if (std::sscanf(line, "read_bytes: %llu", &value) == 1) break;
  }
  std::fclose(file);
  return value;
}
