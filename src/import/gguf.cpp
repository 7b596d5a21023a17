// SPDX-License-Identifier: Apache-2.0
#include "import/gguf.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "base/units.hpp"
#include "import/text.hpp"

namespace sluice::import {
namespace {

// Caps far above any real file, so that a lying count ends here and not in an allocation.
constexpr uint64_t kMaxTensors = 1u << 17;
constexpr uint64_t kMaxKeys = 1u << 16;
constexpr uint64_t kMaxNameBytes = 1024;
constexpr uint64_t kMaxStringBytes = 64 * kMiB;
constexpr uint64_t kMaxArrayElements = 1u << 26;
constexpr uint64_t kMaxAlignment = 1u << 20;
constexpr uint32_t kMaxDimensions = 4;
constexpr uint64_t kDefaultAlignment = 32;

// Bytes of one value of a fixed-size type; 0 for strings, arrays and unknown types.
uint64_t type_bytes(GgufType type) {
  switch (type) {
    case GgufType::u8:
    case GgufType::i8:
    case GgufType::boolean: return 1;
    case GgufType::u16:
    case GgufType::i16: return 2;
    case GgufType::u32:
    case GgufType::i32:
    case GgufType::f32: return 4;
    case GgufType::u64:
    case GgufType::i64:
    case GgufType::f64: return 8;
    default: return 0;
  }
}

template <class T>
T read_as(const std::byte* data) {
  T value;
  std::memcpy(&value, data, sizeof value);
  return value;
}

// A position in the file's bytes that never runs past their end.
class Cursor {
 public:
  Cursor(std::span<const std::byte> data, const std::string& path) : data_(data), path_(path) {}

  uint64_t offset() const { return offset_; }

  Result<std::span<const std::byte>> take(uint64_t bytes, const char* what) {
    if (bytes > data_.size() - offset_) {
      return fail(ErrorCode::corrupt,
                  fmt::format("{}: the file ends inside {} at offset {}: {} bytes wanted, {} left; it is truncated or "
                              "damaged, download it again",
                              path_, what, offset_, bytes, data_.size() - offset_));
    }
    const auto taken = data_.subspan(offset_, bytes);
    offset_ += bytes;
    return taken;
  }

  template <class T>
  Result<T> number(const char* what) {
    SLUICE_TRY_ASSIGN(bytes, take(sizeof(T), what));
    return read_as<T>(bytes.data());
  }

  Result<std::string_view> string(uint64_t most, const char* what) {
    SLUICE_TRY_ASSIGN(length, number<uint64_t>(what));
    if (length > most) {
      return fail(ErrorCode::corrupt, fmt::format("{}: {} at offset {} claims {} bytes, at most {} are possible", path_,
                                                  what, offset_ - 8, length, most));
    }
    SLUICE_TRY_ASSIGN(bytes, take(length, what));
    return std::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  }

 private:
  std::span<const std::byte> data_;
  const std::string& path_;
  uint64_t offset_ = 0;
};

Result<GgufValue> read_array(Cursor& cursor, const std::string& path, std::string_view key) {
  SLUICE_TRY_ASSIGN(type_number, cursor.number<uint32_t>("an array type"));
  SLUICE_TRY_ASSIGN(count, cursor.number<uint64_t>("an array length"));
  GgufValue value;
  value.type = static_cast<GgufType>(type_number);
  value.array = true;
  value.count = count;
  if (count > kMaxArrayElements) {
    return fail(ErrorCode::corrupt, fmt::format("{}: key {} claims an array of {} elements, at most {} are possible",
                                                path, in_quotes(key), count, kMaxArrayElements));
  }
  if (value.type == GgufType::string) {
    // The elements stay where they are; this walk makes sure that a later one cannot leave the file.
    Cursor start = cursor;
    for (uint64_t i = 0; i < count; ++i) SLUICE_TRY(cursor.string(kMaxStringBytes, "a string array"));
    SLUICE_TRY_ASSIGN(bytes, start.take(cursor.offset() - start.offset(), "a string array"));
    value.bytes = bytes;
    return value;
  }
  const uint64_t each = type_bytes(value.type);
  if (each == 0) {
    return fail(ErrorCode::corrupt, fmt::format("{}: key {} is an array of unknown type {}", path, in_quotes(key),
                                                type_number));
  }
  SLUICE_TRY_ASSIGN(bytes, cursor.take(count * each, "an array"));
  value.bytes = bytes;
  return value;
}

Result<GgufValue> read_value(Cursor& cursor, const std::string& path, std::string_view key) {
  SLUICE_TRY_ASSIGN(type_number, cursor.number<uint32_t>("a value type"));
  GgufValue value;
  value.type = static_cast<GgufType>(type_number);
  if (value.type == GgufType::array) return read_array(cursor, path, key);
  if (value.type == GgufType::string) {
    SLUICE_TRY_ASSIGN(text, cursor.string(kMaxStringBytes, "a string value"));
    value.bytes = std::as_bytes(std::span(text.data(), text.size()));
    return value;
  }
  const uint64_t bytes = type_bytes(value.type);
  if (bytes == 0) {
    return fail(ErrorCode::corrupt,
                fmt::format("{}: key {} has the unknown value type {}", path, in_quotes(key), type_number));
  }
  SLUICE_TRY_ASSIGN(data, cursor.take(bytes, "a value"));
  value.bytes = data;
  return value;
}

Result<GgufTensor> read_tensor(Cursor& cursor, const std::string& path) {
  GgufTensor tensor;
  SLUICE_TRY_ASSIGN(name, cursor.string(kMaxNameBytes, "a tensor name"));
  tensor.name = name;
  SLUICE_TRY_ASSIGN(dimensions, cursor.number<uint32_t>("a tensor's dimensions"));
  if (dimensions == 0 || dimensions > kMaxDimensions) {
    return fail(ErrorCode::corrupt, fmt::format("{}: tensor {} claims {} dimensions, expected 1 to {}", path,
                                                in_quotes(name), dimensions, kMaxDimensions));
  }
  for (uint32_t i = 0; i < dimensions; ++i) {
    SLUICE_TRY_ASSIGN(size, cursor.number<uint64_t>("a tensor's shape"));
    tensor.shape.push_back(size);
  }
  SLUICE_TRY_ASSIGN(type, cursor.number<uint32_t>("a tensor's type"));
  SLUICE_TRY_ASSIGN(offset, cursor.number<uint64_t>("a tensor's offset"));
  tensor.ggml_type = type;
  tensor.offset = offset;
  return tensor;
}

// Bytes of a tensor of a type that import reads; nothing on overflow or if rows do not end on a block.
std::optional<uint64_t> tensor_bytes(const GgufTensor& tensor, SourceType type) {
  uint64_t elements = 1;
  for (const uint64_t size : tensor.shape) {
    if (__builtin_mul_overflow(elements, size, &elements)) return std::nullopt;
  }
  if (tensor.shape[0] % block_elems(type) != 0) return std::nullopt;
  uint64_t bytes = 0;
  if (__builtin_mul_overflow(elements / block_elems(type), uint64_t{block_bytes(type)}, &bytes)) return std::nullopt;
  return bytes;
}

std::optional<double> number_of(const GgufValue& value) {
  const std::byte* at = value.bytes.data();
  switch (value.type) {
    case GgufType::u8: return read_as<uint8_t>(at);
    case GgufType::i8: return read_as<int8_t>(at);
    case GgufType::u16: return read_as<uint16_t>(at);
    case GgufType::i16: return read_as<int16_t>(at);
    case GgufType::u32: return read_as<uint32_t>(at);
    case GgufType::i32: return read_as<int32_t>(at);
    case GgufType::f32: return static_cast<double>(read_as<float>(at));
    case GgufType::f64: return read_as<double>(at);
    case GgufType::u64: return static_cast<double>(read_as<uint64_t>(at));
    case GgufType::i64: return static_cast<double>(read_as<int64_t>(at));
    default: return std::nullopt;
  }
}

// Integers of any width, and nothing that is outside int64.
std::optional<int64_t> integer_of(GgufType type, const std::byte* at) {
  switch (type) {
    case GgufType::u8: return read_as<uint8_t>(at);
    case GgufType::i8: return read_as<int8_t>(at);
    case GgufType::u16: return read_as<uint16_t>(at);
    case GgufType::i16: return read_as<int16_t>(at);
    case GgufType::u32: return read_as<uint32_t>(at);
    case GgufType::i32: return read_as<int32_t>(at);
    case GgufType::i64: return read_as<int64_t>(at);
    case GgufType::u64: {
      const auto value = read_as<uint64_t>(at);
      if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return std::nullopt;
      return static_cast<int64_t>(value);
    }
    default: return std::nullopt;
  }
}

}  // namespace

Result<Gguf> Gguf::parse(std::span<const std::byte> file, const std::string& path) {
  Gguf gguf;
  gguf.path_ = path;
  Cursor cursor(file, path);
  SLUICE_TRY_ASSIGN(magic, cursor.take(4, "the magic"));
  if (std::memcmp(magic.data(), "GGUF", 4) != 0) {
    return fail(ErrorCode::corrupt, fmt::format("{}: not a GGUF file (it does not begin with \"GGUF\")", path));
  }
  SLUICE_TRY_ASSIGN(version, cursor.number<uint32_t>("the version"));
  if ((version & 0xffffu) == 0) {
    return fail(ErrorCode::unsupported, fmt::format("{}: a big-endian GGUF file; convert the model again on a "
                                                    "little-endian machine", path));
  }
  if (version != 2 && version != 3) {
    return fail(ErrorCode::unsupported,
                fmt::format("{}: GGUF version {}; this program reads 2 and 3, convert the model again", path, version));
  }
  gguf.version_ = version;
  SLUICE_TRY_ASSIGN(tensor_count, cursor.number<uint64_t>("the tensor count"));
  SLUICE_TRY_ASSIGN(key_count, cursor.number<uint64_t>("the key count"));
  if (tensor_count > kMaxTensors || key_count > kMaxKeys) {
    return fail(ErrorCode::corrupt, fmt::format("{}: the header claims {} tensors and {} keys, at most {} and {} are "
                                                "possible", path, tensor_count, key_count, kMaxTensors, kMaxKeys));
  }
  for (uint64_t i = 0; i < key_count; ++i) {
    SLUICE_TRY_ASSIGN(key, cursor.string(kMaxNameBytes, "a key"));
    SLUICE_TRY_ASSIGN(value, read_value(cursor, path, key));
    if (!gguf.values_.emplace(key, value).second) {
      return fail(ErrorCode::corrupt, fmt::format("{}: key {} is there twice", path, in_quotes(key)));
    }
  }
  for (uint64_t i = 0; i < tensor_count; ++i) {
    SLUICE_TRY_ASSIGN(tensor, read_tensor(cursor, path));
    if (!gguf.index_.emplace(tensor.name, gguf.tensors_.size()).second) {
      return fail(ErrorCode::corrupt, fmt::format("{}: tensor {} is there twice", path, in_quotes(tensor.name)));
    }
    gguf.tensors_.push_back(std::move(tensor));
  }
  SLUICE_TRY_ASSIGN(parts, gguf.unsigned_integer("split.count"));
  if (parts.value_or(0) > 1) {
    return fail(ErrorCode::unsupported, fmt::format("{}: one of {} parts of a split model; merge them first "
                                                    "(llama-gguf-split --merge)", path, *parts));
  }
  SLUICE_TRY_ASSIGN(alignment, gguf.unsigned_integer("general.alignment"));
  const uint64_t align = alignment.value_or(kDefaultAlignment);
  if (align == 0 || align > kMaxAlignment || (align & (align - 1)) != 0) {
    return fail(ErrorCode::corrupt, fmt::format("{}: general.alignment is {}, expected a power of two up to {}", path,
                                                align, kMaxAlignment));
  }
  SLUICE_TRY(gguf.check_tensors(file.size(), align_up(cursor.offset(), align), align));
  return gguf;
}

// Turns offsets into the data into offsets in the file, after making sure that no tensor lies outside or over another.
Status Gguf::check_tensors(uint64_t file_bytes, uint64_t data_offset, uint64_t alignment) {
  struct Run {
    uint64_t begin, end;
    const GgufTensor* tensor;
  };
  std::vector<Run> runs;
  const uint64_t data_bytes = file_bytes > data_offset ? file_bytes - data_offset : 0;
  for (GgufTensor& tensor : tensors_) {
    if (tensor.offset % alignment != 0) {
      return fail(ErrorCode::corrupt, fmt::format("{}: tensor {} begins at data offset {}, not a multiple of {}", path_,
                                                  in_quotes(tensor.name), tensor.offset, alignment));
    }
    if (tensor.offset > data_bytes) {
      return fail(ErrorCode::corrupt,
                  fmt::format("{}: tensor {} begins at data offset {}, but the file has {} bytes of data; it is "
                              "truncated or damaged, download it again",
                              path_, in_quotes(tensor.name), tensor.offset, data_bytes));
    }
    const uint64_t room = data_bytes - tensor.offset;
    const auto type = source_type_of_ggml(tensor.ggml_type);
    if (type) {
      const auto bytes = tensor_bytes(tensor, *type);
      if (!bytes || *bytes == 0) {
        return fail(ErrorCode::corrupt, fmt::format("{}: tensor {} has the impossible shape {} for {}", path_,
                                                    in_quotes(tensor.name), fmt::join(tensor.shape, "x"),
                                                    import::name_of(*type)));
      }
      if (*bytes > room) {
        return fail(ErrorCode::corrupt,
                    fmt::format("{}: tensor {} needs {} bytes at file offset {}, the file has {} there; it is "
                                "truncated or damaged, download it again",
                                path_, in_quotes(tensor.name), *bytes, data_offset + tensor.offset, room));
      }
      runs.push_back({tensor.offset, tensor.offset + *bytes, &tensor});
    }
    tensor.offset += data_offset;
  }
  std::sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < runs.size(); ++i) {
    if (runs[i].begin < runs[i - 1].end) {
      return fail(ErrorCode::corrupt, fmt::format("{}: tensors {} and {} overlap at file offset {}", path_,
                                                  in_quotes(runs[i - 1].tensor->name), in_quotes(runs[i].tensor->name),
                                                  data_offset + runs[i].begin));
    }
  }
  return {};
}

const GgufTensor* Gguf::find(std::string_view name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : &tensors_[found->second];
}

const GgufValue* Gguf::value(std::string_view key) const {
  const auto found = values_.find(key);
  return found == values_.end() ? nullptr : &found->second;
}

Unexpected Gguf::wrong_type(std::string_view key, std::string_view expected) const {
  return fail(ErrorCode::corrupt, fmt::format("{}: key {} is not {}", path_, in_quotes(key), expected));
}

Result<std::optional<uint64_t>> Gguf::unsigned_integer(std::string_view key) const {
  const GgufValue* found = value(key);
  if (found == nullptr) return std::optional<uint64_t>();
  // A few writers give one number per layer; the layers of the supported architectures are alike, so they must agree.
  const uint64_t each = type_bytes(found->type);
  if (each == 0 || found->count == 0) return wrong_type(key, "a whole number");
  std::optional<int64_t> first;
  for (uint64_t i = 0; i < found->count; ++i) {
    const auto integer = integer_of(found->type, found->bytes.data() + i * each);
    if (!integer || *integer < 0) return wrong_type(key, "a whole number of 0 or more");
    if (first && *first != *integer) {
      return fail(ErrorCode::unsupported, fmt::format("{}: key {} differs from layer to layer; such models are not "
                                                      "supported", path_, in_quotes(key)));
    }
    first = integer;
  }
  return std::optional<uint64_t>(static_cast<uint64_t>(*first));
}

Result<std::optional<double>> Gguf::number(std::string_view key) const {
  const GgufValue* found = value(key);
  if (found == nullptr) return std::optional<double>();
  if (found->array) return wrong_type(key, "a number");
  const auto number = number_of(*found);
  if (!number) return wrong_type(key, "a number");
  return number;
}

Result<std::optional<bool>> Gguf::boolean(std::string_view key) const {
  const GgufValue* found = value(key);
  if (found == nullptr) return std::optional<bool>();
  if (found->array || found->type != GgufType::boolean) return wrong_type(key, "true or false");
  return std::optional<bool>(found->bytes[0] != std::byte{0});
}

Result<std::string> Gguf::string(std::string_view key, std::string otherwise) const {
  const GgufValue* found = value(key);
  if (found == nullptr) return otherwise;
  if (found->array || found->type != GgufType::string) return wrong_type(key, "a string");
  return std::string(reinterpret_cast<const char*>(found->bytes.data()), found->bytes.size());
}

Result<std::vector<std::string>> Gguf::strings(std::string_view key) const {
  const GgufValue* found = value(key);
  if (found == nullptr) return std::vector<std::string>();
  if (!found->array || found->type != GgufType::string) return wrong_type(key, "an array of strings");
  std::vector<std::string> texts;
  texts.reserve(found->count);  // bounded: each took at least 8 bytes of the file
  uint64_t at = 0;
  for (uint64_t i = 0; i < found->count; ++i) {
    const auto length = read_as<uint64_t>(found->bytes.data() + at);
    texts.emplace_back(reinterpret_cast<const char*>(found->bytes.data() + at + 8), length);
    at += 8 + length;
  }
  return texts;
}

Result<std::vector<float>> Gguf::floats(std::string_view key) const {
  const GgufValue* found = value(key);
  if (found == nullptr) return std::vector<float>();
  if (!found->array || found->type != GgufType::f32) return wrong_type(key, "an array of F32");
  std::vector<float> numbers(found->count);
  std::memcpy(numbers.data(), found->bytes.data(), found->bytes.size());
  return numbers;
}

Result<std::vector<int64_t>> Gguf::integers(std::string_view key) const {
  const GgufValue* found = value(key);
  if (found == nullptr) return std::vector<int64_t>();
  const uint64_t each = type_bytes(found->type);
  if (!found->array || each == 0) return wrong_type(key, "an array of whole numbers");
  std::vector<int64_t> numbers;
  numbers.reserve(found->count);
  for (uint64_t i = 0; i < found->count; ++i) {
    const auto integer = integer_of(found->type, found->bytes.data() + i * each);
    if (!integer) return wrong_type(key, "an array of whole numbers");
    numbers.push_back(*integer);
  }
  return numbers;
}

std::optional<SourceType> source_type_of_ggml(uint32_t ggml_type) {
  switch (ggml_type) {
    case 0: return SourceType::f32;
    case 1: return SourceType::f16;
    case 2: return SourceType::q4_0;
    case 3: return SourceType::q4_1;
    case 6: return SourceType::q5_0;
    case 7: return SourceType::q5_1;
    case 8: return SourceType::q8_0;
    case 10: return SourceType::q2_k;
    case 11: return SourceType::q3_k;
    case 12: return SourceType::q4_k;
    case 13: return SourceType::q5_k;
    case 14: return SourceType::q6_k;
    case 30: return SourceType::bf16;
    default: return std::nullopt;
  }
}

std::string ggml_type_name(uint32_t ggml_type) {
  if (const auto type = source_type_of_ggml(ggml_type)) return import::name_of(*type);
  switch (ggml_type) {
    case 9: return "Q8_1";
    case 15: return "Q8_K";
    case 16: return "IQ2_XXS";
    case 17: return "IQ2_XS";
    case 18: return "IQ3_XXS";
    case 19: return "IQ1_S";
    case 20: return "IQ4_NL";
    case 21: return "IQ3_S";
    case 22: return "IQ2_S";
    case 23: return "IQ4_XS";
    case 28: return "F64";
    case 29: return "IQ1_M";
    case 34: return "TQ1_0";
    case 35: return "TQ2_0";
    case 39: return "MXFP4";
    default: return fmt::format("number {}", ggml_type);
  }
}

}  // namespace sluice::import
