// SPDX-License-Identifier: Apache-2.0
// Traces that cannot be confirmed. Those that can: tests/cli/trace_confirm_test.py.
#include "catch.hpp"
#include "sluice/sluice.hpp"
#include "trace_maker.hpp"

using namespace sluice;
using namespace sluice::test;

namespace {

Error confirming(const char* note) {
  const TempFolder folder;
  const std::string path = folder.file("t.sltrace");
  (void)trace_bytes(path, write_two_tokens, true, note);
  const auto report = confirm_trace(path);
  REQUIRE_FALSE(report);
  CHECK(report.error().message.find("t.sltrace") != std::string::npos);
  return report.error();
}

}  // namespace

TEST_CASE("a trace that does not say what was run cannot be confirmed") {
  for (const char* note : {R"({"command":"test"})", "[]"}) {
    const Error error = confirming(note);
    CHECK(error.code == ErrorCode::unsupported);
    CHECK(error.message.find("run --trace") != std::string::npos);
  }
}

TEST_CASE("a trace whose description of its run is damaged is refused as that") {
  for (const char* note : {R"({"rerun":{}})", R"({"rerun":7})", R"({"rerun":{"path":"m","prompt":["x"],"options":{}}})"}) {
    CHECK(confirming(note).code == ErrorCode::corrupt);
  }
}

TEST_CASE("a trace that is not there cannot be confirmed") {
  CHECK(confirm_trace("/no/such/file.sltrace").error().code == ErrorCode::not_found);
}
