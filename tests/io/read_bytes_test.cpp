// SPDX-License-Identifier: Apache-2.0
// Bytes read per pass equal the bytes that are not resident, no more: by our counters and by the kernel's.
#include <sys/mman.h>
#include <sys/resource.h>

#include <chrono>
#include <cstdio>
#include <fstream>
#include <string>
#include <thread>

#include "golden_model.hpp"
#include "base/handles.hpp"
#include "storage/container.hpp"
#include "storage/read_queue.hpp"
#include "tiny_container.hpp"

namespace {

using namespace sluice;
using namespace sluice::test;

// read_bytes of /proc/self/io: what this process made the block layer fetch.
uint64_t kernel_read_bytes() {
  std::ifstream file("/proc/self/io");
  std::string key;
  uint64_t value = 0;
  while (file >> key >> value) {
    if (key == "read_bytes:") return value;
  }
  return UINT64_MAX;
}

// The prefetcher runs ahead until staging and ring are full; then nothing is read until something is released.
uint64_t settled_read_bytes() {
  uint64_t last = kernel_read_bytes();
  for (int same = 0; same < 20;) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    const uint64_t now = kernel_read_bytes();
    same = now == last ? same + 1 : 0;
    last = now;
  }
  return last;
}

// Page faults of this process that went to the drive: code that the kernel had dropped. They are in read_bytes too.
long major_faults() {
  rusage usage{};
  REQUIRE(::getrusage(RUSAGE_SELF, &usage) == 0);
  return usage.ru_majflt;
}

// Whether the page cache holds header and manifest, which opening reads through it: then that reads nothing.
// Asking reads nothing.
bool index_is_cached(const storage::Container& container) {
  auto mapping = Mapping::file(container.fd(), container.file_bytes(), container.path());
  REQUIRE(mapping);
  const storage::Tensor& last = container.manifest().tensors.back();
  const uint64_t planes_end = last.offset() + last.padded_bytes();
  std::vector<unsigned char> pages((container.file_bytes() + 4095) / 4096);
  REQUIRE(::mincore(mapping->data(), container.file_bytes(), pages.data()) == 0);
  bool cached = (pages[0] & 1) != 0;
  for (uint64_t page = planes_end / 4096; page < pages.size(); ++page) cached = cached && (pages[page] & 1) != 0;
  return cached;
}

// What one life of a model read, by the kernel's count and by ours.
struct Counts {
  uint64_t kernel_passes = 0, kernel_all = 0;      // of kPasses passes; from before the opening
  uint64_t rows = 0, counted = 0, rows_all = 0;    // embedding rows of those passes; all we count, and rows of it
  uint64_t reported_per_pass = 0;
  ModelInfo info;
  bool disturbed = false;                          // the kernel dropped pages that had to be read again: not ours to count
};
constexpr uint64_t kPasses = 25;

Counts count(const std::string& path, const ModelOptions& options) {
  Counts counts;
  auto container = storage::Container::open(path);   // brings the index into the page cache
  REQUIRE(container);
  const uint64_t kernel_before_open = settled_read_bytes();
  const long faults_before = major_faults();
  counts.disturbed = !index_is_cached(*container);
  Result<Model> model = Model::open(path, options);
  REQUIRE(model);
  counts.info = model->info();
  auto session = model->new_session();
  REQUIRE(session);
  REQUIRE(session->append(std::vector<int32_t>{1, 2, 3}));
  REQUIRE(session->flush());   // the first pass
  const uint64_t kernel_first = settled_read_bytes();
  const uint64_t rows_first = session->timings().embedding_bytes;

  // The first token comes of the flush's logits, each later one takes a pass.
  const auto reason = session->generate(
      {.max_tokens = kPasses + 1, .sampling = {.temperature = 0}, .stop = {}, .ignore_eos = true},
      [](const Token&) { return true; });
  REQUIRE(reason);
  REQUIRE(session->timings().decode.passes == kPasses);
  counts.kernel_passes = settled_read_bytes() - kernel_first;
  counts.rows = session->timings().embedding_bytes - rows_first;
  counts.reported_per_pass = session->timings().disk_bytes_per_pass;

  REQUIRE(session->flush());   // the last token: one more pass
  counts.kernel_all = settled_read_bytes() - kernel_before_open;
  REQUIRE(session->flush());   // nothing is pending; brings the counters up to date
  counts.counted = session->timings().disk_bytes;
  counts.rows_all = session->timings().embedding_bytes;
  counts.disturbed = counts.disturbed || major_faults() != faults_before;
  return counts;
}

}  // namespace

TEST_CASE("read_bytes of the kernel are passes x disk-tier planes + one fill of ring and staging + embedding rows") {
  const TempFolder folder;
  const std::string path = folder.file("tiny.sluice");
  TinyOptions tiny;
  tiny.hyper.layers = 6;
  tiny.hyper.hidden = 1024;
  tiny.hyper.heads = 16;
  tiny.hyper.kv_heads = 4;
  tiny.hyper.head_dim = 64;
  tiny.hyper.ffn = 4096;
  tiny.hyper.vocab = 1000;
  tiny.hyper.max_context = 128;
  REQUIRE(write_tiny_container(path, tiny));
  {
    auto queue = storage::ReadQueue::open(path, {.depth = 1, .direct = true, .log = {}});
    REQUIRE(queue);
    if (!(*queue)->direct() || kernel_read_bytes() == UINT64_MAX) {
      WARN("skipped: the file system takes no O_DIRECT, or /proc/self/io is not readable");
      return;
    }
  }
  auto report = plan_model(path, {.device_memory_bytes = uint64_t{1} << 40, .context = 128, .max_rows = 8}, {});
  REQUIRE(report);
  for (const Io io : {Io::uring, Io::pread}) {
    const ModelOptions options{.device_memory_bytes = report->smallest_device_bytes + (12u << 20),
                               .host_memory_bytes = 2u << 20, .context = 128, .max_rows = 8, .io = io};
    // A machine short of memory drops cached pages, and the kernel counts reading them again: such a life says nothing.
    Counts counts = count(path, options);
    for (int again = 0; counts.disturbed && again < 10; ++again) counts = count(path, options);
    REQUIRE(!counts.disturbed);

    const ModelInfo& info = counts.info;
    const uint64_t per_pass = info.disk_weight_bytes;
    REQUIRE(per_pass > (4u << 20));
    REQUIRE(info.device_weight_bytes > (1u << 20));
    REQUIRE(info.host_weight_bytes > (1u << 20));
    std::printf("%s: %llu passes read %llu bytes: %llu of planes each, %llu of embedding rows in all\n", info.io.c_str(),
                static_cast<unsigned long long>(kPasses), static_cast<unsigned long long>(counts.kernel_passes),
                static_cast<unsigned long long>(per_pass), static_cast<unsigned long long>(counts.rows));
    CHECK(counts.kernel_passes == kPasses * per_pass + counts.rows);
    CHECK(counts.reported_per_pass == per_pass);

    // From before the opening: what was loaded, all passes, and what lies in ring and staging for the next one.
    const uint64_t row_sums = (uint64_t{info.vocab} * sizeof(uint64_t) + 4095) / 4096 * 4096;   // read once, at open
    CHECK(counts.kernel_all == counts.counted + row_sums);
    const uint64_t loaded = info.device_weight_bytes + info.host_weight_bytes;
    const uint64_t fill = counts.counted - loaded - counts.rows_all - (kPasses + 2) * per_pass;
    const uint64_t room = info.ring_bytes + info.staging_bytes;
    std::printf("%s: the fill is %llu bytes of %llu of ring and staging\n", info.io.c_str(),
                static_cast<unsigned long long>(fill), static_cast<unsigned long long>(room));
    CHECK(fill <= room);
    CHECK(fill > 0);
  }
}
