// SPDX-License-Identifier: Apache-2.0
// The safetensors header: read as it is, and refused where it lies.
#include "import/safetensors.hpp"

#include "checkpoint_makers.hpp"
#include "container_fixture.hpp"

using namespace sluice;
using namespace sluice::test;

namespace {

constexpr uint64_t kDataBytes = 64;

Result<import::SafetensorsIndex> parse(const std::string& header) {
  return import::parse_safetensors_header(header, 8 + header.size() + kDataBytes, "model.safetensors");
}

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return "\"" + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}";
}

void refuses(const std::string& header, std::initializer_list<const char*> words) {
  const auto index = parse(header);
  INFO(header.substr(0, 200));
  REQUIRE_FALSE(index);
  CHECK(index.error().code == ErrorCode::corrupt);
  CHECK(mentions(index.error(), "model.safetensors"));
  for (const char* word : words) CHECK(mentions(index.error(), word));
}

}  // namespace

TEST_CASE("a safetensors header gives dtype, shape and place of each tensor") {
  const std::string header = R"({"__metadata__":{"format":"pt"},)" + entry("a", "F32", "[2,4]", "[0,32]") + "," +
                             entry("b", "BF16", "[16]", "[32,64]") + "," + entry("scalar", "I64", "[]", "[0,8]") + "}";
  // The scalar would overlap "a".
  refuses(header, {"scalar", "overlap"});
  const std::string good = R"({"__metadata__":{"format":"pt"},)" + entry("a", "F32", "[2,4]", "[0,32]") + "," +
                           entry("b", "BF16", "[16]", "[32,64]") + "," + entry("none", "F16", "[0,7]", "[64,64]") + "}";
  const auto index = parse(good);
  REQUIRE(index);
  REQUIRE(index->size() == 3);
  CHECK(index->at("a").shape == std::vector<uint64_t>{2, 4});
  CHECK(index->at("a").offset == 8 + good.size());
  CHECK(index->at("b").dtype == "BF16");
  CHECK(index->at("b").offset == 8 + good.size() + 32);
  CHECK(index->at("b").bytes == 32);
}

TEST_CASE("a safetensors header that lies is refused by name") {
  const auto only = [](const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return "{" + entry("w", dtype, shape, offsets) + "}";
  };
  refuses(only("F32", "[16]", "[0,65]"), {"\"w\"", "65", "64"});                       // out of the file
  refuses(only("F32", "[16]", "[4,68]"), {"\"w\""});
  refuses(only("F32", "[4]", "[32,16]"), {"\"w\"", "32", "16"});                       // ends before it begins
  refuses(only("F32", "[4]", "[0,32]"), {"\"w\"", "16", "32"});                        // shape and size differ
  refuses(only("F32", "[4294967296,4294967296]", "[0,0]"), {"\"w\"", "large"});        // wraps to 0
  refuses(only("F32", "[4611686018427387904]", "[0,0]"), {"\"w\"", "large"});          // 2^62 * 4 wraps to 0
  refuses(only("F32", "[-4]", "[0,16]"), {"\"w\"", "shape"});
  refuses(only("F32", "[4.0]", "[0,16]"), {"\"w\"", "shape"});
  refuses(only("F32", "[1,1,1,1,1,1,1,1,4]", "[0,16]"), {"\"w\"", "shape"});
  refuses(only("F32", "[4]", "[0]"), {"\"w\"", "data_offsets"});
  refuses(only("F32", "[4]", "[0,16,32]"), {"\"w\"", "data_offsets"});
  refuses(only("F32", "[4]", "[0,18446744073709551616]"), {"\"w\""});                  // beyond 64 bits
  refuses(R"({"w":{"shape":[4],"data_offsets":[0,16]}})", {"\"w\"", "dtype"});
  refuses(R"({"w":[1,2,3]})", {"\"w\""});
  refuses("{" + entry("w", "F32", "[4]", "[0,16]") + "," + entry("w", "F32", "[4]", "[16,32]") + "}", {"\"w\"", "twice"});
  refuses("{" + entry("w", "F32", "[8]", "[0,32]") + "," + entry("x", "F32", "[8]", "[16,48]") + "}",
          {"\"w\"", "\"x\"", "overlap"});
  refuses("{" + entry("", "F32", "[4]", "[0,16]") + "}", {"name"});
  refuses("[]", {"object"});
  refuses("", {"JSON"});
  refuses("{\"w\":", {"JSON"});
  refuses("{\"\xff\":1}", {"JSON"});                                                   // not UTF-8
  refuses(R"({"w":)" + std::string(100'000, '['), {"deep"});
}

TEST_CASE("brackets inside strings are no nesting") {
  const auto index = parse("{" + entry(std::string(500, '['), "F32", "[4]", "[0,16]") + "}");
  CHECK(index);
}

TEST_CASE("a dtype that import does not read is indexed all the same") {
  const auto index = parse("{" + entry("w", "F4", "[8]", "[0,4]") + "}");
  REQUIRE(index);
  CHECK(index->at("w").dtype == "F4");
}

TEST_CASE("the size of the header is checked before anything is allocated") {
  const auto size_of = [](uint64_t claimed, uint64_t file_bytes) {
    std::byte prefix[8];
    std::memcpy(prefix, &claimed, 8);
    return import::safetensors_header_bytes(prefix, file_bytes, "model.safetensors");
  };
  CHECK(*size_of(100, 108) == 100);
  for (const auto& [claimed, file_bytes] : {std::pair<uint64_t, uint64_t>{101, 108}, {10'000'000'000, 4096},
                                            {10'000'000'000, 1ull << 40}, {~0ull, 4096}, {~0ull, ~0ull}, {0, 7}}) {
    CAPTURE(claimed, file_bytes);
    const auto bytes = size_of(claimed, file_bytes);
    REQUIRE_FALSE(bytes);
    CHECK(bytes.error().code == ErrorCode::corrupt);
  }
}

TEST_CASE("a header of 10 GB in a file of that size is refused without reading it") {
  TempFolder folder;
  const std::string path = folder.file("model.safetensors");
  Bytes prefix;
  put<uint64_t>(prefix, 10'000'000'000);
  save(path, prefix);
  std::filesystem::resize_file(path, 10'000'000'100);  // a hole: takes no room
  auto fd = open_file(path, O_RDONLY);
  REQUIRE(fd);
  const auto index = import::read_safetensors_header(*fd, path);
  REQUIRE_FALSE(index);
  CHECK(index.error().code == ErrorCode::corrupt);
  CHECK(mentions(index.error(), "10000000000"));
}
