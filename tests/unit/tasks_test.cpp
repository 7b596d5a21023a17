// SPDX-License-Identifier: Apache-2.0
#include "cli/tasks.hpp"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "catch.hpp"
#include "container_fixture.hpp"

namespace {

using namespace sluice;
using namespace sluice::cli;
using namespace sluice::test;

struct File {
  TempFolder folder;
  std::string path;
  explicit File(const std::string& text, const std::string& name = "tasks.jsonl") : path(folder.file(name)) {
    std::ofstream(path, std::ios::binary) << text;
  }
};

std::vector<Problem> problems_of(const std::string& text, const std::string& name = "tasks.jsonl") {
  const File file(text, name);
  auto problems = read_tasks(file.path);
  INFO((problems ? std::string() : problems.error().message));
  REQUIRE(problems);
  return std::move(*problems);
}

void refuses(const std::string& text, ErrorCode code, const std::string& words,
             const std::string& name = "tasks.jsonl") {
  const File file(text, name);
  const auto problems = read_tasks(file.path);
  REQUIRE_FALSE(problems);
  INFO(problems.error().message);
  CHECK(problems.error().code == code);
  CHECK(mentions(problems.error(), words));
  CHECK(mentions(problems.error(), file.path));
}

bool right(Check check, const std::string& expected, const std::string& text) {
  return is_right({.prompt = "", .answer = expected, .check = check}, text);
}

}  // namespace

TEST_CASE("problems are read in every form that is published") {
  const auto math = problems_of(R"({"problem": "What is $1+1$?", "solution": "s", "answer": "2", "level": 2})");
  CHECK(math[0].check == Check::boxed);
  CHECK(math[0].answer == "2");
  CHECK(math[0].prompt.starts_with("What is $1+1$?\n\nPlease reason step by step"));
  CHECK(problems_of(R"({"id": 60, "problem": "p", "question": "p", "answer": 204})")[0].answer == "204");
  CHECK(problems_of(R"({"question": "q", "answer": "\\frac12"})")[0].check == Check::boxed);
  const auto gsm = problems_of(
      "{\"question\": \"q\", \"answer\": \"1 + 1 = <<1+1=2>>2\\n#### 1,002\"}\n\n"
      "{\"question\": \"q\", \"answer\": \"#### -3\"}\n");
  CHECK(gsm.size() == 2);
  CHECK(gsm[0].check == Check::numeric);
  CHECK(gsm[0].answer == "1,002");
  const auto own = problems_of(R"({"prompt": "say yes", "answer": "yes"})"
                               "\n"
                               R"({"prompt": "p", "answer": "1", "check": "numeric"})");
  CHECK(own[0].check == Check::exact);
  CHECK(own[0].prompt == "say yes");
  CHECK(own[1].check == Check::numeric);
}

TEST_CASE("GPQA is read from its CSV and from lines, with the right choice in a place of its own") {
  const std::string csv =
      "Record ID,Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3\r\n"
      "a,\"Which, of \"\"these\"\"\nis it?\",right,w1,w2,\"w,3\"\r\n"
      "b,Another?,right,w1,w2,w3\n";
  const auto problems = problems_of(csv, "gpqa_diamond.csv");
  REQUIRE(problems.size() == 2);
  for (const Problem& problem : problems) {
    CHECK(problem.check == Check::choice);
    CHECK(problem.prompt.find("\n" + problem.answer + ") right") != std::string::npos);
    for (const char* letter : {"\nA) ", "\nB) ", "\nC) ", "\nD) "})
      CHECK(problem.prompt.find(letter) != std::string::npos);
  }
  CHECK(problems[0].prompt.starts_with("Which, of \"these\"\nis it?\n\nA) "));
  CHECK(problems[0].prompt.find(") w,3") != std::string::npos);
  const auto lines = problems_of(R"({"Question": "Another?", "Correct Answer": "right", "Incorrect Answer 1": "w1", )"
                                 R"("Incorrect Answer 2": "w2", "Incorrect Answer 3": "w3"})");
  CHECK(lines[0].prompt == problems[1].prompt);
  CHECK(lines[0].answer == problems[1].answer);
}

TEST_CASE("the published files load as they are") {
  const std::string folder = std::string(std::getenv("SLUICE_SHARED")) + "/data/";
  if (!std::filesystem::exists(folder)) {
    WARN("skipped: " << folder << " is not here");
    return;
  }
  const struct {
    const char* name;
    size_t count;
    Check check;
  } files[] = {{"math500.jsonl", 500, Check::boxed},
               {"gsm8k-test.jsonl", 1319, Check::numeric},
               {"aime24.jsonl", 30, Check::boxed}};
  for (const auto& file : files) {
    const auto problems = read_tasks(folder + file.name);
    REQUIRE(problems);
    CHECK(problems->size() == file.count);
    for (const Problem& problem : *problems) {
      INFO(problem.answer);
      CHECK(problem.check == file.check);
      // Every published answer is right, and so is it in a box.
      CHECK(is_right(problem, "So it is $\\boxed{" + problem.answer + "}$."));
      CHECK_FALSE(is_right(problem, "So it is $\\boxed{7" + problem.answer + "}$."));
      CHECK_FALSE(is_right(problem, ""));
    }
  }
}

TEST_CASE("bad task files are refused with their line") {
  refuses("", ErrorCode::usage, "there is no problem in it");
  refuses("{\"prompt\": \"a\", \"answer\": \"b\"}\n[1]\n", ErrorCode::corrupt, "line 2: is not a JSON object");
  refuses("{\"prompt\": \"a\"", ErrorCode::corrupt, "line 1: is not a JSON object");
  refuses(R"({"prompt": "a"})", ErrorCode::corrupt, "\"answer\" is missing");
  refuses(R"({"prompt": " ", "answer": "b"})", ErrorCode::corrupt, "\"prompt\" is missing or empty");
  refuses(R"({"prompt": "a", "answer": "b", "check": "fuzzy"})", ErrorCode::corrupt, "there are exact, numeric");
  refuses(R"({"text": "a"})", ErrorCode::corrupt, "has none of \"prompt\"");
  refuses(R"({"question": "a", "answer": "because ####"})", ErrorCode::corrupt, "nothing stands behind");
  refuses("Question,Correct Answer\na,b\n", ErrorCode::corrupt, "\"Incorrect Answer 1\" is missing", "a.csv");
  refuses("Question,Correct Answer\na,b,c\n", ErrorCode::corrupt, "record 1: has 3 fields", "a.csv");
  refuses("Question,\"Correct\na,b\n", ErrorCode::corrupt, "is not closed", "a.csv");
  refuses("Question,Correct Answer\n", ErrorCode::usage, "no problem", "a.csv");
  refuses("Question,Correct Answer\ncaf\xe9,b\n", ErrorCode::corrupt, "the bytes at offset 27 are not UTF-8", "a.csv");
  refuses("{\"prompt\": \"caf\xe9\", \"answer\": \"b\"}\n", ErrorCode::corrupt,
          "the bytes at offset 15 are not UTF-8");
  const auto missing = read_tasks("/nowhere/tasks.jsonl");
  REQUIRE_FALSE(missing);
  CHECK(missing.error().code == ErrorCode::not_found);
}

TEST_CASE("an exact answer is all of the text") {
  CHECK(right(Check::exact, "yes", " yes\n"));
  CHECK_FALSE(right(Check::exact, "yes", "yes."));
  CHECK_FALSE(right(Check::exact, "yes", "Yes"));
}

TEST_CASE("a numeric answer is boxed, behind #### or the last number") {
  CHECK(right(Check::numeric, "18", "She makes 9 * 2 = $18 every day."));
  CHECK(right(Check::numeric, "1,002", "so 1002"));
  CHECK(right(Check::numeric, "1002", "it costs $1,002.00."));
  CHECK(right(Check::numeric, "70000", "#### 70,000\nThat was 5 steps."));
  CHECK(right(Check::numeric, "12", "\\boxed{12} and then 13"));
  CHECK(right(Check::numeric, "12", "\\boxed{12 \\text{ apples}}"));
  CHECK(right(Check::numeric, "0.5", "\\boxed{\\frac{1}{2}}"));
  CHECK(right(Check::numeric, "-3", "the answer is -3"));
  CHECK(right(Check::numeric, "3", "5-3"));
  CHECK_FALSE(right(Check::numeric, "18", "18 ducks, 9 eggs"));
  CHECK_FALSE(right(Check::numeric, "18", "eighteen"));
  CHECK_FALSE(right(Check::numeric, "0.0000672", "0.000067"));
}

TEST_CASE("a boxed answer is compared as LaTeX") {
  const struct {
    const char *expected, *given;
  } same[] = {{"\\frac{1}{2}", "\\dfrac12"},
              {"\\frac{1}{2}", "0.5"},
              {"\\frac{1}{2}", "1/2"},
              {"-\\frac{3}{8}", "-3/8"},
              {"\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"},
              {"11\\sqrt2", "11\\sqrt{2}"},
              {"10,\\!080", "10080"},
              {"120^\\circ", "120"},
              {"15\\mbox{ cm}^2", "15"},
              {"\\text{Evelyn}", "Evelyn"},
              {".35625", "0.35625"},
              {"5", "x=5"},
              {"50\\%", "50"},
              {"\\$18", "18"},
              {"2", "2."},
              {"\\frac ab", "\\frac{a}{b}"}};
  for (const auto& [expected, given] : same) {
    INFO(expected << " and " << given);
    CHECK(right(Check::boxed, expected, "thus \\boxed{" + std::string(given) + "}"));
  }
  const struct {
    const char *expected, *given;
  } different[] = {{"2", "3"}, {"\\frac{1}{2}", "\\frac{1}{3}"}, {"(3,4]", "(3,4)"}, {"1,-2", "-2,1"}, {"x", "y"},
                   {"2", ""}};
  for (const auto& [expected, given] : different) {
    INFO(expected << " and " << given);
    CHECK_FALSE(right(Check::boxed, expected, "thus \\boxed{" + std::string(given) + "}"));
  }
  CHECK_FALSE(right(Check::boxed, "2", "it is 2"));
  CHECK_FALSE(right(Check::boxed, "2", "\\boxed{2"));
  CHECK(last_boxed("\\boxed{1} then \\boxed{\\frac{2}{3}}") == "\\frac{2}{3}");
  CHECK(last_boxed("\\boxed 7") == "7");
  CHECK(last_boxed("\\boxed{1} then \\boxed{2") == "1");
  CHECK(last_boxed("\\boxed") == "");
}

TEST_CASE("a choice is a letter that stands alone") {
  for (const char* text : {"\\boxed{C}", "\\boxed{\\text{C}}", "\\boxed{(C)}", "The answer is C.", "Answer: (C)",
                           "the answer is **C**", "answer is A? No, the answer is C", "\\boxed{C) 42}"}) {
    INFO(text);
    CHECK(right(Check::choice, "C", text));
  }
  for (const char* text : {"\\boxed{D}", "C", "The answer is Carbon", "the answer is unclear", ""}) {
    INFO(text);
    CHECK_FALSE(right(Check::choice, "C", text));
  }
}

TEST_CASE("pass@1 has Wilson's interval, and samples of one problem do not count as independent") {
  std::vector<uint32_t> right(100, 0);
  for (size_t i = 0; i < 30; ++i) right[i] = 1;
  const PassRate one = pass_at_1(right, 1);  // 30 of 100: 21.9% to 39.6%
  CHECK(one.rate == 0.3);
  CHECK(std::abs(one.low - 0.2189) < 1e-4);
  CHECK(std::abs(one.high - 0.3958) < 1e-4);
  // Always right or always wrong: four samples say no more than one.
  for (uint32_t& n : right) n *= 4;
  const PassRate same = pass_at_1(right, 4);
  CHECK(same.rate == 0.3);
  CHECK(std::abs(same.low - one.low) < 1e-3);
  // Every problem right once in four: they say as much as 400 problems.
  const PassRate independent = pass_at_1(std::vector<uint32_t>(100, 1), 4);
  CHECK(independent.rate == 0.25);
  CHECK(independent.high - independent.low < 0.2);
  const PassRate none = pass_at_1(std::vector<uint32_t>(100, 0), 1);
  CHECK(none.low == 0);
  CHECK(std::abs(none.high - 0.0370) < 1e-4);
  const PassRate all = pass_at_1(std::vector<uint32_t>(100, 4), 4);
  CHECK(all.high == 1);
}

TEST_CASE("a part of the problems is spread evenly") {
  std::vector<Problem> problems;
  for (int i = 0; i < 10; ++i) problems.push_back({.prompt = std::to_string(i), .answer = "a"});
  const auto taken = take_evenly(problems, 3);
  REQUIRE(taken.size() == 3);
  CHECK(taken[0].prompt == "0");
  CHECK(taken[1].prompt == "3");
  CHECK(taken[2].prompt == "6");
  CHECK(take_evenly(problems, 0).size() == 10);
  CHECK(take_evenly(problems, 99).size() == 10);
}
