// SPDX-License-Identifier: Apache-2.0
// Calibration text as windows of tokens.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/tokenizer.hpp"
#include "sluice/log.hpp"
#include "sluice/result.hpp"
#include "storage/manifest.hpp"

namespace sluice::calibrate {

struct Windows {
  std::vector<int32_t> ids;  // [count][window]
  uint32_t count = 0, window = 0;
};

// Up to `count` windows of `window` tokens, spread evenly over the texts, one after the other. A *.jsonl file has a
// JSON object a line, whose texts count, joined by line ends (question and answer, problem and solution, text). Where
// the model begins its texts with a token of its own, every window does. Errors: not_found, io, corrupt (a line that is
// no JSON object, bytes that are no UTF-8: file and offset), usage (less text than one window).
Result<Windows> read_windows(const std::vector<std::string>& paths, const storage::TokenizerSpec& spec, uint32_t count,
                             uint32_t window, const LogHook& log);

}  // namespace sluice::calibrate
