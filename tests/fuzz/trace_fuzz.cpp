// SPDX-License-Identifier: Apache-2.0
// Fuzzes the reader of .sltrace files and what is computed from them: any bytes give a trace or one typed error.
//
// As a test: fuzz_trace [RUNS [SEED]]. With libFuzzer: clang++ -DSLUICE_LIBFUZZER -fsanitize=fuzzer,address.
#include <cstdio>
#include <cstdlib>

#include <nlohmann/json.hpp>

#include "base/check.hpp"
#include "trace/export.hpp"
#include "trace/report.hpp"
#include "trace_maker.hpp"

namespace {

using namespace sluice;

// True if the bytes are a trace.
bool parse_bytes(std::span<const uint8_t> bytes) {
  const auto trace = trace::parse_trace(std::as_bytes(bytes), "fuzz.sltrace");
  if (!trace) {
    SLUICE_CHECK(trace.error().code == ErrorCode::corrupt || trace.error().code == ErrorCode::unsupported);
    SLUICE_CHECK(!trace.error().message.empty());
    return false;
  }
  uint64_t records = 0;
  for (const trace::TraceTrack& track : trace->tracks) {
    records += track.records.size();
    for (const trace::Record& record : track.records) SLUICE_CHECK(record.begin <= record.end);
  }
  SLUICE_CHECK(records == trace->records);
  uint64_t written = 0;
  const trace::Sink count = [&](std::string_view text) -> Status {
    written += text.size();
    return {};
  };
  SLUICE_CHECK(trace::write_perfetto(*trace, count) && trace::write_chrome_json(*trace, count) && written > 0);
  if (const auto tokens = trace::tokens_of(*trace)) {
    const nlohmann::json report = trace::report_of(*trace, *tokens);
    SLUICE_CHECK(!report.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace).empty());
    SLUICE_CHECK(!trace::html_report(report, *tokens).empty());
  }
  return true;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  parse_bytes({data, size});
  return 0;
}

#ifndef SLUICE_LIBFUZZER
#include "fuzz/mutation.hpp"

int main(int argc, char** argv) {
  const uint64_t runs = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 50'000;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  std::printf("trace fuzz: %llu runs, seed %llu\n", static_cast<unsigned long long>(runs),
              static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  const test::TempFolder folder;
  const std::vector<std::byte> good = test::trace_bytes(folder.file("f.sltrace"), test::write_two_tokens);
  std::vector<uint8_t> input(good.size());
  std::memcpy(input.data(), good.data(), good.size());
  SLUICE_CHECK(parse_bytes(input));
  test::Mutator mutator(seed);
  uint64_t parsed = 0;
  for (uint64_t run = 0; run < runs; ++run) {
    std::vector<uint8_t> file = input;
    mutator.mutate(file, 0);
    if (mutator.below(8) != 0) test::reseal(file);
    if (parse_bytes(file)) ++parsed;
  }
  std::printf("%llu of %llu mutations parsed, none broke a promise\n", static_cast<unsigned long long>(parsed),
              static_cast<unsigned long long>(runs));
  return 0;
}
#endif
