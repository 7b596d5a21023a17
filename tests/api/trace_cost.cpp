// SPDX-License-Identifier: Apache-2.0
// Not a test: what writing a trace costs, and whether one loses records. For tools/bench-tracing, which explains itself.
//
//   api_trace_cost MODEL TRACE cost PAIRS       one JSON object a line: tokens, seconds of them without and with
//   api_trace_cost MODEL TRACE drops SECONDS    one JSON object at the end: tokens, records, dropped
#include <algorithm>
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

uint32_t tokens_in(double seconds, double token_seconds) {
  return static_cast<uint32_t>(std::clamp(seconds / token_seconds + 0.5, 1.0, (kContext - 8) / 2.0));
}

Result<double> generate(Session& session, uint32_t tokens) {
  const auto begin = std::chrono::steady_clock::now();
  SLUICE_TRY_ASSIGN(stopped, session.generate({.max_tokens = tokens, .sampling = {.temperature = 0}, .stop = {},
                                               .ignore_eos = true}, [](const Token&) { return true; }));
  (void)stopped;
  return seconds_since(begin);
}

// Timed from 50 to 250 ms after the trace began: its start has passed, and the collector, which wakes and reads the
// machine every 200 ms, does so as often as it does in a long run.
constexpr double kBefore = 0.050, kTimed = 0.200;

// From the same place every time, so that both halves of a pair do the same work.
Result<double> measure_half(Session& session, double token_seconds) {
  SLUICE_TRY(session.truncate(static_cast<uint32_t>(kPrompt.size())));
  SLUICE_TRY_ASSIGN(before, generate(session, tokens_in(kBefore, token_seconds)));
  (void)before;
  return generate(session, tokens_in(kTimed, token_seconds));
}

Status measure_cost(Model& model, Session& session, const char* trace, int pairs) {
  constexpr uint32_t kWarmUp = 100;
  SLUICE_TRY_ASSIGN(warm, generate(session, kWarmUp));
  const double token_seconds = warm / kWarmUp;
  std::mt19937_64 random(1);
  for (int pair = 0; pair < pairs; ++pair) {
    double seconds[2] = {};
    const bool traced_first = (random() & 1) != 0;
    for (const bool traced : {traced_first, !traced_first}) {
      if (traced) SLUICE_TRY(model.start_trace(trace));
      SLUICE_TRY_ASSIGN(taken, measure_half(session, token_seconds));
      if (traced) {
        SLUICE_TRY_ASSIGN(totals, model.stop_trace());
        (void)totals;
      }
      seconds[traced ? 1 : 0] = taken;
    }
    std::printf("{\"tokens\":%u,\"plain\":%.9f,\"traced\":%.9f}\n", tokens_in(kTimed, token_seconds), seconds[0],
                seconds[1]);
    (void)std::fflush(stdout);
  }
  return {};
}

Status measure_drops(Model& model, Session& session, const char* trace, double seconds) {
  SLUICE_TRY(model.start_trace(trace));
  const auto begin = std::chrono::steady_clock::now();
  uint64_t tokens = 0;
  while (seconds_since(begin) < seconds) {
    SLUICE_TRY(session.truncate(static_cast<uint32_t>(kPrompt.size())));
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
  const bool cost = argc == 5 && std::strcmp(argv[3], "cost") == 0;
  if (!cost && !(argc == 5 && std::strcmp(argv[3], "drops") == 0))
    return fail(ErrorCode::usage, "trace_cost MODEL TRACE cost PAIRS | drops SECONDS");
  SLUICE_TRY_ASSIGN(model, Model::open(argv[1], {.context = kContext, .backend = "cpu"}));
  SLUICE_TRY_ASSIGN(session, model.new_session());
  SLUICE_TRY(session.append(kPrompt));
  SLUICE_TRY(session.flush());
  if (cost) return measure_cost(model, session, argv[2], std::atoi(argv[4]));
  return measure_drops(model, session, argv[2], std::atof(argv[4]));
}

}  // namespace

int main(int argc, char** argv) {
  const Status status = measure(argc, argv);
  if (!status) std::fprintf(stderr, "trace_cost: %s\n", status.error().message.c_str());
  return status ? 0 : 1;
}
