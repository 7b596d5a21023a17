// SPDX-License-Identifier: Apache-2.0
// Writing at the disk's speed without filling the page cache: O_DIRECT, 8 MiB at a time. (On a virtual machine's drive
// that wrote 1.1-1.7 GB/s of noise; through the page cache it was 0.2-0.6 GB/s.) Where O_DIRECT is refused, the kernel
// left alone would let dirty pages pile up to a share of memory and then stall the writer, and a 36 GB file would push
// everything else out: there, writeback of every 32 MiB is started as soon as it is full, and pages two steps back are
// waited for and dropped.
#include "storage/container_writer.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <optional>
#include <system_error>

#include "base/check.hpp"
#include "base/handles.hpp"
#include "base/units.hpp"
#include "storage/checksum.hpp"
#include "storage/container.hpp"
#include "storage/container_header.hpp"
#include "storage/manifest_check.hpp"
#include "storage/manifest_codec.hpp"

namespace sluice::storage {

namespace {

constexpr uint64_t kBufferBytes = 8 * kMiB;
constexpr uint64_t kWritebackBytes = 32 * kMiB;

std::string folder_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

// Opens and locks `temp`. A leftover of a process that died and had our id (always 1 in some containers) is taken over;
// one that a live writer holds is not.
Result<UniqueFd> create_temporary(const std::string& temp, const std::string& path) {
  Result<UniqueFd> fd = open_locked(temp, O_RDWR | O_CREAT | O_NOFOLLOW);
  if (fd && ::ftruncate(fd->get(), 0) == 0) return fd;
  const int code = fd ? errno : fd.error().os_code;
  if (code == ENOENT) {
    return fail(ErrorCode::not_found,
                fmt::format("{}: cannot create it: there is no folder {}", path, folder_of(path)), code);
  }
  if (code == EWOULDBLOCK) {
    return fail(ErrorCode::usage, fmt::format("{}: is being written already (by {})", path, temp), code);
  }
  return fail(ErrorCode::io, fmt::format("{}: cannot create {}: {}", path, temp, std::strerror(code)), code);
}

// Temporary files of writers that were killed, whose locks are free. What cannot be removed only takes up space.
void remove_leftovers(const std::string& path) {
  const std::string folder = folder_of(path);
  const std::string prefix = path.substr(path.rfind('/') + 1) + ".tmp-";
  std::error_code error;
  for (std::filesystem::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    if (!name.starts_with(prefix) || name.size() == prefix.size()) continue;
    if (name.find_first_not_of("0123456789", prefix.size()) != std::string::npos) continue;
    const std::string leftover = folder + "/" + name;
    const UniqueFd fd(::open(leftover.c_str(), O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
    if (fd && ::flock(fd.get(), LOCK_EX | LOCK_NB) == 0 && is_named(fd, leftover)) ::unlink(leftover.c_str());
  }
}

}  // namespace

struct ContainerWriter::State {
  std::string path;
  std::string temp;
  UniqueFd fd;
  bool renamed = false;
  std::optional<Error> failed;             // the first write error; every later call repeats it

  bool direct = false;                     // writes bypass the page cache
  Mapping buffer;                          // page-aligned, as O_DIRECT asks
  uint64_t buffered = 0;                   // bytes of it, from `flushed` on, that are not in the file yet
  uint64_t flushed = kHeaderBytes;         // file offset behind the last byte handed to the kernel
  uint64_t writeback_begun = kHeaderBytes; // pages before it were handed to the drive
  uint64_t dropped = kHeaderBytes;         // pages before it are on the drive and out of the cache

  std::vector<Tensor> tensors;
  bool in_tensor = false;
  bool in_plane = false;
  StreamingChecksum block_sum;             // of the begun block
  uint64_t block_fill = 0;

  ~State() {
    if (!renamed && fd) ::unlink(temp.c_str());
  }

  uint64_t position() const { return flushed + buffered; }
  Tensor& tensor() { return tensors.back(); }
  Plane& plane() { return tensors.back().planes.back(); }

  Status misuse(std::string_view what) const {
    return fail(ErrorCode::internal, fmt::format("{}: container writer: {}", path, what));
  }
  Status ready() const {
    if (failed) return fail(*failed);
    if (renamed) return misuse("it is finished");
    return {};
  }

  // `reached`: the file offset at which it did.
  Status write_failed(int code, uint64_t reached) {
    std::string reason = std::strerror(code);
    if (code == ENOSPC || code == EDQUOT) {
      reason = fmt::format("{} after {}, {} more are needed at least; free some space or choose another drive",
                           code == EDQUOT ? "disk quota exceeded" : "no space left on the drive",
                           format_bytes(position()), format_bytes(known_missing_bytes()));
    } else if (code == EFBIG) {
      reason = fmt::format("the file may not grow beyond {} here (ulimit -f, or a file system such as FAT32)",
                           format_bytes(reached));
    }
    failed = Error{ErrorCode::io, fmt::format("{}: write failed: {}", path, reason), code};
    return fail(*failed);
  }

  // What is certain to come: what is not on the drive yet of the planes of the begun tensor, and of the manifest at
  // least its checksums.
  uint64_t known_missing_bytes() {
    uint64_t bytes = buffered + kPlaneAlignment;
    if (!in_tensor) return bytes;
    for (PlaneKind kind : {PlaneKind::values, PlaneKind::scales, PlaneKind::row_sums}) {
      const Plane* begun = tensor().plane(kind);
      const uint64_t expected = expected_plane_bytes(tensor(), kind);
      bytes += expected - (begun != nullptr ? std::min(begun->bytes, expected) : 0);
    }
    return bytes;
  }

  void set_direct(bool on) {
    const int flags = ::fcntl(fd.get(), F_GETFL);
    direct = flags >= 0 && ::fcntl(fd.get(), F_SETFL, on ? flags | O_DIRECT : flags & ~O_DIRECT) == 0 && on;
  }

  // With O_DIRECT, memory, offset and size are multiples of 4096.
  Status write_at(std::span<const std::byte> data, uint64_t offset) {
    while (!data.empty()) {
      const ssize_t n = ::pwrite(fd.get(), data.data(), data.size(), static_cast<off_t>(offset));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0 && errno == EINVAL && direct) {
        // Refused only now, or a file size limit would cut the write where O_DIRECT cannot: the page cache can.
        set_direct(false);
        continue;
      }
      if (n < 0) return write_failed(errno, offset);
      if (n == 0) return write_failed(ENOSPC, offset);  // POSIX leaves it open; no progress means no room
      data = data.subspan(static_cast<size_t>(n));
      offset += static_cast<uint64_t>(n);
    }
    return {};
  }

  // Empties the buffer; it is full, or the file ends with it.
  Status flush() {
    SLUICE_TRY(write_at(buffer.bytes().first(buffered), flushed));
    flushed += buffered;
    buffered = 0;
    while (!direct && flushed - writeback_begun >= kWritebackBytes) {
      SLUICE_TRY(sync_range(writeback_begun, SYNC_FILE_RANGE_WRITE));
      writeback_begun += kWritebackBytes;
      if (writeback_begun - dropped > 2 * kWritebackBytes) {
        SLUICE_TRY(sync_range(dropped,
                              SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER));
        ::posix_fadvise(fd.get(), static_cast<off_t>(dropped), static_cast<off_t>(kWritebackBytes),
                        POSIX_FADV_DONTNEED);
        dropped += kWritebackBytes;
      }
    }
    return {};
  }

  // Only I/O errors count: they are reported once, here or by fsync. Where the call is refused, fsync does it all.
  Status sync_range(uint64_t offset, unsigned flags) {
    if (::sync_file_range(fd.get(), static_cast<off64_t>(offset), kWritebackBytes, flags) == 0) return {};
    if (errno == EIO || errno == ENOSPC || errno == EDQUOT) return write_failed(errno, offset);
    return {};
  }

  Status put(std::span<const std::byte> data) {
    while (!data.empty()) {
      const auto part = data.first(std::min<uint64_t>(data.size(), kBufferBytes - buffered));
      std::memcpy(buffer.data() + buffered, part.data(), part.size());
      buffered += part.size();
      data = data.subspan(part.size());
      if (buffered == kBufferBytes) SLUICE_TRY(flush());
    }
    return {};
  }

  Status put_padding() {
    static constexpr std::byte kZeros[kPlaneAlignment] = {};
    return put(std::span(kZeros).first(align_up(position(), kPlaneAlignment) - position()));
  }

  void hash(std::span<const std::byte> data) {
    while (!data.empty()) {
      if (block_fill == 0 && data.size() >= kBlockBytes) {  // a whole block at once: no copy into the hash's state
        plane().block_sums.push_back(checksum(data.first(kBlockBytes)));
        data = data.subspan(kBlockBytes);
        continue;
      }
      const auto part = data.first(std::min<uint64_t>(data.size(), kBlockBytes - block_fill));
      block_sum.update(part);
      block_fill += part.size();
      data = data.subspan(part.size());
      if (block_fill == kBlockBytes) end_block();
    }
  }

  void end_block() {
    plane().block_sums.push_back(block_sum.finish());
    block_fill = 0;
  }

  Status sync_and_rename() {
    if (::fsync(fd.get()) != 0) return write_failed(errno, flushed);
    if (::rename(temp.c_str(), path.c_str()) != 0) {
      const int code = errno;
      return fail(ErrorCode::io, fmt::format("{}: cannot rename {} to it: {}", path, temp, std::strerror(code)), code);
    }
    renamed = true;
    const std::string folder = folder_of(path);
    SLUICE_TRY_ASSIGN(folder_fd, open_file(folder, O_RDONLY | O_DIRECTORY));
    // Some network file systems do not sync folders; EINVAL says so. The file itself is safe.
    if (::fsync(folder_fd.get()) != 0 && errno != EINVAL && errno != ENOTSUP && errno != EROFS) {
      const int code = errno;
      return fail(ErrorCode::io, fmt::format("{}: cannot sync its folder: {}", path, std::strerror(code)), code);
    }
    return {};
  }
};

ContainerWriter::ContainerWriter(std::unique_ptr<State> state) : state_(std::move(state)) {}
ContainerWriter::ContainerWriter(ContainerWriter&&) noexcept = default;
ContainerWriter& ContainerWriter::operator=(ContainerWriter&&) noexcept = default;
ContainerWriter::~ContainerWriter() = default;

Result<ContainerWriter> ContainerWriter::create(const std::string& path) {
  // Renaming over a device node or a folder is nobody's wish.
  struct stat target = {};
  if (::stat(path.c_str(), &target) == 0 && !S_ISREG(target.st_mode)) {
    return fail(ErrorCode::usage, fmt::format("{}: exists and is not a regular file; give the name of a file", path));
  }
  auto state = std::make_unique<State>();
  state->path = path;
  state->temp = fmt::format("{}.tmp-{}", path, ::getpid());
  SLUICE_TRY_ASSIGN(fd, create_temporary(state->temp, path));
  state->fd = std::move(fd);
  remove_leftovers(path);
  SLUICE_TRY_ASSIGN(buffer, Mapping::anonymous(kBufferBytes, path + ": write buffer"));
  state->buffer = std::move(buffer);
  state->set_direct(true);
  return ContainerWriter(std::move(state));
}

Status ContainerWriter::begin_tensor(const Tensor& tensor) {
  SLUICE_TRY(state_->ready());
  if (state_->in_tensor) return state_->misuse("begin_tensor inside a tensor");
  state_->tensors.push_back(tensor);
  state_->tensor().planes.clear();
  state_->in_tensor = true;
  return {};
}

Status ContainerWriter::begin_plane(PlaneKind kind) {
  SLUICE_TRY(state_->ready());
  if (!state_->in_tensor || state_->in_plane) return state_->misuse("begin_plane outside a tensor or inside a plane");
  Plane plane;
  plane.kind = kind;
  plane.offset = state_->position();
  state_->tensor().planes.push_back(std::move(plane));
  state_->in_plane = true;
  return {};
}

Status ContainerWriter::append(std::span<const std::byte> data) {
  SLUICE_TRY(state_->ready());
  if (!state_->in_plane) return state_->misuse("append outside a plane");
  state_->hash(data);
  state_->plane().bytes += data.size();
  return state_->put(data);
}

Status ContainerWriter::end_plane() {
  SLUICE_TRY(state_->ready());
  if (!state_->in_plane) return state_->misuse("end_plane outside a plane");
  const Tensor& tensor = state_->tensor();
  const Plane& plane = state_->plane();
  if (plane.bytes != expected_plane_bytes(tensor, plane.kind)) {
    return state_->misuse(fmt::format("plane {} of tensor '{}' got {} bytes, its shape needs {}", name_of(plane.kind),
                                      tensor.name, plane.bytes, expected_plane_bytes(tensor, plane.kind)));
  }
  if (state_->block_fill != 0) state_->end_block();
  state_->in_plane = false;
  return state_->put_padding();
}

Status ContainerWriter::end_tensor() {
  SLUICE_TRY(state_->ready());
  if (!state_->in_tensor || state_->in_plane) return state_->misuse("end_tensor outside a tensor or inside a plane");
  state_->in_tensor = false;
  return {};
}

Status ContainerWriter::write_plane(PlaneKind kind, std::span<const std::byte> data) {
  SLUICE_TRY(begin_plane(kind));
  SLUICE_TRY(append(data));
  return end_plane();
}

uint64_t ContainerWriter::bytes_written() const { return state_->position(); }

Status ContainerWriter::finish(Manifest manifest) {
  SLUICE_TRY(state_->ready());
  if (state_->in_tensor) return state_->misuse("finish inside a tensor");
  manifest.tensors = std::move(state_->tensors);
  state_->tensors.clear();

  // What this would write must open again: an importer that let a nonsensical checkpoint through is stopped here.
  ContainerHeader header;
  header.manifest_offset = state_->position();
  SLUICE_TRY(check_manifest(manifest, header.manifest_offset, state_->path));
  SLUICE_TRY_ASSIGN(encoded, encode_manifest(manifest, state_->path));
  SLUICE_TRY(decode_manifest(encoded, state_->path));
  header.manifest_bytes = encoded.size();
  header.manifest_sum = checksum(encoded);
  SLUICE_TRY(state_->put(encoded));
  SLUICE_TRY(state_->put_padding());
  SLUICE_TRY(state_->flush());
  header.file_bytes = state_->flushed;
  header.uuid = random_uuid();
  const HeaderBytes encoded_header = encode_header(header);
  std::memcpy(state_->buffer.data(), encoded_header.data(), encoded_header.size());  // it is empty, and aligned
  SLUICE_TRY(state_->write_at(state_->buffer.bytes().first(encoded_header.size()), 0));
  return state_->sync_and_rename();
}

}  // namespace sluice::storage
