// SPDX-License-Identifier: Apache-2.0
// Containers that are cut, flipped, foreign or lying: each is refused with one sentence.
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <functional>
#include <limits>

#include "catch.hpp"
#include "container_fixture.hpp"
#include "container_lies.hpp"
#include "storage/container.hpp"
#include "storage/container_header.hpp"
#include "storage/container_writer.hpp"
#include "tiny_container.hpp"

using namespace sluice;
using namespace sluice::storage;
using namespace sluice::test;

namespace {

Error open_error(const std::string& path) {
  auto container = Container::open(path);
  REQUIRE_FALSE(container.has_value());
  CHECK(container.error().message.find(path) != std::string::npos);
  return container.error();
}

// Flips bits of a file in place and back again.
class Flipper {
 public:
  explicit Flipper(const std::string& path) : fd_(::open(path.c_str(), O_RDWR | O_CLOEXEC)) { REQUIRE(fd_); }
  void flip(uint64_t offset, int bit) {
    uint8_t byte = 0;
    REQUIRE(::pread(fd_.get(), &byte, 1, static_cast<off_t>(offset)) == 1);
    byte = static_cast<uint8_t>(byte ^ (1 << bit));
    REQUIRE(::pwrite(fd_.get(), &byte, 1, static_cast<off_t>(offset)) == 1);
  }

 private:
  UniqueFd fd_;
};

}  // namespace

TEST_CASE("a flipped bit anywhere in header or manifest is refused") {
  TempFolder folder;
  const std::string path = folder.file("a.sluice");
  REQUIRE(write_tiny_container(path, smallest()));
  const uint64_t manifest_offset = header_of(path).manifest_offset;
  const uint64_t file_bytes = std::filesystem::file_size(path);
  Flipper flipper(path);
  size_t cases = 0;
  const auto expect_refusal = [&](uint64_t offset, int bit, std::string_view reason) {
    flipper.flip(offset, bit);
    const auto container = Container::open(path);
    flipper.flip(offset, bit);
    ++cases;
    if (container || container.error().code != ErrorCode::corrupt || !mentions(container.error(), reason)) {
      FAIL("offset " << offset << " bit " << bit);
    }
  };
  for (uint64_t offset = 0; offset < 64; ++offset) {
    for (int bit = 0; bit < 8; ++bit) expect_refusal(offset, bit, "header checksum");
  }
  for (uint64_t offset = 64; offset < kHeaderBytes; ++offset) {
    expect_refusal(offset, static_cast<int>(offset % 8), "header checksum");
  }
  for (uint64_t offset = manifest_offset; offset < file_bytes; ++offset) {
    const bool in_padding = offset >= manifest_offset + header_of(path).manifest_bytes;
    const std::string_view reason = in_padding ? "padding after the manifest" : "manifest checksum";
    expect_refusal(offset, static_cast<int>(offset % 8), reason);
    if (!in_padding) expect_refusal(offset, static_cast<int>((offset + 3) % 8), reason);
  }
  CHECK(Container::open(path));
  WARN(cases << " flips refused");
}

TEST_CASE("a truncated container is refused at every length") {
  TempFolder folder;
  const std::string path = folder.file("a.sluice"), cut = folder.file("cut.sluice");
  REQUIRE(write_tiny_container(path, smallest()));
  const auto bytes = read_all(path);
  for (uint64_t length = 0; length < bytes.size(); length += 512) {
    write_all(cut, std::span(bytes).first(length));
    const Error error = open_error(cut);
    CAPTURE(length);
    CHECK(error.code == ErrorCode::corrupt);
    if (length == 0) {
      CHECK(mentions(error, "is empty"));
    } else if (length < kHeaderBytes) {
      CHECK(mentions(error, fmt::format("truncated: the header alone has 4096 bytes, file has {}", length)));
    } else {
      CHECK(mentions(error, fmt::format("truncated: header says {} bytes, file has {}", bytes.size(), length)));
    }
  }
  auto longer = bytes;
  longer.resize(bytes.size() + 4096);
  write_all(cut, longer);
  CHECK(mentions(open_error(cut), "appended"));
}

TEST_CASE("what is not a container is called so") {
  TempFolder folder;
  const std::string foreign = folder.file("model.gguf");
  std::vector<std::byte> gguf(10'000, std::byte{7});
  std::memcpy(gguf.data(), "GGUF\3\0\0\0", 8);
  write_all(foreign, gguf);
  CHECK(mentions(open_error(foreign), "not a Sluice container (magic \"GGUF\\x03\\x00\\x00\\x00\"); import a GGUF file"));
  write_all(foreign, std::span(gguf).first(100));
  CHECK(mentions(open_error(foreign), "not a Sluice container"));

  CHECK(open_error(folder.path()).code == ErrorCode::io);
  CHECK(mentions(open_error(folder.path()), "is a folder"));
  CHECK(open_error(folder.file("none.sluice")).code == ErrorCode::not_found);

  const std::string pipe = folder.file("pipe");
  REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
  CHECK(mentions(open_error(pipe), "not a regular file"));

  // A file that was never finished: planes are there, the header is a hole.
  const std::string torn = folder.file("torn.sluice");
  write_all(torn, std::vector<std::byte>(64 * 1024));
  CHECK(mentions(open_error(torn), "not a Sluice container"));
}

TEST_CASE("a newer version with a valid checksum asks for an update") {
  TempFolder folder;
  const std::string path = folder.file("a.sluice");
  REQUIRE(write_tiny_container(path, smallest()));
  rewrite_header(path, [](ContainerHeader& header) { header.version = 2; });
  const Error error = open_error(path);
  CHECK(error.code == ErrorCode::unsupported);
  CHECK(mentions(error, "format version 2 is newer than this Sluice reads (1); update Sluice"));
}

TEST_CASE("a header that lies with a valid checksum is refused") {
  TempFolder folder;
  const std::string path = folder.file("a.sluice");
  REQUIRE(write_tiny_container(path, smallest()));
  const ContainerHeader good = header_of(path);
  const auto lie = [&](std::string_view what, const std::function<void(ContainerHeader&)>& change) {
    INFO(what);
    rewrite_header(path, [&](ContainerHeader& header) {
      header = good;
      change(header);
    });
    CHECK(open_error(path).code == ErrorCode::corrupt);
  };
  constexpr uint64_t kMax = std::numeric_limits<uint64_t>::max();
  lie("version 0", [](auto& header) { header.version = 0; });
  lie("file size", [](auto& header) { header.file_bytes += 4096; });
  lie("file size 0", [](auto& header) { header.file_bytes = 0; });
  lie("manifest in the header", [](auto& header) { header.manifest_offset = 0; });
  lie("manifest unaligned", [](auto& header) { header.manifest_offset += 8; });
  lie("manifest at the end", [](auto& header) { header.manifest_offset = header.file_bytes; });
  lie("manifest beyond the end", [](auto& header) { header.manifest_offset = header.file_bytes + 4096; });
  lie("manifest near 2^64", [](auto& header) { header.manifest_offset = kMax - 4095; });
  lie("manifest empty", [](auto& header) { header.manifest_bytes = 0; });
  lie("manifest too large", [](auto& header) { header.manifest_bytes += 4096; });
  lie("manifest size near 2^64", [](auto& header) { header.manifest_bytes = kMax - 7; });
  lie("manifest size beyond the cap", [](auto& header) { header.manifest_bytes = uint64_t{3} << 30; });
  lie("manifest sum", [](auto& header) { header.manifest_sum ^= 1; });
  rewrite_header(path, [&](ContainerHeader& header) { header = good; });
  CHECK(Container::open(path));
}

TEST_CASE("a manifest that lies with valid checksums is refused by name") {
  TempFolder folder;
  const std::string good = folder.file("good.sluice"), bad = folder.file("bad.sluice");
  TinyOptions options;
  options.hyper = tiny_hyper(Architecture::qwen2);
  options.tokenizer = every_tokenizer_field();
  REQUIRE(write_tiny_container(good, options));
  constexpr uint64_t kMax = std::numeric_limits<uint64_t>::max();
  const float nan = std::numeric_limits<float>::quiet_NaN();

  const auto expect = [&](std::string_view reason, ErrorCode code) {
    INFO(reason);
    const Error error = open_error(bad);
    CHECK(error.code == code);
    CHECK(mentions(error, reason));
  };
  const auto lie = [&](std::string_view reason, const std::function<void(Manifest&)>& change,
                       ErrorCode code = ErrorCode::corrupt) {
    rewrite_manifest(good, bad, change, /*pack=*/false);
    expect(reason, code);
  };
  // With planes that fit what the manifest says, so that only the lie itself is left to find.
  const auto packed_lie = [&](std::string_view reason, const std::function<void(Manifest&)>& change,
                              ErrorCode code = ErrorCode::corrupt) {
    rewrite_manifest(good, bad, change, /*pack=*/true);
    expect(reason, code);
  };
  const auto tensor_of = [](Manifest& manifest, Role role, int32_t layer) -> Tensor& {
    for (Tensor& tensor : manifest.tensors) {
      if (tensor.role == role && tensor.layer == layer) return tensor;
    }
    std::abort();
  };
  const auto q = [&](Manifest& manifest) -> Tensor& { return tensor_of(manifest, Role::q, 1); };

  SECTION("hyperparameters") {
    lie("layers is 0", [](Manifest& m) { m.hyper.layers = 0; });
    lie("layers is 4294967295", [](Manifest& m) { m.hyper.layers = ~0u; });
    lie("hidden is 0", [](Manifest& m) { m.hyper.hidden = 0; });
    lie("heads is 0", [](Manifest& m) { m.hyper.heads = 0; });
    lie("kv_heads is 6", [](Manifest& m) { m.hyper.kv_heads = 6; });
    lie("5 heads cannot share 2 KV heads", [](Manifest& m) { m.hyper.kv_heads = 2; });
    lie("head_dim is 15", [](Manifest& m) { m.hyper.head_dim = 15; });
    lie("head_dim is 1048576", [](Manifest& m) { m.hyper.head_dim = 1u << 20; });
    lie("ffn is 4294967295", [](Manifest& m) { m.hyper.ffn = ~0u; });
    lie("vocab is 4294967295", [](Manifest& m) { m.hyper.vocab = ~0u; });
    lie("max_context is 0", [](Manifest& m) { m.hyper.max_context = 0; });
    lie("norm_eps is nan", [&](Manifest& m) { m.hyper.norm_eps = nan; });
    lie("norm_eps is -1", [](Manifest& m) { m.hyper.norm_eps = -1; });
    lie("expected 200x96", [](Manifest& m) { m.hyper.hidden = 96; });
  }
  SECTION("rope and generation") {
    lie("rope.rotary_dims is 18", [](Manifest& m) { m.rope.rotary_dims = 18; });
    lie("rope.rotary_dims is 15", [](Manifest& m) { m.rope.rotary_dims = 15; });
    lie("rope has 7 inverse frequencies", [](Manifest& m) { m.rope.inverse_frequencies.pop_back(); });
    lie("inverse frequency is nan", [&](Manifest& m) { m.rope.inverse_frequencies[3] = nan; });
    lie("attention_factor is inf",
        [](Manifest& m) { m.rope.attention_factor = std::numeric_limits<float>::infinity(); });
    lie("interleaved", [](Manifest& m) { m.rope.halves = false; }, ErrorCode::unsupported);
    lie("generation default is nan", [&](Manifest& m) { m.generation.top_p = nan; });
  }
  SECTION("tokenizer") {
    lie("4 kinds for 5 tokens", [](Manifest& m) { m.tokenizer.kinds.pop_back(); });
    lie("4 scores for 5 tokens", [](Manifest& m) { m.tokenizer.scores.pop_back(); });
    lie("201 tokens, the vocabulary 200", [](Manifest& m) {
      m.tokenizer.tokens.resize(201);
      m.tokenizer.kinds.resize(201);
      m.tokenizer.scores.resize(201);
    });
    lie("model 2 with 0 tokens", [](Manifest& m) { m.tokenizer.tokens.clear(); });
    lie("model 0 with 5 tokens", [](Manifest& m) { m.tokenizer.model = TokenizerModel::none; });
    lie("tokenizer.kinds has the value 9", [](Manifest& m) { m.tokenizer.kinds[1] = static_cast<TokenKind>(9); },
        ErrorCode::unsupported);
    lie("score is not a number", [&](Manifest& m) { m.tokenizer.scores[1] = nan; });
    lie("bos is 5", [](Manifest& m) { m.tokenizer.bos = 5; });
    lie("eos is -2", [](Manifest& m) { m.tokenizer.eos = -2; });
    lie("stop_ids has 5", [](Manifest& m) { m.tokenizer.stop_ids[0] = 5; });
    lie("lstrip_ids has -1", [](Manifest& m) { m.tokenizer.lstrip_ids[0] = -1; });
    lie("tokenizer.tokens has 65537 entries", [](Manifest& m) { m.tokenizer.tokens[0].resize(65537); });
    lie("tokenizer.splits has 257 entries", [](Manifest& m) { m.tokenizer.splits.resize(257); });
  }
  SECTION("shapes, schemes and roles") {
    lie("shape 0x80, expected 80x80", [&](Manifest& m) { q(m).rows = 0; });
    lie("shape 4294967295x4294967295, expected 80x80", [&](Manifest& m) { q(m).rows = q(m).cols = ~0u; });
    lie("group of 0", [&](Manifest& m) { q(m).group_elems = 0; });
    lie("group of 48", [&](Manifest& m) { q(m).group_elems = 48; });
    lie("f32 with a group of 32", [&](Manifest& m) { tensor_of(m, Role::q_bias, 0).group_elems = 32; });
    lie("scale exponent 127 is beyond", [&](Manifest& m) { q(m).scale_exponent = 127; });
    lie("scale exponent -2147483648 is beyond", [&](Manifest& m) { q(m).scale_exponent = INT32_MIN; });
    lie("int4 in layout tile16x16, expected tile16x64", [&](Manifest& m) { q(m).layout = Layout::tile16x16; });
    lie("scheme has the value 77", [&](Manifest& m) { q(m).scheme = static_cast<Scheme>(77); }, ErrorCode::unsupported);
    lie("vectors are f32, this one is f16", [&](Manifest& m) { tensor_of(m, Role::q_bias, 0).scheme = Scheme::f16; });
    lie("an embedding cannot be int4", [&](Manifest& m) { m.tensors.front().scheme = Scheme::int4; });
    lie("role q in layer 2 of 2", [&](Manifest& m) { q(m).layer = 2; });
    lie("role q in layer -1", [&](Manifest& m) { q(m).layer = -1; });
    lie("a second q in layer 1", [&](Manifest& m) {
      tensor_of(m, Role::o, 1).role = Role::q;  // the same shape
    });
    lie("architecture qwen2 has no q_norm", [&](Manifest& m) { tensor_of(m, Role::q_bias, 0).role = Role::q_norm; });
    lie("execution order", [&](Manifest& m) { std::swap(tensor_of(m, Role::q, 0).layer, tensor_of(m, Role::q, 1).layer); });
    lie("architecture mistral has no q_bias", [](Manifest& m) { m.hyper.architecture = Architecture::mistral; });
    packed_lie("0 of 2 tensors of role q_norm", [](Manifest& m) {
      m.hyper.architecture = Architecture::qwen3;
      std::erase_if(m.tensors, [](const Tensor& t) { return t.role >= Role::q_bias && t.role <= Role::v_bias; });
    });
    packed_lie("1 of 2 tensors of role down", [&](Manifest& m) {
      std::erase_if(m.tensors, [](const Tensor& t) { return t.role == Role::down && t.layer == 1; });
    });
    packed_lie("0 of 1 tensors of role lm_head", [](Manifest& m) {
      m.tensors.pop_back();
    });
    packed_lie("0 of 1 tensors of role token_embedding", [](Manifest& m) {
      m.tensors.clear();
    });
    packed_lie("q_bias, k_bias and v_bias come together", [](Manifest& m) {
      m.hyper.architecture = Architecture::llama;
      std::erase_if(m.tensors, [](const Tensor& t) { return t.role == Role::k_bias; });
    });
  }
  SECTION("planes") {
    lie("its first plane must be values", [&](Manifest& m) { q(m).planes.clear(); });
    lie("its first plane must be values", [&](Manifest& m) { std::swap(q(m).planes[0], q(m).planes[1]); });
    lie("two planes of values", [&](Manifest& m) { q(m).planes[1].kind = PlaneKind::values; });
    lie("part 1", [&](Manifest& m) { q(m).planes[0].part = 1; }, ErrorCode::unsupported);
    packed_lie("int4 without scales", [&](Manifest& m) {
      q(m).planes.pop_back();
    });
    lie("cannot have a plane of row_sums", [&](Manifest& m) { q(m).planes[1].kind = PlaneKind::row_sums; });
    packed_lie("no row_sums", [](Manifest& m) {
      m.tensors.front().planes.pop_back();
    });
    packed_lie("both zeros and bias", [&](Manifest& m) {
      add_plane(q(m), PlaneKind::zeros);
      add_plane(q(m), PlaneKind::bias);
    });
    packed_lie("int4 with a residual's group of 48", [&](Manifest& m) { q(m).residual_group_elems = 48; });
    packed_lie("residual and residual_scales come together", [&](Manifest& m) { add_plane(q(m), PlaneKind::residual); });
    lie("cannot have a plane of perm", [](Manifest& m) { m.tensors.front().planes.back().kind = PlaneKind::perm; });
    lie("bytes, its shape needs", [&](Manifest& m) { q(m).planes[0].bytes -= 1; });
    lie("bytes, its shape needs", [&](Manifest& m) { q(m).planes[0].bytes = kMax; });
    lie("bytes, its shape needs", [&](Manifest& m) { q(m).group_elems = 128; });
    lie("checksums for", [&](Manifest& m) { q(m).planes[0].block_sums.push_back(1); });
    lie("0 checksums for", [&](Manifest& m) { q(m).planes[0].block_sums.clear(); });
    lie("lies at offset 18446744073709547520", [&](Manifest& m) { q(m).planes[0].offset = kMax - 4095; });
    lie("lies at offset 0, expected 4096", [&](Manifest& m) { m.tensors[0].planes[0].offset = 0; });
    lie("expected", [&](Manifest& m) { q(m).planes[0].offset += 1; });
    lie("expected", [&](Manifest& m) { q(m).planes[1].offset = q(m).planes[0].offset; });  // overlap
    lie("expected", [&](Manifest& m) { q(m).planes[0].offset += 4096; });                  // gap
    // A tensor more than the file has room for: the last plane would reach into the manifest.
    lie("reaches beyond the planes", [&](Manifest& m) {
      Tensor& tensor = m.tensors.front();
      m.hyper.vocab = tensor.rows = 1'000'000;
      for (Plane& plane : tensor.planes) plane.bytes = expected_plane_bytes(tensor, plane.kind);
      for (Plane& plane : tensor.planes) plane.block_sums.resize(ceil_div(plane.bytes, kBlockBytes));
      pack_planes(m);
    });
    lie("planes end at offset", [](Manifest& m) {
      // Everything is there and in order, but the file holds more than the manifest speaks of.
      m.hyper.architecture = Architecture::llama;
      std::erase_if(m.tensors, [](const Tensor& t) { return t.role >= Role::q_bias && t.role <= Role::v_bias; });
      pack_planes(m);
    });
  }
  CHECK(Container::open(good));
}

TEST_CASE("FlatBuffers that refer to one string many times do not multiply in memory") {
  // 60,000 tokens that are all the same 60,000 bytes: 3.6 GB if copied, 300 KB in the file.
  const auto encoded = aliased_tokens(60'000, 60'000);
  CHECK(encoded.size() < 400'000);
  const auto manifest = decode_manifest(encoded, "a.sluice");
  REQUIRE_FALSE(manifest.has_value());
  CHECK(manifest.error().code == ErrorCode::corrupt);
  CHECK(mentions(manifest.error(), "tokenizer.tokens overlaps other data"));
}

TEST_CASE("FlatBuffers without their parts are refused") {
  for (const auto& [encoded, reason] : partial_manifests()) {
    const auto manifest = decode_manifest(encoded, "a.sluice");
    REQUIRE_FALSE(manifest.has_value());
    CHECK(mentions(manifest.error(), reason));
  }
}

TEST_CASE("verify finds a flipped bit in any plane and in the padding and says where") {
  TempFolder folder;
  const std::string path = folder.file("a.sluice");
  TinyOptions options = smallest();
  options.int4_kind = Int4Kind::bias;
  options.hyper.vocab = 3001;
  options.hyper.hidden = 400;  // embedding and lm_head: several blocks
  REQUIRE(write_tiny_container(path, options));
  auto container = Container::open(path);
  REQUIRE(container);
  REQUIRE(container->verify({}));
  Flipper flipper(path);
  std::mt19937 random(11);
  size_t cases = 0;
  const auto expect = [&](uint64_t offset, const Tensor& tensor, const Plane& plane, uint64_t reported_offset) {
    const int bit = static_cast<int>(random() % 8);
    flipper.flip(offset, bit);
    const auto status = container->verify({});
    flipper.flip(offset, bit);
    ++cases;
    REQUIRE_FALSE(status.has_value());
    CHECK(status.error().code == ErrorCode::corrupt);
    CHECK(mentions(status.error(), "'" + tensor.name + "'"));
    CHECK(mentions(status.error(), "plane " + std::string(name_of(plane.kind))));
    CHECK(mentions(status.error(), fmt::format("offset {}", reported_offset)));
  };
  for (const Tensor& tensor : container->manifest().tensors) {
    for (const Plane& plane : tensor.planes) {
      for (uint64_t block = 0; block < plane.block_sums.size(); ++block) {
        const uint64_t begin = plane.offset + block * kBlockBytes;
        expect(begin + random() % block_bytes(plane, block), tensor, plane, begin);
        expect(begin + block_bytes(plane, block) - 1, tensor, plane, begin);
      }
      const uint64_t padding = plane.padded_bytes() - plane.bytes;
      if (padding > 0) expect(plane.offset + plane.bytes + random() % padding, tensor, plane, plane.offset + plane.bytes);
    }
  }
  CHECK(container->verify({}));
  WARN(cases << " flips found");
}

TEST_CASE("verify finds a row sum that does not fit its row") {
  TempFolder folder;
  const std::string path = folder.file("a.sluice");
  const TinyOptions options = smallest();
  auto writer = ContainerWriter::create(path);
  REQUIRE(writer);
  for (TinyTensor& tensor : tiny_tensors(options)) {
    if (tensor.tensor.role == Role::token_embedding) tensor.planes.back().second[5 * 8] ^= std::byte{1};
    REQUIRE(writer->begin_tensor(tensor.tensor));
    for (const auto& [kind, bytes] : tensor.planes) REQUIRE(writer->write_plane(kind, bytes));
    REQUIRE(writer->end_tensor());
  }
  REQUIRE(writer->finish(tiny_manifest(options)));
  auto container = Container::open(path);
  REQUIRE(container);
  const auto status = container->verify({});
  REQUIRE_FALSE(status.has_value());
  CHECK(mentions(status.error(), "checksum of row 5"));
}

TEST_CASE("verify reports a file that shrank since it was opened") {
  TempFolder folder;
  const std::string path = folder.file("a.sluice");
  REQUIRE(write_tiny_container(path, smallest()));
  auto container = Container::open(path);
  REQUIRE(container);
  REQUIRE(::truncate(path.c_str(), 10'000) == 0);
  const auto status = container->verify({});
  REQUIRE_FALSE(status.has_value());
  CHECK(mentions(status.error(), "file ends at offset"));
}
