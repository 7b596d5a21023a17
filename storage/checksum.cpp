// SPDX-License-Identifier: Apache-2.0
#include "storage/checksum.hpp"

#define XXH_STATIC_LINKING_ONLY  // the complete XXH3_state_t, laid out alike in every 0.8
#include <xxhash.h>

#include "base/check.hpp"

// What libxxhash exports on x86 where it was built to pick AVX2 or AVX-512 when it runs: 45 GB/s against 5-20 of the
// SSE2 default on one core with AVX-512 (512 KiB blocks in cache). Weak: a library without them gives null.
extern "C" {
[[gnu::weak]] XXH64_hash_t XXH3_64bits_dispatch(const void* data, size_t bytes);
[[gnu::weak]] XXH_errorcode XXH3_64bits_update_dispatch(XXH3_state_t* state, const void* data, size_t bytes);
}

namespace sluice::storage {

uint64_t checksum(std::span<const std::byte> data) {
  if (XXH3_64bits_dispatch != nullptr) return XXH3_64bits_dispatch(data.data(), data.size());
  return XXH3_64bits(data.data(), data.size());
}

namespace {
void update(XXH3_state_t& state, std::span<const std::byte> data) {
  const XXH_errorcode code = XXH3_64bits_update_dispatch != nullptr
                                 ? XXH3_64bits_update_dispatch(&state, data.data(), data.size())
                                 : XXH3_64bits_update(&state, data.data(), data.size());
  SLUICE_CHECK(code == XXH_OK);
}
}  // namespace

// XXH3_state_t is 576 bytes aligned to 64: operator new honours that.
struct StreamingChecksum::State {
  XXH3_state_t xxh3;
};

StreamingChecksum::StreamingChecksum() : state_(std::make_unique<State>()) {
  SLUICE_CHECK(XXH3_64bits_reset(&state_->xxh3) == XXH_OK);
}
StreamingChecksum::StreamingChecksum(StreamingChecksum&&) noexcept = default;
StreamingChecksum& StreamingChecksum::operator=(StreamingChecksum&&) noexcept = default;
StreamingChecksum::~StreamingChecksum() = default;

void StreamingChecksum::update(std::span<const std::byte> data) { storage::update(state_->xxh3, data); }

uint64_t StreamingChecksum::finish() {
  const uint64_t sum = XXH3_64bits_digest(&state_->xxh3);
  SLUICE_CHECK(XXH3_64bits_reset(&state_->xxh3) == XXH_OK);
  return sum;
}

uint64_t row_checksum(std::span<const std::byte> values, std::span<const std::byte> scales) {
  if (scales.empty()) return checksum(values);
  XXH3_state_t xxh3;  // on the stack: called once per token and row
  SLUICE_CHECK(XXH3_64bits_reset(&xxh3) == XXH_OK);
  update(xxh3, values);
  update(xxh3, scales);
  return XXH3_64bits_digest(&xxh3);
}

}  // namespace sluice::storage
