// SPDX-License-Identifier: Apache-2.0
#include "trace/trace_file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <utility>

#include <fmt/format.h>
#include <xxhash.h>

#include "base/units.hpp"

namespace sluice::trace {
namespace {

constexpr char kMagic[8] = {'S', 'L', 'T', 'R', 'A', 'C', 'E', '\n'};
constexpr uint64_t kHeaderBytes = 64;
constexpr uint64_t kChunkHeaderBytes = 16;
constexpr uint32_t kMostTracks = 4096;       // more is damage: a model has three and one a session
constexpr uint32_t kMostNameBytes = 256;
constexpr uint64_t kMostPayloadBytes = 64ull << 20;   // of one chunk
constexpr size_t kGatheredBytes = 128 << 10;

constexpr uint32_t tag_of(const char (&text)[5]) {
  return static_cast<uint32_t>(text[0]) | static_cast<uint32_t>(text[1]) << 8 | static_cast<uint32_t>(text[2]) << 16 |
         static_cast<uint32_t>(text[3]) << 24;
}
constexpr uint32_t kNote = tag_of("NOTE"), kTrack = tag_of("TRAK"), kRecords = tag_of("RECS"), kClock = tag_of("CLKS"),
                   kEnd = tag_of("ENDS");

struct FileHeader {
  char magic[8] = {};
  uint32_t version = kFormatVersion;
  uint32_t header_bytes = kHeaderBytes;
  uint64_t ticks = 0;
  uint64_t steady_ns = 0;
  uint64_t unix_ns = 0;
  uint64_t error_ns = 0;
  uint64_t zero = 0;
  uint64_t sum = 0;
};
static_assert(sizeof(FileHeader) == kHeaderBytes);

uint64_t sum_of(const FileHeader& header) { return XXH3_64bits(&header, offsetof(FileHeader, sum)); }

uint64_t sum_of(uint32_t tag, std::span<const std::byte> payload) {
  const uint64_t seed = uint64_t{tag} | static_cast<uint64_t>(payload.size()) << 32;
  return XXH3_64bits_withSeed(payload.data(), payload.size(), seed);
}

constexpr uint64_t kMoved = 1, kLong = 2, kBytes = 4, kValue = 8, kFlags = kMoved | kLong | kBytes | kValue;
constexpr size_t kMostWords = 5;   // of a record
static_assert(static_cast<size_t>(Kind::count) <= 256);

// One record's words at `out`; returns how many.
size_t pack(const Record& record, uint64_t end_before, uint64_t* out) {
  const uint64_t moved = record.begin - end_before, length = record.end - record.begin;
  uint64_t flags = 0;
  size_t words = 1;
  const auto add = [&](uint64_t flag, uint64_t word) {
    flags |= flag;
    out[words++] = word;
  };
  if (moved != 0) add(kMoved, moved);
  if (length > UINT32_MAX) add(kLong, length);
  if (record.bytes != 0) add(kBytes, record.bytes);
  if (record.value != 0) add(kValue, record.value);
  out[0] = ((flags & kLong) != 0 ? 0 : length) | uint64_t{record.layer} << 32 |
           uint64_t{static_cast<uint16_t>(record.kind)} << 48 | flags << 56;
  return words;
}

void append_bytes(std::vector<std::byte>& out, std::span<const std::byte> bytes) {
  out.insert(out.end(), bytes.begin(), bytes.end());
}

template <class T>
void append(std::vector<std::byte>& out, const T& value) {
  append_bytes(out, std::as_bytes(std::span(&value, 1)));
}

// Reads values off the front of a payload; the caller has compared sizes.
class Cursor {
 public:
  explicit Cursor(std::span<const std::byte> bytes) : bytes_(bytes) {}
  template <class T>
  T take() {
    T value;
    std::memcpy(&value, bytes_.data(), sizeof value);
    bytes_ = bytes_.subspan(sizeof value);
    return value;
  }
  std::span<const std::byte> rest() const { return bytes_; }

 private:
  std::span<const std::byte> bytes_;
};

}  // namespace

// ---------------------------------------------------------------------------------------------------------- writing

Result<TraceFileWriter> TraceFileWriter::create(const std::string& path, const ClockPair& started,
                                                const std::string& note_json) {
  UniqueFd fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
  if (!fd) {
    const int code = errno;
    return fail(code == ENOENT ? ErrorCode::not_found : ErrorCode::io,
                fmt::format("{}: cannot write the trace there: {}", path, std::strerror(code)), code);
  }
  TraceFileWriter writer(path, std::move(fd));
  timespec wall = {};
  ::clock_gettime(CLOCK_REALTIME, &wall);
  const uint64_t since = steady_ns() - started.steady_ns;
  FileHeader header;
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.ticks = started.ticks;
  header.steady_ns = started.steady_ns;
  header.unix_ns = static_cast<uint64_t>(wall.tv_sec) * 1'000'000'000u + static_cast<uint64_t>(wall.tv_nsec) - since;
  header.error_ns = started.error_ns;
  header.sum = sum_of(header);
  append(writer.gathered_, header);
  writer.begin_chunk();
  append_bytes(writer.gathered_, std::as_bytes(std::span(note_json)));
  writer.gathered_.resize(align_up(writer.gathered_.size(), 8), std::byte{' '});
  SLUICE_TRY(writer.end_chunk(kNote));
  SLUICE_TRY(writer.flush());
  return writer;
}

Status TraceFileWriter::flush() {
  for (std::span<const std::byte> left = gathered_; !left.empty();) {
    const ssize_t written = ::write(fd_.get(), left.data(), left.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) {
      const int code = errno;
      return fail(ErrorCode::io, fmt::format("{}: cannot write the trace: {}", path_, std::strerror(code)), code);
    }
    left = left.subspan(static_cast<size_t>(written));
  }
  gathered_.clear();
  return {};
}

void TraceFileWriter::begin_chunk() {
  chunk_at_ = gathered_.size();
  gathered_.resize(chunk_at_ + kChunkHeaderBytes);
}

Status TraceFileWriter::end_chunk(uint32_t tag) {
  const auto payload = std::span(gathered_).subspan(chunk_at_ + kChunkHeaderBytes);
  const struct {
    uint32_t tag, bytes;
    uint64_t sum;
  } header = {tag, static_cast<uint32_t>(payload.size()), sum_of(tag, payload)};
  static_assert(sizeof header == kChunkHeaderBytes);
  std::memcpy(gathered_.data() + chunk_at_, &header, sizeof header);
  if (gathered_.size() < kGatheredBytes) return {};
  return flush();
}

Status TraceFileWriter::add_track(uint32_t number, const std::string& name) {
  begin_chunk();
  append(gathered_, number);
  append(gathered_, static_cast<uint32_t>(name.size()));
  append_bytes(gathered_, std::as_bytes(std::span(name)));
  gathered_.resize(align_up(gathered_.size(), 8));
  return end_chunk(kTrack);
}

Status TraceFileWriter::add_records(uint32_t track, std::span<const Record> records, uint64_t dropped) {
  begin_chunk();
  append(gathered_, track);
  append(gathered_, static_cast<uint32_t>(records.size()));
  append(gathered_, dropped);
  packed_.resize(records.size() * kMostWords);
  size_t words = 0;
  uint64_t end = 0;
  for (const Record& record : records) {
    words += pack(record, end, packed_.data() + words);
    end = record.end;
  }
  append_bytes(gathered_, std::as_bytes(std::span(packed_).first(words)));
  return end_chunk(kRecords);
}

Status TraceFileWriter::add_clock(const ClockPair& pair) {
  begin_chunk();
  append(gathered_, pair);
  return end_chunk(kClock);
}

Status TraceFileWriter::finish(uint64_t records, uint64_t dropped) {
  begin_chunk();
  append(gathered_, records);
  append(gathered_, dropped);
  SLUICE_TRY(end_chunk(kEnd));
  SLUICE_TRY(flush());
  fd_.reset();
  return {};
}

// ---------------------------------------------------------------------------------------------------------- reading

namespace {

class Parser {
 public:
  Parser(std::span<const std::byte> bytes, const std::string& path) : bytes_(bytes) { trace_.path = path; }

  Result<Trace> parse() {
    SLUICE_TRY(header());
    uint64_t at = kHeaderBytes;
    while (bytes_.size() - at >= kChunkHeaderBytes && !trace_.complete) {
      Cursor cursor(bytes_.subspan(at, kChunkHeaderBytes));
      const auto tag = cursor.take<uint32_t>();
      const auto size = cursor.take<uint32_t>();
      const auto sum = cursor.take<uint64_t>();
      if (size % 8 != 0 || size > kMostPayloadBytes) return damaged(at, fmt::format("a chunk of {} bytes", size));
      if (size > bytes_.size() - at - kChunkHeaderBytes) break;  // cut off while it was written
      const auto payload = bytes_.subspan(at + kChunkHeaderBytes, size);
      if (sum_of(tag, payload) != sum) return damaged(at, "a chunk whose checksum differs");
      SLUICE_TRY(chunk(tag, payload, at));
      at += kChunkHeaderBytes + size;
    }
    if (trace_.complete && at != bytes_.size()) return damaged(at, "bytes behind the end");
    for (const TraceTrack& track : trace_.tracks) trace_.dropped += track.dropped;
    trace_.scale = TickScale(trace_.started, later_);
    trace_.clock_error_ns = std::max(trace_.started.error_ns, later_.error_ns);
    return std::move(trace_);
  }

 private:
  Unexpected damaged(uint64_t at, const std::string& found) const {
    return fail(ErrorCode::corrupt, fmt::format("{}: at offset {} is {}; the trace is damaged, record it again",
                                                trace_.path, at, found));
  }

  Status header() {
    if (bytes_.size() < kHeaderBytes || std::memcmp(bytes_.data(), kMagic, sizeof kMagic) != 0) {
      return fail(ErrorCode::corrupt,
                  fmt::format("{} is not a trace; make one with `sluice run --trace FILE`", trace_.path));
    }
    FileHeader header;
    std::memcpy(&header, bytes_.data(), sizeof header);
    if (header.sum != sum_of(header)) return damaged(0, "a header whose checksum differs");
    if (header.version != kFormatVersion) {
      return fail(ErrorCode::unsupported,
                  fmt::format("{} is a trace of format version {}, this is Sluice for version {}; "
                              "read it with the Sluice that wrote it",
                              trace_.path, header.version, kFormatVersion));
    }
    if (header.header_bytes != kHeaderBytes)
      return damaged(12, fmt::format("a header of {} bytes", header.header_bytes));
    trace_.started = {.ticks = header.ticks, .steady_ns = header.steady_ns, .error_ns = header.error_ns};
    trace_.started_unix_ns = header.unix_ns;
    return {};
  }

  Status chunk(uint32_t tag, std::span<const std::byte> payload, uint64_t at) {
    if (tag == kNote) {
      trace_.note.assign(reinterpret_cast<const char*>(payload.data()), payload.size());
      return {};
    }
    if (tag == kTrack) return track(payload, at);
    if (tag == kRecords) return records(payload, at);
    if (tag == kClock) return clock(payload, at);
    if (tag == kEnd) return end(payload, at);
    return {};
  }

  Status track(std::span<const std::byte> payload, uint64_t at) {
    if (payload.size() < 8) return damaged(at, "a track without a name");
    Cursor cursor(payload);
    const auto number = cursor.take<uint32_t>();
    const auto length = cursor.take<uint32_t>();
    if (number != trace_.tracks.size() || number >= kMostTracks)
      return damaged(at, fmt::format("track {} out of order", number));
    if (length > kMostNameBytes || length > cursor.rest().size())
      return damaged(at, fmt::format("a name of {} bytes", length));
    trace_.tracks.push_back({.name = std::string(reinterpret_cast<const char*>(cursor.rest().data()), length)});
    return {};
  }

  Status records(std::span<const std::byte> payload, uint64_t at) {
    if (payload.size() < 16) return damaged(at, "records without their count");
    Cursor cursor(payload);
    const auto number = cursor.take<uint32_t>();
    const auto count = cursor.take<uint32_t>();
    const auto dropped = cursor.take<uint64_t>();
    if (number >= trace_.tracks.size())
      return damaged(at, fmt::format("records of track {}, which is not there", number));
    const std::span<const std::byte> rest = cursor.rest();
    const auto misfit = [&] { return damaged(at, fmt::format("{} records in {} bytes", count, rest.size())); };
    if (rest.size() < uint64_t{count} * 8) return misfit();
    TraceTrack& track = trace_.tracks[number];
    if (dropped < track.dropped) return damaged(at, "a count of dropped records that falls");
    track.dropped = dropped;
    uint64_t end_before = 0;
    for (uint32_t i = 0; i < count; ++i) {
      if (cursor.rest().size() < 8) return misfit();
      const auto first = cursor.take<uint64_t>();
      const uint64_t flags = first >> 56;
      if ((flags & ~kFlags) != 0) return damaged(at, fmt::format("a record with flags {} (record {})", flags, i));
      if (cursor.rest().size() < 8 * static_cast<size_t>(std::popcount(flags))) return misfit();
      Record record;
      record.begin = end_before + ((flags & kMoved) != 0 ? cursor.take<uint64_t>() : 0);
      const uint64_t length = (flags & kLong) != 0 ? cursor.take<uint64_t>() : first & UINT32_MAX;
      record.end = record.begin + length;
      if (record.end < record.begin) return damaged(at, fmt::format("a span that ends before it begins (record {})", i));
      const uint64_t size = (flags & kBytes) != 0 ? cursor.take<uint64_t>() : 0;
      if (size > UINT32_MAX) return damaged(at, fmt::format("a size of {} bytes (record {})", size, i));
      record.bytes = static_cast<uint32_t>(size);
      record.value = (flags & kValue) != 0 ? cursor.take<uint64_t>() : 0;
      record.layer = static_cast<uint16_t>(first >> 32);
      record.kind = static_cast<Kind>(first >> 48 & 0xff);
      end_before = record.end;
      track.records.push_back(record);
    }
    if (!cursor.rest().empty()) return misfit();
    trace_.records += count;
    return {};
  }

  Status clock(std::span<const std::byte> payload, uint64_t at) {
    if (payload.size() != sizeof(ClockPair)) return damaged(at, "a clock reading of another size");
    later_ = Cursor(payload).take<ClockPair>();
    if (later_.ticks < trace_.started.ticks || later_.steady_ns < trace_.started.steady_ns) {
      return damaged(at, "a clock that runs backwards");
    }
    return {};
  }

  Status end(std::span<const std::byte> payload, uint64_t at) {
    if (payload.size() != 16) return damaged(at, "an end of another size");
    Cursor cursor(payload);
    const auto records = cursor.take<uint64_t>();
    const auto dropped = cursor.take<uint64_t>();
    uint64_t seen = 0;
    for (const TraceTrack& track : trace_.tracks) seen += track.dropped;
    if (records != trace_.records || dropped != seen) {
      return damaged(at, fmt::format("an end that counts {} records where {} are", records, trace_.records));
    }
    trace_.complete = true;
    return {};
  }

  std::span<const std::byte> bytes_;
  Trace trace_;
  ClockPair later_;
};

}  // namespace

Result<Trace> parse_trace(std::span<const std::byte> bytes, const std::string& path) {
  return Parser(bytes, path).parse();
}

Result<Trace> read_trace(const std::string& path) {
  SLUICE_TRY_ASSIGN(fd, open_file(path, O_RDONLY | O_CLOEXEC));
  struct stat info = {};
  if (::fstat(fd.get(), &info) != 0) {
    const int code = errno;
    return fail(ErrorCode::io, fmt::format("{}: cannot read it: {}", path, std::strerror(code)), code);
  }
  if (!S_ISREG(info.st_mode)) return fail(ErrorCode::io, fmt::format("{} is not a regular file; give a trace", path));
  std::vector<std::byte> bytes(static_cast<size_t>(info.st_size));
  SLUICE_TRY(read_exactly(fd.get(), bytes, 0, path));
  return parse_trace(bytes, path);
}

}  // namespace sluice::trace
