// SPDX-License-Identifier: Apache-2.0
// Bytes read per pass equal the bytes that are not resident, no more: by our counters and by the kernel's.
#include <chrono>
#include <cstdio>
#include <fstream>
#include <string>
#include <thread>

#include "golden_model.hpp"
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
    const uint64_t kernel_before_open = settled_read_bytes();
    Result<Model> model = Model::open(path, {.device_memory_bytes = report->smallest_device_bytes + (12u << 20),
                                             .host_memory_bytes = 2u << 20, .context = 128, .max_rows = 8, .io = io});
    REQUIRE(model);
    const ModelInfo& info = model->info();
    const uint64_t per_pass = info.disk_weight_bytes;
    REQUIRE(per_pass > (4u << 20));
    REQUIRE(info.device_weight_bytes > (1u << 20));
    REQUIRE(info.host_weight_bytes > (1u << 20));
    auto session = model->new_session();
    REQUIRE(session);
    REQUIRE(session->append(std::vector<int32_t>{1, 2, 3}));
    REQUIRE(session->flush());   // the first pass
    const uint64_t kernel_first = settled_read_bytes();
    const uint64_t rows_first = session->timings().embedding_bytes;

    // The first token comes of the flush's logits, each later one takes a pass.
    constexpr uint64_t kPasses = 25;
    const auto reason = session->generate(
        {.max_tokens = kPasses + 1, .sampling = {.temperature = 0}, .stop = {}, .ignore_eos = true},
        [](const Token&) { return true; });
    REQUIRE(reason);
    REQUIRE(session->timings().decode.passes == kPasses);
    const uint64_t kernel_last = settled_read_bytes();
    const uint64_t rows = session->timings().embedding_bytes - rows_first;
    std::printf("%s: %llu passes read %llu bytes: %llu of planes each, %llu of embedding rows in all\n", info.io.c_str(),
                static_cast<unsigned long long>(kPasses), static_cast<unsigned long long>(kernel_last - kernel_first),
                static_cast<unsigned long long>(per_pass), static_cast<unsigned long long>(rows));
    CHECK(kernel_last - kernel_first == kPasses * per_pass + rows);
    CHECK(session->timings().disk_bytes_per_pass == per_pass);

    // From before the opening: what was loaded, all passes, and what lies in ring and staging for the next one.
    REQUIRE(session->flush());   // nothing is pending but the last token: a pass, and the counters are brought up to date
    const uint64_t kernel_end = settled_read_bytes();
    REQUIRE(session->flush());
    const uint64_t counted = session->timings().disk_bytes;
    const uint64_t row_sums = (uint64_t{info.vocab} * sizeof(uint64_t) + 4095) / 4096 * 4096;   // read once, at open
    CHECK(kernel_end - kernel_before_open == counted + row_sums);
    const uint64_t loaded = info.device_weight_bytes + info.host_weight_bytes;
    const uint64_t fill = counted - loaded - session->timings().embedding_bytes - (kPasses + 2) * per_pass;
    std::printf("%s: the fill is %llu bytes of %llu of ring and staging\n", info.io.c_str(),
                static_cast<unsigned long long>(fill), static_cast<unsigned long long>(info.ring_bytes + info.staging_bytes));
    CHECK(fill <= info.ring_bytes + info.staging_bytes);
    CHECK(fill > 0);
  }
}
