// SPDX-License-Identifier: Apache-2.0
#include "api/kernel_report.hpp"

#include "catch.hpp"
#include "sluice/sluice.hpp"
#include "storage/container.hpp"
#include "tiny_container.hpp"

using namespace sluice;
using namespace sluice::test;
using storage::Scheme;

TEST_CASE("the kernels of a model are its products, each shape once, with all bytes of their planes") {
  for (const Int4Kind kind : {Int4Kind::symmetric, Int4Kind::zeros, Int4Kind::bias}) {
    const TempFolder folder;
    TinyOptions options;
    options.hyper = tiny_hyper();
    options.hyper.layers = 3;
    options.int4_kind = kind;
    options.lm_head = Scheme::f16;
    REQUIRE(write_tiny_container(folder.file("tiny.sluice"), options));
    auto container = storage::Container::open(folder.file("tiny.sluice"));
    REQUIRE(container);
    const storage::HyperParameters& hyper = options.hyper;
    const std::vector<api::KernelShape> shapes = api::kernel_shapes(container->manifest());
    REQUIRE(shapes.size() == 5);

    const uint32_t q = hyper.heads * hyper.head_dim, kv = hyper.kv_heads * hyper.head_dim;
    struct Expected { const char* name; uint32_t outputs, inputs; };
    const Expected expected[] = {{"q, k, v", q + 2 * kv, hyper.hidden}, {"o", hyper.hidden, q},
                                 {"gate, up", 2 * hyper.ffn, hyper.hidden}, {"down", hyper.hidden, hyper.ffn},
                                 {"lm_head", hyper.vocab, hyper.hidden}};
    for (size_t i = 0; i < shapes.size(); ++i) {
      CHECK(shapes[i].shape.name == expected[i].name);
      CHECK(shapes[i].shape.outputs() == expected[i].outputs);
      CHECK(shapes[i].shape.cols == expected[i].inputs);
    }
    const char* suffix = kind == Int4Kind::zeros ? " zeros" : kind == Int4Kind::bias ? " bias" : "";
    CHECK(shapes[1].scheme == std::string("int4 g32") + suffix);
    CHECK(shapes[1].shape.matrices[0].has_zeros == (kind == Int4Kind::zeros));
    CHECK(shapes[1].shape.matrices[0].has_bias == (kind == Int4Kind::bias));
    // Half a byte a weight; per group of 32 two bytes of scale, and one of zero or two of bias.
    REQUIRE(hyper.hidden % 16 == 0);
    const uint64_t weights = uint64_t{hyper.hidden} * ((q + 63) / 64 * 64);
    const uint64_t parameters = kind == Int4Kind::zeros ? 3 : kind == Int4Kind::bias ? 4 : 2;
    CHECK(shapes[1].weight_bytes == weights / 2 + uint64_t{hyper.hidden} * ((q + 31) / 32) * parameters);
    CHECK(shapes[4].scheme == "f16");
  }
}

TEST_CASE("kernels cannot be timed with no rows, none at all, or too many") {
  for (const std::vector<uint32_t>& rows : {std::vector<uint32_t>{}, {1, 0}, {2049}}) {
    const auto refused = bench_kernels("no such file", rows);
    REQUIRE(!refused);
    CHECK(refused.error().code == ErrorCode::usage);
  }
  const auto missing = bench_kernels("no such file", std::vector<uint32_t>{1});
  REQUIRE(!missing);
  CHECK(missing.error().code == ErrorCode::not_found);
}
