// SPDX-License-Identifier: Apache-2.0
// Problems with answers, as data sets are published (docs/quantization.md has the forms), and who answered right.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/result.hpp"

namespace sluice::cli {

// How an answer is told from the text around it, and compared.
enum class Check : uint8_t {
  exact,    // all of the text, white space around it apart
  numeric,  // the number in the last \boxed{}, behind the last "####", or the last one there is
  boxed,    // the last \boxed{}, as LaTeX: 1/2 is \frac12 is 0.5
  choice,   // the letter in the last \boxed{}, or behind the last "answer is" or "answer:"
};

struct Problem {
  std::string prompt;  // what the model reads, instructions included
  std::string answer;  // A to D for a choice
  Check check = Check::exact;
};

// Reads JSON lines: {"prompt", "answer", "check"}, MATH-500 and AIME {"problem", "answer"}, GSM8K {"question",
// "answer"} with "#### n", GPQA {"Question", "Correct Answer", "Incorrect Answer 1" to "3"}; or GPQA's *.csv with those
// columns. Errors: not_found, io, corrupt (with the line; bytes that are not UTF-8), usage (no problem in it).
Result<std::vector<Problem>> read_tasks(const std::string& path);

// `count` of them spread evenly; all where count is 0 or more than there are.
std::vector<Problem> take_evenly(std::vector<Problem> problems, size_t count);

// What is inside the last \boxed{} (or \fbox{}); empty: there is none that closes.
std::string last_boxed(std::string_view text);
bool is_right(const Problem& problem, std::string_view text);

// The share of samples that are right, averaged over problems, with its 95% interval: Wilson's, for as many independent
// samples as the spread between problems says there are (at least one a problem, at most all).
struct PassRate {
  double rate = 0, low = 0, high = 1;
};
// `right`: samples that are right, per problem, not empty.
PassRate pass_at_1(std::span<const uint32_t> right, uint32_t samples);

}  // namespace sluice::cli
