// SPDX-License-Identifier: Apache-2.0
#include "storage/read_queue.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "base/handles.hpp"
#include "base/units.hpp"
#include "catch.hpp"

namespace {

using namespace sluice;
using namespace sluice::storage;

// A file of random bytes on the file system of the working directory, removed with the object.
class RandomFile {
 public:
  RandomFile(uint64_t bytes, uint64_t seed) : content(bytes) {
    std::mt19937_64 random(seed);
    for (auto& byte : content) byte = static_cast<std::byte>(random());
    char name[] = "read_queue_XXXXXX";
    const UniqueFd fd(::mkstemp(name));
    path = name;
    REQUIRE(fd);
    REQUIRE(::write(fd.get(), content.data(), content.size()) == static_cast<ssize_t>(content.size()));
    REQUIRE(::fsync(fd.get()) == 0);
  }
  ~RandomFile() { ::unlink(path.c_str()); }

  std::string path;
  std::vector<std::byte> content;
};

// Reads the whole file in blocks of 64 KiB, as many in flight as the queue takes. The buffer starts poisoned.
Status read_all(ReadQueue& queue, uint64_t bytes, std::span<std::byte> out) {
  constexpr uint64_t kBlock = 64 * kKiB;
  uint64_t next = 0;
  uint64_t done = 0;
  while (done < bytes) {
    while (next < bytes && queue.start(next, out.subspan(next, std::min(kBlock, bytes - next)), next)) next += kBlock;
    SLUICE_TRY(queue.flush());
    SLUICE_TRY_ASSIGN(finished, queue.wait());
    CHECK(finished.completed_ns >= finished.submitted_ns);
    done += std::min(kBlock, bytes - finished.tag);
  }
  return {};
}

Mapping poisoned(uint64_t bytes) {
  auto memory = Mapping::anonymous(bytes, "test");
  REQUIRE(memory);
  std::memset(memory->data(), 0xa5, bytes);
  return std::move(*memory);
}

}  // namespace

TEST_CASE("read queue delivers the file by every reader, direct and buffered") {
  const RandomFile file(3 * kMiB + 8192, 11);
  for (const IoMode mode : {IoMode::automatic, IoMode::pread}) {
    for (const bool direct : {true, false}) {
      CAPTURE(static_cast<int>(mode), direct);
      auto queue = ReadQueue::open(file.path, {.mode = mode, .depth = 8, .direct = direct, .faults = nullptr, .log = {}});
      REQUIRE(queue);
      const Mapping memory = poisoned(file.content.size());
      REQUIRE(read_all(**queue, file.content.size(), memory.bytes()));
      CHECK(std::memcmp(memory.data(), file.content.data(), file.content.size()) == 0);
      CHECK((*queue)->bytes_read() == file.content.size());
      CHECK((*queue)->retries() == 0);
    }
  }
}

TEST_CASE("read queue retries short, interrupted, refused and late reads until every byte is right") {
  const RandomFile file(2 * kMiB, 12);
  uint64_t retries = 0;
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    FaultPlan faults{.seed = seed, .short_read = 0.3, .eintr = 0.1, .eagain = 0.1, .delay = 0.2, .delay_us = 300};
    for (const IoMode mode : {IoMode::automatic, IoMode::pread}) {
      CAPTURE(seed, static_cast<int>(mode));
      auto queue = ReadQueue::open(file.path, {.mode = mode, .depth = 8, .direct = true, .faults = &faults, .log = {}});
      REQUIRE(queue);
      const Mapping memory = poisoned(file.content.size());
      REQUIRE(read_all(**queue, file.content.size(), memory.bytes()));
      REQUIRE(std::memcmp(memory.data(), file.content.data(), file.content.size()) == 0);
      retries += (*queue)->retries();
    }
  }
  CHECK(retries > 0);  // else the faults were never injected
}

TEST_CASE("read queue turns EIO into a typed error that names the file") {
  const RandomFile file(1 * kMiB, 13);
  const FaultPlan faults{.seed = 5, .eio = 1.0};
  auto queue = ReadQueue::open(file.path, {.depth = 4, .faults = &faults, .log = {}});
  REQUIRE(queue);
  const Mapping memory = poisoned(file.content.size());
  const Status status = read_all(**queue, file.content.size(), memory.bytes());
  REQUIRE_FALSE(status);
  CHECK(status.error().code == ErrorCode::io);
  CHECK(status.error().os_code == EIO);
  CHECK(status.error().message.find(file.path) != std::string::npos);
  (*queue)->drain();
  CHECK((*queue)->in_flight() == 0);
}

TEST_CASE("read queue calls a file that shrank corrupt") {
  const RandomFile file(1 * kMiB, 14);
  auto queue = ReadQueue::open(file.path, {.depth = 4, .log = {}});
  REQUIRE(queue);
  REQUIRE(::truncate(file.path.c_str(), 512 * kKiB) == 0);
  const Mapping memory = poisoned(file.content.size());
  const Status status = read_all(**queue, file.content.size(), memory.bytes());
  REQUIRE_FALSE(status);
  CHECK(status.error().code == ErrorCode::corrupt);
  (*queue)->drain();
}

TEST_CASE("read queue reads into registered buffers") {
  const RandomFile file(1 * kMiB, 15);
  auto queue = ReadQueue::open(file.path, {.depth = 4, .log = {}});
  REQUIRE(queue);
  const Mapping memory = poisoned(file.content.size());
  const std::span<std::byte> slabs[] = {memory.bytes()};
  (*queue)->register_buffers(slabs);
  REQUIRE(read_all(**queue, file.content.size(), memory.bytes()));
  CHECK(std::memcmp(memory.data(), file.content.data(), file.content.size()) == 0);
}

TEST_CASE("read queue names a file that is not there") {
  const auto queue = ReadQueue::open("no-such-file", {});
  REQUIRE_FALSE(queue);
  CHECK(queue.error().code == ErrorCode::not_found);
  CHECK(queue.error().message.find("no-such-file") != std::string::npos);
}
