// SPDX-License-Identifier: Apache-2.0
// Expectations are what Jinja2 3.1.6 gives in an ImmutableSandboxedEnvironment with trim_blocks, lstrip_blocks and loop
// controls, which is how transformers renders chat templates.
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "catch.hpp"
#include "model/chat_template.hpp"

namespace {

using sluice::ErrorCode;
using sluice::model::ChatOptions;
using sluice::model::ChatTemplate;
using sluice::model::ChatTurn;

const std::vector<ChatTurn> kMessages = {{"system", "S"}, {"user", " Hi é \n"}, {"assistant", "a,b,,c"}};
const std::vector<ChatTurn> kTalk = {{"system", "S"}, {"user", " Hi \n"}, {"assistant", " Yes. "}, {"user", "證明"}};

std::string must_render(const std::string& source, const std::vector<ChatTurn>& messages, ChatOptions options = {}) {
  const auto chat = ChatTemplate::create(source);
  INFO((chat ? "" : chat.error().message));
  REQUIRE(chat.has_value());
  options.bos_token = options.bos_token.empty() ? "<s>" : options.bos_token;
  options.eos_token = options.eos_token.empty() ? "</s>" : options.eos_token;
  const auto text = chat->render(messages, options);
  INFO((text ? "" : text.error().message));
  REQUIRE(text.has_value());
  return *text;
}

struct Case {
  const char* source;
  const char* expected;
};

void check_cases(const std::vector<Case>& cases) {
  ChatOptions options;
  options.date_string = "26 Jul 2024";
  for (const Case& c : cases) {
    CAPTURE(c.source);
    CHECK(must_render(c.source, kMessages, options) == c.expected);
  }
}

// The error of creating or rendering; fails where there is none.
sluice::Error must_fail(const std::string& source) {
  const auto chat = ChatTemplate::create(source);
  if (!chat) return chat.error();
  const auto text = chat->render(kMessages, {});
  INFO(source.substr(0, 200));
  REQUIRE_FALSE(text.has_value());
  return text.error();
}

// bos_token and the like: a text, an added token, or null.
std::string token_text(const nlohmann::json& config, const char* name) {
  const auto found = config.find(name);
  if (found == config.end() || found->is_null()) return {};
  return found->is_object() ? found->at("content").get<std::string>() : found->get<std::string>();
}

const char* const kChatMl =
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ "
    "'<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
    "Face<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% "
    "endif %}";

const char* const kLlama2 =
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message "
    "= messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = "
    "false %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate "
    "user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and system_message != false "
    "%}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% "
    "else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ "
    "bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ "
    "' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}";

const char* const kMistral =
    "{%- if messages[0][\"role\"] == \"system\" %}\n    {%- set system_message = "
    "messages[0][\"content\"] %}\n    {%- set loop_messages = messages[1:] %}\n{%- else %}\n    {%- set "
    "loop_messages = messages %}\n{%- endif %}\n{%- if not tools is defined %}\n    {%- set tools = none "
    "%}\n{%- endif %}\n{%- set user_messages = loop_messages | selectattr(\"role\", \"equalto\", "
    "\"user\") | list %}\n{%- set ns = namespace() %}\n{%- set ns.index = 0 %}\n{%- for message in "
    "loop_messages %}\n    {%- if not (message.role == \"tool\" or (message.tool_calls is defined and "
    "message.tool_calls is not none)) %}\n        {%- if (message[\"role\"] == \"user\") != (ns.index % "
    "2 == 0) %}\n            {{- raise_exception(\"roles must alternate\") }}\n        {%- endif %}\n    "
    "    {%- set ns.index = ns.index + 1 %}\n    {%- endif %}\n{%- endfor %}\n{{- bos_token }}\n{%- for "
    "message in loop_messages %}\n    {%- if message[\"role\"] == \"user\" %}\n        {%- if tools is "
    "not none and (message == user_messages[-1]) %}\n            {{- \"[AVAILABLE_TOOLS] [\" }}\n        "
    "{%- endif %}\n        {%- if loop.last and system_message is defined %}\n            {{- \"[INST] "
    "\" + system_message + \"\\n\\n\" + message[\"content\"] + \"[/INST]\" }}\n        {%- else %}\n     "
    "       {{- \"[INST] \" + message[\"content\"] + \"[/INST]\" }}\n        {%- endif %}\n    {%- elif "
    "message[\"role\"] == \"assistant\" %}\n        {{- \" \" + message[\"content\"]|trim + "
    "eos_token}}\n    {%- else %}\n        {{- raise_exception(\"Only user and assistant roles are "
    "supported\") }}\n    {%- endif %}\n{%- endfor %}\n";

TEST_CASE("templates of ChatML, Llama 2 and Mistral render as in Python", "[chat]") {
  CHECK(must_render(kChatMl, kTalk) ==
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n Hi \n<|im_end|>\n<|im_start|>assistant\n "
        "Yes. <|im_end|>\n<|im_start|>user\n證明<|im_end|>\n<|im_start|>assistant\n");
  CHECK(must_render(kLlama2, kTalk) ==
        "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\n Hi [/INST] Yes. </s><s>[INST] 證明 [/INST]");
  CHECK(must_render(kMistral, kTalk) ==
        "<s>[INST]  Hi \n[/INST] Yes.</s>[INST] S\n\n證明[/INST]");
  ChatOptions options;
  options.add_generation_prompt = false;
  CHECK(must_render(kChatMl, {{"user", "a"}}, options) ==
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n<|im_start|>user\na<|im_end|>\n");
}
TEST_CASE("white space control in a template give what Jinja gives", "[chat]") {
  check_cases({
      {"a\n  {% if true %}\n  b\n  {% endif %}\nc\n",
       "a\n  b\nc"},
      {"a  {%- if true -%}  b  {%- endif -%}  c",
       "abc"},
      {"a\n  {%+ if true +%}\n b{% endif %}",
       "a\n  \n b"},
      {"x {#- c -#} y\n  {# d #}\nz\n\n",
       "xy\nz\n"},
      {"  {{ 1 }}  {{- 2 -}}  3",
       "  123"},
      {"{% raw %}{{ x }}{% endraw %}\n{%- raw -%} {% y %} {%- endraw %}",
       "{{ x }}{% y %}"},
      {"a\r\nb\r\n",
       "a\nb"},
  });
}

TEST_CASE("loops in a template give what Jinja gives", "[chat]") {
  check_cases({
      {"{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.first }}{{ "
       "loop.last }}{{ loop.length }}{{ m.role }};{% endfor %}",
       "103TrueFalse3system;212FalseFalse3user;321FalseTrue3assistant;"},
      {"{% for m in messages if m.role != \"system\" %}{{ loop.index }}/{{ loop.length }} {% endfor %}",
       "1/2 2/2 "},
      {"{% for x in [] %}{{ x }}{% else %}none{% endfor %}{% for x in nope %}{% else %}!{% endfor %}",
       "none!"},
      {"{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 4 %}{% break %}{% endif "
       "%}{{ i }}{% endfor %}",
       "0134"},
      {"{% for k, v in {\"a\": 1, \"b\": 2}.items() %}{{ k }}={{ v }} {% endfor %}",
       "a=1 b=2 "},
      {"{% for x in \"añb\" %}{{ loop.previtem }}<{{ x }}>{{ loop.nextitem }}{% endfor %}",
       "<a>ña<ñ>bñ<b>"},
      {"{% for i in [1] %}{% continue %}{% else %}else{% endfor %}",
       "else"},
      {"{% for i in [1,2] %}{% for j in [3,4] %}{{ loop.depth }}{{ loop.cycle(\"a\",\"b\") }}{% endfor "
       "%}{{ loop.index }}{% endfor %}",
       "1a1b11a1b2"},
  });
}

TEST_CASE("scopes in a template give what Jinja gives", "[chat]") {
  check_cases({
      {"{% set x = 1 %}{% for i in [1,2] %}{{ x }}{% set x = 9 %}{{ x }}{% endfor %}{{ x }}",
       "19191"},
      {"{% set ns = namespace(n=0) %}{% for i in range(4) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n "
       "}}",
       "6"},
      {"{% if true %}{% set y = 3 %}{% endif %}{{ y }}",
       "3"},
      {"{% set b %}<{{ bos_token }}>{% endset %}{{ b ~ b }}",
       "<<s>><<s>>"},
      {"{% set a, b = [1, 2] %}{{ b }}{{ a }}",
       "21"},
      {"{% macro f(x, y=2) %}[{{ x }}|{{ y }}]{% endmacro %}{{ f(1) }}{{ f(1, y=\"q\") }}{{ f() }}",
       "[1|2][1|q][|2]"},
      {"{% set z = 1 %}{% macro g() %}{{ z }}{% endmacro %}{% set z = 2 %}{{ g() }}",
       "2"},
      {"{% generation %}{% set q = 1 %}{{ q }}{% endgeneration %}{{ q }}",
       "1"},
  });
}

TEST_CASE("operators in a template give what Jinja gives", "[chat]") {
  check_cases({
      {"{{ 1 + 2 * 3 - 4 }} {{ 7 // 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 7 / 2 }} {{ 2 ** 3 ** 2 }} {{ -2 "
       "** 2 }} {{ 7.5 % -2 }}",
       "3 3 -4 2 3.5 64 4 -0.5"},
      {"{{ \"a\" ~ 1 ~ none ~ true ~ 1.0 ~ nope }}",
       "a1NoneTrue1.0"},
      {"{{ 1 < 2 < 3 }} {{ 1 < 2 > 3 }} {{ \"a\" in \"cab\" }} {{ 2 not in [1, 2] }} {{ \"k\" in {\"k\": "
       "1} }} {{ 1 == 1.0 == true }}",
       "True False True False True True"},
      {"{{ \"x\" if false }}|{{ \"x\" if 0 else \"y\" }}|{{ nope or \"d\" }}|{{ 0 and 1 }}|{{ not 0 }}",
       "|y|d|0|True"},
      {"{{ [1,2]+[3] }} {{ \"ab\" * 3 }} {{ (1,) }} {{ () }} {{ [1, \"a'b\", none, {\"k\": [true]}] }}",
       "[1, 2, 3] ababab (1,) () [1, \"a'b\", None, {'k': [True]}]"},
      {"{{ 1e16 }} {{ 0.1 + 0.2 }} {{ 100000000000000000.0 }} {{ 1.5e-7 }} {{ 12_3 }}",
       "1e+16 0.30000000000000004 1e+17 1.5e-07 123"},
      {"{{ \"a\\tb\\x41\\u00e9\\q\" \"c\" }}",
       "a\tbAé\\qc"},
  });
}

TEST_CASE("subscripts in a template give what Jinja gives", "[chat]") {
  check_cases({
      {"{{ messages[0].role }} {{ messages[-1][\"role\"] }} {{ messages[9] is undefined }}",
       "system assistant True"},
      {"{{ [1,2,3,4][::-1] }} {{ [1,2,3,4][1:] }} {{ [1,2,3,4][:-1] }} {{ [1,2,3,4][-3:3] }} {{ "
       "[1,2,3,4][3:0:-2] }}",
       "[4, 3, 2, 1] [2, 3, 4] [1, 2, 3] [2, 3] [4, 2]"},
      {"{{ \"añbc\"[1] }}{{ \"añbc\"[::-1] }}{{ \"añbc\"[-2:] }}",
       "ñcbñabc"},
      {"{{ {\"items\": 3}[\"items\"] }} {{ {\"a\": {\"b\": 2}}.a.b }} {{ none.x is defined }} {{ [5, "
       "6].1 }}",
       "3 2 False 6"},
  });
}

TEST_CASE("string methods in a template give what Jinja gives", "[chat]") {
  check_cases({
      {"{{ \"  x \".strip() }}|{{ \"xxaxx\".lstrip(\"x\") }}|{{ \"xxaxx\".rstrip(\"x\") }}|{{ \"a b  "
       "c\".split() }}|{{ \"a,b,,c\".split(\",\") }}|{{ \"a,b,c\".rsplit(\",\", 1) }}|{{ \"a b "
       "c\".split(none, 1) }}",
       "x|axx|xxa|['a', 'b', 'c']|['a', 'b', '', 'c']|['a,b', 'c']|['a', 'b c']"},
      {"{{ \"abc\".startswith(\"ab\") }} {{ \"abc\".endswith((\"x\", \"c\")) }} {{ "
       "\"aXbX\".replace(\"X\", \"--\", 1) }} {{ \"aß é\".upper() }} {{ \"ÀB\".lower() }} {{ \"ab "
       "cD-e\".title() }} {{ \"aB\".capitalize() }}",
       "True True a--bX ASS É àb Ab Cd-E Ab"},
      {"{{ \"añb\".find(\"b\") }} {{ \"abab\".rfind(\"ab\") }} {{ \"abab\".count(\"ab\") }} {{ "
       "\"-\".join([\"a\", \"b\"]) }} {{ \"a\\nb\".splitlines() }} {{ \"abc\".removeprefix(\"a\") }} {{ "
       "\"12\".isdigit() }}",
       "2 2 2 a-b ['a', 'b'] bc True"},
      {"{{ \"</think>x</think>y\".split(\"</think>\")[-1].lstrip(\"\\n\") }}",
       "y"},
  });
}

TEST_CASE("mapping methods in a template give what Jinja gives", "[chat]") {
  check_cases({
      {"{% set d = {\"a\": 1, \"b\": none} %}{{ d.items()|list }} {{ d.keys()|list }} {{ d.values()|list "
       "}} {{ d.get(\"a\") }} {{ d.get(\"z\") }} {{ d.get(\"z\", 5) }}",
       "[('a', 1), ('b', None)] ['a', 'b'] [1, None] 1 None 5"},
      {"{{ dict(a=1, b=\"x\") }} {{ [1, 2, 1].index(2) }} {{ [1, 2, 1].count(1) }}",
       "{'a': 1, 'b': 'x'} 1 2"},
  });
}

TEST_CASE("filters in a template give what Jinja gives", "[chat]") {
  check_cases({
      {"{{ \" x \"|trim }}|{{ \"xax\"|trim(\"x\") }}|{{ [1,2]|length }}|{{ \"añ\"|count }}|{{ "
       "[1,\"b\"]|join(\", \") }}|{{ messages|join(\"/\", attribute=\"role\") }}",
       "x|a|2|2|1, b|system/user/assistant"},
      {"{{ {\"a\": \"é\\n\\\"<\", \"b\": [1, 2.5, none, true], \"c\": {}}|tojson }} {{ [1, {\"a\": [], "
       "\"b\": [2]}]|tojson(indent=2) }}",
       "{\"a\": \"é\\n\\\"<\", \"b\": [1, 2.5, null, true], \"c\": {}} [\n  1,\n  {\n    \"a\": [],\n    "
       "\"b\": [\n      2\n    ]\n  }\n]"},
      {"{{ nope|default(\"d\") }} {{ \"\"|default(\"e\") }} {{ \"\"|default(\"f\", true) }} {{ "
       "none|d(\"g\") }}",
       "d  f None"},
      {"{{ [1,2,3]|first }} {{ \"abc\"|last }} {{ \"ab cd\"|upper }} {{ \"AB\"|lower }} {{ \"hello wORLD "
       "(foo)\"|title }} {{ \"aB\"|capitalize }} {{ \"aXa\"|replace(\"a\", \"b\") }}",
       "1 c AB CD ab Hello World (Foo) Ab bXb"},
      {"{{ messages|map(attribute=\"role\")|list }} {{ [\"a\",\"b\"]|map(\"upper\")|join }} {{ "
       "messages|selectattr(\"role\", \"equalto\", \"user\")|map(attribute=\"role\")|first }} {{ "
       "messages|rejectattr(\"role\", \"in\", [\"user\"])|list|length }}",
       "['system', 'user', 'assistant'] AB user 2"},
      {"{{ [0,1,2,none]|select|list }} {{ [1,2,3]|reject(\"odd\")|list }} {{ \"12\"|int + 1 }} {{ "
       "\"x\"|int(7) }} {{ \"1.5\"|float }} {{ 3.9|int }} {{ 5|string + \"a\" }} {{ -3|abs }}",
       "[1, 2] [2] 13 7 1.5 3 5a 3"},
      {"{{ [3,1,2]|sort }} {{ [\"b\",\"A\",\"a\"]|sort(reverse=true) }} {{ [3,1]|reverse|list }} {{ "
       "\"abc\"|reverse }} {{ [1,1,2]|unique|list }} {{ [1,2]|sum }} {{ [3,1]|min }} {{ [3,1]|max }} {{ "
       "{\"k\": 1}|items|list }} {{ \"a\\nb\"|indent(2) }} {{ \"<\"|safe }}",
       "[1, 2, 3] ['b', 'A', 'a'] [1, 3] cba [1, 2] 3 1 3 [('k', 1)] a\n  b <"},
      {"{% if messages|selectattr(\"role\", \"eq\", \"tool\") %}a generator is true{% endif %}",
       "a generator is true"},
  });
}

TEST_CASE("tests in a template give what Jinja gives", "[chat]") {
  check_cases({
      {"{{ x is defined }} {{ bos_token is defined }} {{ x is undefined }} {{ none is none }} {{ \"a\" "
       "is string }} {{ {} is mapping }} {{ [] is iterable }} {{ 1 is iterable }} {{ 1 is number }} {{ "
       "true is number }} {{ true is integer }} {{ true is boolean }} {{ false is false }} {{ 1 is true "
       "}}",
       "False True True True True True True False True True False True True False"},
      {"{{ 1 is eq 1 }} {{ 1 is equalto(2) }} {{ 3 is odd }} {{ 4 is even }} {{ 9 is divisibleby 3 }} {{ "
       "1 is in [1, 2] }} {{ 1 is not in [1] }} {{ 2 is gt 1 }} {{ \"a\" is lower }} {{ [] is sequence "
       "}} {{ tools is none }} {{ raise_exception is callable }} {{ 1.0 is float }}",
       "True False True True True True False True True True True True True"},
  });
}

TEST_CASE("functions in a template give what Jinja gives", "[chat]") {
  check_cases({
      {"{{ range(3)|list }} {{ range(1, 8, 3)|list }} {{ range(3, 0, -1)|list }}",
       "[0, 1, 2] [1, 4, 7] [3, 2, 1]"},
      {"{{ strftime_now(\"%d %b %Y, %A\") }} {{ date_string }}",
       "26 Jul 2024, Friday 26 Jul 2024"},
      {"{% if strftime_now is defined %}{% set date_string = strftime_now(\"%Y-%m-%d\") %}{% endif %}{{ "
       "date_string }}",
       "2024-07-26"},
  });
}

TEST_CASE("every rendering of the full-size tokenizers' templates is exact", "[chat]") {
  const char* shared = std::getenv("SLUICE_SHARED");
  const std::filesystem::path folder = std::filesystem::path(shared != nullptr ? shared : "") / "tokenizers";
  if (!std::filesystem::exists(folder)) {
    std::printf("chat renderings: skipped, %s is absent, nothing checked\n", folder.c_str());
    return;
  }
  for (const char* name : {"llama3_1", "qwen3", "deepseek_v3"}) {
    std::ifstream config_file(folder / name / "tokenizer_config.json");
    const auto config = nlohmann::json::parse(config_file);
    const auto chat = ChatTemplate::create(config.at("chat_template").get<std::string>());
    REQUIRE(chat.has_value());
    std::ifstream cases(folder / name / "chat.jsonl");
    int count = 0;
    for (std::string line; std::getline(cases, line); ++count) {
      const auto json = nlohmann::json::parse(line);
      std::vector<ChatTurn> messages;
      for (const auto& message : json.at("messages")) messages.push_back({message.at("role"), message.at("content")});
      ChatOptions options;
      options.add_generation_prompt = json.at("add_generation_prompt").get<bool>();
      options.bos_token = token_text(config, "bos_token");
      options.eos_token = token_text(config, "eos_token");
      CAPTURE(name, count);
      const auto text = chat->render(messages, options);
      INFO((text ? "" : text.error().message));
      REQUIRE(text.has_value());
      REQUIRE(*text == json.at("rendered").get<std::string>());
    }
    std::printf("%s: %d renderings\n", name, count);
    REQUIRE(count > 0);
  }
}

TEST_CASE("further variables reach the template", "[chat]") {
  const std::string source =
      "{% if enable_thinking is defined and enable_thinking is false %}quick{% else %}slow{% endif %}";
  ChatOptions options;
  CHECK(must_render(source, kMessages, options) == "slow");
  options.flags = {{"enable_thinking", false}};
  CHECK(must_render(source, kMessages, options) == "quick");
}

TEST_CASE("a missing bos token is undefined and prints nothing", "[chat]") {
  const auto chat = ChatTemplate::create("[{{ bos_token }}]{{ bos_token is defined }}");
  REQUIRE(chat.has_value());
  CHECK(*chat->render(kMessages, {}) == "[]False");
}

TEST_CASE("malformed UTF-8 in a message is replaced", "[chat]") {
  CHECK(must_render("{{ messages[0].content }}", {{"user", "a\xff" "b"}}) == "a\xef\xbf\xbd" "b");
}

TEST_CASE("raise_exception is a usage error that carries its message", "[chat]") {
  const auto error = must_fail("\n{{ raise_exception('roles must ' + 'alternate') }}");
  CHECK(error.code == ErrorCode::usage);
  CHECK(error.message.find("roles must alternate") != std::string::npos);
  CHECK(error.message.find("line 2") != std::string::npos);
  const auto chat = ChatTemplate::create(kLlama2);
  REQUIRE(chat.has_value());
  const auto text = chat->render(std::vector<ChatTurn>{{"user", "a"}, {"user", "b"}}, {});
  REQUIRE_FALSE(text.has_value());
  CHECK(text.error().code == ErrorCode::usage);
}

TEST_CASE("operations that Python refuses are usage errors", "[chat]") {
  for (const char* source :
       {"{{ nope.x }}", "{{ nope + 'a' }}", "{{ 'a' + 1 }}", "{{ 1 // 0 }}", "{{ 1 < 'a' }}", "{{ none|length }}",
        "{% for x in 5 %}{% endfor %}", "{{ nope() }}", "{{ messages[0].x.y }}", "{% set a, b = [1] %}",
        "{{ 'a'.split('') }}",
        "{{ 1 in 'a' }}", "{{ range(1000000) }}", "{{ 'a'.strip(1, 2) }}", "{% set x = {} %}{% set x.y = 1 %}",
        "{{ [1]|map('upper')|length }}", "{{ {}|tojson(foo=1) }}", "{{ 'abc'[::0] }}"}) {
    CAPTURE(source);
    const auto error = must_fail(source);
    CHECK(error.code == ErrorCode::usage);
    CHECK(error.message.find("line 1") != std::string::npos);
  }
}

TEST_CASE("what is no template is corrupt and names the line", "[chat]") {
  for (const char* source :
       {"\n{{ 1", "\n{% if true %}", "\n{% endif %}", "\n{{ }}", "\n{{ 'a }}", "\n{% for x y %}{% endfor %}",
        "\n{# open",
        "\n{{ a b }}", "\n{{ (1] }}", "\n{% wrong %}", "\n{{ 1 +  }}", "\n{% break %}", "\n{% raw %} {{ x }}",
        "\n{{ ! }}",
        "\n{% set 1 = 2 %}", "\n{% set true = 2 %}", "\n{{ f(a=1, 2) }}", "\n{{ '\\x4' }}"}) {
    CAPTURE(source);
    const auto error = must_fail(source);
    CHECK(error.code == ErrorCode::corrupt);
    CHECK(error.message.find("line 2") != std::string::npos);
  }
}

TEST_CASE("constructs outside of the subset are named with their line", "[chat]") {
  const std::vector<std::pair<const char*, const char*>> cases = {
      {"\n{% include 'x' %}", "include"},
      {"\n{% call f() %}{% endcall %}", "call"},
      {"\n{% for x in y recursive %}{% endfor %}", "recursive"},
      {"\n{{ 1|wordwrap }}", "wordwrap"},
      {"\n{{ 1 is filter }}", "filter"},
      {"\n{{ 'a'.format(1) }}", "format"},
      {"\n{{ 'a' % 1 }}", "%"},
      {"\n{{ cycler(1) }}", "cycler"},
      {"\n{{ f(*a) }}", "unpacking"},
      {"\n{{ 9223372036854775807 + 1 }}", "64 bits"},
  };
  for (const auto& [source, construct] : cases) {
    CAPTURE(source);
    const auto error = must_fail(source);
    CHECK(error.code == ErrorCode::unsupported);
    CHECK(error.message.find(construct) != std::string::npos);
    CHECK(error.message.find("line 2") != std::string::npos);
  }
}

TEST_CASE("a construct outside of the subset does no harm where it is not reached", "[chat]") {
  CHECK(must_render("{% if tools %}{{ tools|wordwrap }}{{ 'a'.format(1) }}{% endif %}ok", kMessages) == "ok");
}

std::string repeated(const std::string& text, int times) {
  std::string out;
  for (int i = 0; i < times; ++i) out += text;
  return out;
}

TEST_CASE("a hostile template ends in a typed error", "[chat]") {
  const std::string nines = "range(99999)";
  const std::vector<std::string> sources = {
      "{% for a in " + nines + " %}{% for b in " + nines + " %}{% endfor %}{% endfor %}",
      "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
      "{{ 'x' * 1000000000000 }}",
      "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
      "{% set ns = namespace(l=[1]) %}{% for i in range(64) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
      "{% set s = 'x' * 1000000 %}{% for i in " + nines + " %}{{ s }}{% endfor %}",
      "{% set s = 'x' * 10000000 %}{% for i in " + nines + " %}{% if 'y' in s %}{% endif %}{% endfor %}",
      "{% set a = 'x' * 4000000 %}{% for i in range(9000) %}{% if a.rfind('y' ~ a[:2000000]) %}{% endif %}{% endfor %}",
      // Lists that share their parts: 2^60 items to compare, print or write as JSON.
      "{% set n = namespace(a=[], b=[]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}"
      "{% endfor %}{{ n.a == n.b }}",
      "{% set n = namespace(a=[]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a }}",
      "{% set n = namespace(a=[]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a|tojson }}",
      "{{ 'a'|map(" + repeated("'map',", 5000) + "'upper')|list }}",
      "{{ " + repeated("(", 5000) + "1" + repeated(")", 5000) + " }}",
      "{{ " + repeated("-", 5000) + "1 }}",
      "{{ " + repeated("not ", 5000) + "1 }}",
      "{{ 1" + repeated(" + 1", 5000) + " }}",
      "{{ a" + repeated(".b", 5000) + " }}",
      "{{ 1 if " + repeated("1 else 1 if ", 5000) + "1 }}",
      repeated("{% if 1 %}", 5000),
      repeated("x", (1 << 20) + 1),
  };
  for (const std::string& source : sources) {
    CAPTURE(source.substr(0, 120));
    const auto error = must_fail(source);
    CHECK(error.code == ErrorCode::unsupported);
    CHECK(!error.message.empty());
  }
}

TEST_CASE("a value that outlives its loop can still be used", "[chat]") {
  CHECK(must_render("{% set ns = namespace() %}{% for x in [1, 2] %}{% set ns.l = loop %}"
                    "{% macro f() %}{{ x }}{% endmacro %}"
                    "{% set ns.f = f %}{% endfor %}{{ ns.l.index }}{{ ns.f() }}",
                    kMessages) == "22");
}

TEST_CASE("one template renders on several threads at once", "[chat]") {
  const auto chat = ChatTemplate::create(kChatMl);
  REQUIRE(chat.has_value());
  const std::string expected = *chat->render(kTalk, {});
  std::vector<std::string> results(4);
  std::vector<std::thread> threads;
  for (std::string& result : results) {
    threads.emplace_back([&] {
      for (int i = 0; i < 50; ++i) result = *chat->render(kTalk, {});
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& result : results) CHECK(result == expected);
}

}  // namespace
