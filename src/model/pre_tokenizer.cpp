// SPDX-License-Identifier: Apache-2.0
#include "model/pre_tokenizer.hpp"

#include <fmt/format.h>
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <array>

namespace sluice::model {
namespace {

// The White_Space property as the inside of a character class.
constexpr std::string_view kWhiteSpaceRanges =
    "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}";
// Its complement as the inside of one.
constexpr std::string_view kOtherRanges =
    "\\x{0}-\\x{8}\\x{e}-\\x{1f}\\x{21}-\\x{84}\\x{86}-\\x{9f}\\x{a1}-\\x{167f}\\x{1681}-\\x{1fff}\\x{200b}-\\x{2027}"
    "\\x{202a}-\\x{202e}\\x{2030}-\\x{205e}\\x{2060}-\\x{2fff}\\x{3001}-\\x{d7ff}\\x{e000}-\\x{10ffff}";

// Bounds a hostile pattern; the patterns of real models stay below a few thousand per match.
constexpr uint32_t kMatchLimit = 20'000'000;
constexpr size_t kMaxSteps = 32;
constexpr size_t kMaxPatternBytes = 64 * 1024;

struct CodeDeleter {
  void operator()(pcre2_code* code) const { pcre2_code_free(code); }
};
struct MatchDataDeleter {
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
};
struct MatchContextDeleter {
  void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
};
struct CompileContextDeleter {
  void operator()(pcre2_compile_context* context) const { pcre2_compile_context_free(context); }
};

constexpr std::string_view kGpt2Pattern =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
constexpr std::string_view kLlama3Pattern =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
    "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
constexpr std::string_view kQwen2Pattern =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
    "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
constexpr std::string_view kDeepSeekV3Words =
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
    " ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
constexpr std::string_view kCjkAndHangul = "[\\x{4e00}-\\x{9fa5}\\x{800}-\\x{4e00}\\x{ac00}-\\x{d7ff}]+";

struct NamedPreTokenizer {
  std::string_view name;
  std::array<std::string_view, 6> patterns;  // the empty ones are not there
  bool ignore_merges;
  bool nfc;
};

constexpr std::array kNamed = {
    NamedPreTokenizer{"llama-bpe", {kLlama3Pattern}, true, false},
    NamedPreTokenizer{"llama3", {kLlama3Pattern}, true, false},
    NamedPreTokenizer{"llama-v3", {kLlama3Pattern}, true, false},
    NamedPreTokenizer{"qwen2", {kQwen2Pattern}, false, true},
    NamedPreTokenizer{"deepseek-r1-qwen", {kQwen2Pattern}, false, true},
    NamedPreTokenizer{"deepseek-v3",
                      {"\\p{N}{1,3}", "[\\x{4e00}-\\x{9fa5}\\x{3040}-\\x{30ff}]+", kDeepSeekV3Words}, false, false},
    NamedPreTokenizer{"deepseek-llm",  // \p{L&}: the cased letters, which its tokenizer.json lists one by one
                      {"[\\r\\n]", "\\s?\\p{L&}+",
                       "\\s?[!-/:-~\\x{ff01}-\\x{ff0f}\\x{ff1a}-\\x{ff5e}\\x{2018}-\\x{201f}\\x{3000}-\\x{3002}]+",
                       "\\s+$", kCjkAndHangul, "\\p{N}+"}, false, false},
    NamedPreTokenizer{"deepseek-coder", {"[\\r\\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", kCjkAndHangul, "\\p{N}"}, false,
                      false},
    NamedPreTokenizer{"smollm", {"\\p{N}", kGpt2Pattern}, false, false},
    NamedPreTokenizer{"gpt-2", {kGpt2Pattern}, false, false},
    NamedPreTokenizer{"gpt2", {kGpt2Pattern}, false, false},
    NamedPreTokenizer{"default", {kGpt2Pattern}, false, false},
    NamedPreTokenizer{"", {kGpt2Pattern}, false, false},
};

Result<std::unique_ptr<pcre2_code, CodeDeleter>> compile(const std::string& pattern) {
  const std::unique_ptr<pcre2_compile_context, CompileContextDeleter> context(pcre2_compile_context_create(nullptr));
  if (!context) return fail(ErrorCode::out_of_memory, "tokenizer: no memory for a split pattern");
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  pcre2_set_max_pattern_length(context.get(), 2 * kMaxPatternBytes);
  // MULTILINE: in the syntax that tokenizer.json is written for, $ also matches before a line feed.
  constexpr uint32_t kOptions = PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C;
  const std::string rewritten = with_explicit_white_space(pattern);
  int error_code = 0;
  PCRE2_SIZE error_offset = 0;
  std::unique_ptr<pcre2_code, CodeDeleter> code(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(rewritten.data()),
                                                              rewritten.size(), kOptions, &error_code, &error_offset,
                                                              context.get()));
  if (!code) {
    std::array<PCRE2_UCHAR, 256> text{};
    pcre2_get_error_message(error_code, text.data(), text.size());
    return fail(ErrorCode::unsupported,
                fmt::format("tokenizer: the split pattern \"{}\" does not compile: {} (at byte {} of \"{}\")", pattern,
                            reinterpret_cast<const char*>(text.data()), error_offset, rewritten));
  }
  // Where the machine forbids pages that are written and run, this fails and matching is interpreted: 5x slower.
  (void)pcre2_jit_compile(code.get(), PCRE2_JIT_COMPLETE);
  return code;
}

}  // namespace

struct PreTokenizer::Step {
  std::unique_ptr<pcre2_code, CodeDeleter> code;
  bool drop_matches = false;
  bool drop_gaps = false;
};

PreTokenizer::PreTokenizer() = default;
PreTokenizer::PreTokenizer(PreTokenizer&&) noexcept = default;
PreTokenizer& PreTokenizer::operator=(PreTokenizer&&) noexcept = default;
PreTokenizer::~PreTokenizer() = default;

std::string_view gpt2_split_pattern() { return kGpt2Pattern; }

Result<std::vector<storage::SplitStep>> pre_tokenizer_by_name(std::string_view gguf_pre, bool* ignore_merges,
                                                              bool* nfc) {
  for (const NamedPreTokenizer& named : kNamed) {
    if (named.name != gguf_pre) continue;
    std::vector<storage::SplitStep> steps;
    for (const std::string_view pattern : named.patterns) {
      if (!pattern.empty()) steps.push_back({std::string(pattern), storage::SplitBehavior::isolated, false});
    }
    if (ignore_merges != nullptr) *ignore_merges = named.ignore_merges;
    if (nfc != nullptr) *nfc = named.nfc;
    return steps;
  }
  std::string known;
  for (const NamedPreTokenizer& named : kNamed) {
    if (!named.name.empty()) known += fmt::format("{}{}", known.empty() ? "" : ", ", named.name);
  }
  return fail(ErrorCode::unsupported,
              fmt::format("tokenizer: the pre-tokenizer \"{}\" is not known (known: {}); import the model from its "
                          "Hugging Face folder, whose tokenizer.json spells the pattern out",
                          gguf_pre, known));
}

std::string with_explicit_white_space(std::string_view pattern) {
  std::string out;
  out.reserve(pattern.size() + 256);
  bool in_class = false;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    if (c == '\\' && i + 1 < pattern.size()) {
      const char escaped = pattern[++i];
      if (escaped == 'Q') {  // literal up to \E
        const size_t end = pattern.find("\\E", i + 1);
        const size_t stop = end == std::string_view::npos ? pattern.size() : end + 2;
        out.append(pattern.substr(i - 1, stop - i + 1));
        i = stop - 1;
      } else if (escaped != 's' && escaped != 'S') {
        out += c;
        out += escaped;
      } else if (in_class) {
        out += escaped == 's' ? kWhiteSpaceRanges : kOtherRanges;
      } else {
        out += escaped == 's' ? "[" : "[^";
        out += kWhiteSpaceRanges;
        out += ']';
      }
      continue;
    }
    out += c;
    if (!in_class && c == '[') {
      in_class = true;
      // A ] right after [ or [^ is a member, not the end.
      if (i + 1 < pattern.size() && pattern[i + 1] == '^') out += pattern[++i];
      if (i + 1 < pattern.size() && pattern[i + 1] == ']') out += pattern[++i];
    } else if (in_class && c == '[' && i + 1 < pattern.size() && pattern[i + 1] == ':') {
      const size_t end = pattern.find(":]", i + 2);  // a POSIX class such as [:alpha:]
      if (end != std::string_view::npos) {
        out.append(pattern.substr(i + 1, end + 2 - (i + 1)));
        i = end + 1;
      }
    } else if (in_class && c == ']') {
      in_class = false;
    }
  }
  return out;
}

Result<PreTokenizer> PreTokenizer::create(const std::vector<storage::SplitStep>& steps) {
  if (steps.size() > kMaxSteps) {
    return fail(ErrorCode::unsupported,
                fmt::format("tokenizer: {} split steps are more than the {} supported", steps.size(), kMaxSteps));
  }
  PreTokenizer result;
  for (const storage::SplitStep& step : steps) {
    if (step.pattern.size() > kMaxPatternBytes) {
      return fail(ErrorCode::unsupported,
                  fmt::format("tokenizer: a split pattern of {} bytes is longer than the {} supported",
                              step.pattern.size(), kMaxPatternBytes));
    }
    SLUICE_TRY_ASSIGN(code, compile(step.pattern));
    Step compiled;
    compiled.code = std::move(code);
    if (step.behavior == storage::SplitBehavior::removed) {
      compiled.drop_matches = !step.invert;
      compiled.drop_gaps = step.invert;
    }
    result.steps_.push_back(std::move(compiled));
  }
  return result;
}

void PreTokenizer::split(std::string_view text, std::vector<std::string_view>& pieces) const {
  if (text.empty()) return;
  std::vector<std::string_view> current = {text};
  std::vector<std::string_view> next;
  const std::unique_ptr<pcre2_match_context, MatchContextDeleter> context(pcre2_match_context_create(nullptr));
  if (context) pcre2_set_match_limit(context.get(), kMatchLimit);

  for (const Step& step : steps_) {
    const std::unique_ptr<pcre2_match_data, MatchDataDeleter> data(
        pcre2_match_data_create_from_pattern(step.code.get(), nullptr));
    if (!data) break;  // out of memory: what is not split yet stays whole
    const PCRE2_SIZE* span = pcre2_get_ovector_pointer(data.get());
    next.clear();
    const auto emit = [&](std::string_view piece, bool drop) {
      if (!piece.empty() && !drop) next.push_back(piece);
    };
    for (const std::string_view piece : current) {
      const auto* subject = reinterpret_cast<PCRE2_SPTR>(piece.data());
      size_t done = 0;
      size_t from = 0;
      while (from < piece.size()) {
        int rc = pcre2_match(step.code.get(), subject, piece.size(), from, PCRE2_NO_UTF_CHECK, data.get(),
                             context.get());
        if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {
          rc = pcre2_match(step.code.get(), subject, piece.size(), from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, data.get(),
                           context.get());
        }
        if (rc < 0) break;
        const size_t begin = span[0];
        const size_t end = span[1];
        if (end <= begin || begin < done) {  // an empty match, or one that \K moved: step over one character
          from = std::max(end, from) + 1;
          while (from < piece.size() && (static_cast<unsigned char>(piece[from]) & 0xc0) == 0x80) ++from;
          continue;
        }
        emit(piece.substr(done, begin - done), step.drop_gaps);
        emit(piece.substr(begin, end - begin), step.drop_matches);
        done = from = end;
      }
      emit(piece.substr(done), step.drop_gaps);
    }
    current.swap(next);
  }
  pieces.insert(pieces.end(), current.begin(), current.end());
}

}  // namespace sluice::model
