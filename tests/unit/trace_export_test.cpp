// SPDX-License-Identifier: Apache-2.0
// What is shown of a trace: lanes, clocks, and a page that no note can break.
#include <nlohmann/json.hpp>

#include "base/check.hpp"
#include "catch.hpp"
#include "trace/export.hpp"
#include "trace/report.hpp"
#include "trace_maker.hpp"

using namespace sluice;
using namespace sluice::test;
using namespace sluice::trace;

namespace {

using Spans = std::vector<std::pair<uint64_t, uint64_t>>;

TraceTrack track_of(const Spans& spans) {
  TraceTrack track{.name = "drive"};
  for (const auto& [begin, end] : spans) track.records.push_back({.begin = begin, .end = end, .kind = Kind::disk_read});
  track.records.push_back({.begin = 1, .end = 1, .layer = 0, .kind = Kind::counter});
  return track;
}

std::vector<Spans> lanes(const Spans& spans) {
  const TraceTrack track = track_of(spans);
  std::vector<Spans> found;
  for (const Lane& lane : lanes_of(track)) {
    found.emplace_back();
    for (const Record* span : lane.spans) found.back().emplace_back(span->begin, span->end);
  }
  return found;
}

}  // namespace

TEST_CASE("spans that nest share a lane, those that overlap do not") {
  CHECK(lanes({}) == std::vector<Spans>{{}});
  // Behind each other, without a gap and with one; written as they end, a whole behind its parts.
  CHECK(lanes({{0, 2}, {2, 4}, {0, 4}, {5, 6}}) == std::vector<Spans>{{{0, 4}, {0, 2}, {2, 4}, {5, 6}}});
  CHECK(lanes({{0, 3}, {1, 4}, {2, 5}, {3, 6}}) == std::vector<Spans>{{{0, 3}, {3, 6}}, {{1, 4}}, {{2, 5}}});
  // The last one nests in the second lane only.
  CHECK(lanes({{0, 3}, {1, 9}, {2, 8}}) == std::vector<Spans>{{{0, 3}}, {{1, 9}, {2, 8}}});
  CHECK(lanes({{0, 9}, {0, 9}, {9, 9}, {4, 4}}) == std::vector<Spans>{{{0, 9}, {0, 9}, {4, 4}, {9, 9}}});
}

TEST_CASE("lanes have numbers where there are several") {
  const TraceTrack one = track_of({{0, 3}}), two = track_of({{0, 3}, {1, 4}});
  CHECK(lanes_of(one).at(0).name == "drive");
  CHECK(lanes_of(two).at(0).name == "drive 0");
  CHECK(lanes_of(two).at(1).name == "drive 1");
}

TEST_CASE("a mark of a fault is called by the fault's name") {
  const Record mark{.layer = 4, .kind = Kind::injected}, later{.layer = 99, .kind = Kind::injected};
  CHECK(slice_name(mark) == "injected callback");
  CHECK_FALSE(has_layer(mark));
  CHECK(slice_name(later) == "injected");
  CHECK(slice_name({.kind = Kind::disk_read}) == "disk_read");
}

TEST_CASE("the byte clock counts what was read for prompts") {
  Tokens tokens;
  for (const bool decoded : {false, true, true, false, true}) {
    Token token;
    token.decoded = decoded;
    token.begin = static_cast<double>(tokens.all.size());
    token.counters[static_cast<size_t>(Counter::stream_bytes)] = 10;
    tokens.all.push_back(token);
  }
  const Clocks clocks = clocks_of(tokens);
  CHECK(clocks[Clock::token] == std::vector<double>{0, 1, 2});
  CHECK(clocks[Clock::time] == std::vector<double>{1, 2, 4});
  CHECK(clocks[Clock::bytes] == std::vector<double>{10, 20, 40});
}

TEST_CASE("no note breaks the report or its page") {
  const TempFolder folder;
  for (const char* note : {
           "", "null", "[]", "{", R"({"model":7,"rerun":[]})", R"({"model":{"name":[]},"tiers":[7,{"disk":"x"}]})",
           R"({"rerun":{"prompt":7,"generate":[],"options":"x"}})",
           R"({"rerun":{"generate":{"stop":5,"seed":"x","top_k":-1}}})",
           R"({"rerun":{"options":{"inject":[7,"moonlight","read:period=3"]}}})",
           R"({"rerun":{"options":{"device_memory":-1,"precision":9,"verify":true,"context":1e300}}})"}) {
    const auto trace = parse_trace(trace_bytes(folder.file("t.sltrace"), write_two_tokens, true, note), "t.sltrace");
    REQUIRE(trace);
    const auto tokens = tokens_of(*trace);
    REQUIRE(tokens);
    const nlohmann::json report = report_of(*trace, *tokens);
    INFO(note);
    CHECK(html_report(report, *tokens).ends_with("</html>\n"));
    CHECK(report["clock"]["host_error_ns"] == 50);
    CHECK(report["clock"]["device_error_ns"].is_null());
  }
}
