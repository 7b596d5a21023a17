// SPDX-License-Identifier: Apache-2.0
// What a writer writes, a reader reads; what a writer cannot finish leaves nothing.
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>

#include "catch.hpp"
#include "container_fixture.hpp"
#include "storage/container.hpp"
#include "storage/container_writer.hpp"
#include "storage/tile.hpp"
#include "tiny_container.hpp"

using namespace sluice;
using namespace sluice::storage;
using namespace sluice::test;

namespace {

std::vector<std::byte> read_plane(const Container& container, const Plane& plane) {
  std::vector<std::byte> bytes(plane.bytes);
  REQUIRE(read_exactly(container.fd(), bytes, plane.offset, container.path()));
  return bytes;
}

}  // namespace

TEST_CASE("every field of the manifest survives the way through the file") {
  TempFolder folder;
  TinyOptions options;
  options.hyper = tiny_hyper();
  options.hyper.norm_eps = 3e-6f;
  options.scale_exponent = -3;
  options.tokenizer = every_tokenizer_field();
  Manifest manifest = tiny_manifest(options);
  manifest.rope.attention_factor = 1.25f;
  manifest.rope.rotary_dims = 12;
  manifest.rope.inverse_frequencies.resize(6);
  manifest.generation = {.temperature = 0.6f, .top_k = 20, .top_p = 0.9f, .min_p = 0.05f, .repetition_penalty = 1.1f};
  auto writer = ContainerWriter::create(folder.file("a.sluice"));
  REQUIRE(writer);
  auto tensors = tiny_tensors(options);
  for (const TinyTensor& tensor : tensors) {
    REQUIRE(writer->begin_tensor(tensor.tensor));
    for (const auto& [kind, bytes] : tensor.planes) REQUIRE(writer->write_plane(kind, bytes));
    REQUIRE(writer->end_tensor());
  }
  const uint64_t before_manifest = writer->bytes_written();
  REQUIRE(writer->finish(manifest));

  auto container = Container::open(folder.file("a.sluice"));
  REQUIRE(container);
  CHECK(container->file_bytes() % kPlaneAlignment == 0);
  CHECK(container->file_bytes() == std::filesystem::file_size(folder.file("a.sluice")));
  CHECK(container->file_bytes() > before_manifest);
  CHECK(container->uuid().size() == 36);
  const Manifest& read = container->manifest();
  CHECK(read.model_name == manifest.model_name);
  CHECK(read.source == manifest.source);
  CHECK(read.hyper.architecture == manifest.hyper.architecture);
  CHECK(read.hyper.layers == manifest.hyper.layers);
  CHECK(read.hyper.hidden == manifest.hyper.hidden);
  CHECK(read.hyper.heads == manifest.hyper.heads);
  CHECK(read.hyper.kv_heads == manifest.hyper.kv_heads);
  CHECK(read.hyper.head_dim == manifest.hyper.head_dim);
  CHECK(read.hyper.ffn == manifest.hyper.ffn);
  CHECK(read.hyper.vocab == manifest.hyper.vocab);
  CHECK(read.hyper.max_context == manifest.hyper.max_context);
  CHECK(read.hyper.norm_eps == manifest.hyper.norm_eps);
  CHECK(read.hyper.tied_embeddings == manifest.hyper.tied_embeddings);
  CHECK(read.rope.inverse_frequencies == manifest.rope.inverse_frequencies);
  CHECK(read.rope.attention_factor == manifest.rope.attention_factor);
  CHECK(read.rope.rotary_dims == manifest.rope.rotary_dims);
  CHECK(read.rope.halves);
  CHECK(read.generation.temperature == manifest.generation.temperature);
  CHECK(read.generation.top_k == manifest.generation.top_k);
  CHECK(read.generation.top_p == manifest.generation.top_p);
  CHECK(read.generation.min_p == manifest.generation.min_p);
  CHECK(read.generation.repetition_penalty == manifest.generation.repetition_penalty);
  const TokenizerSpec& tokenizer = read.tokenizer;
  CHECK(tokenizer.model == options.tokenizer.model);
  CHECK(tokenizer.tokens == options.tokenizer.tokens);
  CHECK(tokenizer.kinds == options.tokenizer.kinds);
  CHECK(tokenizer.scores == options.tokenizer.scores);
  CHECK(tokenizer.merges == options.tokenizer.merges);
  REQUIRE(tokenizer.splits.size() == 2);
  for (size_t i = 0; i < 2; ++i) {
    CHECK(tokenizer.splits[i].pattern == options.tokenizer.splits[i].pattern);
    CHECK(tokenizer.splits[i].behavior == options.tokenizer.splits[i].behavior);
    CHECK(tokenizer.splits[i].invert == options.tokenizer.splits[i].invert);
  }
  CHECK(tokenizer.nfc);
  CHECK(tokenizer.ignore_merges);
  CHECK(tokenizer.byte_fallback);
  CHECK(tokenizer.add_prefix_space);
  CHECK(tokenizer.space_prefix == SpacePrefix::first_if_missing);
  CHECK(tokenizer.add_bos);
  CHECK(tokenizer.add_eos);
  CHECK(tokenizer.bos == 0);
  CHECK(tokenizer.eos == 4);
  CHECK(tokenizer.unknown == 3);
  CHECK(tokenizer.stop_ids == options.tokenizer.stop_ids);
  CHECK(tokenizer.rstrip_ids == options.tokenizer.rstrip_ids);
  CHECK(tokenizer.lstrip_ids == options.tokenizer.lstrip_ids);
  CHECK(tokenizer.chat_template == options.tokenizer.chat_template);

  REQUIRE(read.tensors.size() == tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& wrote = tensors[i].tensor;
    const Tensor& tensor = read.tensors[i];
    CAPTURE(wrote.name);
    CHECK(tensor.name == wrote.name);
    CHECK(tensor.role == wrote.role);
    CHECK(tensor.layer == wrote.layer);
    CHECK(tensor.rows == wrote.rows);
    CHECK(tensor.cols == wrote.cols);
    CHECK(tensor.scheme == wrote.scheme);
    CHECK(tensor.layout == wrote.layout);
    CHECK(tensor.group_elems == wrote.group_elems);
    CHECK(tensor.scale_exponent == wrote.scale_exponent);
    CHECK(container->find(wrote.role, wrote.layer) == &tensor);
    REQUIRE(tensor.planes.size() == tensors[i].planes.size());
    for (size_t p = 0; p < tensor.planes.size(); ++p) {
      CHECK(tensor.planes[p].kind == tensors[i].planes[p].first);
      CHECK(tensor.planes[p].offset % kPlaneAlignment == 0);
      CHECK(read_plane(*container, tensor.planes[p]) == tensors[i].planes[p].second);
    }
  }
  CHECK(container->find(Role::q, 2) == nullptr);
  CHECK(container->find(Role::q_norm, 0) == nullptr);
  CHECK(container->verify({}));
}

TEST_CASE("containers of every architecture, scheme and group open and verify") {
  TempFolder folder;
  const std::string path = folder.file("a.sluice");
  for (Architecture architecture : {Architecture::llama, Architecture::mistral, Architecture::qwen2, Architecture::qwen3}) {
    for (Scheme scheme : {Scheme::f32, Scheme::f16, Scheme::bf16, Scheme::int8, Scheme::int4}) {
      for (uint32_t group : {32u, 64u, 128u}) {
        for (Int4Kind kind : {Int4Kind::symmetric, Int4Kind::zeros, Int4Kind::bias}) {
          if (scheme != Scheme::int4 && kind != Int4Kind::symmetric) continue;
          TinyOptions options;
          options.hyper = tiny_hyper(architecture);
          options.scheme = scheme;
          options.embedding = options.lm_head = scheme == Scheme::int4 ? Scheme::int8 : scheme;
          options.hyper.tied_embeddings = group == 64;
          options.attention_bias = architecture == Architecture::llama && group == 128;
          options.group_elems = group;
          options.int4_kind = kind;
          INFO(name_of(architecture) << " " << name_of(scheme) << " group " << group);
          const auto wrote = write_tiny_container(path, options);
          if (!wrote) FAIL(wrote.error().message);
          auto container = Container::open(path);
          if (!container) FAIL(container.error().message);
          const auto status = container->verify({});
          if (!status) FAIL(status.error().message);
          if (options.hyper.tied_embeddings) REQUIRE(wrote->at("lm_head") == wrote->at("token_embedding"));
        }
      }
    }
  }
}

TEST_CASE("tile addresses agree with the lanes as drawn") {
  const uint32_t rows = 40, cols = 200;
  test::tiny_detail::for_each_nibble(rows, cols, [&](uint32_t row, uint32_t col, uint32_t lane, uint32_t word,
                                                     uint32_t nibble, uint64_t tile) {
    const NibbleAddress address = int4_address(row, col, cols);
    REQUIRE(address.byte == tile * 512 + lane * 16 + word * 4 + nibble / 2);
    REQUIRE(address.high == (nibble % 2 == 1));
    REQUIRE(int8_address(row, col, cols) == tile * 1024 + (word / 2) * 512 + lane * 16 + (word % 2) * 8 + nibble);
  });
  test::tiny_detail::for_each_half(rows, cols, [&](uint32_t row, uint32_t col, uint64_t element) {
    REQUIRE(tile16x16_element(row, col, cols) == element);
  });
}

TEST_CASE("a plane written in odd pieces has the sums of one written at once") {
  TempFolder folder;
  TinyOptions options = smallest();
  options.hyper.vocab = 3001;
  options.hyper.hidden = 640;  // int8 embedding: 1.8 MiB, 4 blocks
  const auto tensors = tiny_tensors(options);
  auto whole = write_tiny_container(folder.file("whole.sluice"), options);
  REQUIRE(whole);
  auto writer = ContainerWriter::create(folder.file("pieces.sluice"));
  REQUIRE(writer);
  std::mt19937 random(7);
  for (const TinyTensor& tensor : tensors) {
    REQUIRE(writer->begin_tensor(tensor.tensor));
    for (const auto& [kind, bytes] : tensor.planes) {
      REQUIRE(writer->begin_plane(kind));
      std::span<const std::byte> rest = bytes;
      while (!rest.empty()) {
        const size_t most = random() % 4 == 0 ? 900'000 : 5'000;
        const auto piece = rest.first(std::min<size_t>(rest.size(), random() % most));
        REQUIRE(writer->append(piece));
        rest = rest.subspan(piece.size());
      }
      REQUIRE(writer->end_plane());
    }
    REQUIRE(writer->end_tensor());
  }
  REQUIRE(writer->finish(tiny_manifest(options)));
  auto first = Container::open(folder.file("whole.sluice"));
  auto second = Container::open(folder.file("pieces.sluice"));
  REQUIRE(first);
  REQUIRE(second);
  CHECK(first->uuid() != second->uuid());
  for (size_t i = 0; i < tensors.size(); ++i) {
    for (size_t p = 0; p < tensors[i].planes.size(); ++p) {
      CHECK(first->manifest().tensors[i].planes[p].block_sums == second->manifest().tensors[i].planes[p].block_sums);
    }
  }
  uint64_t last_done = 0, last_total = 0;
  CHECK(second->verify([&](uint64_t done, uint64_t total) {
    CHECK(done > last_done);
    last_done = done;
    last_total = total;
  }));
  CHECK(last_done == last_total);
  CHECK(last_total > second->file_bytes());  // the planes, and the embedding once more for its row sums
}

TEST_CASE("a writer that is dropped half way leaves nothing and harms nothing") {
  TempFolder folder;
  const std::string path = folder.file("a.sluice");
  const auto tensors = tiny_tensors(smallest());
  const auto write_half = [&] {
    auto writer = ContainerWriter::create(path);
    REQUIRE(writer);
    REQUIRE(writer->begin_tensor(tensors[0].tensor));
    REQUIRE(writer->begin_plane(PlaneKind::values));
    REQUIRE(writer->append(std::vector<std::byte>(3 << 20)));
    CHECK(entries_in(folder.path()) >= 1);
  };
  write_half();
  CHECK(entries_in(folder.path()) == 0);

  REQUIRE(write_tiny_container(path, smallest()));
  const auto before = read_all(path);
  write_half();
  CHECK(entries_in(folder.path()) == 1);
  CHECK(read_all(path) == before);
}

TEST_CASE("a leftover of a process that died is taken over, a live writer's file is not") {
  TempFolder folder;
  const std::string path = folder.file("a.sluice");
  write_all(fmt::format("{}.tmp-{}", path, ::getpid()), std::vector<std::byte>(100'000, std::byte{0xee}));
  REQUIRE(write_tiny_container(path, smallest()));
  CHECK(entries_in(folder.path()) == 1);
  auto container = Container::open(path);
  REQUIRE(container);
  CHECK(container->verify({}));

  auto first = ContainerWriter::create(path);
  REQUIRE(first);
  auto second = ContainerWriter::create(path);
  REQUIRE_FALSE(second.has_value());
  CHECK(second.error().code == ErrorCode::usage);
  CHECK(mentions(second.error(), "is being written already"));
}

TEST_CASE("leftovers of writers that were killed are removed, what a live one holds and other files are not") {
  TempFolder folder;
  const std::string path = folder.file("a.sluice");
  const std::vector<std::byte> some(1000);
  for (const char* name : {".tmp-1", ".tmp-2", ".tmp-old", ".tmp-"}) write_all(path + name, some);
  write_all(folder.file("b.sluice.tmp-1"), some);
  const auto held = open_locked(path + ".tmp-2", O_RDWR);
  REQUIRE(held);
  REQUIRE(write_tiny_container(path, smallest()));
  CHECK_FALSE(std::filesystem::exists(path + ".tmp-1"));
  for (const char* name : {".tmp-2", ".tmp-old", ".tmp-"}) CHECK(std::filesystem::exists(path + name));
  CHECK(std::filesystem::exists(folder.file("b.sluice.tmp-1")));
}

TEST_CASE("a writer refuses a target it must not replace and a folder that is not there") {
  TempFolder folder;
  CHECK(mentions(ContainerWriter::create("/dev/null").error(), "not a regular file"));
  CHECK(mentions(ContainerWriter::create(folder.path()).error(), "not a regular file"));
  const auto missing = ContainerWriter::create(folder.file("none/a.sluice"));
  REQUIRE_FALSE(missing.has_value());
  CHECK(missing.error().code == ErrorCode::not_found);
  CHECK(mentions(missing.error(), "there is no folder"));
}

TEST_CASE("a writer calls misuse a bug and an impossible model corrupt") {
  TempFolder folder;
  const auto tensors = tiny_tensors(smallest());
  auto writer = ContainerWriter::create(folder.file("a.sluice"));
  REQUIRE(writer);
  CHECK(writer->begin_plane(PlaneKind::values).error().code == ErrorCode::internal);
  CHECK(writer->append({}).error().code == ErrorCode::internal);
  CHECK(writer->end_tensor().error().code == ErrorCode::internal);
  REQUIRE(writer->begin_tensor(tensors[0].tensor));
  CHECK(writer->begin_tensor(tensors[0].tensor).error().code == ErrorCode::internal);
  CHECK(writer->finish({}).error().code == ErrorCode::internal);
  REQUIRE(writer->begin_plane(PlaneKind::values));
  REQUIRE(writer->append(std::vector<std::byte>(1)));
  const auto status = writer->end_plane();
  REQUIRE_FALSE(status.has_value());
  CHECK(mentions(status.error(), "plane values of tensor 'token_embedding' got 1 bytes, its shape needs 128"));

  TinyOptions nonsense = smallest();
  nonsense.hyper.max_context = 0;
  const auto refused = write_tiny_container(folder.file("b.sluice"), nonsense);
  REQUIRE_FALSE(refused.has_value());
  CHECK(refused.error().code == ErrorCode::corrupt);
  CHECK(mentions(refused.error(), "max_context is 0"));
  CHECK_FALSE(std::filesystem::exists(folder.file("b.sluice")));
}

TEST_CASE("a file size limit ends writing with one sentence and no file") {
  TempFolder folder;
  rlimit before = {};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit limit = {.rlim_cur = 300'000, .rlim_max = before.rlim_max};
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
  TinyOptions options = smallest();
  options.hyper.vocab = 30'000;
  const auto wrote = write_tiny_container(folder.file("a.sluice"), options);
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &before) == 0);
  std::signal(SIGXFSZ, handler);
  REQUIRE_FALSE(wrote.has_value());
  CHECK(wrote.error().code == ErrorCode::io);
  CHECK(wrote.error().os_code == EFBIG);
  CHECK(mentions(wrote.error(), "may not grow beyond 293.0 KiB"));
  CHECK(entries_in(folder.path()) == 0);
}

TEST_CASE("a full drive ends writing with one sentence and no file") {
  TempFolder folder;
  const std::string mount_point = folder.file("small");
  std::filesystem::create_directory(mount_point);
  if (::mount("tmpfs", mount_point.c_str(), "tmpfs", 0, "size=1m") != 0) {
    WARN("skipped: mounting a small tmpfs needs privileges (the file size limit test takes the same path)");
    return;
  }
  TinyOptions options = smallest();
  options.hyper.vocab = 100'000;
  options.embedding = Scheme::f16;
  const auto wrote = write_tiny_container(mount_point + "/a.sluice", options);
  const size_t left = entries_in(mount_point);
  ::umount(mount_point.c_str());
  REQUIRE_FALSE(wrote.has_value());
  CHECK(wrote.error().code == ErrorCode::io);
  CHECK(wrote.error().os_code == ENOSPC);
  CHECK(mentions(wrote.error(), "no space left on the drive after"));
  CHECK(mentions(wrote.error(), "more are needed at least"));
  CHECK(left == 0);
}
