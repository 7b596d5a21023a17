// SPDX-License-Identifier: Apache-2.0
#include "exec/prefetcher.hpp"

#include <cstring>
#include <mutex>
#include <random>
#include <set>

#include "base/handles.hpp"
#include "catch.hpp"
#include "memory_backend.hpp"
#include "tiny_container.hpp"

namespace {

using namespace sluice;
using namespace sluice::exec;
using backend::DeviceAddress;
using test::MemoryBackend;

// A container whose matrices take several checksum blocks, on a real file system.
struct Model {
  Model() {
    test::TinyOptions options;
    options.hyper.layers = 3;
    options.hyper.hidden = 768;
    options.hyper.heads = 12;
    options.hyper.kv_heads = 4;
    options.hyper.head_dim = 64;
    options.hyper.ffn = 3072;
    options.hyper.vocab = 512;
    options.hyper.max_context = 128;
    path = folder.file("tiny.sluice");
    const auto written = test::write_tiny_container(path, options);
    REQUIRE(written);
  }
  test::TempFolder folder;
  std::string path;
};

plan::Plan plan_of(const storage::Container& container, uint64_t device, uint64_t host) {
  plan::Inputs inputs;
  inputs.device_budget_bytes = device;
  inputs.host_budget_bytes = host;
  inputs.fixed_need = [](uint32_t) { return plan::FixedNeed{}; };
  auto plan = plan::make_plan(container.manifest(), inputs);
  REQUIRE(plan);
  return std::move(*plan);
}

// A copy engine with so much before it that no copy is done until somebody waits for it.
class LateBackend : public MemoryBackend {
 public:
  void record_copy(backend::EventId event) override {
    const std::lock_guard lock(mutex_);
    pending_.insert(event);
  }
  Status host_wait(backend::EventId) override {
    const std::lock_guard lock(mutex_);
    pending_.clear();
    return {};
  }
  bool done(backend::EventId event) override {
    const std::lock_guard lock(mutex_);
    return !pending_.contains(event);
  }

 private:
  std::mutex mutex_;
  std::set<backend::EventId> pending_;
};

// What is on the prefetcher's track of this kind.
std::vector<trace::Record> recorded(const trace::Recorder& recorder, trace::Kind kind) {
  std::vector<trace::Record> found;
  for (const trace::Track* track : recorder.tracks()) {
    if (track->name() != "prefetcher") continue;
    found.resize(track->capacity());
    found.resize(track->take(0, found).records);
  }
  std::erase_if(found, [&](const trace::Record& record) { return record.kind != kind; });
  return found;
}

// Streams `passes` passes and compares every item, when it is acquired, with the file.
Status stream(const storage::Container& container, const plan::Plan& plan, const storage::FaultPlan* faults, int passes,
              uint64_t* bytes_read, MemoryBackend&& backend = {}, trace::Recorder* recorder = nullptr) {
  auto ring = backend.allocate(plan.ring_bytes, "ring");
  REQUIRE(ring);
  auto staging = Mapping::anonymous(8 * storage::kBlockBytes, "staging");
  REQUIRE(staging);

  std::vector<std::vector<std::byte>> contents;
  for (const plan::StreamItem& item : plan.stream) {
    contents.emplace_back(item.bytes);
    REQUIRE(read_exactly(container.fd(), contents.back(), container.manifest().tensors[item.tensor].offset(), "file"));
  }
  Prefetcher::Options options{
      .ring = *ring, .host_weights = {}, .staging = staging->bytes(), .recorder = recorder};
  for (size_t i = 0; i < plan.stream.size(); ++i) {
    options.host_weights.emplace_back();
    if (plan.stream[i].tier == plan::Tier::host) options.host_weights.back() = contents[i];
  }
  auto queue = storage::ReadQueue::open(container.path(), {.depth = 8, .direct = true, .faults = faults, .log = {}});
  REQUIRE(queue);
  auto prefetcher = Prefetcher::start(container, plan, backend, std::move(*queue), std::move(options));
  REQUIRE(prefetcher);

  AcquireTimes times;
  for (int pass = 0; pass < passes; ++pass) {
    for (uint32_t i = 0; i < plan.stream.size(); ++i) {
      SLUICE_TRY((*prefetcher)->acquire(i, times));
      const plan::StreamItem& item = plan.stream[i];
      REQUIRE(std::memcmp(backend.memory[ring->buffer].data() + item.ring_offset, contents[i].data(), item.bytes) == 0);
      (*prefetcher)->release(i);
    }
  }
  if (bytes_read != nullptr) *bytes_read = (*prefetcher)->bytes_read();
  return {};
}

}  // namespace

TEST_CASE("reads of a tensor cover its planes once and never exceed a checksum block") {
  const Model model;
  auto container = storage::Container::open(model.path);
  REQUIRE(container);
  for (const storage::Tensor& tensor : container->manifest().tensors) {
    uint64_t at = tensor.offset();
    for (const BlockRead& read : reads_of(tensor)) {
      CHECK(read.offset == at);
      CHECK(read.bytes <= storage::kBlockBytes);
      CHECK(read.tensor_offset == read.offset - tensor.offset());
      at += read.bytes;
    }
    CHECK(at == tensor.offset() + tensor.padded_bytes());
  }
}

TEST_CASE("prefetcher brings every item of every pass, in every mix of tiers") {
  const Model model;
  auto container = storage::Container::open(model.path);
  REQUIRE(container);
  const uint64_t total = container->file_bytes();
  for (const auto& [device, host] : {std::pair{total / 3, uint64_t{0}}, {total / 3, total / 3}, {total / 3, total},
                                     {total / 2, uint64_t{0}}}) {
    CAPTURE(device, host);
    const plan::Plan plan = plan_of(*container, device, host);
    REQUIRE_FALSE(plan.stream.empty());
    uint64_t bytes_read = 0;
    constexpr int kPasses = 25;
    REQUIRE(stream(*container, plan, nullptr, kPasses, &bytes_read));
    // Exactly the disk tier per pass, and no more ahead than the staging slots and the ring hold.
    CHECK(bytes_read >= kPasses * plan.disk_bytes);
    CHECK(bytes_read <= kPasses * plan.disk_bytes + plan.ring_bytes + 8 * storage::kBlockBytes);
  }
}

// Every staging slot is then read, copied and not yet free, and the executor waits for an item whose next read has no
// slot: no release will come.
TEST_CASE("prefetcher waits for the copy engine when that is all there is to wait for") {
  const Model model;
  auto container = storage::Container::open(model.path);
  REQUIRE(container);
  const uint64_t total = container->file_bytes();
  for (const uint64_t host : {uint64_t{0}, total / 3}) {
    CAPTURE(host);
    const plan::Plan plan = plan_of(*container, total / 3, host);
    REQUIRE(plan.disk_bytes > 8 * storage::kBlockBytes);
    trace::Recorder recorder;
    REQUIRE(stream(*container, plan, nullptr, 5, nullptr, LateBackend(), &recorder));
    CHECK_FALSE(recorded(recorder, trace::Kind::slot_wait).empty());
  }
}

// With a copy engine that is never behind there is nothing of the sort to wait for.
TEST_CASE("prefetcher records no wait for a staging slot where copies are done at once") {
  const Model model;
  auto container = storage::Container::open(model.path);
  REQUIRE(container);
  trace::Recorder recorder;
  REQUIRE(stream(*container, plan_of(*container, container->file_bytes() / 3, 0), nullptr, 5, nullptr, {}, &recorder));
  CHECK(recorded(recorder, trace::Kind::slot_wait).empty());
  CHECK_FALSE(recorded(recorder, trace::Kind::stage_wait).empty());
}

TEST_CASE("prefetcher counts what the ring holds: filled and not yet released") {
  const Model model;
  auto container = storage::Container::open(model.path);
  REQUIRE(container);
  const plan::Plan plan = plan_of(*container, container->file_bytes() / 3, 0);
  const auto items = static_cast<uint32_t>(plan.stream.size());
  // The items that fit before anything is released.
  uint32_t first = 0;
  while (first < items && first < plan.stream[first].distance) ++first;
  REQUIRE((first > 1 && first < items));

  MemoryBackend backend;
  auto ring = backend.allocate(plan.ring_bytes, "ring");
  REQUIRE(ring);
  auto staging = Mapping::anonymous(8 * storage::kBlockBytes, "staging");
  REQUIRE(staging);
  auto queue = storage::ReadQueue::open(container->path(), {.depth = 8, .direct = true, .faults = nullptr, .log = {}});
  REQUIRE(queue);
  trace::Recorder recorder;
  Prefetcher::Options options{.ring = *ring, .host_weights = {}, .staging = staging->bytes(), .recorder = &recorder};
  options.host_weights.resize(items);
  auto prefetcher = Prefetcher::start(*container, plan, backend, std::move(*queue), std::move(options));
  REQUIRE(prefetcher);

  // Whatever becomes free is filled at once, so each reading is known: items 0 to i, less those that had to go for i.
  std::vector<uint64_t> expected;
  AcquireTimes times;
  uint32_t released = 0;
  const auto bytes_between = [&](uint32_t begin, uint32_t end) {
    uint64_t bytes = 0;
    for (uint32_t i = begin; i < end; ++i) bytes += plan.stream[i % items].bytes;
    return bytes;
  };
  for (uint32_t i = 0; i < 3 * items; ++i) {
    const uint32_t distance = plan.stream[i % items].distance;
    for (; i >= distance && released <= i - distance; ++released) (*prefetcher)->release(released % items);
    REQUIRE((*prefetcher)->acquire(i % items, times));
    expected.push_back(bytes_between(released, i + 1));
  }
  prefetcher->reset();
  std::vector<uint64_t> counted;
  for (const trace::Record& record : recorded(recorder, trace::Kind::counter)) {
    CHECK(record.layer == static_cast<uint16_t>(trace::Counter::ring_bytes));
    CHECK(record.value <= plan.ring_bytes);
    counted.push_back(record.value);
  }
  REQUIRE(counted.size() >= expected.size());
  counted.resize(expected.size());
  CHECK(counted == expected);
}

TEST_CASE("prefetcher delivers the same bytes under short, late and interrupted reads") {
  const Model model;
  auto container = storage::Container::open(model.path);
  REQUIRE(container);
  const plan::Plan plan = plan_of(*container, container->file_bytes() / 3, 0);
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    CAPTURE(seed);
    const storage::FaultPlan faults{
        .seed = seed, .short_read = 0.2, .eintr = 0.1, .eagain = 0.1, .delay = 0.2, .delay_us = 200};
    REQUIRE(stream(*container, plan, &faults, 4, nullptr));
  }
}

TEST_CASE("prefetcher hands up a failed drive and a flipped bit as typed errors") {
  const Model model;
  auto container = storage::Container::open(model.path);
  REQUIRE(container);
  const plan::Plan plan = plan_of(*container, container->file_bytes() / 3, 0);

  const storage::FaultPlan broken{.seed = 3, .eio = 0.05};
  const Status io = stream(*container, plan, &broken, 50, nullptr);
  REQUIRE_FALSE(io);
  CHECK(io.error().code == ErrorCode::io);

  const storage::FaultPlan flipped{.seed = 4, .bit_flip = 0.05};
  const Status corrupt = stream(*container, plan, &flipped, 50, nullptr);
  REQUIRE_FALSE(corrupt);
  CHECK(corrupt.error().code == ErrorCode::corrupt);
}
