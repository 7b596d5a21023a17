// SPDX-License-Identifier: Apache-2.0
#include "storage/row_reader.hpp"

#include <algorithm>
#include <cstdio>

#include "base/units.hpp"
#include "storage/checksum.hpp"
#include "temp_file.hpp"

using namespace sluice;
using namespace sluice::storage;

namespace {

// An embedding table as it lies in a container: values, scales, row sums, each on its own page.
struct Table {
  Tensor tensor;
  std::vector<std::byte> file;

  Table(uint32_t rows, uint32_t cols, Scheme scheme) {
    tensor.name = "model.embed_tokens.weight";
    tensor.rows = rows;
    tensor.cols = cols;
    tensor.scheme = scheme;
    if (scheme == Scheme::int8) tensor.group_elems = 32;
    file.resize(8192);   // what comes before it
    const uint64_t value_bytes = scheme == Scheme::int8 ? 1 : scheme == Scheme::f32 ? 4 : 2;
    add(PlaneKind::values, random_bytes(rows * cols * value_bytes, rows));
    if (scheme == Scheme::int8) add(PlaneKind::scales, random_bytes(rows * ceil_div(cols, 32) * 2, cols));
    std::vector<uint64_t> sums;
    for (uint32_t row = 0; row < rows; ++row) sums.push_back(row_checksum(values(row), scales(row)));
    const auto* bytes = reinterpret_cast<const std::byte*>(sums.data());
    add(PlaneKind::row_sums, {bytes, bytes + sums.size() * 8});
  }

  std::span<const std::byte> values(uint32_t row) const { return row_of(PlaneKind::values, row); }
  std::span<const std::byte> scales(uint32_t row) const { return row_of(PlaneKind::scales, row); }

 private:
  std::span<const std::byte> row_of(PlaneKind kind, uint32_t row) const {
    for (const Plane& plane : tensor.planes) {
      if (plane.kind != kind) continue;
      const uint64_t bytes = plane.bytes / tensor.rows;
      return {file.data() + plane.offset + row * bytes, bytes};
    }
    return {};
  }
  void add(PlaneKind kind, const std::vector<std::byte>& data) {
    Plane plane;
    plane.kind = kind;
    plane.offset = file.size();
    plane.bytes = data.size();
    for (uint64_t at = 0; at < data.size(); at += kBlockBytes) {
      plane.block_sums.push_back(checksum({data.data() + at, std::min<uint64_t>(kBlockBytes, data.size() - at)}));
    }
    file.insert(file.end(), data.begin(), data.end());
    file.resize(align_up(file.size(), kPlaneAlignment));
    tensor.planes.push_back(plane);
  }
};

std::vector<int32_t> some_ids(uint32_t rows, size_t count, uint64_t seed) {
  std::vector<int32_t> ids;
  for (size_t i = 0; i < count; ++i) ids.push_back(static_cast<int32_t>(next_random(seed) % rows));
  return ids;
}

// Reads `ids` and compares every row.
Status read_and_compare(RowReader& reader, const Table& table, const std::vector<int32_t>& ids) {
  std::vector<std::byte> values(ids.size() * reader.value_row_bytes()), scales(ids.size() * reader.scale_row_bytes());
  SLUICE_TRY(reader.read(ids, values, scales));
  for (size_t i = 0; i < ids.size(); ++i) {
    const auto row = static_cast<uint32_t>(ids[i]);
    const auto expected_values = table.values(row), expected_scales = table.scales(row);
    CHECK(std::equal(expected_values.begin(), expected_values.end(), values.begin() + i * reader.value_row_bytes()));
    CHECK(std::equal(expected_scales.begin(), expected_scales.end(), scales.begin() + i * reader.scale_row_bytes()));
  }
  return {};
}

RowReader must_open(const TempFile& file, const Table& table, const ReadQueueOptions& options) {
  auto reader = RowReader::open(file.path(), table.tensor, options);
  if (!reader) FAIL(reader.error().message);
  return std::move(*reader);
}

}  // namespace

TEST_CASE("rows of every scheme and width come back as they were written, reading exactly the pages around them") {
  struct Shape { uint32_t rows, cols; Scheme scheme; };
  // 576: rows straddle pages; 4096 bytes: they fill pages; 2048 x f32 and 8192: longer than a page; 1 x 32: smallest.
  const Shape shapes[] = {{49152, 576, Scheme::int8}, {1000, 4096, Scheme::int8}, {700, 8192, Scheme::f16},
                          {300, 2048, Scheme::f32},   {129, 33, Scheme::bf16},    {1, 32, Scheme::int8},
                          {513, 5000, Scheme::int8}};
  for (const Shape& shape : shapes) {
    const Table table(shape.rows, shape.cols, shape.scheme);
    const TempFile file(table.file);
    for (const IoMode mode : {IoMode::automatic, IoMode::pread}) {
      for (const bool direct : {true, false}) {
        for (const uint32_t depth : {1u, 5u, 32u}) {
          CAPTURE(shape.rows, shape.cols, name_of(shape.scheme), static_cast<int>(mode), direct, depth);
          ReadQueueOptions options;
          options.mode = mode;
          options.direct = direct;
          options.depth = depth;
          RowReader reader = must_open(file, table, options);
          for (const size_t count : {0u, 1u, 2u, 100u}) {
            auto ids = some_ids(shape.rows, count, depth + count);
            if (count == 100) ids[0] = static_cast<int32_t>(shape.rows - 1), ids[1] = 0, ids[2] = 0;
            uint64_t expected = 0;
            for (const int32_t id : ids) expected += reader.range_bytes(id);
            const uint64_t counted_before = reader.bytes_read(), drive_before = bytes_read_from_drives();
            REQUIRE(read_and_compare(reader, table, ids).has_value());
            CHECK(reader.bytes_read() - counted_before == expected);
            if (reader.direct()) CHECK(bytes_read_from_drives() - drive_before == expected);
          }
        }
      }
    }
  }
}

TEST_CASE("rows survive short, interrupted and late reads") {
  const Table table(2000, 576, Scheme::int8);
  const TempFile file(table.file);
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    FaultPlan plan;
    plan.seed = seed;
    plan.short_read = plan.eintr = plan.eagain = plan.delay = 0.2;
    plan.delay_us = 100;
    ReadQueueOptions options;
    options.faults = &plan;
    RowReader reader = must_open(file, table, options);
    REQUIRE(read_and_compare(reader, table, some_ids(2000, 200, seed)).has_value());
    CHECK(reader.retries() > 0);
  }
  std::printf("seeds 1..10\n");
}

TEST_CASE("a wrong bit in a row is an error that names token and offset, never a row") {
  Table table(2000, 576, Scheme::int8);
  const uint64_t bad_value = table.tensor.planes[0].offset + 1234 * 576 + 7;
  const uint64_t bad_scale = table.tensor.planes[1].offset + 77 * 36 + 3;
  table.file[bad_value] ^= std::byte{4};
  table.file[bad_scale] ^= std::byte{1};
  const TempFile file(table.file);
  RowReader reader = must_open(file, table, {});
  REQUIRE(read_and_compare(reader, table, {5, 1233, 1235}).has_value());
  for (const int32_t id : {1234, 77}) {
    const auto status = read_and_compare(reader, table, {1, id, 2, 3});
    REQUIRE_FALSE(status.has_value());
    CHECK(status.error().code == ErrorCode::corrupt);
    CHECK(status.error().message.find(file.path()) == 0);
    CHECK(status.error().message.find("token " + std::to_string(id)) != std::string::npos);
    const uint64_t at = table.tensor.planes[0].offset + static_cast<uint64_t>(id) * 576;
    CHECK(status.error().message.find("values at offset " + std::to_string(at)) != std::string::npos);
  }
  REQUIRE(read_and_compare(reader, table, some_ids(70, 50, 1)).has_value());   // and the reader lives on

  FaultPlan plan;
  plan.bit_flip = 1;
  plan.after_reads = 1;   // the row sums
  ReadQueueOptions options;
  options.faults = &plan;
  RowReader flipping = must_open(file, table, options);
  int refused = 0;
  for (int32_t id = 0; id < 50; ++id) refused += !read_and_compare(flipping, table, {id}).has_value();
  // One flipped bit in 8 KiB of values and one in 4 or 8 KiB of scales hit the row itself in about one case of 13.
  CHECK(refused > 0);
}

TEST_CASE("failing and shrinking files, foreign ids and damaged sums are typed errors") {
  Table table(2000, 576, Scheme::int8);
  const TempFile file(table.file);
  {
    FaultPlan plan;
    plan.eio = 1;
    plan.after_reads = 1;
    ReadQueueOptions options;
    options.faults = &plan;
    RowReader reader = must_open(file, table, options);
    const auto status = read_and_compare(reader, table, {3, 4});
    REQUIRE_FALSE(status.has_value());
    CHECK(status.error().os_code == EIO);
  }
  {
    RowReader reader = must_open(file, table, {});
    CHECK(read_and_compare(reader, table, {0, 2000}).error().code == ErrorCode::usage);
    CHECK(read_and_compare(reader, table, {-1}).error().code == ErrorCode::usage);
    REQUIRE(::truncate(file.path().c_str(), 16384) == 0);
    CHECK(read_and_compare(reader, table, {1900}).error().code == ErrorCode::corrupt);
  }
  table.file[table.tensor.planes[2].offset + 9] ^= std::byte{1};
  const TempFile damaged(table.file);
  CHECK(RowReader::open(damaged.path(), table.tensor, {}).error().code == ErrorCode::corrupt);
  table.tensor.planes.pop_back();
  CHECK(RowReader::open(damaged.path(), table.tensor, {}).error().code == ErrorCode::corrupt);
  table.tensor.layout = Layout::tile16x64;
  CHECK(RowReader::open(damaged.path(), table.tensor, {}).error().code == ErrorCode::unsupported);
}
