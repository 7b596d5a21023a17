// SPDX-License-Identifier: Apache-2.0
#include "import/source_file.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <span>

#include "base/units.hpp"

namespace sluice::import {

Result<uint64_t> regular_file_bytes(const UniqueFd& fd, const std::string& path) {
  struct stat info = {};
  if (::fstat(fd.get(), &info) != 0) {
    const int code = errno;
    return fail(ErrorCode::io, fmt::format("{}: cannot ask for its size: {}", path, std::strerror(code)), code);
  }
  if (!S_ISREG(info.st_mode)) return fail(ErrorCode::usage, fmt::format("{}: not a regular file", path));
  return static_cast<uint64_t>(info.st_size);
}

Result<std::string> read_text_file(const std::string& path, uint64_t most) {
  // O_NONBLOCK: opening a pipe by that name must not wait for a writer.
  SLUICE_TRY_ASSIGN(fd, open_file(path, O_RDONLY | O_NONBLOCK));
  SLUICE_TRY_ASSIGN(bytes, regular_file_bytes(fd, path));
  if (bytes > most) {
    return fail(ErrorCode::unsupported, fmt::format("{}: it has {}, at most {} are expected of such a file", path,
                                                    format_bytes(bytes), format_bytes(most)));
  }
  std::string text(bytes, '\0');
  SLUICE_TRY(read_exactly(fd.get(), std::as_writable_bytes(std::span(text)), 0, path));
  return text;
}

}  // namespace sluice::import
