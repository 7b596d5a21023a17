// SPDX-License-Identifier: Apache-2.0
#include "plan/advice.hpp"

#include <string>
#include <vector>

#include "catch.hpp"

namespace {

using namespace sluice::plan;

Candidate candidate(const std::string& recipe, double kl, double rate, bool streams = false, bool residual = false) {
  return {
      .recipe = recipe, .residual = residual, .kl = kl, .fits = true, .streams = streams, .tokens_per_second = rate};
}

std::string chosen(const std::vector<Candidate>& candidates, Workload workload, double wanted = 10) {
  const Decision decision = choose(candidates, workload, wanted);
  CHECK_FALSE(decision.reasons.empty());
  if (!decision.candidate) return "none";
  const Candidate& one = candidates[*decision.candidate];
  return one.recipe + (one.residual ? "+" : "");
}

}  // namespace

TEST_CASE("where every recipe is fast, the fastest of those whose loss cannot be told apart is chosen") {
  const std::vector<Candidate> all = {candidate("fp16", 2e-6, 50), candidate("int8", 0.0018, 100),
                                      candidate("int8-critical", 9e-4, 70), candidate("int4", 0.13, 190)};
  CHECK(chosen(all, Workload::general) == "int8");        // 0.0018 is below a tenth of 0.2
  CHECK(chosen(all, Workload::math) == "int8-critical");  // 0.0018 is not below a tenth of 0.01, 9e-4 is
  CHECK(chosen(all, Workload::math, 80) == "int8");       // the others are too slow
  CHECK(chosen(all, Workload::general, 150) == "int4");
}

TEST_CASE("what loses more than the workload allows is no choice, however fast") {
  const std::vector<Candidate> all = {candidate("int8", 0.0018, 1), candidate("medium", 0.09, 50),
                                      candidate("int4", 0.13, 100)};
  CHECK(chosen(all, Workload::general) == "medium");
  CHECK(chosen(all, Workload::code) == "medium");
  CHECK(chosen(all, Workload::math) == "int8");
}

TEST_CASE("where none is fast enough speed decides, and a streamed residual wins a tie") {
  const std::vector<Candidate> all = {candidate("fp16", 2e-6, 0.25, true), candidate("int8", 0.0018, 0.52, true),
                                      candidate("int4", 0.13, 1.9, true), candidate("int4", 0.005, 0.50, true, true)};
  CHECK(chosen(all, Workload::general) == "int4");
  CHECK(chosen(all, Workload::math) == "int4+");
  std::vector<Candidate> slower = all;
  slower[3].tokens_per_second = 0.4;  // more than a tenth slower than int8
  CHECK(chosen(slower, Workload::math) == "int8");
  std::vector<Candidate> resident = all;
  for (Candidate& one : resident) one.streams = false;
  CHECK(chosen(resident, Workload::math) == "int8");  // the least loss within a tenth
}

TEST_CASE("without a recipe that is good enough the least lossy is taken, and without one that fits none") {
  std::vector<Candidate> all = {candidate("a", 0.5, 100), candidate("b", 0.4, 1)};
  CHECK(chosen(all, Workload::math) == "b");
  for (Candidate& one : all) one.fits = false;
  CHECK(chosen(all, Workload::math) == "none");
  all[0].fits = true;
  CHECK(chosen(all, Workload::math) == "a");
  CHECK(choose({}, Workload::general, 10).candidate == std::nullopt);
}

TEST_CASE("unknown rates leave the least loss") {
  CHECK(chosen({candidate("int4", 0.1, 0), candidate("int8", 0.001, 0)}, Workload::general) == "int8");
}
