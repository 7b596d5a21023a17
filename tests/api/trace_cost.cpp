// SPDX-License-Identifier: Apache-2.0
// Not a test: what writing a trace costs, and whether one loses records. For tools/bench-tracing, which explains itself.
//
//   api_trace_cost MODEL TRACE cost PAIRS TOKENS    one JSON object a line: seconds of TOKENS tokens without and with
//   api_trace_cost MODEL TRACE drops SECONDS        one JSON object at the end: tokens, records, dropped
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "sluice/sluice.hpp"

using namespace sluice;

namespace {

constexpr uint32_t kContext = 1024;
const std::vector<int32_t> kPrompt = {1, 20, 300, 4000};

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Generates from the same place every time, so that both halves of a pair do the same work.
Result<double> generate(Session& session, uint32_t tokens) {
  SLUICE_TRY(session.truncate(static_cast<uint32_t>(kPrompt.size())));
  const auto begin = std::chrono::steady_clock::now();
  SLUICE_TRY_ASSIGN(stopped, session.generate({.max_tokens = tokens, .sampling = {.temperature = 0}, .stop = {},
                                               .ignore_eos = true}, [](const Token&) { return true; }));
  (void)stopped;
  return seconds_since(begin);
}

Status measure_cost(Model& model, Session& session, const char* trace, int pairs, uint32_t tokens) {
  std::mt19937_64 random(1);
  for (int pair = -1; pair < pairs; ++pair) {   // the first one warms up
    double seconds[2] = {};
    const bool traced_first = (random() & 1) != 0;
    for (const bool traced : {traced_first, !traced_first}) {
      if (traced) SLUICE_TRY(model.start_trace(trace));
      SLUICE_TRY_ASSIGN(taken, generate(session, tokens));
      if (traced) {
        SLUICE_TRY_ASSIGN(totals, model.stop_trace());
        (void)totals;
      }
      seconds[traced ? 1 : 0] = taken;
    }
    if (pair >= 0) std::printf("{\"plain\":%.9f,\"traced\":%.9f}\n", seconds[0], seconds[1]);
    (void)std::fflush(stdout);
  }
  return {};
}

Status measure_drops(Model& model, Session& session, const char* trace, double seconds) {
  SLUICE_TRY(model.start_trace(trace));
  const auto begin = std::chrono::steady_clock::now();
  uint64_t tokens = 0;
  while (seconds_since(begin) < seconds) {
    SLUICE_TRY_ASSIGN(taken, generate(session, kContext - 16));
    (void)taken;
    tokens += kContext - 16;
  }
  const double taken = seconds_since(begin);
  SLUICE_TRY_ASSIGN(totals, model.stop_trace());
  std::printf("{\"seconds\":%.1f,\"tokens\":%llu,\"records\":%llu,\"dropped\":%llu}\n", taken,
              static_cast<unsigned long long>(tokens), static_cast<unsigned long long>(totals.records),
              static_cast<unsigned long long>(totals.dropped));
  return {};
}

Status measure(int argc, char** argv) {
  const bool cost = argc == 6 && std::strcmp(argv[3], "cost") == 0;
  if (!cost && !(argc == 5 && std::strcmp(argv[3], "drops") == 0))
    return fail(ErrorCode::usage, "trace_cost MODEL TRACE cost PAIRS TOKENS | drops SECONDS");
  SLUICE_TRY_ASSIGN(model, Model::open(argv[1], {.context = kContext, .backend = "cpu"}));
  SLUICE_TRY_ASSIGN(session, model.new_session());
  SLUICE_TRY(session.append(kPrompt));
  SLUICE_TRY(session.flush());
  if (cost) return measure_cost(model, session, argv[2], std::atoi(argv[4]), static_cast<uint32_t>(std::atoi(argv[5])));
  return measure_drops(model, session, argv[2], std::atof(argv[4]));
}

}  // namespace

int main(int argc, char** argv) {
  const Status status = measure(argc, argv);
  if (!status) std::fprintf(stderr, "trace_cost: %s\n", status.error().message.c_str());
  return status ? 0 : 1;
}
