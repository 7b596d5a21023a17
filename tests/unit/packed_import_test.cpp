// SPDX-License-Identifier: Apache-2.0
// Matrices published as INT4 into containers: every weight must be the one that the publisher's own arithmetic gives.
// The words are packed here from the descriptions of the formats, not by the importer's code.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <limits>
#include <numeric>
#include <random>

#include "checkpoint_folder.hpp"
#include "container_lies.hpp"
#include "import_fixture.hpp"
#include "storage/checksum.hpp"

using namespace sluice;
using namespace sluice::test;
using import::Weights;
using storage::PlaneKind;
using storage::Role;
using Json = nlohmann::json;

namespace {

enum class Form { gptq_v1, gptq_v2, awq, compressed };

struct Kind {
  Form form = Form::gptq_v1;
  uint32_t group = 32;  // 0: one per row
  bool symmetric = false;
  bool act_order = false;
  std::string scale_dtype = "F16";
  const char* name() const {
    constexpr const char* kNames[] = {"gptq v1", "gptq v2", "awq", "compressed-tensors"};
    return kNames[static_cast<int>(form)];
  }
};

// One matrix in full: what was packed and what it means.
struct Made {
  uint32_t rows = 0, cols = 0, group = 0, groups = 0;
  std::vector<uint8_t> codes, zeros;  // [rows][cols], [rows][groups]
  std::vector<float> scales;          // [rows][groups]
  std::vector<int32_t> g_idx;         // [cols]
  std::vector<float> values() const {
    std::vector<float> out(codes.size());
    for (uint32_t n = 0; n < rows; ++n) {
      for (uint32_t k = 0; k < cols; ++k) {
        const size_t at = size_t{n} * groups + static_cast<size_t>(g_idx[k]);
        out[size_t{n} * cols + k] =
            static_cast<float>(static_cast<int>(codes[size_t{n} * cols + k]) - static_cast<int>(zeros[at])) *
            scales[at];
      }
    }
    return out;
  }
};

Made make_matrix(uint32_t rows, uint32_t cols, const Kind& kind, std::mt19937& random) {
  Made m;
  m.rows = rows;
  m.cols = cols;
  m.group = kind.group == 0 ? cols : kind.group;
  m.groups = (cols + m.group - 1) / m.group;
  const auto below = [&](int end) { return std::uniform_int_distribution<int>(0, end - 1)(random); };
  for (uint32_t i = 0; i < rows * cols; ++i) m.codes.push_back(static_cast<uint8_t>(below(16)));
  for (uint32_t i = 0; i < rows * m.groups; ++i) {
    // gptq v1 stores z - 1, so its zero points are 1 to 16.
    const int zero = kind.symmetric ? 8 : kind.form == Form::gptq_v1 ? 1 + below(16) : below(16);
    m.zeros.push_back(static_cast<uint8_t>(zero));
    const float scale = std::uniform_real_distribution<float>(0.002f, 0.02f)(random) * (below(9) == 0 ? -1.0f : 1.0f);
    m.scales.push_back(kind.scale_dtype == "BF16" ? float_from_bf16(bf16_from_float(scale))
                                                  : float_from_half(half_from_float(scale)));
  }
  for (uint32_t k = 0; k < cols; ++k) m.g_idx.push_back(static_cast<int32_t>(k / m.group));
  if (kind.act_order) std::shuffle(m.g_idx.begin(), m.g_idx.end(), random);
  return m;
}

Bytes as_dtype(const std::vector<float>& values, const std::string& dtype) {
  Bytes out;
  for (const float value : values) {
    if (dtype == "F32") put(out, value);
    else put(out, dtype == "BF16" ? bf16_from_float(value) : half_from_float(value));
  }
  return out;
}

// Words [outer][inner] whose nibble i is nibble(outer, inner, i).
SafetensorsMaker::Tensor words(uint32_t outer, uint32_t inner,
                               const std::function<uint32_t(uint32_t, uint32_t, uint32_t)>& nibble) {
  Bytes out;
  for (uint32_t a = 0; a < outer; ++a) {
    for (uint32_t b = 0; b < inner; ++b) {
      uint32_t word = 0;
      for (uint32_t i = 0; i < 8; ++i) word |= nibble(a, b, i) << (4 * i);
      put(out, word);
    }
  }
  return {"I32", {outer, inner}, std::move(out)};
}

void put_matrix(SafetensorsMaker& file, const std::string& stem, const Made& m, const Kind& kind) {
  const auto code = [&](uint32_t n, uint32_t k) { return uint32_t{m.codes[size_t{n} * m.cols + k]}; };
  const auto zero = [&](uint32_t n, uint32_t g) { return uint32_t{m.zeros[size_t{n} * m.groups + g]}; };
  constexpr uint32_t kAwq[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  std::vector<float> by_group;  // [groups][rows]
  for (uint32_t g = 0; g < m.groups; ++g) {
    for (uint32_t n = 0; n < m.rows; ++n) by_group.push_back(m.scales[size_t{n} * m.groups + g]);
  }
  Bytes index;
  for (const int32_t g : m.g_idx) put(index, g);
  auto& tensors = file.tensors;
  tensors.erase(stem + ".weight");
  if (kind.form == Form::compressed) {
    tensors[stem + ".weight_packed"] = words(m.rows, (m.cols + 7) / 8, [&](uint32_t n, uint32_t r, uint32_t i) {
      return 8 * r + i < m.cols ? code(n, 8 * r + i) : 0u;
    });
    tensors[stem + ".weight_scale"] = {kind.scale_dtype, {m.rows, m.groups}, as_dtype(m.scales, kind.scale_dtype)};
    Bytes shape;
    put<int64_t>(shape, m.rows), put<int64_t>(shape, m.cols);
    tensors[stem + ".weight_shape"] = {"I64", {2}, shape};
    if (!kind.symmetric) {
      tensors[stem + ".weight_zero_point"] = words((m.rows + 7) / 8, m.groups, [&](uint32_t r, uint32_t g, uint32_t i) {
        return 8 * r + i < m.rows ? zero(8 * r + i, g) : 0u;
      });
    }
    if (kind.act_order) tensors[stem + ".weight_g_idx"] = {"I32", {m.cols}, index};
    return;
  }
  const bool awq = kind.form == Form::awq;
  if (awq) {
    tensors[stem + ".qweight"] =
        words(m.cols, m.rows / 8, [&](uint32_t k, uint32_t c, uint32_t i) { return code(8 * c + kAwq[i], k); });
  } else {
    tensors[stem + ".qweight"] =
        words(m.cols / 8, m.rows, [&](uint32_t r, uint32_t n, uint32_t i) { return code(n, 8 * r + i); });
    tensors[stem + ".g_idx"] = {"I32", {m.cols}, index};
  }
  tensors[stem + ".qzeros"] = words(m.groups, m.rows / 8, [&](uint32_t g, uint32_t c, uint32_t i) {
    return zero(8 * c + (awq ? kAwq[i] : i), g) - (kind.form == Form::gptq_v1 ? 1u : 0u);
  });
  tensors[stem + ".scales"] = {kind.scale_dtype, {m.groups, m.rows}, as_dtype(by_group, kind.scale_dtype)};
}

Json config_of(const Kind& kind) {
  const int group = kind.group == 0 ? -1 : static_cast<int>(kind.group);
  if (kind.form == Form::awq) {
    return {{"quant_method", "awq"}, {"bits", 4}, {"group_size", group}, {"zero_point", true}, {"version", "gemm"}};
  }
  if (kind.form == Form::compressed) {
    const Json weights = {{"num_bits", 4},
                          {"type", "int"},
                          {"actorder", kind.act_order ? Json("group") : Json()},
                          {"symmetric", kind.symmetric},
                          {"strategy", kind.group == 0 ? "channel" : "group"},
                          {"group_size", kind.group == 0 ? Json() : Json(group)}};
    return {{"quant_method", "compressed-tensors"},
            {"format", "pack-quantized"},
            {"config_groups", {{"group_0", {{"targets", {"Linear"}}, {"weights", weights}}}}}};
  }
  return {{"quant_method", "gptq"},     {"bits", 4},
          {"group_size", group},        {"sym", kind.symmetric},
          {"desc_act", kind.act_order}, {"checkpoint_format", kind.form == Form::gptq_v1 ? "gptq" : "gptq_v2"}};
}

const std::pair<Role, const char*> kMatrices[] = {
    {Role::q, "self_attn.q_proj"}, {Role::k, "self_attn.k_proj"}, {Role::down, "mlp.down_proj"}};

// The llama3 golden shapes (128 and 256 columns) with some matrices of layer 0 packed.
struct PackedFolder : Folder {
  std::map<Role, Made> made;

  PackedFolder(const Kind& kind, uint32_t seed) {
    std::mt19937 random(seed);
    config["quantization_config"] = config_of(kind);
    for (const auto& [role, name] : kMatrices) {
      const std::string stem = std::string("model.layers.0.") + name;
      const std::vector<uint64_t> shape = weights.tensors.at(stem + ".weight").shape;
      made[role] = make_matrix(static_cast<uint32_t>(shape[0]), static_cast<uint32_t>(shape[1]), kind, random);
      put_matrix(weights, stem, made[role], kind);
    }
  }

  SafetensorsMaker::Tensor& part(const std::string& name) { return weights.tensors.at("model.layers.0." + name); }
};

// Overwrites one element of a part.
void set_element(SafetensorsMaker::Tensor& tensor, size_t index, double value) {
  Bytes element;
  if (tensor.dtype == "I32") put(element, static_cast<int32_t>(value));
  else if (tensor.dtype == "I64") put(element, static_cast<int64_t>(value));
  else element = as_dtype({static_cast<float>(value)}, tensor.dtype);
  std::copy(element.begin(), element.end(), tensor.data.begin() + static_cast<ptrdiff_t>(index * element.size()));
}

// The stored weights with the permutation undone.
std::vector<float> weights_in_order(const storage::Container& container, Role role) {
  const storage::Tensor* tensor = container.find(role, 0);
  REQUIRE(tensor != nullptr);
  std::vector<float> stored = stored_weights(container, role, 0);
  const std::vector<std::byte> plane = read_plane(container, *tensor, PlaneKind::perm);
  if (plane.empty()) return stored;
  std::vector<uint32_t> perm(tensor->cols);
  std::memcpy(perm.data(), plane.data(), plane.size());
  std::vector<float> ordered(stored.size());
  for (size_t n = 0; n < tensor->rows; ++n) {
    for (size_t k = 0; k < tensor->cols; ++k) ordered[n * tensor->cols + perm[k]] = stored[n * tensor->cols + k];
  }
  return ordered;
}

}  // namespace

TEST_CASE("every published INT4 format, group and scale type imports to exactly its own weights") {
  const uint32_t seed = std::random_device{}();
  std::printf("seed %u\n", seed);
  size_t formats = 0;
  for (const Form form : {Form::gptq_v1, Form::gptq_v2, Form::awq, Form::compressed}) {
    for (const uint32_t group : {32u, 64u, 96u, 128u, 256u, 0u}) {
      for (const bool symmetric : {false, true}) {
        for (const bool act_order : {false, true}) {
          for (const std::string dtype : {"F16", "BF16", "F32"}) {
            const Kind kind{form, group, symmetric, act_order, dtype};
            if (act_order && form == Form::awq) continue;
            INFO("seed " << seed << ", " << kind.name() << ", group " << group << (symmetric ? ", symmetric" : "")
                         << (act_order ? ", act-order" : "") << ", scales " << dtype);
            PackedFolder folder(kind, seed);
            const auto report = folder.run();
            if (!report) FAIL(report.error().message);
            CHECK(report->requantized == 0);
            CHECK(folder.warnings_with("left out") == 0);
            const storage::Container container = folder.container();
            for (const auto& [role, made] : folder.made) {
              const storage::Tensor& tensor = *container.find(role, 0);
              CHECK(tensor.scheme == storage::Scheme::int4);
              CHECK((tensor.plane(PlaneKind::zeros) == nullptr) == symmetric);
              // Groups of a permuted row of one group have nothing to sort.
              CHECK((tensor.plane(PlaneKind::perm) != nullptr) == (act_order && made.groups > 1));
              CHECK(same_bits(weights_in_order(container, role), made.values()));
            }
            ++formats;
          }
        }
      }
    }
  }
  std::printf("%zu kinds of checkpoint\n", formats);
  CHECK(formats == 252);
}

TEST_CASE("scales beyond FP16's range stay exact by a power of two, and are refused where none serves") {
  Kind kind{Form::compressed, 128, true, false, "BF16"};
  PackedFolder folder(kind, 5);
  const auto rescale = [&](float factor, size_t step) {
    for (auto& [role, made] : folder.made) {
      for (size_t i = 0; i < made.scales.size(); i += step) made.scales[i] *= factor;
    }
    for (const auto& [role, name] : kMatrices) {
      put_matrix(folder.weights, std::string("model.layers.0.") + name, folder.made.at(role), kind);
    }
  };
  const auto set_all = [&](float scale) {
    for (auto& [role, made] : folder.made) std::fill(made.scales.begin(), made.scales.end(), scale);
    rescale(1, 1);
  };
  SECTION("all small") {
    rescale(0x1p-60f, 1);
    REQUIRE(folder.run());
    const storage::Container container = folder.container();
    for (const auto& [role, made] : folder.made) CHECK(same_bits(weights_in_order(container, role), made.values()));
  }
  SECTION("some small") {
    rescale(0x1p-60f, 2);
    refuses(folder, folder.run(), ErrorCode::unsupported,
            {"q_proj.weight_packed", "more range or more bits than FP16"});
  }
  SECTION("as small as a container's exponent reaches") {
    set_all(0x1p-118f);
    REQUIRE(folder.run());
    const storage::Container container = folder.container();
    for (const auto& [role, made] : folder.made) CHECK(same_bits(weights_in_order(container, role), made.values()));
  }
  SECTION("smaller") {
    set_all(0x1p-119f);
    refuses(folder, folder.run(), ErrorCode::unsupported,
            {"q_proj.weight_packed", "more range or more bits than FP16"});
  }
  SECTION("too many bits") {
    kind.scale_dtype = "F32";
    rescale(1.0f + 0x1p-20f, 1);
    refuses(folder, folder.run(), ErrorCode::unsupported, {"more range or more bits than FP16"});
  }
}

TEST_CASE("parts of a packed matrix that do not belong together are refused by name") {
  PackedFolder folder({Form::gptq_v1, 32, false, true, "F16"}, 6);
  const auto refused = [&](ErrorCode code, std::initializer_list<std::string> words) {
    refuses(folder, folder.run(), code, words);
  };
  const auto write_half = [&](const char* name, size_t index, uint16_t bits) {
    std::memcpy(folder.part(name).data.data() + 2 * index, &bits, 2);
  };
  const auto write_index = [&](size_t column, int32_t group) {
    std::memcpy(folder.part("mlp.down_proj.g_idx").data.data() + 4 * column, &group, 4);
  };
  SECTION("qweight of another shape") {
    folder.part("self_attn.q_proj.qweight") = {"I32", {8, 128}, Bytes(4096)};
    refused(ErrorCode::corrupt, {"q_proj.qweight", "8x128", "16x128"});
  }
  SECTION("scales of another number of groups") {
    folder.part("self_attn.k_proj.scales") = {"F16", {2, 64}, Bytes(256, 0x20)};
    refused(ErrorCode::corrupt, {"k_proj.scales", "2x64", "4x64"});
  }
  SECTION("g_idx of another length") {
    folder.part("mlp.down_proj.g_idx") = {"I32", {255}, Bytes(1020)};
    refused(ErrorCode::corrupt, {"down_proj.g_idx", "255", "256"});
  }
  SECTION("g_idx that leads out of the groups") {
    write_index(17, 1000);
    refused(ErrorCode::corrupt, {"down_proj.qweight", "g_idx puts column 17 into group 1000, there are 8"});
  }
  SECTION("g_idx with a negative group") {
    write_index(17, -1);
    refused(ErrorCode::corrupt, {"g_idx puts column 17 into group -1"});
  }
  SECTION("g_idx that fills a group twice") {
    for (size_t k = 0; k < 256; ++k) write_index(k, 0);
    refused(ErrorCode::corrupt, {"g_idx gives group 0 more or fewer than 32 columns"});
  }
  SECTION("qzeros missing") {
    folder.weights.tensors.erase("model.layers.0.self_attn.q_proj.qzeros");
    refused(ErrorCode::corrupt, {"q_proj.qzeros", "missing"});
  }
  SECTION("scales missing") {
    folder.weights.tensors.erase("model.layers.0.self_attn.q_proj.scales");
    refused(ErrorCode::corrupt, {"q_proj.scales", "missing"});
  }
  SECTION("qweight of another dtype") {
    folder.part("self_attn.q_proj.qweight").dtype = "F32";
    refused(ErrorCode::unsupported, {"q_proj.qweight", "F32"});
  }
  SECTION("a scale that is NaN") {
    write_half("self_attn.q_proj.scales", 128 + 5, 0x7e00);
    refused(ErrorCode::numeric, {"q_proj.qweight", "the scale of row 5, group 1 is nan"});
  }
  SECTION("a scale that is infinite") {
    write_half("self_attn.q_proj.scales", 0, 0x7c00);
    refused(ErrorCode::numeric, {"the scale of row 0, group 0 is inf"});
  }
  SECTION("a scale that is zero") {
    write_half("self_attn.q_proj.scales", 128 + 5, 0);
    refused(ErrorCode::numeric, {"the scale of row 5, group 1 is 0"});
  }
  SECTION("neither packed nor plain") {
    folder.weights.tensors.erase("model.layers.0.self_attn.q_proj.qweight");
    refused(ErrorCode::corrupt, {"q_proj.weight", "missing"});
  }
  SECTION("other weights wanted") {
    const auto report = folder.run(Weights::f16);
    refuses(folder, report, ErrorCode::usage, {"q_proj.qweight", "GPTQ INT4 already", "--weights int4 or keep"});
  }
}

TEST_CASE("weight_shape of compressed-tensors must be the matrix's") {
  PackedFolder folder({Form::compressed, 32, true, false, "F16"}, 7);
  const int64_t rows = 64;
  std::memcpy(folder.part("self_attn.q_proj.weight_shape").data.data(), &rows, sizeof rows);
  refuses(folder, folder.run(), ErrorCode::corrupt, {"q_proj.weight_shape", "64x128", "128x128"});
  set_element(folder.part("self_attn.q_proj.weight_shape"), 0, 128);
  set_element(folder.part("self_attn.q_proj.weight_shape"), 1, 64);
  refuses(folder, folder.run(), ErrorCode::corrupt, {"q_proj.weight_shape", "says 128x64", "128x128"});
}

// Of k_proj, 64x128. A transposed shape, or one of another rank, has the right number of bytes.
TEST_CASE("every part of a packed matrix must have the shape that its format gives it") {
  const struct {
    Form form;
    uint32_t group;
    const char* part;
    std::vector<uint64_t> shape;
    const char* needs;
  } cases[] = {
      {Form::gptq_v1, 32, "qweight", {128, 8}, "16x64"},  // awq's
      {Form::gptq_v1, 32, "qzeros", {4, 16}, "4x8"},
      {Form::gptq_v2, 32, "qzeros", {8, 4}, "4x8"},
      {Form::gptq_v1, 32, "scales", {64, 4}, "4x64"},
      {Form::gptq_v1, 0, "scales", {4, 64}, "1x64"},
      {Form::gptq_v1, 0, "scales", {64}, "1x64"},
      {Form::gptq_v1, 32, "g_idx", {1, 128}, "128"},
      {Form::awq, 32, "qweight", {16, 64}, "128x8"},  // gptq's
      {Form::awq, 32, "qzeros", {8, 4}, "4x8"},
      {Form::awq, 32, "scales", {64, 4}, "4x64"},
      {Form::compressed, 32, "weight_packed", {16, 64}, "64x16"},
      {Form::compressed, 32, "weight_packed", {64, 128}, "64x16"},
      {Form::compressed, 32, "weight_scale", {4, 64}, "64x4"},
      {Form::compressed, 0, "weight_scale", {64}, "64x1"},
      {Form::compressed, 32, "weight_zero_point", {64, 4}, "8x4"},
      {Form::compressed, 32, "weight_zero_point", {4, 8}, "8x4"},
      {Form::compressed, 32, "weight_g_idx", {64}, "128"},
      {Form::compressed, 32, "weight_shape", {3}, "2"},
  };
  for (const auto& [form, group, part, shape, needs] : cases) {
    const Kind kind{form, group, false, form != Form::awq, "F16"};
    PackedFolder folder(kind, 12);
    SafetensorsMaker::Tensor& tensor = folder.part(std::string("self_attn.k_proj.") + part);
    const auto elements = [&] {
      return std::accumulate(tensor.shape.begin(), tensor.shape.end(), uint64_t{1}, std::multiplies<>());
    };
    const size_t element_bytes = tensor.data.size() / elements();
    tensor.shape = shape;
    tensor.data.resize(elements() * element_bytes);
    std::string has;
    for (const uint64_t size : shape) has += (has.empty() ? "" : "x") + std::to_string(size);
    INFO(kind.name() << ", " << part << " of " << has);
    const auto report = folder.run();
    refuses(folder, report, ErrorCode::corrupt,
            {std::string("k_proj.") + part + '"',
             "has shape " + has + ", a matrix of 64x128 in groups of " + (group == 0 ? "128" : "32") + " needs "});
    CHECK(report.error().message.ends_with(std::string(" needs ") + needs));
  }
}

TEST_CASE("every part of a packed matrix must be there, and of a dtype that its format has") {
  const struct {
    Form form;
    bool symmetric;
    const char* part;
    const char* dtype;  // of as many bytes; nullptr: the part is missing
    const char* supported;
  } cases[] = {
      {Form::gptq_v1, true, "qzeros", nullptr, ""},  // they are stored in any case
      {Form::gptq_v2, true, "qzeros", nullptr, ""},
      {Form::awq, false, "qzeros", nullptr, ""},
      {Form::awq, true, "scales", nullptr, ""},
      {Form::compressed, true, "weight_scale", nullptr, ""},
      {Form::compressed, false, "weight_zero_point", nullptr, ""},
      {Form::gptq_v1, false, "g_idx", nullptr, ""},  // without it columns would be taken as they lie
      {Form::gptq_v2, true, "g_idx", nullptr, ""},
      {Form::compressed, true, "weight_g_idx", nullptr, ""},
      {Form::gptq_v1, false, "scales", "I16", "F16, BF16, F32"},
      {Form::gptq_v1, false, "qzeros", "F32", "I32"},
      {Form::gptq_v1, false, "g_idx", "F32", "I32"},
      {Form::awq, false, "qweight", "F32", "I32"},
      {Form::awq, false, "qzeros", "F32", "I32"},
      {Form::awq, false, "scales", "I16", "F16, BF16, F32"},
      {Form::compressed, false, "weight_packed", "F32", "I32"},
      {Form::compressed, false, "weight_scale", "I16", "F16, BF16, F32"},
      {Form::compressed, false, "weight_zero_point", "F32", "I32"},
      {Form::compressed, false, "weight_g_idx", "F32", "I32"},
      {Form::compressed, false, "weight_shape", "F64", "I64, I32"},
  };
  for (const auto& [form, symmetric, part, dtype, supported] : cases) {
    const Kind kind{form, 32, symmetric, form != Form::awq, "F16"};
    PackedFolder folder(kind, 13);
    const std::string name = std::string("self_attn.k_proj.") + part;
    INFO(kind.name() << ", " << part << (dtype == nullptr ? " missing" : std::string(" of ") + dtype));
    if (dtype == nullptr) {
      folder.weights.tensors.erase("model.layers.0." + name);
      refuses(folder, folder.run(), ErrorCode::corrupt, {name + '"', "is missing, although"});
    } else {
      folder.part(name).dtype = dtype;
      refuses(folder, folder.run(), ErrorCode::unsupported,
              {name + '"', std::string("is of dtype \"") + dtype + "\"; supported is " + supported});
    }
  }
}

// Of k_proj, which has 64 rows and 4 groups.
TEST_CASE("a scale or a group that cannot be is refused with its place, in every format and scale type") {
  const auto nan = std::numeric_limits<double>::quiet_NaN(), infinite = std::numeric_limits<double>::infinity();
  const struct {
    Form form;
    const char* scale_dtype;
    const char* part;
    size_t index;
    double value;
    const char* says;
  } cases[] = {
      {Form::awq, "F16", "scales", 64 + 5, nan, "the scale of row 5, group 1 is nan"},
      {Form::awq, "BF16", "scales", 64 + 5, 0, "the scale of row 5, group 1 is 0;"},
      {Form::gptq_v2, "F32", "scales", 64 + 5, -0.0, "the scale of row 5, group 1 is -0;"},
      {Form::compressed, "F16", "weight_scale", 4 * 5 + 1, 0, "the scale of row 5, group 1 is 0;"},
      {Form::compressed, "BF16", "weight_scale", 4 * 5 + 1, -infinite, "the scale of row 5, group 1 is -inf"},
      {Form::compressed, "F32", "weight_scale", 4 * 63 + 3, nan, "the scale of row 63, group 3 is nan"},
      {Form::gptq_v1, "F16", "g_idx", 17, 4, "g_idx puts column 17 into group 4, there are 4"},
      {Form::compressed, "F16", "weight_g_idx", 127, 4, "g_idx puts column 127 into group 4, there are 4"},
      {Form::compressed, "F16", "weight_g_idx", 0, -1, "g_idx puts column 0 into group -1, there are 4"},
      // Columns are in order: 40 leaves group 1 for its neighbours.
      {Form::gptq_v2, "F16", "g_idx", 40, 2, "g_idx gives group 1 more or fewer than 32 columns"},
      {Form::gptq_v1, "F16", "g_idx", 40, 0, "g_idx gives group 0 more or fewer than 32 columns"},
  };
  for (const auto& [form, scale_dtype, part, index, value, says] : cases) {
    const bool compressed = form == Form::compressed;
    const Kind kind{form, 32, false, compressed, scale_dtype};  // with weight_g_idx
    PackedFolder folder(kind, 14);
    SafetensorsMaker::Tensor& tensor = folder.part(std::string("self_attn.k_proj.") + part);
    set_element(tensor, index, value);
    INFO(kind.name() << ", " << scale_dtype << ", " << part << "[" << index << "] = " << value);
    refuses(folder, folder.run(), tensor.dtype == "I32" ? ErrorCode::corrupt : ErrorCode::numeric,
            {compressed ? "k_proj.weight_packed\"" : "k_proj.qweight\"", says});
  }
}

TEST_CASE("a matrix whose rows do not come by eights cannot be packed by them") {
  for (const Form form : {Form::gptq_v1, Form::awq}) {
    PackedFolder folder({form, 32, false, false, "F16"}, 15);
    SafetensorsMaker::Tensor& embedding = folder.weights.tensors.at("model.embed_tokens.weight");
    embedding.data.resize(embedding.data.size() / 512 * 516);
    embedding.shape[0] = 516;
    folder.weights.tensors["lm_head.qweight"] = {"I32", {16, 516}, Bytes(4 * 16 * 516)};
    refuses(folder, folder.run(), ErrorCode::corrupt,
            {"lm_head.qweight\"", "a matrix of 516x128 cannot be packed by eights"});
  }
}

TEST_CASE("a packed lm_head stays INT4, and is refused where something else is asked for it alone") {
  const Kind kind{Form::compressed, 32, true, false, "F16"};
  PackedFolder folder(kind, 16);
  std::mt19937 random(16);
  put_matrix(folder.weights, "lm_head", make_matrix(512, 128, kind, random), kind);
  REQUIRE(folder.run());
  CHECK(folder.container().find(Role::lm_head)->scheme == storage::Scheme::int4);
  import::Options options;
  options.source = folder.place.path();
  options.output = folder.place.file("out.sluice");
  options.lm_head = Weights::int8;
  std::filesystem::remove(options.output);
  refuses(folder, import::import_model(options), ErrorCode::usage,
          {"lm_head.weight_packed\"", "is compressed-tensors INT4 already", "--lm-head int4 or keep"});
}

TEST_CASE("a packed embedding is refused at once, tied or not") {
  const Kind kind{Form::gptq_v1, 32, true, false, "F16"};
  for (const bool tied : {false, true}) {
    PackedFolder folder(kind, 17);
    std::mt19937 random(17);
    folder.config["tie_word_embeddings"] = tied;
    put_matrix(folder.weights, "model.embed_tokens", make_matrix(512, 128, kind, random), kind);
    folder.weights.tensors.erase("model.embed_tokens.weight");
    refuses(folder, folder.run(), ErrorCode::unsupported,
            {"model.embed_tokens.qweight\"", "the embedding is packed in 4 bits"});
  }
}

TEST_CASE("settings that are not those of 4-bit groups are refused by name") {
  const std::string group_0 = "/config_groups/group_0";
  const Json other_zeros = {{"weights", {{"num_bits", 4}, {"symmetric", true}, {"group_size", 32}}}};
  const struct {
    Form form;
    std::string key;  // a JSON pointer into quantization_config
    Json value;
    ErrorCode code;
    std::string says;
  } cases[] = {
      {Form::gptq_v1, "/group_size", 0, ErrorCode::unsupported, "\"group_size\" is 0, where multiples of 32"},
      {Form::gptq_v1, "/group_size", -32, ErrorCode::unsupported, "\"group_size\" is -32,"},
      {Form::gptq_v1, "/group_size", 16, ErrorCode::unsupported, "\"group_size\" is 16,"},
      {Form::gptq_v1, "/group_size", 32.5, ErrorCode::unsupported, "\"group_size\" is 32.5,"},
      {Form::gptq_v1, "/group_size", 1 << 25, ErrorCode::unsupported, "\"group_size\" is 33554432,"},
      {Form::gptq_v1, "/group_size", "32", ErrorCode::corrupt, "\"group_size\" is \"\\x2232\\x22\", expected a number"},
      {Form::gptq_v1, "/bits", 3, ErrorCode::unsupported, "the weights have 3 bits"},
      {Form::gptq_v1, "/bits", "4", ErrorCode::corrupt, "\"bits\" is \"\\x224\\x22\", expected a whole number"},
      {Form::gptq_v1, "/bits", -4, ErrorCode::corrupt, "\"bits\" is \"-4\", expected a whole number"},
      {Form::gptq_v1, "/checkpoint_format", "gguf", ErrorCode::unsupported, "GPTQ in checkpoint_format \"gguf\""},
      {Form::gptq_v1, "/is_marlin_format", true, ErrorCode::unsupported, "GPTQ in checkpoint_format \"marlin\""},
      {Form::gptq_v1, "/sym", 1, ErrorCode::corrupt, "\"sym\" is \"1\", expected true or false"},
      {Form::gptq_v1, "", Json::array({4, 32}), ErrorCode::unsupported, "quantized by \"\""},
      {Form::awq, "/bits", 8, ErrorCode::unsupported, "the weights have 8 bits"},
      {Form::awq, "/w_bit", 3, ErrorCode::unsupported, "the weights have 3 bits"},
      {Form::awq, "/group_size", 48, ErrorCode::unsupported, "\"group_size\" is 48,"},
      {Form::awq, "", {{"quant_method", "awq"}, {"w_bit", 4}, {"q_group_size", 48}}, ErrorCode::unsupported,
       "\"q_group_size\" is 48,"},
      {Form::awq, "/zero_point", "no", ErrorCode::corrupt, "expected true or false"},
      {Form::compressed, "/format", nullptr, ErrorCode::unsupported, "compressed-tensors in format \"\""},
      {Form::compressed, "/config_groups", nullptr, ErrorCode::corrupt, "\"config_groups\" is missing or empty"},
      {Form::compressed, group_0 + "/weights", nullptr, ErrorCode::corrupt,
       "a group of \"config_groups\" has no \"weights\""},
      {Form::compressed, group_0 + "/weights/num_bits", 8, ErrorCode::unsupported, "the weights have 8 bits"},
      {Form::compressed, group_0 + "/weights/num_bits", nullptr, ErrorCode::corrupt, "\"num_bits\" is missing"},
      {Form::compressed, group_0 + "/weights/group_size", 0, ErrorCode::unsupported, "\"group_size\" is 0,"},
      {Form::compressed, group_0 + "/weights/group_size", 48, ErrorCode::unsupported, "\"group_size\" is 48,"},
      {Form::compressed, group_0 + "/output_activations", {{"num_bits", 8}}, ErrorCode::unsupported,
       "the activations are quantized too"},
      {Form::compressed, "/config_groups/group_1", other_zeros, ErrorCode::unsupported, "config_groups that differ"},
  };
  for (const auto& [form, key, value, code, says] : cases) {
    const Kind kind{form, 32, false, false, "F16"};
    PackedFolder folder(kind, 17);
    folder.config["quantization_config"][Json::json_pointer(key)] = value;
    INFO(kind.name() << ", \"" << key << "\": " << value.dump());
    refuses(folder, folder.run(), code, {folder.place.file("config.json"), says});
  }
}

TEST_CASE("settings of other matrices are refused with the first part that does not fit them") {
  const struct {
    Form form;
    const char* key;
    Json value;
    const char* says;
  } cases[] = {
      {Form::gptq_v1, "/group_size", 64,
       "q_proj.scales\": has shape 4x128, a matrix of 128x128 in groups of 64 needs 2x128"},
      {Form::gptq_v1, "/group_size", -1,
       "q_proj.scales\": has shape 4x128, a matrix of 128x128 in groups of 128 needs 1x128"},
      {Form::compressed, "/config_groups/group_0/weights/strategy", "channel",
       "q_proj.weight_scale\": has shape 128x4, a matrix of 128x128 in groups of 128 needs 128x1"},
      {Form::gptq_v1, "/quant_method", "awq", "q_proj.qweight\": has shape 16x128"},
      {Form::awq, "/quant_method", "gptq", "q_proj.qweight\": has shape 128x16"},
      {Form::gptq_v1, "", nullptr, "\"model.layers.0.self_attn.q_proj.weight\" is missing"},  // plain weights
  };
  for (const auto& [form, key, value, says] : cases) {
    const Kind kind{form, 32, false, false, "F16"};
    PackedFolder folder(kind, 18);
    folder.config["quantization_config"][Json::json_pointer(key)] = value;
    INFO(kind.name() << ", \"" << key << "\": " << value.dump());
    refuses(folder, folder.run(), ErrorCode::corrupt, {folder.place.path(), says});
  }
}

TEST_CASE("what is wrong in a file of older writers is refused with that file's name") {
  const struct {
    const char *name, *content;
    ErrorCode code;
    const char* says;
  } cases[] = {
      {"quantize_config.json", R"({"bits": 8, "group_size": 32})", ErrorCode::unsupported, "the weights have 8 bits"},
      {"quantize_config.json", R"({"bits": 4,)", ErrorCode::corrupt, "not valid JSON"},
      {"quantize_config.json", R"([4, 32])", ErrorCode::corrupt, "the top of the JSON is not an object"},
      {"quant_config.json", R"({"w_bit": 4, "q_group_size": 0})", ErrorCode::unsupported, "\"q_group_size\" is 0,"},
  };
  for (const auto& [name, content, code, says] : cases) {
    PackedFolder folder({Form::gptq_v1, 32, false, false, "F16"}, 19);
    folder.config.erase("quantization_config");
    folder.write(name, content);
    INFO(name << ": " << content);
    refuses(folder, folder.run(), code, {folder.place.file(name), says});
  }
}

TEST_CASE("quantizations that are not read are refused with what to import instead") {
  PackedFolder folder({Form::gptq_v1, 32, false, false, "F16"}, 8);
  Json& config = folder.config["quantization_config"];
  const auto refused = [&](std::initializer_list<std::string> words, ErrorCode code = ErrorCode::unsupported) {
    const auto report = folder.run();
    refuses(folder, report, code, words);
    if (code == ErrorCode::unsupported) CHECK(mentions(report.error(), "or the F16 or BF16 original"));
  };
  SECTION("fp8") {
    config = {{"quant_method", "fp8"}, {"weight_block_size", {128, 128}}};
    refused({"config.json", "quantized by \"fp8\""});
  }
  SECTION("bitsandbytes") {
    config = {{"quant_method", "bitsandbytes"}, {"load_in_4bit", true}};
    refused({"quantized by \"bitsandbytes\""});
  }
  SECTION("no method") {
    config = Json{{"bits", 4}};
    refused({"quantized by \"\""});
  }
  SECTION("8 bits") {
    config["bits"] = 8;
    refused({"8 bits"});
  }
  SECTION("bits missing") {
    config.erase("bits");
    refused({"\"bits\" is missing"}, ErrorCode::corrupt);
  }
  SECTION("a group that is no multiple of 32") {
    config["group_size"] = 48;
    refused({"\"group_size\" is 48"});
  }
  SECTION("marlin") {
    config["checkpoint_format"] = "marlin";
    refused({"marlin"});
  }
  SECTION("settings of single modules") {
    config["dynamic"] = {{"+:.*q_proj", {{"bits", 8}}}};
    refused({"dynamic", "+:.*q_proj"});
  }
  SECTION("AWQ gemv") {
    config = config_of({Form::awq, 32, false, false, "F16"});
    config["version"] = "gemv";
    refused({"AWQ in version \"gemv\""});
  }
  SECTION("compressed-tensors in FP8") {
    config = config_of({Form::compressed, 32, true, false, "F16"});
    config["format"] = "float-quantized";
    refused({"float-quantized"});
  }
  SECTION("compressed-tensors with FP4 weights") {
    config = config_of({Form::compressed, 32, true, false, "F16"});
    config["config_groups"]["group_0"]["weights"]["type"] = "float";
    refused({"weights of type \"float\""});
  }
  SECTION("quantized activations") {
    config = config_of({Form::compressed, 32, true, false, "F16"});
    config["config_groups"]["group_0"]["input_activations"] = {{"num_bits", 8}};
    refused({"activations are quantized too"});
  }
  SECTION("no groups") {
    config = config_of({Form::compressed, 32, true, false, "F16"});
    config["config_groups"] = Json::object();
    refused({"config_groups"}, ErrorCode::corrupt);
  }
  SECTION("groups that differ") {
    config = config_of({Form::compressed, 32, true, false, "F16"});
    config["config_groups"]["group_1"] = config["config_groups"]["group_0"];
    config["config_groups"]["group_1"]["weights"]["group_size"] = 64;
    refused({"config_groups that differ"});
  }
  SECTION("a blockwise strategy") {
    config = config_of({Form::compressed, 32, true, false, "F16"});
    config["config_groups"]["group_0"]["weights"]["strategy"] = "tensor_group";
    refused({"strategy \"tensor_group\""});
  }
  SECTION("sparse weights") {
    config = config_of({Form::compressed, 32, true, false, "F16"});
    config["sparsity_config"] = {{"format", "sparse-24-bitmask"}};
    refused({"sparse-24-bitmask"});
  }
}

TEST_CASE("a column permutation that leads out of its matrix, or is damaged, is refused") {
  PackedFolder folder({Form::gptq_v1, 32, false, true, "F16"}, 11);
  REQUIRE(folder.run());
  const storage::Container container = folder.container();
  CHECK(container.check_permutations());
  const storage::Tensor* tensor = container.find(Role::q, 0);
  REQUIRE(tensor != nullptr);
  const std::string path = container.path() + "-changed";
  std::vector<std::byte> bytes = file_bytes_of(container.path());
  const uint32_t beyond = tensor->cols;
  std::byte* const entry = bytes.data() + tensor->plane(PlaneKind::perm)->offset + 5 * sizeof beyond;
  std::memcpy(entry, &beyond, sizeof beyond);
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(bytes.data()),
                                              static_cast<std::streamsize>(bytes.size()));
  const auto error_of = [&] {
    const auto changed = storage::Container::open(path);
    REQUIRE(changed);
    const Status checked = changed->check_permutations();
    REQUIRE_FALSE(checked);
    CHECK(checked.error().code == ErrorCode::corrupt);
    return checked.error();
  };
  CHECK(mentions(error_of(), "checksum"));
  rewrite_manifest(path, path, [&](storage::Manifest& manifest) {
    for (storage::Tensor& one : manifest.tensors) {
      if (one.name != tensor->name) continue;
      for (storage::Plane& plane : one.planes) {
        if (plane.kind == PlaneKind::perm) plane.block_sums[0] = storage::checksum({bytes.data() + plane.offset, plane.bytes});
      }
    }
  }, false);
  CHECK(mentions(error_of(), "q_proj.weight': its column permutation has column 128 of 128"));
}

TEST_CASE("folders of older writers say how they were quantized in a file of its own") {
  PackedFolder gptq({Form::gptq_v1, 32, false, true, "F16"}, 9);
  gptq.write("quantize_config.json", R"({"bits": 4, "group_size": 32, "desc_act": true, "sym": false})");
  gptq.config.erase("quantization_config");
  REQUIRE(gptq.run());
  CHECK(same_bits(weights_in_order(gptq.container(), Role::down), gptq.made.at(Role::down).values()));

  PackedFolder awq({Form::awq, 64, false, false, "F16"}, 10);
  awq.write("quant_config.json", R"({"w_bit": 4, "q_group_size": 64, "zero_point": true, "version": "GEMM"})");
  awq.config.erase("quantization_config");
  REQUIRE(awq.run());
  CHECK(same_bits(weights_in_order(awq.container(), Role::down), awq.made.at(Role::down).values()));
}
