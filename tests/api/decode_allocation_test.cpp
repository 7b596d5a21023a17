// SPDX-License-Identifier: Apache-2.0
// No allocation per token: every malloc of the process, in any thread or library, is counted between two tokens.
#include <atomic>
#include <cstdio>
#include <cstdlib>

#include "golden_model.hpp"
#include "tiny_container.hpp"

#if defined(__SANITIZE_ADDRESS__)
#define SLUICE_COUNTS 0   // the sanitizer has its own malloc
#else
#define SLUICE_COUNTS 1
#endif

namespace {
std::atomic<bool> counting{false};
std::atomic<uint64_t> allocations{0};
}  // namespace

#if SLUICE_COUNTS
extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

static void count() {
  if (counting.load(std::memory_order_relaxed)) allocations.fetch_add(1, std::memory_order_relaxed);
}
void* malloc(size_t bytes) {
  count();
  return __libc_malloc(bytes);
}
void* calloc(size_t items, size_t bytes) {
  count();
  return __libc_calloc(items, bytes);
}
void* realloc(void* old, size_t bytes) {
  count();
  return __libc_realloc(old, bytes);
}
void* aligned_alloc(size_t alignment, size_t bytes) {
  count();
  return __libc_memalign(alignment, bytes);
}
int posix_memalign(void** out, size_t alignment, size_t bytes) {
  count();
  *out = __libc_memalign(alignment, bytes);
  return *out == nullptr ? 12 : 0;
}
}
#endif

using namespace sluice;
using namespace sluice::test;

TEST_CASE("decoding allocates nothing per token, resident or streamed, greedy or sampled") {
  if (!SLUICE_COUNTS) {
    WARN("skipped: the sanitizer's malloc cannot be counted");
    return;
  }
  const TempFolder folder;
  const std::string path = folder.file("model.sluice");
  import_golden("llama3", path, WeightFormat::int4, 32);
  const auto report = plan_model(path, {.device_memory_bytes = uint64_t{1} << 40, .context = 512}, {});
  REQUIRE(report);
  const uint64_t smallest = report->smallest_device_bytes;
  const ModelOptions openings[] = {
      {.context = 512},
      {.device_memory_bytes = smallest, .context = 512},
      {.device_memory_bytes = smallest, .host_memory_bytes = 1u << 20, .context = 512, .io = Io::pread},
      {.context = 512, .io = Io::mmap},
  };
  {
    counting = true;
    std::free(std::malloc(10));
    auto* made = new std::vector<int>(100);
    counting = false;
    delete made;
    REQUIRE(allocations.exchange(0) >= 3);   // the counter counts
  }
  for (const ModelOptions& options : openings) {
    const Model model = open_or_fail(path, options);
    for (const float temperature : {0.0f, 0.8f}) {
      auto session = model.new_session();
      REQUIRE(session);
      REQUIRE(session->append(std::vector<int32_t>{5, 6, 7}));
      uint64_t tokens = 0;
      const auto reason = session->generate(
          {.max_tokens = 300,
           .sampling = {.temperature = temperature, .top_k = 40, .top_p = 0.9f, .min_p = 0.05f, .repeat_penalty = 1.2f},
           .stop = {"never"},
           .ignore_eos = true},
          [&](const Token&) {
            ++tokens;
            if (tokens == 2) counting = true;
            if (tokens == 299) counting = false;
            return true;
          });
      counting = false;
      REQUIRE(reason);
      REQUIRE(tokens == 300);
      CHECK(allocations.exchange(0) == 0);
    }
  }
}
