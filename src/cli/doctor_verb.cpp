// SPDX-License-Identifier: Apache-2.0
// sluice doctor: what this machine offers, and what to do where it does not.
#include <memory>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "output.hpp"
#include "verb.hpp"
#include "sluice/sluice.hpp"

namespace sluice::cli {
namespace {

struct Flags {
  std::string folder = ".";
  bool json = false;
};

Result<int> examine(const Flags& flags) {
  const std::vector<Finding> findings = examine_machine(flags.folder);
  bool all_ok = true;
  nlohmann::json list = nlohmann::json::array();
  std::string text;
  for (const Finding& finding : findings) {
    all_ok = all_ok && finding.ok;
    list.push_back({{"name", finding.name}, {"ok", finding.ok}, {"value", finding.value}, {"remedy", finding.remedy}});
    text += fmt::format("{:<5} {:<24} {}\n", finding.ok ? "ok" : "FAIL", finding.name, finding.value);
    if (!finding.remedy.empty()) text += fmt::format("      {:<24} -> {}\n", "", finding.remedy);
  }
  if (flags.json) SLUICE_TRY(print_json(list));
  else SLUICE_TRY(print(text));
  return all_ok ? 0 : 1;
}

}  // namespace

void add_doctor(CLI::App& app, Chosen& chosen) {
  auto flags = std::make_shared<Flags>();
  CLI::App* verb = app.add_subcommand("doctor", "Examine this machine: kernel, io_uring, disk, memory, devices");
  verb->add_option("--folder", flags->folder,
                   "Where the disk is measured, with a temporary file of 256 MiB (default: the current folder)")
      ->check(CLI::ExistingDirectory)->type_name("DIR");
  verb->add_flag("--json", flags->json, "Print the findings as JSON");
  verb->footer("Exit code 1 where something has a remedy; Sluice works all the same, slower.\n"
               "Example:\n  sluice doctor --folder /mnt/nvme");
  verb->callback([flags, &chosen] { chosen.action = [flags] { return examine(*flags); }; });
}

}  // namespace sluice::cli
