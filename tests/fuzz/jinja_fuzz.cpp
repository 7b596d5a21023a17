// SPDX-License-Identifier: Apache-2.0
// Fuzzes chat templates: parsing, and rendering of what parses. Whatever the template says, it ends within its
// limits, in a text or in a typed error.
//
// As a test: fuzz_jinja [RUNS [SEED]]. With libFuzzer: clang++ -DSLUICE_LIBFUZZER -fsanitize=fuzzer,address.
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <string>
#include <vector>

#include "base/check.hpp"
#include "model/jinja_renderer.hpp"

namespace {

using namespace sluice;
using namespace sluice::model;

// Small, so that a mutation which loops costs milliseconds.
constexpr jinja::Limits kLimits = {.steps = 20'000, .arena_bytes = 1 << 20, .output_bytes = 1 << 18, .depth = 100};

void check_error(const Error& error) {
  SLUICE_CHECK(!error.message.empty());
  SLUICE_CHECK(error.code == ErrorCode::corrupt || error.code == ErrorCode::unsupported ||
               error.code == ErrorCode::usage);
}

// True if the source renders.
bool render_source(std::string source) {
  jinja::Program program;
  if (const Status parsed = jinja::parse(std::move(source), program); !parsed) {
    check_error(parsed.error());
    return false;
  }
  using jinja::Value;
  std::tm day{};
  day.tm_mday = 1;
  day.tm_year = 124;
  jinja::Context context(kLimits, day);
  std::vector<Value> messages;
  for (const auto& [role, content] : {std::pair("system", "S"), std::pair("user", " Hi \xc3\xa9 \n"),
                                      std::pair("assistant", "<think>\nx\n</think>\n\nb")}) {
    auto message = context.dict({{Value::of("role"), Value::of(role)}, {Value::of("content"), Value::of(content)}});
    SLUICE_CHECK(message);
    messages.push_back(*message);
  }
  auto list = context.list(messages);
  SLUICE_CHECK(list);
  const auto text = jinja::render(program, context,
                                  {{"messages", *list},
                                   {"tools", Value::none()},
                                   {"add_generation_prompt", Value::of(true)},
                                   {"bos_token", Value::of("<s>")},
                                   {"eos_token", Value::of("</s>")}});
  if (!text) {
    check_error(text.error());
    return false;
  }
  SLUICE_CHECK(text->size() <= kLimits.output_bytes);
  return true;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  render_source(std::string(data, data + size));
  return 0;
}

#ifndef SLUICE_LIBFUZZER
#include "fuzz/mutation.hpp"

namespace {

const std::vector<std::string> kSeeds = {
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "{%- set ns = namespace(multi=true, last=messages|length - 1) %}\n{%- for message in messages[::-1] %}\n"
    "    {%- set index = (messages|length - 1) - loop.index0 %}\n    {%- if ns.multi and message.role == \"user\" and "
    "not(message.content.startswith('<a>') and message.content.endswith('</a>')) %}\n"
    "        {%- set ns.last = index %}\n"
    "    {%- endif %}\n{%- endfor %}\n{{ ns.last }}",
    "{% set c = messages[2].content.split('</think>')[-1].lstrip('\\n') %}{{ c|trim|upper|replace('A', 'b')|tojson }}"
    "{{ [1, 2.5, none, {'k': [true]}]|tojson(indent=2) }}{{ 'a,b'.rsplit(',', 1) }}",
    "{% macro f(x, y=2) %}{{ x ~ y }}{{ f(x - 1) if x > 0 }}{% endmacro %}{{ f(3) }}{% for i in range(9) if i is odd %}"
    "{% if i > 5 %}{% break %}{% endif %}{{ loop.cycle('a', 'b') }}{% else %}-{% endfor %}"
    "{% set b %}x{% endset %}{{ b * 3 }}",
    "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|join(', ') }}"
    "{{ [3, 1, 2]|sort|reverse|list }}"
    "{{ -7 // 2 % 3 ** 2 }}{{ strftime_now('%d %b %Y') }}{# c -#} {% raw %}{{ }}{% endraw %}"
    "{{ {'a': 1}.items()|list }}",
};

// What a mutation pastes in: single bytes seldom make a tag.
const std::vector<std::string> kPieces = {
    "{{ ", " }}", "{% ", " %}", "{%- ", " -%}", "{#", "#}", "{% if ", "{% else %}", "{% endif %}", "{% for x in ",
    "{% endfor %}", "{% set x = ", "{% endset %}", "{% macro f(x) %}", "{% endmacro %}", "f(x)", "messages", "loop",
    "loop.index", "x", "ns", "ns.x", "[", "]", "(", ")", "{", "}", "[::-1]", "[-9223372036854775807 - 1:]",
    "9223372036854775807", "1e308", "'a'", "''", "\"\xc3\xa9\"", "none", "true", " + ", " - ", " * ", " / ", " // ",
    " % ", " ** ", " ~ ", " in ", " not in ", " is ", " == ", " < ", " and ", " or ", " if ", " else ", "|list",
    "|map('upper')", "|sort", "|tojson", "|join", "|int", "|first", "|last", "|reverse", "|replace('', x)",
    "|default(x)", "|length", ".items()", ".split()", ".split(x)", ".strip(x)", ".replace('', 'ab')", ".find(x)",
    "namespace(x=x)", "range(99)", "{% break %}", "{% continue %}", "\\", "\n",
};

}  // namespace

int main(int argc, char** argv) {
  const uint64_t runs = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 50'000;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  std::printf("jinja fuzz: %llu runs, seed %llu\n", static_cast<unsigned long long>(runs),
              static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  for (const std::string& source : kSeeds) SLUICE_CHECK(render_source(source));
  test::Mutator mutator(seed);
  uint64_t rendered = 0;
  for (uint64_t run = 0; run < runs; ++run) {
    std::string source = kSeeds[run % kSeeds.size()];
    for (uint64_t i = mutator.below(6); i > 0; --i) {
      const std::string& piece = kPieces[mutator.below(kPieces.size())];
      const size_t at = mutator.below(source.size());
      source.replace(at, mutator.below(2) * mutator.below(12), piece);
    }
    if (mutator.below(3) == 0) {
      std::vector<uint8_t> bytes(source.begin(), source.end());
      mutator.mutate(bytes, 0);
      source.assign(bytes.begin(), bytes.end());
    }
    if (render_source(std::move(source))) ++rendered;
  }
  std::printf("%llu of %llu mutations rendered, the others ended in a typed error\n",
              static_cast<unsigned long long>(rendered), static_cast<unsigned long long>(runs));
  return 0;
}
#endif
