// SPDX-License-Identifier: Apache-2.0
#include "calibrate/calibration.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/units.hpp"
#include "import/source_file.hpp"
#include "model/utf8.hpp"

namespace sluice::calibrate {
namespace {

constexpr uint64_t kMaxTextBytes = 1 * kGiB;

// The texts of every line's object.
Result<std::string> text_of_jsonl(const std::string& lines, const std::string& path) {
  std::string text;
  size_t number = 0;
  for (size_t begin = 0; begin < lines.size(); ++number) {
    const size_t end = std::min(lines.find('\n', begin), lines.size());
    const std::string line = lines.substr(begin, end - begin);
    begin = end + 1;
    if (std::all_of(line.begin(), line.end(), [](unsigned char c) { return std::isspace(c) != 0; })) continue;
    const auto object = nlohmann::ordered_json::parse(line, nullptr, false);
    if (object.is_discarded() || !object.is_object()) {
      return fail(ErrorCode::corrupt, fmt::format("{}: line {} is not a JSON object", path, number + 1));
    }
    for (const auto& member : object) {
      if (member.is_string()) text += member.get_ref<const std::string&>() + "\n";
    }
    text += "\n";
  }
  return text;
}

}  // namespace

Result<Windows> read_windows(const std::vector<std::string>& paths, const storage::TokenizerSpec& spec, uint32_t count,
                             uint32_t window, const LogHook& log) {
  SLUICE_TRY_ASSIGN(tokenizer, model::Tokenizer::create(spec));
  std::vector<int32_t> all;
  for (const std::string& path : paths) {
    SLUICE_TRY_ASSIGN(text, import::read_text_file(path, kMaxTextBytes));
    SLUICE_TRY(model::check_utf8(text, path));
    if (path.ends_with(".jsonl")) {
      SLUICE_TRY_ASSIGN(texts, text_of_jsonl(text, path));
      text = std::move(texts);
    }
    const std::vector<int32_t> ids = tokenizer.encode(text, {.special = false, .bos_eos = false});
    all.insert(all.end(), ids.begin(), ids.end());
  }
  const uint32_t first_token = spec.add_bos && spec.bos >= 0 ? 1 : 0;
  const uint32_t taken = window - first_token;  // of the text, per window
  if (all.size() < taken) {
    return fail(ErrorCode::usage,
                fmt::format("{}: the calibration text has {} tokens, one window takes {}; give more text or "
                            "a shorter --window",
                            fmt::join(paths, ", "), all.size(), window));
  }
  Windows windows{
      .ids = {}, .count = static_cast<uint32_t>(std::min<uint64_t>(count, all.size() / taken)), .window = window};
  if (windows.count < count) {
    log_warning(log, fmt::format("the calibration text has {} windows of {} tokens, {} were asked for", windows.count,
                                 window, count));
  }
  const uint64_t stride = all.size() / windows.count;
  for (uint64_t i = 0; i < windows.count; ++i) {
    if (first_token != 0) windows.ids.push_back(spec.bos);
    const auto begin = all.begin() + static_cast<ptrdiff_t>(i * stride);
    windows.ids.insert(windows.ids.end(), begin, begin + taken);
  }
  return windows;
}

}  // namespace sluice::calibrate
