// SPDX-License-Identifier: Apache-2.0
#include "storage/manifest_codec.hpp"

#include <fmt/format.h>

#include "base/check.hpp"
#include "storage/manifest_generated.h"

namespace sluice::storage {

namespace {

// The schema and the C++ enums carry the same numbers.
static_assert(static_cast<int>(fb::Architecture::MAX) == static_cast<int>(Architecture::qwen3));
static_assert(static_cast<int>(fb::Scheme::MAX) == static_cast<int>(Scheme::int4));
static_assert(static_cast<int>(fb::Layout::MAX) == static_cast<int>(Layout::tile16x64));
static_assert(static_cast<int>(fb::PlaneKind::MAX) == static_cast<int>(PlaneKind::row_sums));
static_assert(static_cast<int>(fb::Role::MAX) == static_cast<int>(Role::lm_head));
static_assert(static_cast<int>(fb::TokenizerModel::MAX) == static_cast<int>(TokenizerModel::sentencepiece_bpe));

// Caps on counts and text sizes: several times what any published model has.
constexpr uint32_t kMaxTensors = 1u << 16;
constexpr uint32_t kMaxPlanes = 8;              // one of each kind
constexpr uint32_t kMaxBlockSums = 1u << 23;    // 4 TiB in one plane
constexpr uint32_t kMaxTokens = 1u << 22;
constexpr uint32_t kMaxMerges = 1u << 23;
constexpr uint32_t kMaxSplits = 256;
constexpr uint32_t kMaxFrequencies = 1u << 12;
constexpr uint32_t kMaxNameBytes = 4096;
constexpr uint32_t kMaxTokenBytes = 64 * 1024;
constexpr uint32_t kMaxTextBytes = 16 * 1024 * 1024;  // chat template, pre-tokenizer pattern

// ---- C++ to FlatBuffers ----

template <class To, class From>
To as(From value) {
  return static_cast<To>(static_cast<std::underlying_type_t<To>>(value));
}

flatbuffers::Offset<fb::Tensor> encode(flatbuffers::FlatBufferBuilder& builder, const Tensor& tensor) {
  std::vector<flatbuffers::Offset<fb::Plane>> planes;
  planes.reserve(tensor.planes.size());
  for (const Plane& plane : tensor.planes) {
    const auto sums = builder.CreateVector(plane.block_sums);
    planes.push_back(
        fb::CreatePlane(builder, as<fb::PlaneKind>(plane.kind), plane.part, plane.offset, plane.bytes, sums));
  }
  const auto name = builder.CreateString(tensor.name);
  const auto plane_vector = builder.CreateVector(planes);
  return fb::CreateTensor(builder, name, as<fb::Role>(tensor.role), tensor.layer, tensor.rows, tensor.cols,
                          as<fb::Scheme>(tensor.scheme), as<fb::Layout>(tensor.layout), tensor.group_elems,
                          tensor.scale_exponent, plane_vector, tensor.residual_group_elems);
}

flatbuffers::Offset<fb::Tokenizer> encode(flatbuffers::FlatBufferBuilder& builder, const TokenizerSpec& tokenizer) {
  std::vector<uint8_t> kind_bytes;
  kind_bytes.reserve(tokenizer.kinds.size());
  for (TokenKind kind : tokenizer.kinds) kind_bytes.push_back(static_cast<uint8_t>(kind));
  std::vector<flatbuffers::Offset<fb::SplitStep>> steps;
  for (const SplitStep& step : tokenizer.splits) {
    const auto pattern = builder.CreateString(step.pattern);
    steps.push_back(fb::CreateSplitStep(builder, pattern, static_cast<uint8_t>(step.behavior), step.invert));
  }

  const auto tokens = builder.CreateVectorOfStrings(tokenizer.tokens);
  const auto kinds = builder.CreateVector(kind_bytes);
  const auto scores = builder.CreateVector(tokenizer.scores);
  const auto merges = builder.CreateVectorOfStrings(tokenizer.merges);
  const auto splits = builder.CreateVector(steps);
  const auto stop_ids = builder.CreateVector(tokenizer.stop_ids);
  const auto rstrip_ids = builder.CreateVector(tokenizer.rstrip_ids);
  const auto lstrip_ids = builder.CreateVector(tokenizer.lstrip_ids);
  const auto chat_template = builder.CreateString(tokenizer.chat_template);

  fb::TokenizerBuilder table(builder);
  table.add_model(as<fb::TokenizerModel>(tokenizer.model));
  table.add_tokens(tokens);
  table.add_kinds(kinds);
  table.add_scores(scores);
  table.add_merges(merges);
  table.add_splits(splits);
  table.add_nfc(tokenizer.nfc);
  table.add_ignore_merges(tokenizer.ignore_merges);
  table.add_byte_fallback(tokenizer.byte_fallback);
  table.add_add_prefix_space(tokenizer.add_prefix_space);
  table.add_add_bos(tokenizer.add_bos);
  table.add_add_eos(tokenizer.add_eos);
  table.add_bos(tokenizer.bos);
  table.add_eos(tokenizer.eos);
  table.add_unknown(tokenizer.unknown);
  table.add_stop_ids(stop_ids);
  table.add_rstrip_ids(rstrip_ids);
  table.add_lstrip_ids(lstrip_ids);
  table.add_chat_template(chat_template);
  table.add_space_prefix(static_cast<uint8_t>(tokenizer.space_prefix));
  return table.Finish();
}

flatbuffers::Offset<fb::HyperParameters> encode(flatbuffers::FlatBufferBuilder& builder, const HyperParameters& hyper) {
  return fb::CreateHyperParameters(builder, as<fb::Architecture>(hyper.architecture), hyper.layers, hyper.hidden,
                                   hyper.heads, hyper.kv_heads, hyper.head_dim, hyper.ffn, hyper.vocab,
                                   hyper.max_context, hyper.norm_eps, hyper.tied_embeddings);
}

// Upper bound of the encoded size: the builder asserts, and so may abort, where it would pass 2 GiB.
uint64_t encoded_bound(const Manifest& manifest) {
  constexpr uint64_t kPerString = 16;   // offset, length, terminator, padding
  constexpr uint64_t kPerTable = 256;   // fields, vtable
  const TokenizerSpec& tokenizer = manifest.tokenizer;
  uint64_t bytes = 4096 + manifest.model_name.size() + manifest.source.size() + tokenizer.chat_template.size();
  for (const std::string& token : tokenizer.tokens) bytes += token.size() + kPerString;
  for (const std::string& merge : tokenizer.merges) bytes += merge.size() + kPerString;
  for (const SplitStep& step : tokenizer.splits) bytes += step.pattern.size() + kPerTable;
  bytes += tokenizer.kinds.size() + 4 * (tokenizer.scores.size() + tokenizer.stop_ids.size() +
                                         tokenizer.rstrip_ids.size() + tokenizer.lstrip_ids.size());
  bytes += 4 * manifest.rope.inverse_frequencies.size();
  for (const Tensor& tensor : manifest.tensors) {
    bytes += tensor.name.size() + kPerTable;
    for (const Plane& plane : tensor.planes) bytes += 8 * plane.block_sums.size() + kPerTable;
  }
  return bytes;
}

// ---- FlatBuffers to C++ ----

// Copies out of a verified buffer. `budget_bytes_` starts at the buffer's size and pays for every byte copied: offsets
// may point at one string a million times, and that must not become a million strings.
class Decoder {
 public:
  Decoder(uint64_t budget_bytes, const std::string& path) : budget_bytes_(budget_bytes), path_(path) {}

  Status text(std::string& out, const flatbuffers::String* in, uint32_t cap, std::string_view field) {
    if (in == nullptr) return {};
    SLUICE_TRY(pay(in->size(), 1, cap, field));
    out.assign(in->c_str(), in->size());
    return {};
  }

  template <class T>
  Status numbers(std::vector<T>& out, const flatbuffers::Vector<T>* in, uint32_t cap, std::string_view field) {
    if (in == nullptr) return {};
    SLUICE_TRY(pay(in->size(), sizeof(T), cap, field));
    out.resize(in->size());
    for (uint32_t i = 0; i < in->size(); ++i) out[i] = in->Get(i);
    return {};
  }

  Status texts(std::vector<std::string>& out, const flatbuffers::Vector<flatbuffers::Offset<flatbuffers::String>>* in,
               uint32_t cap, std::string_view field) {
    if (in == nullptr) return {};
    SLUICE_TRY(pay(in->size(), sizeof(flatbuffers::uoffset_t), cap, field));
    out.resize(in->size());
    for (uint32_t i = 0; i < in->size(); ++i) SLUICE_TRY(text(out[i], in->Get(i), kMaxTokenBytes, field));
    return {};
  }

  template <class To, class From>
  Status enumeration(To& out, From in, To last, std::string_view field) {
    if (static_cast<uint64_t>(in) > static_cast<uint64_t>(last)) {
      return fail(ErrorCode::unsupported,
                  fmt::format("{}: manifest: {} has the value {}, which this version of Sluice does not know; update "
                              "Sluice, or import the model again",
                              path_, field, static_cast<uint64_t>(in)));
    }
    out = static_cast<To>(in);
    return {};
  }

  // Takes the cost of `count` elements; also compares the count with its cap.
  Status pay(uint64_t count, uint64_t element_bytes, uint64_t cap, std::string_view field) {
    if (count > cap) {
      return fail(ErrorCode::corrupt,
                  fmt::format("{}: manifest: {} has {} entries, at most {} are possible", path_, field, count, cap));
    }
    if (count * element_bytes > budget_bytes_) {
      return fail(ErrorCode::corrupt,
                  fmt::format("{}: manifest: {} overlaps other data (more bytes are referred to than there are)", path_,
                              field));
    }
    budget_bytes_ -= count * element_bytes;
    return {};
  }

  Status missing(std::string_view field) const {
    return fail(ErrorCode::corrupt, fmt::format("{}: manifest: {} is missing", path_, field));
  }

 private:
  uint64_t budget_bytes_;
  const std::string& path_;
};

Status decode(Decoder& decoder, Plane& out, const fb::Plane& in, const std::string& field) {
  SLUICE_TRY(decoder.pay(1, sizeof(flatbuffers::uoffset_t), 1, field));
  SLUICE_TRY(decoder.enumeration(out.kind, in.kind(), PlaneKind::row_sums, field + ".kind"));
  out.part = in.part();
  out.offset = in.offset();
  out.bytes = in.bytes();
  return decoder.numbers(out.block_sums, in.block_sums(), kMaxBlockSums, field + ".block_sums");
}

Status decode(Decoder& decoder, Tensor& out, const fb::Tensor& in, uint32_t index) {
  SLUICE_TRY(decoder.text(out.name, in.name(), kMaxNameBytes, fmt::format("name of tensor {}", index)));
  const std::string field = fmt::format("tensor {} ({})", index, out.name);
  SLUICE_TRY(decoder.enumeration(out.role, in.role(), Role::lm_head, field + ": role"));
  SLUICE_TRY(decoder.enumeration(out.scheme, in.scheme(), Scheme::int4, field + ": scheme"));
  SLUICE_TRY(decoder.enumeration(out.layout, in.layout(), Layout::tile16x64, field + ": layout"));
  out.layer = in.layer();
  out.rows = in.rows();
  out.cols = in.cols();
  out.group_elems = in.group_elems();
  out.residual_group_elems = in.residual_group_elems();
  out.scale_exponent = in.scale_exponent();
  if (in.planes() == nullptr) return decoder.missing(field + ": planes");
  SLUICE_TRY(decoder.pay(in.planes()->size(), sizeof(flatbuffers::uoffset_t), kMaxPlanes, field + ": planes"));
  out.planes.resize(in.planes()->size());
  for (uint32_t i = 0; i < in.planes()->size(); ++i) {
    SLUICE_TRY(decode(decoder, out.planes[i], *in.planes()->Get(i), fmt::format("{}: plane {}", field, i)));
  }
  return {};
}

Status decode(Decoder& decoder, HyperParameters& out, const fb::HyperParameters& in) {
  SLUICE_TRY(decoder.enumeration(out.architecture, in.architecture(), Architecture::qwen3, "architecture"));
  out.layers = in.layers();
  out.hidden = in.hidden();
  out.heads = in.heads();
  out.kv_heads = in.kv_heads();
  out.head_dim = in.head_dim();
  out.ffn = in.ffn();
  out.vocab = in.vocab();
  out.max_context = in.max_context();
  out.norm_eps = in.norm_eps();
  out.tied_embeddings = in.tied_embeddings();
  return {};
}

Status decode(Decoder& decoder, Rope& out, const fb::Rope& in) {
  SLUICE_TRY(
      decoder.numbers(out.inverse_frequencies, in.inverse_frequencies(), kMaxFrequencies, "rope.inverse_frequencies"));
  out.attention_factor = in.attention_factor();
  out.rotary_dims = in.rotary_dims();
  out.halves = in.halves();
  return {};
}

Status decode(Decoder& decoder, TokenizerSpec& out, const fb::Tokenizer& in) {
  SLUICE_TRY(decoder.enumeration(out.model, in.model(), TokenizerModel::sentencepiece_bpe, "tokenizer.model"));
  SLUICE_TRY(decoder.texts(out.tokens, in.tokens(), kMaxTokens, "tokenizer.tokens"));
  std::vector<uint8_t> kinds;
  SLUICE_TRY(decoder.numbers(kinds, in.kinds(), kMaxTokens, "tokenizer.kinds"));
  out.kinds.resize(kinds.size());
  for (size_t i = 0; i < kinds.size(); ++i) {
    SLUICE_TRY(decoder.enumeration(out.kinds[i], kinds[i], TokenKind::unused, "tokenizer.kinds"));
  }
  SLUICE_TRY(decoder.numbers(out.scores, in.scores(), kMaxTokens, "tokenizer.scores"));
  SLUICE_TRY(decoder.texts(out.merges, in.merges(), kMaxMerges, "tokenizer.merges"));
  if (in.splits() != nullptr) {
    SLUICE_TRY(decoder.pay(in.splits()->size(), sizeof(flatbuffers::uoffset_t), kMaxSplits, "tokenizer.splits"));
    out.splits.resize(in.splits()->size());
    for (uint32_t i = 0; i < in.splits()->size(); ++i) {
      const fb::SplitStep& step = *in.splits()->Get(i);
      SLUICE_TRY(decoder.text(out.splits[i].pattern, step.pattern(), kMaxTextBytes, "tokenizer.splits.pattern"));
      SLUICE_TRY(decoder.enumeration(out.splits[i].behavior, step.behavior(), SplitBehavior::removed,
                                     "tokenizer.splits.behavior"));
      out.splits[i].invert = step.invert();
    }
  }
  out.nfc = in.nfc();
  out.ignore_merges = in.ignore_merges();
  out.byte_fallback = in.byte_fallback();
  out.add_prefix_space = in.add_prefix_space();
  SLUICE_TRY(decoder.enumeration(out.space_prefix, in.space_prefix(), SpacePrefix::first_if_missing,
                                 "tokenizer.space_prefix"));
  out.add_bos = in.add_bos();
  out.add_eos = in.add_eos();
  out.bos = in.bos();
  out.eos = in.eos();
  out.unknown = in.unknown();
  SLUICE_TRY(decoder.numbers(out.stop_ids, in.stop_ids(), kMaxTokens, "tokenizer.stop_ids"));
  SLUICE_TRY(decoder.numbers(out.rstrip_ids, in.rstrip_ids(), kMaxTokens, "tokenizer.rstrip_ids"));
  SLUICE_TRY(decoder.numbers(out.lstrip_ids, in.lstrip_ids(), kMaxTokens, "tokenizer.lstrip_ids"));
  return decoder.text(out.chat_template, in.chat_template(), kMaxTextBytes, "tokenizer.chat_template");
}

}  // namespace

Result<std::vector<std::byte>> encode_manifest(const Manifest& manifest, const std::string& path) {
  if (encoded_bound(manifest) > kMaxManifestBytes) {
    return fail(ErrorCode::unsupported,
                fmt::format("{}: the manifest would need {}, at most {} are possible; the tokenizer or the chat template "
                            "of the source is not sane",
                            path, format_bytes(encoded_bound(manifest)), format_bytes(kMaxManifestBytes)));
  }
  flatbuffers::FlatBufferBuilder builder(1 * kMiB);
  std::vector<flatbuffers::Offset<fb::Tensor>> tensor_offsets;
  tensor_offsets.reserve(manifest.tensors.size());
  for (const Tensor& tensor : manifest.tensors) tensor_offsets.push_back(encode(builder, tensor));
  const auto tensors = builder.CreateVector(tensor_offsets);
  const auto tokenizer = encode(builder, manifest.tokenizer);
  const auto hyper = encode(builder, manifest.hyper);
  const auto frequencies = builder.CreateVector(manifest.rope.inverse_frequencies);
  const auto rope = fb::CreateRope(builder, frequencies, manifest.rope.attention_factor, manifest.rope.rotary_dims,
                                   manifest.rope.halves);
  const GenerationDefaults& defaults = manifest.generation;
  const auto generation = fb::CreateGeneration(builder, defaults.temperature, defaults.top_k, defaults.top_p,
                                               defaults.min_p, defaults.repetition_penalty);
  const auto model_name = builder.CreateString(manifest.model_name);
  const auto source = builder.CreateString(manifest.source);
  fb::FinishManifestBuffer(
      builder, fb::CreateManifest(builder, model_name, source, hyper, rope, tokenizer, generation, tensors));
  const auto* bytes = reinterpret_cast<const std::byte*>(builder.GetBufferPointer());
  return std::vector<std::byte>(bytes, bytes + builder.GetSize());
}

Result<Manifest> decode_manifest(std::span<const std::byte> data, const std::string& path) {
  SLUICE_CHECK(reinterpret_cast<uintptr_t>(data.data()) % alignof(uint64_t) == 0);
  // 4-byte root offset, 4-byte identifier, and the smallest table: the verifier itself wants that much.
  if (data.size() < 16 || data.size() > kMaxManifestBytes) {
    return fail(ErrorCode::corrupt, fmt::format("{}: manifest of {} bytes; between 16 and {} are possible", path,
                                                data.size(), kMaxManifestBytes));
  }
  // Tables: one per tensor, plane and split step, and a handful; each visit counts, so a table that is referred to a
  // million times is refused rather than visited. Depth: Manifest, Tensor, Plane.
  constexpr flatbuffers::uoffset_t kMaxDepth = 16;
  constexpr flatbuffers::uoffset_t kMaxTables = kMaxTensors * (kMaxPlanes + 1) + kMaxSplits + 16;
  flatbuffers::Verifier verifier(reinterpret_cast<const uint8_t*>(data.data()), data.size(), kMaxDepth, kMaxTables);
  if (!fb::VerifyManifestBuffer(verifier)) {
    return fail(ErrorCode::corrupt,
                fmt::format("{}: the manifest is not a valid FlatBuffer of this format; import the model again", path));
  }
  const fb::Manifest& in = *fb::GetManifest(data.data());

  Decoder decoder(data.size(), path);
  Manifest out;
  if (in.hyper() == nullptr) return Unexpected{decoder.missing("hyper").error()};
  if (in.rope() == nullptr) return Unexpected{decoder.missing("rope").error()};
  if (in.tensors() == nullptr) return Unexpected{decoder.missing("tensors").error()};
  SLUICE_TRY(decoder.text(out.model_name, in.model_name(), kMaxNameBytes, "model_name"));
  SLUICE_TRY(decoder.text(out.source, in.source(), kMaxNameBytes, "source"));
  SLUICE_TRY(decode(decoder, out.hyper, *in.hyper()));
  SLUICE_TRY(decode(decoder, out.rope, *in.rope()));
  if (in.tokenizer() != nullptr) SLUICE_TRY(decode(decoder, out.tokenizer, *in.tokenizer()));
  if (const fb::Generation* generation = in.generation()) {
    out.generation = {.temperature = generation->temperature(),
                      .top_k = generation->top_k(),
                      .top_p = generation->top_p(),
                      .min_p = generation->min_p(),
                      .repetition_penalty = generation->repetition_penalty()};
  }
  SLUICE_TRY(decoder.pay(in.tensors()->size(), sizeof(flatbuffers::uoffset_t), kMaxTensors, "tensors"));
  out.tensors.resize(in.tensors()->size());
  for (uint32_t i = 0; i < in.tensors()->size(); ++i) {
    SLUICE_TRY(decode(decoder, out.tensors[i], *in.tensors()->Get(i), i));
  }
  return out;
}

}  // namespace sluice::storage
