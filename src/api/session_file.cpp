// SPDX-License-Identifier: Apache-2.0
// A session on disk: tokens and KV cache, so that a long prompt is read once.
//
//   offset 0    magic "SLUICESN", u32 version, u32 tokens, u32 tokens in the KV cache, u32 zero
//          24   model uuid (36 characters), 4 zero bytes
//          64   backend name (16 bytes, zero-padded), u64 KV bytes, u64 xxh3-64 of everything else
//          96   tokens (i32), then the KV cache as the backend keeps it
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <vector>

#include <fmt/format.h>

#include "api/state.hpp"
#include "base/handles.hpp"
#include "storage/checksum.hpp"

namespace sluice {
namespace {

struct FileHeader {
  char magic[8] = {'S', 'L', 'U', 'I', 'C', 'E', 'S', 'N'};
  uint32_t version = 1;
  uint32_t tokens = 0;
  uint32_t evaluated = 0;
  uint32_t zero = 0;
  char uuid[40] = {};
  char backend[16] = {};
  uint64_t kv_bytes = 0;
  uint64_t sum = 0;
};
static_assert(sizeof(FileHeader) == 96);

uint64_t sum_of(FileHeader header, std::span<const std::byte> tokens, std::span<const std::byte> kv) {
  header.sum = 0;
  storage::StreamingChecksum sum;
  sum.update(std::as_bytes(std::span(&header, 1)));
  sum.update(tokens);
  sum.update(kv);
  return sum.finish();
}

Unexpected io_failure(const std::string& path, const char* what) {
  const int code = errno;
  return fail(ErrorCode::io, fmt::format("{}: cannot {}: {}", path, what, std::strerror(code)), code);
}

Status write_all(int fd, std::span<const std::byte> data, const std::string& path) {
  while (!data.empty()) {
    const ssize_t written = ::write(fd, data.data(), data.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return io_failure(path, "write");
    data = data.subspan(static_cast<size_t>(written));
  }
  return {};
}

// Writes beside `path`, then takes its name: a torn write never replaces a good file.
Status write_file(const std::string& path, const FileHeader& header, std::span<const std::byte> tokens,
                  std::span<const std::byte> kv) {
  const std::string temporary = fmt::format("{}.tmp-{}", path, ::getpid());
  UniqueFd fd(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
  if (!fd) return io_failure(path, "write");
  Status status = write_all(fd.get(), std::as_bytes(std::span(&header, 1)), path);
  if (status) status = write_all(fd.get(), tokens, path);
  if (status) status = write_all(fd.get(), kv, path);
  if (status && ::fsync(fd.get()) != 0) status = io_failure(path, "write");
  if (status && ::rename(temporary.c_str(), path.c_str()) != 0) status = io_failure(path, "rename into place");
  if (!status) ::unlink(temporary.c_str());
  return status;
}

}  // namespace

Status Session::save(const std::string& path) const {
  const State& state = *state_;
  exec::Engine& engine = *state.model.engine;
  FileHeader header;
  header.tokens = static_cast<uint32_t>(state.tokens.size());
  header.evaluated = state.evaluated;
  header.kv_bytes = engine.backend().kv_bytes(state.evaluated);
  state.model.info.uuid.copy(header.uuid, sizeof header.uuid - 1);
  state.model.info.backend.copy(header.backend, sizeof header.backend - 1);
  std::vector<std::byte> kv(header.kv_bytes);
  {
    const auto turn = engine.turn();
    SLUICE_TRY(engine.backend().save_kv(state.slot, state.evaluated, kv));
  }
  const std::span<const std::byte> tokens = std::as_bytes(std::span(state.tokens));
  header.sum = sum_of(header, tokens, kv);
  return write_file(path, header, tokens, kv);
}

Status Session::restore(const std::string& path) {
  State& state = *state_;
  exec::Engine& engine = *state.model.engine;
  SLUICE_TRY_ASSIGN(fd, open_file(path, O_RDONLY | O_CLOEXEC));
  struct stat info {};
  if (::fstat(fd.get(), &info) != 0) return io_failure(path, "read");
  const auto file_bytes = static_cast<uint64_t>(info.st_size);
  const auto corrupt = [&path](std::string_view what) {
    return fail(ErrorCode::corrupt, fmt::format("{}: {}; save the session again", path, what));
  };

  FileHeader header;
  if (file_bytes < sizeof header) return corrupt("not a saved session: it is too short");
  SLUICE_TRY(read_exactly(fd.get(), std::as_writable_bytes(std::span(&header, 1)), 0, path));
  const FileHeader expected;
  if (std::memcmp(header.magic, expected.magic, sizeof header.magic) != 0) return corrupt("not a saved session");
  if (header.version != expected.version) {
    return fail(ErrorCode::unsupported, fmt::format("{}: saved by a newer version of Sluice (format {})", path,
                                                    header.version));
  }
  header.uuid[sizeof header.uuid - 1] = header.backend[sizeof header.backend - 1] = '\0';
  if (state.model.info.uuid != header.uuid) {
    return fail(ErrorCode::usage, fmt::format("{}: belongs to another model ({}), not to {}", path, header.uuid,
                                              state.model.info.path));
  }
  if (state.model.info.backend != header.backend) {
    return fail(ErrorCode::usage, fmt::format("{}: was saved by the {} backend, this is {}", path, header.backend,
                                              state.model.info.backend));
  }
  if (header.tokens > state.model.info.context) {
    return fail(ErrorCode::budget, fmt::format("{}: {} tokens do not fit the context of {}; open the model with a longer "
                                               "one (--context)", path, header.tokens, state.model.info.context));
  }
  if (header.evaluated > header.tokens || header.kv_bytes != engine.backend().kv_bytes(header.evaluated) ||
      file_bytes != sizeof header + uint64_t{header.tokens} * sizeof(int32_t) + header.kv_bytes) {
    return corrupt("its sizes contradict each other");
  }
  std::vector<int32_t> tokens(header.tokens);
  std::vector<std::byte> kv(header.kv_bytes);
  SLUICE_TRY(read_exactly(fd.get(), std::as_writable_bytes(std::span(tokens)), sizeof header, path));
  SLUICE_TRY(read_exactly(fd.get(), kv, file_bytes - kv.size(), path));
  if (sum_of(header, std::as_bytes(std::span(tokens)), kv) != header.sum) return corrupt("its checksum does not match");
  for (const int32_t id : tokens) {
    if (id < 0 || static_cast<uint32_t>(id) >= state.model.info.vocab) return corrupt("a token is outside the vocabulary");
  }

  const auto turn = engine.turn();
  SLUICE_TRY(engine.backend().load_kv(state.slot, header.evaluated, kv));
  state.tokens.assign(tokens.begin(), tokens.end());
  state.evaluated = header.evaluated;
  state.logits_at = 0;
  return {};
}

}  // namespace sluice
