// SPDX-License-Identifier: Apache-2.0
// GGUF files into containers: exact where it must be, refused where it must be.
#include <fmt/format.h>
#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <limits>

#include "checkpoint_makers.hpp"
#include "container_fixture.hpp"
#include "import/ggml_blocks.hpp"
#include "import/gguf.hpp"
#include "import/import.hpp"
#include "import_fixture.hpp"
#include "storage/container.hpp"

using namespace sluice;
using namespace sluice::test;
using import::SourceType;
using storage::Role;

namespace {

// Row of a GGUF of architecture llama that holds row `row` of the model: the converter reshapes (heads, 2, dim / 2) and
// swaps the last two.
uint32_t permuted_row(uint32_t row, uint32_t head_dim) {
  const uint32_t head = row / head_dim, half = row % head_dim / (head_dim / 2), i = row % (head_dim / 2);
  return head * head_dim + 2 * i + half;
}

std::vector<float> unpermuted(const std::vector<float>& weights, uint32_t cols,
                              uint32_t head_dim = TinyGguf::kHeadDim) {
  std::vector<float> out(weights.size());
  for (uint32_t row = 0; row < weights.size() / cols; ++row) {
    const uint32_t from = permuted_row(row, head_dim);
    std::copy_n(weights.begin() + from * cols, cols, out.begin() + row * cols);
  }
  return out;
}

Result<import::Report> import_bytes(const TempFolder& folder, const Bytes& bytes,
                                    import::Weights weights = import::Weights::keep) {
  save(folder.file("model.gguf"), bytes);
  import::Options options;
  options.source = folder.file("model.gguf");
  options.output = folder.file("model.sluice");
  options.weights = weights;
  return import::import_model(options);
}

// Refused with this code and these words, and nothing but the source is in the folder afterwards.
void refuses(const Bytes& bytes, ErrorCode code, std::initializer_list<const char*> words) {
  TempFolder folder;
  const auto report = import_bytes(folder, bytes);
  REQUIRE_FALSE(report);
  INFO(report.error().message);
  CHECK(report.error().code == code);
  CHECK(mentions(report.error(), "model.gguf"));
  for (const char* word : words) CHECK(mentions(report.error(), word));
  CHECK(entries_in(folder.path()) == 1);
}

// The bytes of a file with `with` written over the only place where `what` is found, `skip` bytes behind it.
template <class T>
Bytes overwritten(Bytes file, std::string_view what, size_t skip, T with) {
  const auto found = std::search(file.begin(), file.end(), what.begin(), what.end());
  REQUIRE(found != file.end());
  const auto at = static_cast<size_t>(found - file.begin()) + what.size() + skip;
  REQUIRE(at + sizeof with <= file.size());
  std::memcpy(file.data() + at, &with, sizeof with);
  return file;
}

// A tensor's entry: name, u32 dimensions, u64 each, u32 type, u64 offset. Of a matrix:
constexpr size_t kDimensionsAt = 0, kColsAt = 4, kTypeAt = 20, kOffsetAt = 24;

}  // namespace

TEST_CASE("keep puts every exact GGUF type into the container bit for bit, RoPE rows unpermuted") {
  const auto type = GENERATE(GgmlType::f32, GgmlType::f16, GgmlType::bf16, GgmlType::q8_0, GgmlType::q4_0, GgmlType::q4_1);
  CAPTURE(static_cast<uint32_t>(type));
  const TinyGguf model(type);
  TempFolder folder;
  const auto report = import_bytes(folder, model.file.bytes());
  REQUIRE(report);
  CHECK(report->requantized == 0);
  CHECK(report->losses.empty());
  const auto container = storage::Container::open(folder.file("model.sluice"));
  REQUIRE(container);
  REQUIRE(container->verify({}));
  const auto holds = [&](Role role, int32_t layer, const std::vector<float>& expected) {
    CAPTURE(storage::name_of(role));
    CHECK(same_bits(stored_weights(*container, role, layer), expected));
  };
  const auto& w = model.weights;
  holds(Role::q, 0, unpermuted(w.at("blk.0.attn_q.weight"), TinyGguf::kHidden));
  holds(Role::k, 0, unpermuted(w.at("blk.0.attn_k.weight"), TinyGguf::kHidden));
  holds(Role::v, 0, w.at("blk.0.attn_v.weight"));
  holds(Role::o, 0, w.at("blk.0.attn_output.weight"));
  holds(Role::gate, 0, w.at("blk.0.ffn_gate.weight"));
  holds(Role::up, 0, w.at("blk.0.ffn_up.weight"));
  holds(Role::down, 0, w.at("blk.0.ffn_down.weight"));
  holds(Role::attn_norm, 0, w.at("blk.0.attn_norm.weight"));
  holds(Role::output_norm, -1, w.at("output_norm.weight"));
  holds(Role::lm_head, -1, w.at("output.weight"));
  if (type != GgmlType::q4_1) {
    holds(Role::token_embedding, -1, w.at("token_embd.weight"));
    return;
  }
  // Embeddings have no bias plane: q * d + m is rounded to FP16 there.
  std::vector<float> rounded = w.at("token_embd.weight");
  for (float& value : rounded) value = float_from_half(half_from_float(value));
  holds(Role::token_embedding, -1, rounded);
}

TEST_CASE("Q4_0 and Q4_1 keep their codes under int4, Q8_0 under int8") {
  const auto [type, weights] = GENERATE(table<GgmlType, import::Weights>({{GgmlType::q4_0, import::Weights::int4},
                                                                          {GgmlType::q4_1, import::Weights::int4},
                                                                          {GgmlType::q8_0, import::Weights::int8},
                                                                          {GgmlType::q4_0, import::Weights::int8}}));
  const TinyGguf model(type);
  TempFolder folder;
  const auto report = import_bytes(folder, model.file.bytes(), weights);
  REQUIRE(report);
  const auto container = storage::Container::open(folder.file("model.sluice"));
  REQUIRE(container);
  const storage::Tensor* down = container->find(Role::down, 0);
  REQUIRE(down != nullptr);
  CHECK(down->scheme == (weights == import::Weights::int4 ? storage::Scheme::int4 : storage::Scheme::int8));
  CHECK(down->group_elems == 32);
  CHECK(same_bits(stored_weights(*container, Role::down, 0), model.weights.at("blk.0.ffn_down.weight")));
}

TEST_CASE("rounding quantized values again is counted and said in one line") {
  TempFolder folder;
  save(folder.file("model.gguf"), TinyGguf(GgmlType::q4_1).file.bytes());
  import::Options options;
  options.source = folder.file("model.gguf");
  options.output = folder.file("model.sluice");
  options.weights = import::Weights::int8;
  std::vector<std::string> warnings;
  options.log = [&](LogLevel level, std::string_view line) {
    if (level == LogLevel::warning && line.find("Q4_1") != std::string_view::npos) warnings.emplace_back(line);
  };
  const auto report = import::import_model(options);
  REQUIRE(report);
  CHECK(report->requantized == 9);
  REQUIRE(warnings.size() == 1);
  CHECK(warnings[0].find("9 tensors") != std::string::npos);
}

TEST_CASE("K formats are rounded again within a step, and what that cost is said by type and scheme") {
  // As in a Q4_K_M: some matrices are Q6_K. Rows of whole blocks of 256.
  constexpr GgufShape kShape{.hidden = 256, .heads = 2, .kv_heads = 1, .head_dim = 128, .ffn = 512, .vocab = 48};
  const struct {
    Role role;
    const char* name;
    GgmlType type;
  } matrices[] = {
      {Role::token_embedding, "token_embd.weight", GgmlType::q4_k},
      {Role::q, "blk.0.attn_q.weight", GgmlType::q4_k},
      {Role::k, "blk.0.attn_k.weight", GgmlType::q4_k},
      {Role::v, "blk.0.attn_v.weight", GgmlType::q6_k},
      {Role::o, "blk.0.attn_output.weight", GgmlType::q4_k},
      {Role::gate, "blk.0.ffn_gate.weight", GgmlType::q4_k},
      {Role::up, "blk.0.ffn_up.weight", GgmlType::q4_k},
      {Role::down, "blk.0.ffn_down.weight", GgmlType::q6_k},
      {Role::lm_head, "output.weight", GgmlType::q6_k},
  };
  const auto wish = GENERATE(import::Weights::keep, import::Weights::int8, import::Weights::int4);
  TinyGguf model(GgmlType::f32, "llama", 1, kShape);
  std::mt19937 random(2);
  for (const auto& matrix : matrices) model.put_k_blocks(matrix.name, matrix.type, random);
  TempFolder folder;
  save(folder.file("model.gguf"), model.file.bytes());
  import::Options options;
  options.source = folder.file("model.gguf");
  options.output = folder.file("model.sluice");
  options.weights = wish;
  std::vector<std::string> warnings;
  options.log = [&](LogLevel level, std::string_view line) {
    if (level != LogLevel::warning || line.find("higher precision") == std::string_view::npos) return;
    warnings.emplace_back(line);
  };
  const auto report = import::import_model(options);
  if (!report) FAIL(report.error().message);
  CHECK(report->requantized == std::size(matrices));
  const auto container = storage::Container::open(options.output);
  REQUIRE(container);

  struct Sum {
    uint64_t tensors = 0;
    double errors = 0, weights = 0;  // squares
  };
  std::map<std::pair<SourceType, storage::Scheme>, Sum> sums;
  for (const auto& matrix : matrices) {
    CAPTURE(matrix.name);
    const SourceType type = *import::source_type_of_ggml(static_cast<uint32_t>(matrix.type));
    const GgufMaker::Tensor& source = model.file.tensors.at(matrix.name);
    const auto cols = static_cast<uint32_t>(source.shape[0]);
    std::vector<float> decoded(source.shape[0] * source.shape[1]);
    import::decode_to_float(type, std::as_bytes(std::span(source.data)), decoded);
    if (matrix.role == Role::q || matrix.role == Role::k) decoded = unpermuted(decoded, cols, kShape.head_dim);
    const int32_t layer = matrix.role == Role::token_embedding || matrix.role == Role::lm_head ? -1 : 0;
    const storage::Tensor* tensor = container->find(matrix.role, layer);
    REQUIRE(tensor != nullptr);
    const std::vector<float> stored = stored_weights(*container, matrix.role, layer);
    REQUIRE(stored.size() == decoded.size());
    Sum& sum = sums[{type, tensor->scheme}];
    ++sum.tensors;
    for (size_t begin = 0; begin < decoded.size(); begin += tensor->group_elems) {
      double largest = 0, worst = 0;
      for (size_t i = begin; i < begin + tensor->group_elems; ++i) {
        const double weight = static_cast<double>(decoded[i]), error = weight - static_cast<double>(stored[i]);
        largest = std::max(largest, std::fabs(weight));
        worst = std::max(worst, std::fabs(error));
        sum.errors += error * error;
        sum.weights += weight * weight;
      }
      // INT8: half a step of max / 127. INT4: a step of max / 8, for the side without the extreme ends at 7 of them.
      // FP16 rounds a scale by 2^-11 of it, and those 7 by 7 times that: less than 5 thousandths of a step.
      REQUIRE(worst <= 1.005 * largest * (tensor->scheme == storage::Scheme::int8 ? 0.5 / 127 : 1.0 / 8));
    }
  }
  REQUIRE(report->losses.size() == sums.size());
  REQUIRE(warnings.size() == sums.size());
  for (const import::RequantizationLoss& loss : report->losses) {
    CAPTURE(import::name_of(loss.type), storage::name_of(loss.scheme));
    const Sum& sum = sums.at({loss.type, loss.scheme});
    const double expected = std::sqrt(sum.errors / sum.weights);
    CHECK(loss.tensors == sum.tensors);
    CHECK(loss.group_elems == (wish == import::Weights::keep ? 32u : 128u));
    CHECK(loss.relative_error == Approx(expected).epsilon(1e-9));
    CHECK((expected > 1e-3 && expected < 0.4));
    const std::string told = fmt::format("{} tensors of type {} were decoded and rounded to {} in groups of {}, at a "
                                         "relative RMS error of {:.2f}%",
                                         sum.tensors, import::name_of(loss.type), storage::name_of(loss.scheme),
                                         loss.group_elems, 100 * expected);
    CHECK(std::count_if(warnings.begin(), warnings.end(), [&](const std::string& line) {
            return line.find(told) != std::string::npos;
          }) == 1);
  }
}

TEST_CASE("Qwen's rows and biases are not permuted") {
  const TinyGguf model(GgmlType::f16, "qwen2");
  TempFolder folder;
  REQUIRE(import_bytes(folder, model.file.bytes()));
  const auto container = storage::Container::open(folder.file("model.sluice"));
  REQUIRE(container);
  CHECK(same_bits(stored_weights(*container, Role::q, 0), model.weights.at("blk.0.attn_q.weight")));
  CHECK(same_bits(stored_weights(*container, Role::k_bias, 0), model.weights.at("blk.0.attn_k.bias")));
}

TEST_CASE("biases of a llama are unpermuted like its rows") {
  TinyGguf model(GgmlType::f16);
  std::mt19937 random(7);
  for (const auto& [name, length] : {std::pair<const char*, uint32_t>{"blk.0.attn_q.bias", 64},
                                     {"blk.0.attn_k.bias", 32}, {"blk.0.attn_v.bias", 32}}) {
    MadeWeights made = make_weights(GgmlType::f32, length, random);
    model.weights[name] = made.values;
    model.file.tensors[name] = {{length}, GgmlType::f32, made.data};
  }
  TempFolder folder;
  REQUIRE(import_bytes(folder, model.file.bytes()));
  const auto container = storage::Container::open(folder.file("model.sluice"));
  REQUIRE(container);
  CHECK(same_bits(stored_weights(*container, Role::q_bias, 0), unpermuted(model.weights.at("blk.0.attn_q.bias"), 1)));
  CHECK(same_bits(stored_weights(*container, Role::v_bias, 0), model.weights.at("blk.0.attn_v.bias")));
}

TEST_CASE("a file without output.weight gives a tied model") {
  TinyGguf model(GgmlType::q8_0);
  model.file.tensors.erase("output.weight");
  TempFolder folder;
  REQUIRE(import_bytes(folder, model.file.bytes()));
  const auto container = storage::Container::open(folder.file("model.sluice"));
  REQUIRE(container);
  CHECK(container->manifest().hyper.tied_embeddings);
  CHECK(same_bits(stored_weights(*container, Role::lm_head, -1), model.weights.at("token_embd.weight")));
}

TEST_CASE("rope_freqs divides the inverse frequencies") {
  TinyGguf model(GgmlType::f16);
  Bytes factors;
  for (uint32_t i = 0; i < TinyGguf::kHeadDim / 2; ++i) put(factors, 1.0f + static_cast<float>(i));
  model.file.tensors["rope_freqs.weight"] = {{TinyGguf::kHeadDim / 2}, GgmlType::f32, factors};
  TempFolder folder;
  REQUIRE(import_bytes(folder, model.file.bytes()));
  const auto container = storage::Container::open(folder.file("model.sluice"));
  REQUIRE(container);
  const auto& frequencies = container->manifest().rope.inverse_frequencies;
  REQUIRE(frequencies.size() == TinyGguf::kHeadDim / 2);
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const double expected = std::pow(10000.0, -static_cast<double>(2 * i) / TinyGguf::kHeadDim) / static_cast<double>(1 + i);
    CHECK(frequencies[i] == Approx(expected).epsilon(1e-6));
  }
}

TEST_CASE("block types decode to what the gguf package's reference decodes") {
  // Two blocks of bytes from a linear congruential generator, FP16 fields set to 0.25, -1.5 or 0.375: all values are
  // exact in float. From gguf 0.19.0, gguf.quants.dequantize: values 0, 1, 17, n/2, n-1, n, 2n-1, and sum of (i+1) v[i].
  struct Case {
    SourceType type;
    float values[7];
    double weighted_sum;
  };
  const Case cases[] = {
      {SourceType::q4_0, {-0.75, -1.5, -0.5, 0.5, 0.25, 1.25, -1.25}, 222.5},
      {SourceType::q4_1, {1.25, -1.5, 0.5, 1.5, -0.75, -0.75, -0.5}, 865.75},
      {SourceType::q5_0, {3.25, -4.0, 0.25, 2.0, 3.75, 1.5, -2.75}, -496.25},
      {SourceType::q5_1, {4.0, 3.0, -0.75, 5.75, 0.75, -1.0, 4.5}, 4895.75},
      {SourceType::q8_0, {-22.75, 24.5, 13.0, -24.25, -29.0, -13.0, 14.25}, -4246.75},
      {SourceType::q2_k, {-2.25, 3.75, -3.0, -0.375, 3.375, -0.75, -1.625}, -14156.25},
      {SourceType::q3_k, {9.5, 19.0, -6.0, -21.0, -0.5, 7.5, 2.5}, 48579.0},
      {SourceType::q4_k, {24.75, -2.75, 24.75, 103.5, -16.125, -5.625, 78.125}, 6109170.75},
      {SourceType::q5_k, {0.0, 30.25, 8.25, 187.5, 55.125, -16.125, 239.25}, 11498049.25},
      {SourceType::q6_k, {620.0, -558.0, -48.0, -234.0, 31.5, 257.25, 9.75}, -3278683.75},
  };
  const std::map<SourceType, std::map<uint32_t, float>> fields = {
      {SourceType::q4_0, {{0, 0.25f}}},   {SourceType::q4_1, {{0, 0.25f}, {2, -1.5f}}},
      {SourceType::q5_0, {{0, 0.25f}}},   {SourceType::q5_1, {{0, 0.25f}, {2, -1.5f}}},
      {SourceType::q8_0, {{0, 0.25f}}},   {SourceType::q2_k, {{80, 0.25f}, {82, 0.375f}}},
      {SourceType::q3_k, {{108, 0.25f}}}, {SourceType::q4_k, {{0, 0.25f}, {2, 0.375f}}},
      {SourceType::q5_k, {{0, 0.25f}, {2, 0.375f}}}, {SourceType::q6_k, {{208, 0.25f}}}};
  for (const Case& one : cases) {
    CAPTURE(import::name_of(one.type));
    const uint32_t bytes = import::block_bytes(one.type), elems = import::block_elems(one.type);
    std::vector<std::byte> blocks;
    uint64_t state = 1;
    for (uint32_t i = 0; i < 2 * bytes; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      blocks.push_back(static_cast<std::byte>(state >> 56));
    }
    for (uint32_t block = 0; block < 2; ++block) {
      for (const auto& [offset, value] : fields.at(one.type)) {
        const uint16_t bits = half_from_float(value);
        std::memcpy(blocks.data() + block * bytes + offset, &bits, 2);
      }
    }
    std::vector<float> out(2 * elems);
    import::decode_to_float(one.type, blocks, out);
    const uint32_t at[7] = {0, 1, 17, elems / 2, elems - 1, elems, 2 * elems - 1};
    for (int i = 0; i < 7; ++i) CHECK(out[at[i]] == one.values[i]);
    double sum = 0;
    for (uint32_t i = 0; i < 2 * elems; ++i) sum += (i + 1.0) * static_cast<double>(out[i]);
    CHECK(sum == one.weighted_sum);
  }
}

TEST_CASE("a GGUF cut at any byte of its header is refused, and so is one cut in its weights") {
  const Bytes whole = TinyGguf().file.bytes();
  size_t checked = 0;
  for (size_t length = 0; length < whole.size(); length += length < 4096 ? 1 : 997, ++checked) {
    const auto parsed = import::Gguf::parse(std::as_bytes(std::span(whole).first(length)), "cut.gguf");
    CAPTURE(length);
    REQUIRE_FALSE(parsed);
    REQUIRE(parsed.error().code == ErrorCode::corrupt);
  }
  CHECK(checked > 1000);
  refuses(Bytes(whole.begin(), whole.end() - 1), ErrorCode::corrupt, {"truncated", "tensor"});
  refuses({}, ErrorCode::corrupt, {"empty"});
}

TEST_CASE("a GGUF that lies about counts, sizes or offsets is refused by name") {
  const Bytes good = TinyGguf().file.bytes();
  const std::string v = "blk.0.attn_v.weight";
  SECTION("tensor count") { refuses(overwritten<uint64_t>(good, "GGUF", 4, 1ull << 60), ErrorCode::corrupt, {"tensors"}); }
  SECTION("key count") { refuses(overwritten<uint64_t>(good, "GGUF", 12, ~0ull), ErrorCode::corrupt, {"keys"}); }
  SECTION("one tensor too many") {
    refuses(overwritten<uint64_t>(good, "GGUF", 4, 13), ErrorCode::corrupt, {"offset"});
  }
  SECTION("a string of 8 EiB") {
    refuses(overwritten<uint64_t>(good, "general.architecture", 4, 1ull << 63), ErrorCode::corrupt, {"claims"});
  }
  SECTION("an array of 2^61 numbers") {
    GgufMaker file = TinyGguf().file;
    file.key_texts("tokenizer.ggml.tokens", {"a", "b"});
    refuses(overwritten<uint64_t>(file.bytes(), "tokenizer.ggml.tokens", 8, 1ull << 61), ErrorCode::corrupt, {"array"});
  }
  SECTION("an unknown value type") {
    refuses(overwritten<uint32_t>(good, "llama.block_count", 0, 77), ErrorCode::corrupt, {"llama.block_count"});
  }
  SECTION("dimensions") { refuses(overwritten<uint32_t>(good, v, kDimensionsAt, 1000), ErrorCode::corrupt, {v.c_str()}); }
  SECTION("a size that overflows") {
    refuses(overwritten<uint64_t>(good, v, kColsAt, 1ull << 62), ErrorCode::corrupt, {v.c_str(), "shape"});
  }
  SECTION("a wrong shape") {
    refuses(overwritten<uint64_t>(good, v, kColsAt, 32), ErrorCode::corrupt, {v.c_str(), "shape", "64x32"});
  }
  SECTION("a row that ends inside a block") {
    refuses(overwritten<uint64_t>(good, v, kColsAt, 33), ErrorCode::corrupt, {v.c_str()});
  }
  SECTION("an offset past the end") {
    refuses(overwritten<uint64_t>(good, v, kOffsetAt, 1ull << 40), ErrorCode::corrupt, {v.c_str(), "offset"});
  }
  SECTION("an offset that wraps") {
    refuses(overwritten<uint64_t>(good, v, kOffsetAt, ~0ull - 31), ErrorCode::corrupt, {v.c_str(), "offset"});
  }
  SECTION("two tensors in one place") {
    refuses(overwritten<uint64_t>(good, v, kOffsetAt, 0), ErrorCode::corrupt, {v.c_str(), "overlap"});
  }
  SECTION("an offset that is not aligned") {
    refuses(overwritten<uint64_t>(good, v, kOffsetAt, 1), ErrorCode::corrupt, {v.c_str(), "multiple"});
  }
}

TEST_CASE("a GGUF that is valid and not supported is refused by name") {
  const Bytes good = TinyGguf().file.bytes();
  SECTION("another architecture") {
    GgufMaker file;
    file.key_text("general.architecture", "mamba");
    refuses(file.bytes(), ErrorCode::unsupported, {"mamba", "llama"});
  }
  SECTION("another type") {
    refuses(overwritten<uint32_t>(good, "blk.0.attn_v.weight", kTypeAt, 20), ErrorCode::unsupported, {"IQ4_NL"});
  }
  SECTION("another version") { refuses(overwritten<uint32_t>(good, "GGUF", 0, 4), ErrorCode::unsupported, {"version 4"}); }
  SECTION("another format") { refuses({'P', 'K', 3, 4, 0, 0, 0, 0}, ErrorCode::corrupt, {"not a GGUF"}); }
  SECTION("experts") {
    GgufMaker file = TinyGguf().file;
    file.key_u32("llama.expert_count", 8);
    refuses(file.bytes(), ErrorCode::unsupported, {"experts"});
  }
}

TEST_CASE("a GGUF without one of its tensors or keys is refused by name") {
  TinyGguf model;
  SECTION("tensor") {
    model.file.tensors.erase("blk.0.ffn_up.weight");
    refuses(model.file.bytes(), ErrorCode::corrupt, {"blk.0.ffn_up.weight", "missing"});
  }
  SECTION("key") {
    GgufMaker file;
    file.key_text("general.architecture", "llama");
    refuses(file.bytes(), ErrorCode::corrupt, {"llama.block_count"});
  }
}

TEST_CASE("weights and scales that are not finite are refused with tensor, row and column") {
  const auto poisoned = [](GgmlType type, const char* name, size_t byte, uint32_t bits, size_t bytes) {
    TinyGguf model(type);
    std::memcpy(model.file.tensors.at(name).data.data() + byte, &bits, bytes);
    return model.file.bytes();
  };
  const char* v = "blk.0.attn_v.weight";
  refuses(poisoned(GgmlType::f32, v, (3 * 64 + 5) * 4, 0x7fc00000u, 4), ErrorCode::numeric, {v, "row 3", "column 5"});
  refuses(poisoned(GgmlType::f16, v, (3 * 64 + 5) * 2, 0x7c00u, 2), ErrorCode::numeric, {v, "row 3", "column 5"});
  refuses(poisoned(GgmlType::bf16, v, (3 * 64 + 5) * 2, 0xff80u, 2), ErrorCode::numeric, {v, "row 3", "column 5"});
  refuses(poisoned(GgmlType::q4_0, v, (3 * 2 + 1) * 18, 0x7e00u, 2), ErrorCode::numeric, {v, "scale", "row 3", "column 32"});
  refuses(poisoned(GgmlType::q4_1, v, (3 * 2 + 1) * 20 + 2, 0xfc00u, 2), ErrorCode::numeric, {v, "minimum", "row 3"});
  refuses(poisoned(GgmlType::q8_0, v, (3 * 2 + 1) * 34, 0x7c00u, 2), ErrorCode::numeric, {v, "scale", "row 3"});
  refuses(poisoned(GgmlType::f16, "output_norm.weight", 4 * 9, 0x7f800000u, 4), ErrorCode::numeric,
          {"output_norm.weight", "column 9"});
}

TEST_CASE("a limit on the file size ends an import with the tensor it reached and leaves the old output alone") {
  TempFolder folder;
  TinyGguf model(GgmlType::f32);
  constexpr uint32_t kManyTokens = 32768;  // 4 MiB as F16: more than any buffer of the writer
  for (const char* name : {"token_embd.weight", "output.weight"}) {
    model.file.tensors[name] = {{TinyGguf::kHidden, kManyTokens}, GgmlType::f32, Bytes(kManyTokens * TinyGguf::kHidden * 4)};
  }
  save(folder.file("model.gguf"), model.file.bytes());
  save(folder.file("model.sluice"), Bytes{'o', 'l', 'd'});
  struct rlimit before = {};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  struct rlimit small = before;
  small.rlim_cur = 6 * kMiB;
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
  import::Options options;
  options.source = folder.file("model.gguf");
  options.output = folder.file("model.sluice");
  options.weights = import::Weights::f16;
  const auto report = import::import_model(options);
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &before) == 0);
  std::signal(SIGXFSZ, handler);
  REQUIRE_FALSE(report);
  CHECK(report.error().code == ErrorCode::io);
  CHECK(report.error().os_code == EFBIG);
  CHECK(mentions(report.error(), "model.sluice"));
  CHECK(mentions(report.error(), "output.weight"));
  CHECK(entries_in(folder.path()) == 2);
  CHECK(std::filesystem::file_size(folder.file("model.sluice")) == 3);
}

TEST_CASE("source and output cannot be one file") {
  TempFolder folder;
  save(folder.file("model.gguf"), TinyGguf().file.bytes());
  import::Options options;
  options.source = options.output = folder.file("model.gguf");
  const auto report = import::import_model(options);
  REQUIRE_FALSE(report);
  CHECK(report.error().code == ErrorCode::usage);
}

TEST_CASE("the SmolLM2 file is kept exactly where it is there") {
  // tools/fetch-smollm2 gets it; the suite does not depend on the network.
  const std::string path = std::string(std::getenv("SLUICE_GOLDEN")) + "/../../models/SmolLM2-135M-Instruct.Q4_1.gguf";
  if (!std::filesystem::exists(path)) {
    WARN("skipped: " << path << " is not there");
    return;
  }
  TempFolder folder;
  import::Options options;
  options.source = path;
  options.output = folder.file("model.sluice");
  options.weights = import::Weights::keep;
  const auto report = import::import_model(options);
  REQUIRE(report);
  CHECK(report->requantized == 0);
  const auto container = storage::Container::open(options.output);
  REQUIRE(container);
  auto fd = open_file(path, O_RDONLY);
  REQUIRE(fd);
  const auto mapping = Mapping::file(fd->get(), std::filesystem::file_size(path), path);
  REQUIRE(mapping);
  const auto gguf = import::Gguf::parse(mapping->bytes(), path);
  REQUIRE(gguf);
  const auto source = [&](const char* name) {
    const import::GgufTensor* tensor = gguf->find(name);
    REQUIRE(tensor != nullptr);
    const auto type = *import::source_type_of_ggml(tensor->ggml_type);
    const uint64_t elems = tensor->shape[0] * tensor->shape[1];
    std::vector<float> values(elems);
    import::decode_to_float(type, mapping->bytes().subspan(tensor->offset, elems / import::block_elems(type) *
                                                                               import::block_bytes(type)), values);
    return values;
  };
  CHECK(same_bits(stored_weights(*container, Role::token_embedding, -1), source("token_embd.weight")));
  CHECK(same_bits(stored_weights(*container, Role::lm_head, -1), source("token_embd.weight")));
  CHECK(same_bits(stored_weights(*container, Role::down, 29), source("blk.29.ffn_down.weight")));
  const auto k = source("blk.7.attn_k.weight");
  const auto stored = stored_weights(*container, Role::k, 7);
  REQUIRE(stored.size() == k.size());
  std::vector<float> expected(k.size());
  for (uint32_t row = 0; row < 192; ++row) {
    std::copy_n(k.begin() + permuted_row(row, 64) * 576, 576, expected.begin() + row * 576);
  }
  CHECK(same_bits(stored, expected));
}
