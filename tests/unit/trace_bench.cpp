// SPDX-License-Identifier: Apache-2.0
// Not a test: what a span costs. Best of many rounds, as the least disturbed one.
#include <algorithm>
#include <cstdio>

#include "trace/evidence.hpp"
#include "trace/recorder.hpp"

using namespace sluice::trace;

namespace {

// Nanoseconds per call of `body`.
template <class Body>
double best_of(int rounds, int calls, Body&& body) {
  double best = 1e9;
  for (int round = 0; round < rounds; ++round) {
    const uint64_t begin = steady_ns();
    for (int i = 0; i < calls; ++i) body();
    best = std::min(best, static_cast<double>(steady_ns() - begin) / calls);
  }
  return best;
}

}  // namespace

int main(int argc, char**) {
  Track track(0, "bench", Recorder::kBusyCapacity);
  const double stamp = best_of(200, 20000, [] { (void)ticks(); });
  const double span = best_of(200, 20000, [&] {
    const uint64_t begin = ticks();
    track.record(Kind::matmul, begin, ticks(), 3, 4096, 7);
  });
  Chain chain(track);
  const double chained = best_of(200, 20000, [&] { chain.span(Kind::matmul, 3); });
  TokenEvidence evidence(track, "/", false);
  const double token = best_of(50, 200, [&] { evidence.read(1000); });
  std::printf("stamp %.1f ns, span with two stamps %.1f ns, span of a chain %.1f ns, evidence of a token %.1f us\n",
              stamp, span, chained, token / 1000);
  return argc > 1 && span > 25 ? 1 : 0;
}
