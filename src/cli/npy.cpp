// SPDX-License-Identifier: Apache-2.0
#include "npy.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include <fmt/format.h>

namespace sluice::cli {
namespace {

Unexpected io_failure(const std::string& what, const std::string& path) {
  const int failure = errno;
  return fail(ErrorCode::io, fmt::format("cannot {} {}: {}", what, path, std::strerror(failure)), failure);
}

bool write_at(int fd, const void* data, size_t bytes, uint64_t offset) {
  const char* next = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = ::pwrite(fd, next, bytes, static_cast<off_t>(offset));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return false;
    next += written;
    bytes -= static_cast<size_t>(written);
    offset += static_cast<uint64_t>(written);
  }
  return true;
}

}  // namespace

Result<NpyWriter> NpyWriter::create(const std::string& path, uint64_t rows, uint64_t cols) {
  std::string temporary = fmt::format("{}.tmp-{}", path, ::getpid());
  const int fd = ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd < 0) return io_failure("create", temporary);
  NpyWriter writer(path, std::move(temporary), fd);
  // Magic, version 1.0, length of the text; magic to end of text is a multiple of 64, and the text ends in a newline.
  std::string text = fmt::format("{{'descr': '<f4', 'fortran_order': False, 'shape': ({}, {}), }}", rows, cols);
  constexpr size_t kPrefix = 10;
  text.append(63 - (kPrefix + text.size()) % 64, ' ');
  text += '\n';
  std::string header("\x93NUMPY\x01\x00", 8);
  header += static_cast<char>(text.size() & 0xff);
  header += static_cast<char>(text.size() >> 8);
  header += text;
  if (!write_at(fd, header.data(), header.size(), 0)) return io_failure("write", path);
  writer.header_bytes_ = header.size();
  return writer;
}

NpyWriter::NpyWriter(NpyWriter&& other) noexcept
    : path_(std::move(other.path_)),
      temporary_(std::move(other.temporary_)),
      fd_(std::exchange(other.fd_, -1)),
      header_bytes_(other.header_bytes_) {}

NpyWriter::~NpyWriter() {
  if (fd_ < 0) return;
  ::close(fd_);
  ::unlink(temporary_.c_str());
}

Status NpyWriter::write_row(uint64_t row, std::span<const float> values) {
  if (!write_at(fd_, values.data(), values.size_bytes(), header_bytes_ + row * values.size_bytes())) {
    return io_failure("write", path_);
  }
  return {};
}

Status NpyWriter::finish() {
  if (::fsync(fd_) != 0) return io_failure("write", path_);
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) return io_failure("rename the finished file to", path_);
  ::close(std::exchange(fd_, -1));
  return {};
}

}  // namespace sluice::cli
