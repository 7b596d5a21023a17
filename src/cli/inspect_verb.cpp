// SPDX-License-Identifier: Apache-2.0
// sluice inspect, sluice verify: what a container holds, and whether it still holds it.
#include <algorithm>
#include <memory>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "output.hpp"
#include "verb.hpp"
#include "sluice/sluice.hpp"

namespace sluice::cli {
namespace {

using nlohmann::json;

struct Flags {
  std::string path;
  bool json = false;
  bool tensors = false;
};

// A value on one line: texts bare and shortened, everything else as JSON.
std::string brief(const json& value) {
  std::string text = value.is_string() ? value.get<std::string>()
                                       : value.dump(-1, ' ', false, json::error_handler_t::replace);
  std::replace(text.begin(), text.end(), '\n', ' ');
  constexpr size_t kLongest = 100;
  if (text.size() <= kLongest) return text;
  size_t end = kLongest;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;  // not inside a character
  return text.substr(0, end) + "...";
}

// Objects become indented sections, long arrays their length; so whatever a later version adds is shown as well.
void describe(const json& object, size_t indent, std::string& text) {
  for (const auto& [name, value] : object.items()) {
    const std::string margin(indent, ' ');
    if (name == "tensors" && value.is_array()) {
      text += fmt::format("{}{:<18}{} (list them with --tensors)\n", margin, name, value.size());
    } else if (value.is_object()) {
      text += fmt::format("{}{}\n", margin, name);
      describe(value, indent + 2, text);
    } else if (value.is_array() && value.size() > 8) {
      text += fmt::format("{}{:<18}[{} entries]\n", margin, name, value.size());
    } else {
      text += fmt::format("{}{:<18}{}\n", margin, name, brief(value));
    }
  }
}

// Scalars of a tensor on one line, in the order of the JSON; planes as kind and size.
std::string tensor_line(const json& tensor) {
  std::string line = tensor.value("name", std::string("?"));
  for (const auto& [name, value] : tensor.items()) {
    if (name == "name") continue;
    if (name == "planes" && value.is_array()) {
      for (const json& plane : value) {
        if (!plane.is_object()) continue;
        line += fmt::format("  {}@{}+{}", brief(plane.value("kind", json())), brief(plane.value("offset", json())),
                            brief(plane.value("bytes", json())));
      }
    } else if (!value.is_object()) {
      line += fmt::format("  {}={}", name, brief(value));
    }
  }
  return line + "\n";
}

Result<int> inspect(const Flags& flags) {
  SLUICE_TRY_ASSIGN(text, inspect_json(flags.path));
  if (flags.json) {
    SLUICE_TRY(print(text.ends_with('\n') ? text : text + "\n"));
    return 0;
  }
  const json report = json::parse(text, nullptr, false);
  if (!report.is_object()) return fail(ErrorCode::internal, "inspect_json() did not give a JSON object");
  std::string lines;
  describe(report, 0, lines);
  if (flags.tensors && report.contains("tensors")) {
    for (const json& tensor : report["tensors"]) lines += tensor_line(tensor);
  }
  SLUICE_TRY(print(lines));
  return 0;
}

Result<int> verify(const Flags& flags) {
  uint64_t bytes = 0;
  {
    Progress progress("verifying", Progress::Unit::bytes);
    SLUICE_TRY(verify_file(flags.path, [&](uint64_t done, uint64_t total) {
      bytes = total;
      progress.update(done, total);
    }));
  }
  if (flags.json) SLUICE_TRY(print_json({{"file", flags.path}, {"ok", true}, {"bytes", bytes}}));
  else SLUICE_TRY(print(fmt::format("{}: all checksums match ({})\n", flags.path, bytes_text(bytes))));
  return 0;
}

}  // namespace

void add_inspect(CLI::App& app, Chosen& chosen) {
  auto flags = std::make_shared<Flags>();
  CLI::App* verb = app.add_subcommand("inspect", "Show what a container holds");
  verb->add_option("file", flags->path, "The .sluice file")->required();
  verb->add_flag("--tensors", flags->tensors, "List every tensor with its planes");
  verb->add_flag("--json", flags->json, "Print everything as JSON");
  verb->footer("Example:\n  sluice inspect models/smollm2-135m.sluice --tensors");
  verb->callback([flags, &chosen] { chosen.action = [flags] { return inspect(*flags); }; });
}

void add_verify(CLI::App& app, Chosen& chosen) {
  auto flags = std::make_shared<Flags>();
  CLI::App* verb = app.add_subcommand("verify", "Read a container and compare every checksum");
  verb->add_option("file", flags->path, "The .sluice file")->required();
  verb->add_flag("--json", flags->json, "Print the result as JSON");
  verb->footer("Exit code 5 where a checksum differs.\nExample:\n  sluice verify models/smollm2-135m.sluice");
  verb->callback([flags, &chosen] { chosen.action = [flags] { return verify(*flags); }; });
}

}  // namespace sluice::cli
