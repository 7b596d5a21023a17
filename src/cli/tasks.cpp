// SPDX-License-Identifier: Apache-2.0
#include "tasks.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "flags.hpp"

namespace sluice::cli {
namespace {

using Json = nlohmann::json;

constexpr const char* kBoxedRequest = "\n\nPlease reason step by step, and put your final answer within \\boxed{}.";
constexpr const char* kChoiceRequest =
    "\n\nPlease reason step by step, and put the letter of the right choice within \\boxed{}.";

Unexpected bad(const std::string& where, const std::string& what) {
  return fail(ErrorCode::corrupt, fmt::format("{}: {}", where, what));
}

std::string_view trimmed(std::string_view text) {
  constexpr std::string_view kWhite = " \t\r\n";
  const size_t begin = text.find_first_not_of(kWhite);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kWhite) - begin + 1);
}

// FNV-1a: the same choice stands at the same letter everywhere.
uint64_t hash_of(std::string_view text) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return hash;
}

// The fields of one problem by name; a number counts as its digits.
using Fields = std::map<std::string, std::string>;

Result<std::string> field(const Fields& fields, const std::string& name, const std::string& where) {
  const auto found = fields.find(name);
  if (found != fields.end() && !trimmed(found->second).empty()) return found->second;
  return bad(where, fmt::format("\"{}\" is missing or empty", name));
}

Result<Problem> own_problem(const Fields& fields, const std::string& where) {
  SLUICE_TRY_ASSIGN(prompt, field(fields, "prompt", where));
  SLUICE_TRY_ASSIGN(answer, field(fields, "answer", where));
  Problem problem{.prompt = std::move(prompt), .answer = std::move(answer), .check = Check::exact};
  const auto check = fields.find("check");
  if (check == fields.end() || check->second == "exact") return problem;
  if (check->second == "numeric") problem.check = Check::numeric;
  else if (check->second == "boxed") problem.check = Check::boxed;
  else if (check->second == "choice") problem.check = Check::choice;
  else return bad(where, fmt::format("check \"{}\"; there are exact, numeric, boxed and choice", check->second));
  return problem;
}

Result<Problem> gpqa_problem(const Fields& fields, const std::string& where) {
  SLUICE_TRY_ASSIGN(question, field(fields, "Question", where));
  SLUICE_TRY_ASSIGN(right, field(fields, "Correct Answer", where));
  std::vector<std::string> choices;
  for (const char* name : {"Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"}) {
    SLUICE_TRY_ASSIGN(wrong, field(fields, name, where));
    choices.push_back(std::move(wrong));
  }
  const size_t place = hash_of(question) % 4;
  choices.insert(choices.begin() + static_cast<ptrdiff_t>(place), std::move(right));
  Problem problem{
      .prompt = std::string(trimmed(question)) + "\n", .answer = std::string(1, "ABCD"[place]), .check = Check::choice};
  for (size_t i = 0; i < choices.size(); ++i) problem.prompt += fmt::format("\n{}) {}", "ABCD"[i], trimmed(choices[i]));
  problem.prompt += kChoiceRequest;
  return problem;
}

Result<Problem> problem_of(const Fields& fields, const std::string& where) {
  if (fields.contains("prompt")) return own_problem(fields, where);
  if (fields.contains("Question")) return gpqa_problem(fields, where);
  const char* question_name = fields.contains("problem") ? "problem" : "question";
  if (!fields.contains(question_name)) {
    return bad(where,
               "has none of \"prompt\", \"problem\", \"question\" and \"Question\"; docs/quantization.md has the "
               "forms that are read");
  }
  SLUICE_TRY_ASSIGN(question, field(fields, question_name, where));
  SLUICE_TRY_ASSIGN(answer, field(fields, "answer", where));
  Problem problem{.prompt = question + kBoxedRequest, .answer = answer, .check = Check::boxed};
  const size_t mark = answer.rfind("####");
  if (mark != std::string::npos) {
    problem.answer = std::string(trimmed(std::string_view(answer).substr(mark + 4)));
    problem.check = Check::numeric;
    if (problem.answer.empty()) return bad(where, "nothing stands behind \"####\"");
  }
  return problem;
}

Result<std::vector<Problem>> read_lines(const std::string& text, const std::string& path) {
  std::vector<Problem> problems;
  size_t number = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line = trimmed(std::string_view(text).substr(begin, end - begin));
    begin = end + 1;
    ++number;
    if (line.empty()) continue;
    const std::string where = fmt::format("{}: line {}", path, number);
    const Json object = Json::parse(line, nullptr, false);
    if (object.is_discarded() || !object.is_object()) return bad(where, "is not a JSON object");
    Fields fields;
    for (const auto& [name, value] : object.items()) {
      if (value.is_string()) fields[name] = value.get<std::string>();
      else if (value.is_number()) fields[name] = value.dump();
    }
    SLUICE_TRY_ASSIGN(problem, problem_of(fields, where));
    problems.push_back(std::move(problem));
  }
  return problems;
}

// Records of RFC 4180: fields in double quotes may hold commas, line breaks and doubled quotes.
Result<std::vector<std::vector<std::string>>> read_records(const std::string& text, const std::string& path) {
  std::vector<std::vector<std::string>> records;
  std::vector<std::string> record;
  std::string value;
  bool quoted = false;
  size_t line = 1;
  const auto end_record = [&] {
    record.push_back(std::exchange(value, {}));
    if (record.size() > 1 || !record.front().empty()) records.push_back(std::move(record));
    record.clear();
  };
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '\n') ++line;
    if (quoted) {
      if (c != '"') value += c;
      else if (i + 1 < text.size() && text[i + 1] == '"') value += text[++i];
      else quoted = false;
    } else if (c == '"') {
      quoted = true;
    } else if (c == ',') {
      record.push_back(std::exchange(value, {}));
    } else if (c == '\n') {
      end_record();
    } else if (c != '\r') {
      value += c;
    }
  }
  if (quoted) return bad(path, fmt::format("a quoted field is not closed by line {}", line));
  if (!value.empty() || !record.empty()) end_record();
  return records;
}

Result<std::vector<Problem>> read_csv(const std::string& text, const std::string& path) {
  SLUICE_TRY_ASSIGN(records, read_records(text, path));
  std::vector<Problem> problems;
  for (size_t i = 1; i < records.size(); ++i) {
    const std::string where = fmt::format("{}: record {}", path, i);
    if (records[i].size() != records[0].size()) {
      return bad(where, fmt::format("has {} fields, the first line names {}", records[i].size(), records[0].size()));
    }
    Fields fields;
    for (size_t k = 0; k < records[i].size(); ++k) fields[records[0][k]] = std::move(records[i][k]);
    SLUICE_TRY_ASSIGN(problem, problem_of(fields, where));
    problems.push_back(std::move(problem));
  }
  return problems;
}

// ---------------------------------------------------------------------------------------------------- answers

void replace_all(std::string& text, std::string_view from, std::string_view to) {
  for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size())) {
    text.replace(at, from.size(), to);
  }
}

// The argument of a macro that begins at `at`: "{...}" with its braces balanced, or one character. Nothing where it
// does not close.
std::optional<std::string_view> argument_at(std::string_view text, size_t at) {
  if (at >= text.size()) return std::nullopt;
  if (text[at] != '{') return text.substr(at, 1);
  int depth = 0;
  for (size_t i = at; i < text.size(); ++i) {
    depth += text[i] == '{' ? 1 : text[i] == '}' ? -1 : 0;
    if (depth == 0) return text.substr(at, i - at + 1);
  }
  return std::nullopt;
}

// \frac12 and \sqrt2 get their braces.
void add_braces(std::string& text, std::string_view macro, int arguments) {
  for (size_t at = text.find(macro); at != std::string::npos; at = text.find(macro, at + 1)) {
    size_t next = at + macro.size();
    for (int i = 0; i < arguments; ++i) {
      const std::optional<std::string_view> argument = argument_at(text, next);
      if (!argument || (*argument)[0] == '[') return;
      if ((*argument)[0] != '{') {
        if ((*argument)[0] == '\\') return;
        text.insert(next + 1, "}");
        text.insert(next, "{");
        next += 3;
      } else {
        next += argument->size();
      }
    }
  }
}

// \text{x} becomes x; one that begins with a space is a unit, and ends the answer.
void unwrap_text(std::string& text) {
  for (const std::string_view macro : {"\\text{", "\\mbox{", "\\textbf{", "\\mathrm{", "\\mathbf{", "\\textit{"}) {
    for (size_t at = text.find(macro); at != std::string::npos; at = text.find(macro, at)) {
      const size_t brace = at + macro.size() - 1;
      const std::optional<std::string_view> argument = argument_at(text, brace);
      if (!argument) return;
      if (at > 0 && argument->size() > 1 && (*argument)[1] == ' ') {
        text.resize(at);
        break;
      }
      const std::string inner(argument->substr(1, argument->size() - 2));
      text.replace(at, macro.size() - 1 + argument->size(), inner);
    }
  }
}

// One spelling for what is the same: after Hendrycks et al., "Measuring Mathematical Problem Solving With the MATH
// Dataset", 2021 (math_equivalence.py).
std::string normalized(std::string_view latex) {
  std::string text(trimmed(latex));
  for (const std::string_view gone : {"\\!", "\\,", "\\;", "\\:", "\\left", "\\right", "\\$", "$", "\\%", "%",
                                      "^{\\circ}", "^\\circ", "\\displaystyle", "\\(", "\\)", "\\[", "\\]"}) {
    replace_all(text, gone, "");
  }
  replace_all(text, "\\tfrac", "\\frac");
  replace_all(text, "\\dfrac", "\\frac");
  unwrap_text(text);
  for (const std::string_view white : {" ", "\n", "\t", "\\ ", "~"}) replace_all(text, white, "");
  while (text.ends_with('.')) text.pop_back();
  const size_t equals = text.find('=');
  const auto is_letter = [](unsigned char c) { return std::isalpha(c) != 0; };
  if (equals != std::string::npos && equals <= 2 && text.find('=', equals + 1) == std::string::npos &&
      std::all_of(text.begin(), text.begin() + static_cast<ptrdiff_t>(equals), is_letter)) {
    text.erase(0, equals + 1);  // x = 5
  }
  add_braces(text, "\\frac", 2);
  add_braces(text, "\\sqrt", 1);
  return text;
}

// A decimal number, perhaps with commas between thousands.
std::optional<double> decimal(std::string_view text) {
  std::string digits;
  bool point = false, any = false;
  size_t since_comma = 0, commas = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c >= '0' && c <= '9') {
      digits += c;
      any = true;
      ++since_comma;
    } else if ((c == '-' || c == '+') && i == 0) {
      if (c == '-') digits += c;
    } else if (c == '.' && !point) {
      if (commas > 0 && since_comma != 3) return std::nullopt;
      point = true;
      digits += c;
    } else if (c == ',' && !point && any && (commas == 0 ? since_comma <= 3 : since_comma == 3)) {
      ++commas;
      since_comma = 0;
    } else {
      return std::nullopt;
    }
  }
  if (!any || (commas > 0 && !point && since_comma != 3)) return std::nullopt;
  return std::strtod(digits.c_str(), nullptr);
}

// The value of a normalized answer that is a number: 12,345, .5, 3/4, -\frac{3}{4}.
std::optional<double> number_of(std::string_view text) {
  if (const std::optional<double> plain = decimal(text)) return plain;
  double sign = 1;
  if (text.starts_with('-')) {
    sign = -1;
    text.remove_prefix(1);
  }
  std::string_view above, below;
  if (text.starts_with("\\frac{")) {
    const std::optional<std::string_view> first = argument_at(text, 5);
    const std::optional<std::string_view> second = first ? argument_at(text, 5 + first->size()) : std::nullopt;
    if (!second || second->size() < 2 || 5 + first->size() + second->size() != text.size()) return std::nullopt;
    above = first->substr(1, first->size() - 2);
    below = second->substr(1, second->size() - 2);
  } else {
    const size_t slash = text.find('/');
    if (slash == std::string_view::npos) return std::nullopt;
    above = text.substr(0, slash);
    below = text.substr(slash + 1);
  }
  const std::optional<double> numerator = decimal(above), denominator = decimal(below);
  if (!numerator || !denominator || *denominator == 0) return std::nullopt;
  return sign * *numerator / *denominator;
}

bool same_number(double a, double b) { return std::fabs(a - b) <= 1e-6 * std::fabs(b); }

bool same_latex(std::string_view given, std::string_view expected) {
  const std::string a = normalized(given), b = normalized(expected);
  if (a.empty()) return false;
  if (a == b) return true;
  const std::optional<double> number_a = number_of(a), number_b = number_of(b);
  return number_a && number_b && same_number(*number_a, *number_b);
}

// The last run of digits in `text`, with sign, commas and point.
std::optional<double> last_number(std::string_view text) {
  const auto digit = [&](size_t i) { return text[i] >= '0' && text[i] <= '9'; };
  size_t end = text.size();
  while (end > 0 && !digit(end - 1)) --end;
  if (end == 0) return std::nullopt;
  size_t begin = end;
  while (begin > 0 && (digit(begin - 1) || text[begin - 1] == ',' || text[begin - 1] == '.')) --begin;
  while (begin < end && !digit(begin) && text[begin] != '.') ++begin;
  // A minus behind a digit is a subtraction.
  if (begin > 0 && text[begin - 1] == '-' && (begin < 2 || !digit(begin - 2))) --begin;
  if (const std::optional<double> number = decimal(text.substr(begin, end - begin))) return number;
  while (end > begin && digit(end - 1)) --end;  // "1,2,34": what is behind the last separator
  return decimal(text.substr(end, text.find_first_not_of("0123456789", end) - end));
}

std::optional<double> numeric_answer(std::string_view text) {
  const std::string boxed = last_boxed(text);
  if (!boxed.empty()) {
    if (const std::optional<double> number = number_of(normalized(boxed))) return number;
    return last_number(boxed);
  }
  const size_t mark = text.rfind("####");
  if (mark != std::string_view::npos) {
    const std::string_view line = text.substr(mark + 4);
    if (const std::optional<double> number = last_number(line.substr(0, line.find('\n')))) return number;
  }
  return last_number(text);
}

// The letter that stands alone at the beginning of `text`, behind brackets and spaces.
char letter_of(std::string_view text) {
  const size_t at = text.find_first_not_of(" \t\n*({[$:");
  if (at == std::string_view::npos || text[at] < 'A' || text[at] > 'D') return 0;
  const bool alone = at + 1 == text.size() || std::isalnum(static_cast<unsigned char>(text[at + 1])) == 0;
  return alone ? text[at] : '\0';
}

char chosen_letter(std::string_view text) {
  const std::string boxed = last_boxed(text);
  if (!boxed.empty()) return letter_of(normalized(boxed));
  std::string lower(text);
  std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });
  size_t best = std::string::npos;
  for (const std::string_view lead : {"answer is", "answer:"}) {
    const size_t at = lower.rfind(lead);
    if (at != std::string::npos && (best == std::string::npos || at + lead.size() > best)) best = at + lead.size();
  }
  return best == std::string::npos ? '\0' : letter_of(text.substr(best));
}

}  // namespace

Result<std::vector<Problem>> read_tasks(const std::string& path) {
  SLUICE_TRY_ASSIGN(text, read_utf8(path));
  SLUICE_TRY_ASSIGN(problems, path.ends_with(".csv") ? read_csv(text, path) : read_lines(text, path));
  if (problems.empty()) return fail(ErrorCode::usage, fmt::format("{}: there is no problem in it", path));
  return problems;
}

std::vector<Problem> take_evenly(std::vector<Problem> problems, size_t count) {
  if (count == 0 || count >= problems.size()) return problems;
  std::vector<Problem> taken;
  for (size_t i = 0; i < count; ++i) taken.push_back(std::move(problems[i * problems.size() / count]));
  return taken;
}

std::string last_boxed(std::string_view text) {
  std::string found;
  for (const std::string_view macro : {"\\boxed", "\\fbox"}) {
    for (size_t at = text.rfind(macro); at != std::string_view::npos;
         at = at == 0 ? at - 1 : text.rfind(macro, at - 1)) {
      size_t open = at + macro.size();
      while (open < text.size() && text[open] == ' ') ++open;
      const std::optional<std::string_view> argument = argument_at(text, open);
      if (!argument) continue;
      return std::string(argument->size() > 1 ? argument->substr(1, argument->size() - 2) : *argument);
    }
  }
  return found;
}

bool is_right(const Problem& problem, std::string_view text) {
  switch (problem.check) {
    case Check::exact:
      return trimmed(text) == trimmed(problem.answer);
    case Check::numeric: {
      const std::optional<double> expected = number_of(normalized(problem.answer));
      const std::optional<double> given = numeric_answer(text);
      return expected && given && same_number(*given, *expected);
    }
    case Check::boxed:
      return same_latex(last_boxed(text), problem.answer);
    case Check::choice:
      return chosen_letter(text) != 0 && problem.answer == std::string(1, chosen_letter(text));
  }
  return false;
}

PassRate pass_at_1(std::span<const uint32_t> right, uint32_t samples) {
  const auto problems = static_cast<double>(right.size()), each = static_cast<double>(samples);
  uint64_t all_right = 0;
  for (const uint32_t one : right) all_right += one;
  const double mean = static_cast<double>(all_right) / (problems * each);
  double variance = 0;
  for (const uint32_t one : right) {
    const double off = static_cast<double>(one) / each - mean;
    variance += off * off / std::max(1.0, problems - 1);
  }
  // Samples of one problem depend on each other: p (1 - p) / n is the variance of a mean of n independent ones.
  double n = problems;
  if (variance > 0) n = std::clamp(mean * (1 - mean) * problems / variance, problems, problems * each);
  constexpr double kZ = 1.959964;  // of 95%
  const double centre = (mean + kZ * kZ / (2 * n)) / (1 + kZ * kZ / n);
  const double half = kZ / (1 + kZ * kZ / n) * std::sqrt(mean * (1 - mean) / n + kZ * kZ / (4 * n * n));
  return {.rate = mean, .low = std::max(0.0, centre - half), .high = std::min(1.0, centre + half)};
}

}  // namespace sluice::cli
