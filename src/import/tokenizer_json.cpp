// SPDX-License-Identifier: Apache-2.0
#include "import/tokenizer_json.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>

#include "base/units.hpp"
#include "import/json_text.hpp"
#include "import/source_file.hpp"
#include "import/text.hpp"
#include "model/pre_tokenizer.hpp"
#include "model/tokenizer.hpp"

namespace sluice::import {
namespace {

using storage::SplitBehavior;
using storage::SplitStep;
using storage::TokenizerSpec;
using storage::TokenKind;

constexpr uint64_t kMaxFileBytes = 256 * kMiB;  // the largest published tokenizer.json has 33 MB
constexpr int64_t kMaxTokenId = (1 << 24) - 1;
constexpr int kMaxNesting = 8;                  // of Sequence in Sequence
constexpr std::string_view kSpaceSymbol = "\xe2\x96\x81";

// Reads one tokenizer.json into a specification; each part refuses what it would not reproduce.
class Reader {
 public:
  explicit Reader(const std::string& path) : path_(path) {}

  Result<TokenizerSpec> read(const TokenizerTexts& texts);

 private:
  template <class... Args>
  Unexpected corrupt(fmt::format_string<Args...> format, Args&&... args) const {
    return fail(ErrorCode::corrupt, fmt::format("{}: {}", path_, fmt::format(format, std::forward<Args>(args)...)));
  }
  template <class... Args>
  Unexpected unsupported(fmt::format_string<Args...> format, Args&&... args) const {
    return fail(ErrorCode::unsupported,
                fmt::format("{}: {}; this tokenizer cannot be reproduced exactly", path_,
                            fmt::format(format, std::forward<Args>(args)...)));
  }

  Status read_model(const Json& root);
  Status read_vocabulary(const Json& model);
  Status read_merges(const Json& model);
  Status read_added_tokens(const Json& root);
  Status read_normalizer(const Json& normalizer, int depth);
  Status read_pre_tokenizer(const Json& step, int depth);
  Status read_split(const Json& step);
  Status read_metaspace(const Json& step);
  Status read_post_processor(const Json& step, int depth);
  Status read_tokenizer_config(std::string_view text);
  Status read_generation_config(std::string_view text);
  Status decide_kind();
  Status put_token(int64_t id, const std::string& text, const char* what);
  int32_t id_of(std::string_view text) const;
  std::string neighbour(const char* name) const { return std::filesystem::path(path_).replace_filename(name).string(); }

  const std::string& path_;
  TokenizerSpec spec_;
  std::vector<bool> taken_;
  std::string unknown_text_;
  bool byte_level_ = false;      // a ByteLevel step was seen
  bool replaces_spaces_ = false; // a normalizer or Metaspace writes U+2581 for a space
  bool template_bos_ = false;    // the post-processor adds one
  bool template_eos_ = false;
};

std::string text_of(const Json& object, const char* key) {
  const Json* value = json_member(object, key);
  return value != nullptr && value->is_string() ? value->get<std::string>() : std::string();
}

bool flag_of(const Json& object, const char* key, bool otherwise = false) {
  const Json* value = json_member(object, key);
  return value != nullptr && value->is_boolean() ? value->get<bool>() : otherwise;
}

// A token named in tokenizer_config.json: the text, or an object that holds it as "content".
std::string named_token(const Json& config, const char* key) {
  const Json* value = json_member(config, key);
  if (value == nullptr) return {};
  return value->is_string() ? value->get<std::string>() : text_of(*value, "content");
}

// A literal string as a pattern that matches it.
std::string quoted_pattern(std::string_view literal) {
  std::string pattern;
  for (const char c : literal) {
    if (std::string_view("\\^$.[]|()?*+{}-#&~").find(c) != std::string_view::npos) pattern += '\\';
    pattern += c;
  }
  return pattern;
}

Status Reader::put_token(int64_t id, const std::string& text, const char* what) {
  if (id < 0 || id > kMaxTokenId) return corrupt("{} {} has the id {}", what, in_quotes(text), id);
  const auto at = static_cast<size_t>(id);
  if (at >= spec_.tokens.size()) {
    spec_.tokens.resize(at + 1);
    spec_.kinds.resize(at + 1, TokenKind::unused);
    taken_.resize(at + 1, false);
  }
  if (taken_[at] && spec_.tokens[at] != text) {
    return corrupt("id {} is both {} and {}", id, in_quotes(spec_.tokens[at]), in_quotes(text));
  }
  spec_.tokens[at] = text;
  if (!taken_[at]) spec_.kinds[at] = TokenKind::normal;
  taken_[at] = true;
  return {};
}

Status Reader::read_vocabulary(const Json& model) {
  const Json* vocabulary = json_member(model, "vocab");
  if (vocabulary == nullptr || !vocabulary->is_object() || vocabulary->empty()) {
    return corrupt("model.vocab must be an object of token texts and ids");
  }
  const auto count = static_cast<int64_t>(vocabulary->size());
  for (const auto& [text, id] : vocabulary->items()) {
    if (!id.is_number_integer()) return corrupt("the id of token {} is not an integer", in_quotes(text));
    const auto value = id.get<int64_t>();
    // A vocabulary of few tokens with huge ids would make a table of holes.
    if (value > 2 * count + 65536) {
      return corrupt("token {} has the id {} in a vocabulary of {}", in_quotes(text), value, count);
    }
    SLUICE_TRY(put_token(value, text, "token"));
  }
  return {};
}

Status Reader::read_merges(const Json& model) {
  const Json* merges = json_member(model, "merges");
  if (merges == nullptr || !merges->is_array()) return corrupt("model.merges must be an array");
  spec_.merges.reserve(merges->size());
  for (const Json& merge : *merges) {
    if (merge.is_string()) {
      spec_.merges.push_back(merge.get<std::string>());
    } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      spec_.merges.push_back(merge[0].get<std::string>() + " " + merge[1].get<std::string>());
    } else {
      return corrupt("model.merges[{}] is neither \"a b\" nor [\"a\", \"b\"]", spec_.merges.size());
    }
  }
  return {};
}

Status Reader::read_model(const Json& root) {
  const Json* model = json_member(root, "model");
  if (model == nullptr || !model->is_object()) return corrupt("there is no \"model\"; is this a tokenizer.json?");
  const std::string type = text_of(*model, "type");
  if (type != "BPE" && !(type.empty() && json_member(*model, "merges") != nullptr)) {
    return unsupported("the model type is {}, only BPE is supported", in_quotes(type));
  }
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!text_of(*model, key).empty()) return unsupported("model.{} is {}", key, in_quotes(text_of(*model, key)));
  }
  if (const Json* dropout = json_member(*model, "dropout"); dropout != nullptr && *dropout != 0.0) {
    return unsupported("model.dropout is set");
  }
  SLUICE_TRY(read_vocabulary(*model));
  SLUICE_TRY(read_merges(*model));
  spec_.ignore_merges = flag_of(*model, "ignore_merges");
  spec_.byte_fallback = flag_of(*model, "byte_fallback");
  unknown_text_ = text_of(*model, "unk_token");
  return {};
}

Status Reader::read_added_tokens(const Json& root) {
  const Json* added = json_member(root, "added_tokens");
  if (added == nullptr) return {};
  if (!added->is_array()) return corrupt("added_tokens must be an array");
  for (const Json& token : *added) {
    const std::string content = text_of(token, "content");
    const Json* id = json_member(token, "id");
    if (content.empty() || id == nullptr || !id->is_number_integer()) {
      return corrupt("an entry of added_tokens lacks \"content\" or an integer \"id\"");
    }
    const auto value = id->get<int64_t>();
    if (value > 2 * static_cast<int64_t>(spec_.tokens.size()) + 65536) {
      return corrupt("added token {} has the id {} beyond a vocabulary of {}", in_quotes(content), value, spec_.tokens.size());
    }
    SLUICE_TRY(put_token(value, content, "added token"));
    if (flag_of(token, "single_word")) return unsupported("added token {} has single_word", in_quotes(content));
    const auto at = static_cast<int32_t>(value);
    spec_.kinds[static_cast<size_t>(at)] = flag_of(token, "special") ? TokenKind::special : TokenKind::added;
    if (flag_of(token, "lstrip")) spec_.lstrip_ids.push_back(at);
    if (flag_of(token, "rstrip")) spec_.rstrip_ids.push_back(at);
  }
  return {};
}

Status Reader::read_normalizer(const Json& normalizer, int depth) {
  if (depth > kMaxNesting) return corrupt("normalizers are nested {} deep", depth);
  const std::string type = text_of(normalizer, "type");
  if (type == "Sequence") {
    const Json* parts = json_member(normalizer, "normalizers");
    if (parts == nullptr || !parts->is_array()) return corrupt("a Sequence normalizer without \"normalizers\"");
    for (const Json& part : *parts) SLUICE_TRY(read_normalizer(part, depth + 1));
    return {};
  }
  if (type == "NFC") {
    if (replaces_spaces_ || spec_.add_prefix_space) return unsupported("the NFC normalizer comes after another");
    spec_.nfc = true;
    return {};
  }
  if (type == "Prepend" && text_of(normalizer, "prepend") == kSpaceSymbol) {
    spec_.add_prefix_space = true;
    spec_.space_prefix = storage::SpacePrefix::always;
    return {};
  }
  if (type == "Replace") {
    const Json* pattern = json_member(normalizer, "pattern");
    if (pattern != nullptr && text_of(*pattern, "String") == " " && text_of(normalizer, "content") == kSpaceSymbol) {
      replaces_spaces_ = true;
      return {};
    }
  }
  return unsupported("the normalizer {} is not known", in_quotes(normalizer.dump()));
}

Status Reader::read_split(const Json& step) {
  const Json* pattern = json_member(step, "pattern");
  SplitStep split;
  if (pattern != nullptr && !text_of(*pattern, "Regex").empty()) {
    split.pattern = text_of(*pattern, "Regex");
  } else if (pattern != nullptr && !text_of(*pattern, "String").empty()) {
    split.pattern = quoted_pattern(text_of(*pattern, "String"));
  } else {
    return corrupt("a Split pre-tokenizer without a pattern");
  }
  split.invert = flag_of(step, "invert");
  const std::string behavior = text_of(step, "behavior");
  if (behavior == "Removed") {
    split.behavior = SplitBehavior::removed;
  } else if (behavior != "Isolated") {
    return unsupported("a Split pre-tokenizer has the behavior {}", in_quotes(behavior));
  }
  spec_.splits.push_back(std::move(split));
  return {};
}

Status Reader::read_metaspace(const Json& step) {
  if (text_of(step, "replacement") != kSpaceSymbol) {
    return unsupported("Metaspace replaces spaces by {}", in_quotes(text_of(step, "replacement")));
  }
  std::string scheme = text_of(step, "prepend_scheme");
  if (scheme.empty()) scheme = flag_of(step, "add_prefix_space", true) ? "always" : "never";
  replaces_spaces_ = true;
  if (scheme == "always" || scheme == "first") {
    spec_.add_prefix_space = true;
    spec_.space_prefix =
        scheme == "first" ? storage::SpacePrefix::first_if_missing : storage::SpacePrefix::if_missing;
  } else if (scheme != "never") {
    return unsupported("Metaspace has the prepend_scheme {}", in_quotes(scheme));
  }
  if (flag_of(step, "split", true)) {  // every piece is a word with the symbol before it
    spec_.splits.push_back({fmt::format("{0}[^{0}]*|[^{0}]+", kSpaceSymbol), SplitBehavior::isolated, false});
  }
  return {};
}

Status Reader::read_pre_tokenizer(const Json& step, int depth) {
  if (depth > kMaxNesting) return corrupt("pre-tokenizers are nested {} deep", depth);
  const std::string type = text_of(step, "type");
  if (type == "Sequence") {
    const Json* parts = json_member(step, "pretokenizers");
    if (parts == nullptr || !parts->is_array()) return corrupt("a Sequence pre-tokenizer without \"pretokenizers\"");
    for (const Json& part : *parts) SLUICE_TRY(read_pre_tokenizer(part, depth + 1));
    return {};
  }
  // After ByteLevel text is in the byte alphabet, where these patterns would mean something else.
  if (byte_level_) return unsupported("the pre-tokenizer {} comes after ByteLevel", in_quotes(type));
  if (type == "Split") return read_split(step);
  if (type == "Metaspace") return read_metaspace(step);
  if (type == "Digits") {
    const bool individual = flag_of(step, "individual_digits");
    spec_.splits.push_back({individual ? "\\p{N}" : "\\p{N}+", SplitBehavior::isolated, false});
    return {};
  }
  if (type == "ByteLevel") {
    byte_level_ = true;
    if (flag_of(step, "add_prefix_space", true)) {
      // The space would go before every piece, not once before the text.
      if (!spec_.splits.empty()) return unsupported("ByteLevel adds a space after other pre-tokenizers");
      spec_.add_prefix_space = true;
      spec_.space_prefix = storage::SpacePrefix::if_missing;
    }
    if (flag_of(step, "use_regex", true)) {
      spec_.splits.push_back({std::string(model::gpt2_split_pattern()), SplitBehavior::isolated, false});
    }
    return {};
  }
  return unsupported("the pre-tokenizer {} is not known", in_quotes(type));
}

Status Reader::read_post_processor(const Json& step, int depth) {
  if (depth > kMaxNesting) return corrupt("post-processors are nested {} deep", depth);
  const std::string type = text_of(step, "type");
  if (type == "Sequence") {
    const Json* parts = json_member(step, "processors");
    if (parts == nullptr || !parts->is_array()) return corrupt("a Sequence post-processor without \"processors\"");
    for (const Json& part : *parts) SLUICE_TRY(read_post_processor(part, depth + 1));
    return {};
  }
  if (type != "TemplateProcessing") return {};  // ByteLevel changes offsets only
  const Json* single = json_member(step, "single");
  if (single == nullptr || !single->is_array()) return corrupt("a TemplateProcessing without \"single\"");
  bool before = true;
  for (const Json& part : *single) {
    if (json_member(part, "Sequence") != nullptr) before = false;
    const Json* token = json_member(part, "SpecialToken");
    if (token == nullptr) continue;
    const int32_t id = id_of(text_of(*token, "id"));
    if (id < 0) return corrupt("the post-processor adds {}, which is no token", in_quotes(text_of(*token, "id")));
    (before ? template_bos_ : template_eos_) = true;
    (before ? spec_.bos : spec_.eos) = id;
  }
  return {};
}

Status Reader::read_tokenizer_config(std::string_view text) {
  spec_.add_bos = template_bos_;
  spec_.add_eos = template_eos_;
  if (text.empty()) return {};
  SLUICE_TRY_ASSIGN(config, parse_json_object(text, neighbour("tokenizer_config.json")));
  const struct {
    const char* key;
    int32_t* id;
  } kTokens[] = {{"bos_token", &spec_.bos}, {"eos_token", &spec_.eos}};
  for (const auto& [key, id] : kTokens) {
    const std::string name = named_token(config, key);
    if (name.empty()) continue;
    const int32_t found = id_of(name);
    if (found < 0) return corrupt("tokenizer_config.json names the {} {}, which is no token", key, in_quotes(name));
    *id = found;
  }
  spec_.add_bos = flag_of(config, "add_bos_token", template_bos_) && spec_.bos >= 0;
  spec_.add_eos = flag_of(config, "add_eos_token", template_eos_) && spec_.eos >= 0;

  const Json* chat = json_member(config, "chat_template");
  if (chat != nullptr && chat->is_string()) {
    spec_.chat_template = chat->get<std::string>();
  } else if (chat != nullptr && chat->is_array()) {  // several, by name
    for (const Json& entry : *chat) {
      if (spec_.chat_template.empty() || text_of(entry, "name") == "default") {
        spec_.chat_template = text_of(entry, "template");
      }
    }
  }
  return {};
}

Status Reader::read_generation_config(std::string_view text) {
  const auto stop_at = [&](int64_t id) {
    if (id < 0 || static_cast<size_t>(id) >= spec_.tokens.size()) return;  // a config older than its vocabulary
    const auto value = static_cast<int32_t>(id);
    auto& ids = spec_.stop_ids;
    if (std::find(ids.begin(), ids.end(), value) == ids.end()) ids.push_back(value);
  };
  bool listed = false;
  if (!text.empty()) {
    SLUICE_TRY_ASSIGN(config, parse_json_object(text, neighbour("generation_config.json")));
    if (const Json* eos = json_member(config, "eos_token_id")) {
      const Json list = eos->is_array() ? *eos : Json::array({*eos});
      for (const Json& id : list) {
        if (!id.is_number_integer()) return corrupt("generation_config.json: eos_token_id holds {}", in_quotes(id.dump()));
        stop_at(id.get<int64_t>());
        listed = true;
        if (spec_.eos < 0 && !spec_.stop_ids.empty()) spec_.eos = spec_.stop_ids.front();
      }
    }
    const Json* bos = json_member(config, "bos_token_id");
    if (spec_.bos < 0 && bos != nullptr && bos->is_number_integer() && bos->get<int64_t>() >= 0 &&
        static_cast<size_t>(bos->get<int64_t>()) < spec_.tokens.size()) {
      spec_.bos = bos->get<int32_t>();
    }
  }
  stop_at(spec_.eos);
  if (!listed) {
    for (const int32_t id : model::end_of_turn_ids(spec_)) stop_at(id);
  }
  return {};
}

Status Reader::decide_kind() {
  if (byte_level_ && replaces_spaces_) return unsupported("it is byte-level and writes U+2581 for spaces");
  if (byte_level_) {
    if (spec_.byte_fallback) return unsupported("it is byte-level and has byte_fallback");
    spec_.model = storage::TokenizerModel::byte_level_bpe;
    return {};
  }
  if (!replaces_spaces_) return unsupported("it has neither a ByteLevel pre-tokenizer nor one that writes U+2581 for spaces");
  spec_.model = storage::TokenizerModel::sentencepiece_bpe;
  if (spec_.unknown >= 0) spec_.kinds[static_cast<size_t>(spec_.unknown)] = TokenKind::unknown;
  for (size_t id = 0; id < spec_.tokens.size(); ++id) {
    const std::string& text = spec_.tokens[id];
    if (spec_.byte_fallback && spec_.kinds[id] == TokenKind::normal && text.size() == 6 && text.starts_with("<0x") &&
        text.ends_with(">")) {
      spec_.kinds[id] = TokenKind::byte;
    }
  }
  return {};
}

int32_t Reader::id_of(std::string_view text) const {
  // Only a handful of names are asked for, among 128k: a scan beats a table that lives for them.
  for (size_t id = 0; id < spec_.tokens.size(); ++id) {
    if (taken_[id] && spec_.tokens[id] == text) return static_cast<int32_t>(id);
  }
  return -1;
}

Result<TokenizerSpec> Reader::read(const TokenizerTexts& texts) {
  {
    SLUICE_TRY_ASSIGN(root, parse_json_object(texts.tokenizer, path_));
    SLUICE_TRY(read_model(root));
    SLUICE_TRY(read_added_tokens(root));
    if (!unknown_text_.empty()) spec_.unknown = id_of(unknown_text_);  // model.unk_token may be an added token
    if (const Json* normalizer = json_member(root, "normalizer")) SLUICE_TRY(read_normalizer(*normalizer, 0));
    if (const Json* pre_tokenizer = json_member(root, "pre_tokenizer")) SLUICE_TRY(read_pre_tokenizer(*pre_tokenizer, 0));
    if (const Json* post_processor = json_member(root, "post_processor")) {
      SLUICE_TRY(read_post_processor(*post_processor, 0));
    }
  }  // the JSON of a large vocabulary holds about 100 MB
  SLUICE_TRY(decide_kind());
  SLUICE_TRY(read_tokenizer_config(texts.tokenizer_config));
  SLUICE_TRY(read_generation_config(texts.generation_config));
  if (!texts.chat_template.empty()) spec_.chat_template = texts.chat_template;
  return std::move(spec_);
}

}  // namespace

Result<TokenizerSpec> read_tokenizer_json(const std::string& path, const std::string& tokenizer_config_path,
                                          const std::string& generation_config_path) {
  std::string config;
  std::string generation;
  std::string chat_template;
  SLUICE_TRY_ASSIGN(tokenizer, read_text_file(path, kMaxFileBytes));
  if (!tokenizer_config_path.empty()) {
    SLUICE_TRY_ASSIGN(text, read_text_file(tokenizer_config_path, kMaxFileBytes));
    config = std::move(text);
    const std::filesystem::path jinja = std::filesystem::path(tokenizer_config_path).replace_filename("chat_template.jinja");
    std::error_code ignored;
    if (std::filesystem::exists(jinja, ignored)) {
      SLUICE_TRY_ASSIGN(jinja_text, read_text_file(jinja.string(), kMaxFileBytes));
      chat_template = std::move(jinja_text);
    }
  }
  if (!generation_config_path.empty()) {
    SLUICE_TRY_ASSIGN(text, read_text_file(generation_config_path, kMaxFileBytes));
    generation = std::move(text);
  }
  return parse_tokenizer_json({tokenizer, config, generation, chat_template}, path);
}

Result<TokenizerSpec> parse_tokenizer_json(const TokenizerTexts& texts, const std::string& path) {
  return Reader(path).read(texts);
}

Result<TokenizerSpec> parse_tokenizer_json(std::string_view text, const std::string& path) {
  return parse_tokenizer_json({text, {}, {}, {}}, path);
}

}  // namespace sluice::import
