// SPDX-License-Identifier: Apache-2.0
#include "exec/embedding.hpp"

#include <algorithm>

#include "base/units.hpp"
#include "catch.hpp"
#include "tiny_container.hpp"

namespace {

using namespace sluice;
using namespace sluice::test;
using exec::Embedding;
using exec::RowCache;
using storage::Scheme;

struct Fixture {
  explicit Fixture(Scheme scheme) : path(folder.file("tiny.sluice")) {
    TinyOptions options;
    options.hyper = tiny_hyper();
    options.hyper.vocab = 300;
    options.embedding = scheme;
    auto weights = write_tiny_container(path, options);
    REQUIRE(weights);
    expected = weights->at(std::string(name_of(storage::Role::token_embedding)));
    auto opened = storage::Container::open(path);
    REQUIRE(opened);
    container = std::make_unique<storage::Container>(std::move(*opened));
    hidden = options.hyper.hidden;
  }
  Embedding open(uint32_t max_rows) const {
    auto embedding = Embedding::open(*container, max_rows, {.depth = 8, .log = {}});
    REQUIRE(embedding);
    return std::move(*embedding);
  }
  // What the container holds, in the order of `ids`.
  std::vector<float> rows(const std::vector<int32_t>& ids) const {
    std::vector<float> out;
    for (const int32_t id : ids) {
      const auto first = expected.begin() + static_cast<ptrdiff_t>(id) * hidden;
      out.insert(out.end(), first, first + hidden);
    }
    return out;
  }
  TempFolder folder;
  std::string path;
  std::vector<float> expected;
  std::unique_ptr<storage::Container> container;
  uint32_t hidden = 0;
};

}  // namespace

TEST_CASE("embedding rows of every scheme are what was written, read or remembered, and are read once") {
  for (const Scheme scheme : {Scheme::f32, Scheme::f16, Scheme::bf16, Scheme::int8}) {
    const Fixture fixture(scheme);
    Embedding embedding = fixture.open(8);
    std::vector<float> out(8 * fixture.hidden);
    uint64_t read = 0;
    const auto fetch = [&](const std::vector<int32_t>& ids, const std::vector<int32_t>& misses) {
      std::fill(out.begin(), out.end(), -1.0f);
      const std::span<float> rows = std::span(out).first(ids.size() * fixture.hidden);
      REQUIRE(embedding.fetch(ids, rows));
      CHECK(std::equal(rows.begin(), rows.end(), fixture.rows(ids).begin()));
      for (const int32_t id : misses) read += embedding.range_bytes(id);
      CHECK(embedding.bytes_read() == read);
    };
    INFO("scheme " << name_of(scheme));
    fetch({7}, {7});
    fetch({7}, {});
    fetch({299, 7, 0, 7, 31}, {299, 0, 31});
    fetch({5, 5}, {5, 5});   // twice in one call: both on their way before either is there
    fetch({31, 5, 299, 0, 7}, {});
    fetch({}, {});
  }
}

TEST_CASE("an id outside the vocabulary is refused, and what comes after it is right") {
  const Fixture fixture(Scheme::int8);
  Embedding embedding = fixture.open(4);
  std::vector<float> out(2 * fixture.hidden);
  for (const int32_t bad : {-1, 300, INT32_MIN, INT32_MAX}) {
    const Status refused = embedding.fetch(std::vector<int32_t>{7, bad}, out);
    REQUIRE(!refused);
    CHECK(refused.error().code == ErrorCode::usage);
  }
  const std::vector<int32_t> ids = {7, 8};
  REQUIRE(embedding.fetch(ids, out));
  CHECK(out == fixture.rows(ids));
}

TEST_CASE("the row cache holds what fits, and a row that takes another's place is not mistaken for it") {
  auto cache = RowCache::create(1000, exec::kRowCacheBytes / 4);   // four places
  REQUIRE(cache);
  for (const int32_t id : {-1, 0, 3}) CHECK(cache->find(id).empty());
  cache->insert(3)[0] = std::byte{33};
  cache->insert(4)[0] = std::byte{44};
  CHECK(cache->find(3)[0] == std::byte{33});
  CHECK(cache->find(4)[0] == std::byte{44});
  cache->insert(7)[0] = std::byte{77};
  CHECK(cache->find(3).empty());
  CHECK(cache->find(7)[0] == std::byte{77});
  CHECK(cache->find(0).empty());
  CHECK(cache->find(-1).empty());
  // No more places than rows, and one where not even one row fits the limit.
  REQUIRE(RowCache::create(1, 64));
  auto wide = RowCache::create(10, 2 * exec::kRowCacheBytes);
  REQUIRE(wide);
  wide->insert(2);
  CHECK(wide->find(2).size() == 2 * exec::kRowCacheBytes);
  CHECK(wide->find(3).empty());
}
