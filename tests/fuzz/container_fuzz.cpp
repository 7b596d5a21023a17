// SPDX-License-Identifier: Apache-2.0
// Fuzzes the opening of a container. Checksums would stop nearly every mutation at the door, so each input is opened twice:
// as it is, and with header and manifest sums made to fit. What opens must keep the promises that readers build on.
//
// As a test: fuzz_container [RUNS [SEED]]. With libFuzzer: clang++ -DSLUICE_LIBFUZZER -fsanitize=fuzzer,address.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "base/check.hpp"
#include "base/handles.hpp"
#include "storage/checksum.hpp"
#include "storage/container.hpp"
#include "storage/container_header.hpp"

namespace {

using namespace sluice;
using namespace sluice::storage;

// Byte offsets in the header, docs/container.md.
constexpr size_t kManifestOffsetAt = 16, kManifestBytesAt = 24, kManifestSumAt = 32, kFileBytesAt = 40;

uint64_t get_u64(const std::vector<uint8_t>& file, size_t at) {
  uint64_t value;
  std::memcpy(&value, file.data() + at, 8);
  return value;
}
void put_u64(std::vector<uint8_t>& file, size_t at, uint64_t value) { std::memcpy(file.data() + at, &value, 8); }

// Makes file size and checksums fit, as a liar would.
void repair(std::vector<uint8_t>& file) {
  if (file.size() < kHeaderBytes) return;
  std::memcpy(file.data(), kMagic.data(), kMagic.size());
  file.resize(align_up(file.size(), kPlaneAlignment));
  put_u64(file, kFileBytesAt, file.size());
  const uint64_t offset = get_u64(file, kManifestOffsetAt), bytes = get_u64(file, kManifestBytesAt);
  if (offset <= file.size() && bytes <= file.size() - offset) {
    put_u64(file, kManifestSumAt, checksum(std::as_bytes(std::span(file).subspan(offset, bytes))));
  }
  put_u64(file, kHeaderBytes - 8, checksum(std::as_bytes(std::span(file).first(kHeaderBytes - 8))));
}

// True if the bytes open as a container.
bool open_bytes(const std::vector<uint8_t>& file) {
  UniqueFd memory(::memfd_create("container_fuzz", MFD_CLOEXEC));
  SLUICE_CHECK(memory);
  size_t done = 0;
  while (done < file.size()) {
    const ssize_t n = ::write(memory.get(), file.data() + done, file.size() - done);
    SLUICE_CHECK(n > 0);
    done += static_cast<size_t>(n);
  }
  const auto container = Container::open("/proc/self/fd/" + std::to_string(memory.get()));
  if (!container) {
    SLUICE_CHECK(!container.error().message.empty());
    SLUICE_CHECK(container.error().code == ErrorCode::corrupt || container.error().code == ErrorCode::unsupported);
    return false;
  }
  for (const Tensor& tensor : container->manifest().tensors) {
    SLUICE_CHECK(!tensor.planes.empty());
    for (const Plane& plane : tensor.planes) {
      SLUICE_CHECK(plane.offset % kPlaneAlignment == 0 && plane.offset >= kHeaderBytes);
      SLUICE_CHECK(plane.offset < file.size() && plane.padded_bytes() <= file.size() - plane.offset);
      SLUICE_CHECK(plane.bytes > 0 && plane.bytes == expected_plane_bytes(tensor, plane.kind));
      SLUICE_CHECK(plane.block_sums.size() == ceil_div(plane.bytes, kBlockBytes));
    }
  }
  (void)container->verify({});  // may refuse, must not crash
  return true;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::vector<uint8_t> file(data, data + size);
  open_bytes(file);
  repair(file);
  open_bytes(file);
  return 0;
}

#ifndef SLUICE_LIBFUZZER
#include "fuzz/mutation.hpp"
#include "tiny_container.hpp"

namespace {

std::vector<std::vector<uint8_t>> seed_inputs() {
  test::TempFolder folder;
  std::vector<std::vector<uint8_t>> inputs;
  for (Architecture architecture : {Architecture::llama, Architecture::qwen2, Architecture::qwen3}) {
    test::TinyOptions options;
    options.hyper = test::tiny_hyper(architecture);
    options.hyper.layers = 1;
    options.hyper.hidden = options.hyper.ffn = options.hyper.vocab = 16;
    options.hyper.heads = 2;
    options.hyper.head_dim = 8;
    options.int4_kind = static_cast<test::Int4Kind>(inputs.size());
    options.tokenizer.model = TokenizerModel::byte_level_bpe;
    options.tokenizer.tokens = {"a", "b", "ab", "<s>"};
    options.tokenizer.kinds = {TokenKind::normal, TokenKind::normal, TokenKind::normal, TokenKind::special};
    options.tokenizer.merges = {"a b"};
    options.tokenizer.splits = {{"\\p{L}+"}};
    options.tokenizer.stop_ids = {3};
    const std::string path = folder.file("seed.sluice");
    SLUICE_CHECK(test::write_tiny_container(path, options));
    auto fd = open_file(path, O_RDONLY);
    SLUICE_CHECK(fd);
    std::vector<uint8_t> bytes(std::filesystem::file_size(path));
    SLUICE_CHECK(read_exactly(fd->get(), std::as_writable_bytes(std::span(bytes)), 0, path));
    inputs.push_back(std::move(bytes));
  }
  return inputs;
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t runs = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 20'000;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  std::printf("container fuzz: %llu runs, seed %llu\n", static_cast<unsigned long long>(runs),
              static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  const auto inputs = seed_inputs();
  for (const auto& input : inputs) SLUICE_CHECK(open_bytes(input));
  test::Mutator mutator(seed);
  uint64_t opened = 0;
  for (uint64_t run = 0; run < runs; ++run) {
    std::vector<uint8_t> file = inputs[run % inputs.size()];
    const uint64_t manifest_offset = get_u64(file, kManifestOffsetAt);
    const uint64_t manifest_end = manifest_offset + get_u64(file, kManifestBytesAt);
    if (mutator.below(4) == 0) {
      mutator.mutate(file, 0);
    } else {  // where the structure is
      std::vector<uint8_t> manifest(file.begin() + static_cast<ptrdiff_t>(manifest_offset),
                                    file.begin() + static_cast<ptrdiff_t>(manifest_end));
      mutator.mutate(manifest, 0);
      file.resize(manifest_offset);
      file.insert(file.end(), manifest.begin(), manifest.end());
      put_u64(file, kManifestBytesAt, manifest.size());
    }
    open_bytes(file);
    repair(file);
    if (open_bytes(file)) ++opened;
  }
  std::printf("%llu of %llu repaired mutations opened (names, ids and the like may change), none broke a promise\n",
              static_cast<unsigned long long>(opened), static_cast<unsigned long long>(runs));
  return 0;
}
#endif
