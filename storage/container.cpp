// SPDX-License-Identifier: Apache-2.0
#include "storage/container.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/check.hpp"
#include "storage/checksum.hpp"
#include "storage/container_header.hpp"
#include "storage/manifest_check.hpp"
#include "storage/manifest_codec.hpp"

namespace sluice::storage {

namespace {

bool all_zero(std::span<const std::byte> bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [](std::byte byte) { return byte == std::byte{0}; });
}

// The size of a regular file; anything else is refused before a byte is read from it.
Result<uint64_t> regular_file_bytes(int fd, const std::string& path) {
  struct stat status = {};
  if (::fstat(fd, &status) != 0) {
    const int code = errno;
    return fail(ErrorCode::io, fmt::format("{}: cannot stat: {}", path, std::strerror(code)), code);
  }
  if (S_ISDIR(status.st_mode)) {
    return fail(ErrorCode::io,
                fmt::format("{}: is a folder, not a Sluice container; `sluice import` makes one of a Hugging Face folder",
                            path),
                EISDIR);
  }
  if (!S_ISREG(status.st_mode)) return fail(ErrorCode::io, fmt::format("{}: is not a regular file", path), EINVAL);
  return static_cast<uint64_t>(status.st_size);
}

Result<ContainerHeader> read_header(int fd, uint64_t file_bytes, const std::string& path) {
  alignas(8) HeaderBytes bytes = {};
  if (file_bytes < kHeaderBytes) {
    const auto start = std::span(bytes).first(file_bytes);
    SLUICE_TRY(read_exactly(fd, start, 0, path));
    return fail(short_file_error(start, path));
  }
  SLUICE_TRY(read_exactly(fd, bytes, 0, path));
  return decode_header(bytes, file_bytes, path);
}

// The header's offsets and sizes are already known to lie in the file.
Result<Manifest> read_manifest(int fd, const ContainerHeader& header, const std::string& path) {
  const uint64_t padded_bytes = align_up(header.manifest_bytes, kPlaneAlignment);
  SLUICE_TRY_ASSIGN(memory, Mapping::anonymous(padded_bytes, path + ": manifest"));
  const auto padded = memory.bytes().first(padded_bytes);
  SLUICE_TRY(read_exactly(fd, padded, header.manifest_offset, path));
  const auto data = padded.first(header.manifest_bytes);
  if (checksum(data) != header.manifest_sum) {
    return fail(ErrorCode::corrupt,
                fmt::format("{}: the manifest checksum does not fit: {} bytes at offset {} are damaged; copy or import the "
                            "file again",
                            path, data.size(), header.manifest_offset));
  }
  if (!all_zero(padded.subspan(header.manifest_bytes))) {
    return fail(ErrorCode::corrupt, fmt::format("{}: the padding after the manifest (offset {}) is not zero; copy or "
                                                "import the file again",
                                                path, header.manifest_offset + header.manifest_bytes));
  }
  return decode_manifest(data, path);
}

// Reads forward in large steps with the kernel's readahead kept 8 to 16 MiB ahead: block by block, the drive would idle
// while a block is hashed.
class SequentialReads {
 public:
  SequentialReads(int fd, const std::string& path) : fd_(fd), path_(path) {}

  Status read(std::span<std::byte> out, uint64_t offset) {
    constexpr uint64_t kAhead = 16 * kMiB;
    if (offset + out.size() + kAhead / 2 > ahead_until_) {
      const uint64_t from = std::max(offset, ahead_until_);
      ::posix_fadvise(fd_, static_cast<off_t>(from), static_cast<off_t>(offset + kAhead - from), POSIX_FADV_WILLNEED);
      ahead_until_ = offset + kAhead;
    }
    return read_exactly(fd_, out, offset, path_);
  }

 private:
  int fd_;
  const std::string& path_;
  uint64_t ahead_until_ = 0;
};

// Every row sum of the embedding against the row it speaks of.
Status verify_rows(int fd, const Tensor& tensor, const std::string& path,
                   const std::function<void(uint64_t bytes)>& advance) {
  constexpr uint64_t kChunkBytes = 4 * kMiB;
  const Plane& values = *tensor.plane(PlaneKind::values);
  const Plane& sums = *tensor.plane(PlaneKind::row_sums);
  const Plane* scales = tensor.plane(PlaneKind::scales);
  const uint64_t value_row_bytes = values.bytes / tensor.rows;
  const uint64_t scale_row_bytes = scales != nullptr ? scales->bytes / tensor.rows : 0;
  const uint64_t chunk_rows = std::clamp<uint64_t>(kChunkBytes / value_row_bytes, 1, tensor.rows);
  const uint64_t buffer_bytes = chunk_rows * (value_row_bytes + scale_row_bytes + sizeof(uint64_t));
  SLUICE_TRY_ASSIGN(memory, Mapping::anonymous(buffer_bytes, "verifying rows"));
  std::vector<uint64_t> stored(chunk_rows);
  SequentialReads value_reads(fd, path), scale_reads(fd, path), sum_reads(fd, path);

  for (uint64_t first = 0; first < tensor.rows; first += chunk_rows) {
    const uint64_t rows = std::min(chunk_rows, tensor.rows - first);
    const auto value_bytes = memory.bytes().first(rows * value_row_bytes);
    const auto scale_bytes = memory.bytes().subspan(chunk_rows * value_row_bytes, rows * scale_row_bytes);
    SLUICE_TRY(value_reads.read(value_bytes, values.offset + first * value_row_bytes));
    if (scales != nullptr) SLUICE_TRY(scale_reads.read(scale_bytes, scales->offset + first * scale_row_bytes));
    const auto sum_bytes = std::as_writable_bytes(std::span(stored).first(rows));
    SLUICE_TRY(sum_reads.read(sum_bytes, sums.offset + first * sizeof(uint64_t)));
    for (uint64_t i = 0; i < rows; ++i) {
      const uint64_t sum = row_checksum(value_bytes.subspan(i * value_row_bytes, value_row_bytes),
                                        scale_bytes.subspan(i * scale_row_bytes, scale_row_bytes));
      if (sum != stored[i]) {
        return fail(ErrorCode::corrupt,
                    fmt::format("{}: tensor '{}': the checksum of row {} (offset {}) does not fit; import the model again",
                                path, tensor.name, first + i, values.offset + (first + i) * value_row_bytes));
      }
    }
    advance(value_bytes.size() + scale_bytes.size() + sum_bytes.size());
  }
  return {};
}

// Bytes that verify_rows reads.
uint64_t row_check_bytes(const Tensor& tensor) {
  const Plane* scales = tensor.plane(PlaneKind::scales);
  return tensor.plane(PlaneKind::values)->bytes + tensor.plane(PlaneKind::row_sums)->bytes +
         (scales != nullptr ? scales->bytes : 0);
}

}  // namespace

Result<Container> Container::open(const std::string& path) {
  Container container;
  container.path_ = path;
  // O_NONBLOCK: a named pipe must not hang here; on regular files it does nothing.
  SLUICE_TRY_ASSIGN(fd, open_file(path, O_RDONLY | O_NONBLOCK));
  SLUICE_TRY_ASSIGN(file_bytes, regular_file_bytes(fd.get(), path));
  SLUICE_TRY_ASSIGN(header, read_header(fd.get(), file_bytes, path));
  SLUICE_TRY_ASSIGN(manifest, read_manifest(fd.get(), header, path));
  SLUICE_TRY(check_manifest(manifest, header.manifest_offset, path));
  container.fd_ = std::move(fd);
  container.file_bytes_ = file_bytes;
  container.uuid_ = format_uuid(header.uuid);
  container.manifest_ = std::move(manifest);
  return container;
}

bool Container::has_residuals() const {
  return std::any_of(manifest_.tensors.begin(), manifest_.tensors.end(),
                     [](const Tensor& tensor) { return tensor.plane(PlaneKind::residual) != nullptr; });
}

Status Container::set_precision(Precision precision) {
  std::vector<Tensor> tensors;
  for (Tensor& tensor : manifest_.tensors) {
    const bool has_residual = tensor.plane(PlaneKind::residual) != nullptr;
    tensors.push_back(std::move(tensor));
    if (!has_residual) continue;
    Tensor& base = tensors.back();
    const size_t first = base.planes.size() - 2;
    if (base.planes[first].kind != PlaneKind::residual || base.planes[first + 1].kind != PlaneKind::residual_scales ||
        base.plane(PlaneKind::perm) != nullptr) {
      return fail(ErrorCode::unsupported,
                  fmt::format("{}: tensor '{}': a residual must be its last two planes, and not of a matrix in act-order; "
                              "quantize the model again", path_, base.name));
    }
    Tensor residual = base.residual();
    base.planes.resize(first);
    if (precision == Precision::fine) tensors.push_back(std::move(residual));
  }
  manifest_.tensors = std::move(tensors);
  return {};
}

const Tensor* Container::find(Role role, int32_t layer) const {
  for (const Tensor& tensor : manifest_.tensors) {
    if (tensor.role == role && tensor.layer == layer) return &tensor;
  }
  return nullptr;
}

Status Container::check_permutations() const {
  for (const Tensor& tensor : manifest_.tensors) {
    const Plane* plane = tensor.plane(PlaneKind::perm);
    if (plane == nullptr) continue;
    std::vector<uint32_t> perm(tensor.cols);
    const std::span<std::byte> bytes = std::as_writable_bytes(std::span(perm));
    SLUICE_CHECK(bytes.size() == plane->bytes);
    SLUICE_TRY(read_exactly(fd_.get(), bytes, plane->offset, path_));
    for (uint64_t block = 0; block < plane->block_sums.size(); ++block) {
      const auto data = bytes.subspan(block * kBlockBytes, block_bytes(*plane, block));
      SLUICE_TRY(check_block(path_, tensor, *plane, block, data));
    }
    const auto out = std::find_if(perm.begin(), perm.end(), [&](uint32_t column) { return column >= tensor.cols; });
    if (out == perm.end()) continue;
    return fail(ErrorCode::corrupt,
                fmt::format("{}: tensor '{}': its column permutation has column {} of {} (offset {}); import the model again",
                            path_, tensor.name, *out, tensor.cols,
                            plane->offset + static_cast<uint64_t>(out - perm.begin()) * sizeof(uint32_t)));
  }
  return {};
}

Status Container::verify(const std::function<void(uint64_t done, uint64_t total)>& progress) const {
  uint64_t total = 0;
  for (const Tensor& tensor : manifest_.tensors) {
    total += tensor.padded_bytes();
    if (tensor.role == Role::token_embedding) total += row_check_bytes(tensor);
  }
  uint64_t done = 0;
  const auto advance = [&](uint64_t bytes) {
    done += bytes;
    if (progress) progress(done, total);
  };

  constexpr uint64_t kChunkBlocks = 8;
  SLUICE_TRY_ASSIGN(memory, Mapping::anonymous(kChunkBlocks * kBlockBytes, "verifying"));
  SequentialReads reads(fd_.get(), path_);
  for (const Tensor& tensor : manifest_.tensors) {
    for (const Plane& plane : tensor.planes) {
      for (uint64_t at = 0; at < plane.padded_bytes(); at += kChunkBlocks * kBlockBytes) {
        const uint64_t chunk_bytes = std::min(kChunkBlocks * kBlockBytes, plane.padded_bytes() - at);
        const auto chunk = memory.bytes().first(chunk_bytes);
        SLUICE_TRY(reads.read(chunk, plane.offset + at));
        const uint64_t data_bytes = std::min(chunk_bytes, plane.bytes - at);
        for (uint64_t in_chunk = 0; in_chunk < data_bytes; in_chunk += kBlockBytes) {
          const uint64_t block = (at + in_chunk) / kBlockBytes;
          SLUICE_TRY(check_block(path_, tensor, plane, block, chunk.subspan(in_chunk, block_bytes(plane, block))));
        }
        if (!all_zero(chunk.subspan(data_bytes))) {
          return fail(ErrorCode::corrupt,
                      fmt::format("{}: tensor '{}': the padding after plane {} (offset {}) is not zero; copy or import "
                                  "the file again",
                                  path_, tensor.name, name_of(plane.kind), plane.offset + plane.bytes));
        }
        advance(chunk_bytes);
      }
    }
    if (tensor.role == Role::token_embedding) SLUICE_TRY(verify_rows(fd_.get(), tensor, path_, advance));
  }
  return {};
}

uint64_t block_bytes(const Plane& plane, uint64_t block) {
  SLUICE_CHECK(block < plane.block_sums.size());
  return std::min(kBlockBytes, plane.bytes - block * kBlockBytes);
}

Status check_block(const std::string& path, const Tensor& tensor, const Plane& plane, uint64_t block,
                   std::span<const std::byte> data) {
  SLUICE_CHECK(data.size() == block_bytes(plane, block));
  if (checksum(data) == plane.block_sums[block]) return {};
  return fail(ErrorCode::corrupt,
              fmt::format("{}: tensor '{}': plane {} is damaged: the checksum of {} bytes at offset {} does not fit; copy "
                          "or import the file again",
                          path, tensor.name, name_of(plane.kind), data.size(), plane.offset + block * kBlockBytes));
}

}  // namespace sluice::storage
