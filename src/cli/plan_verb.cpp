// SPDX-License-Identifier: Apache-2.0
// sluice plan: where the weights would go, and how long a pass would take; with --advise, which recipe to choose.
#include <algorithm>
#include <filesystem>
#include <memory>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "advice_report.hpp"
#include "flags.hpp"
#include "output.hpp"
#include "verb.hpp"
#include "sluice/sluice.hpp"

namespace sluice::cli {
namespace {

struct Flags {
  std::string path;
  ModelOptions options;
  Bandwidths bandwidths;
  AdviceOptions advice;
  bool no_measure = false, tensors = false, json = false, advise = false;
};

// What was not given is measured, unless the user does not want to wait for it.
Bandwidths bandwidths_of(const Flags& flags, const std::string& backend) {
  Bandwidths rates = flags.bandwidths;
  if (flags.no_measure) return rates;
  constexpr uint64_t kSampleBytes = 256u << 20;
  if (rates.disk <= 0) {
    // Shapes have no weights to read: the drive that one works on stands in for the one they would lie on.
    const bool shapes = std::filesystem::path(flags.path).extension() == ".toml";
    Result<double> disk = measure_disk(shapes ? "." : flags.path, kSampleBytes, flags.options.io);
    if (disk) rates.disk = *disk;
    else note("warning: the disk could not be measured: " + disk.error().message);
  }
  if (backend != "cpu" && (rates.bus <= 0 || rates.device_memory <= 0)) {
    Result<DeviceRates> device = measure_device(backend);
    if (!device) note("warning: the GPU could not be measured: " + device.error().message);
    if (device && rates.bus <= 0) rates.bus = device->bus;
    if (device && rates.device_memory <= 0) rates.device_memory = device->read;
    return rates;
  }
  if (rates.bus <= 0) rates.bus = measure_memory_copy();
  if (rates.cpu_memory <= 0) rates.cpu_memory = measure_memory_read(flags.options.threads);
  if (rates.device_memory <= 0) rates.device_memory = rates.cpu_memory;  // of the CPU backend they are one
  return rates;
}

nlohmann::json plan_json(const PlanReport& plan, const Bandwidths& rates) {
  nlohmann::json tensors = nlohmann::json::array();
  for (const PlanReport::Tier& tier : plan.tensors) {
    tensors.push_back({{"tensor", tier.tensor}, {"tier", tier.tier}, {"bytes", tier.bytes}});
  }
  return {{"backend", plan.backend},
          {"device_bytes", plan.device_bytes},
          {"host_bytes", plan.host_bytes},
          {"resident_bytes", plan.resident_bytes},
          {"host_tier_bytes", plan.host_tier_bytes},
          {"disk_tier_bytes", plan.disk_tier_bytes},
          {"ring_bytes", plan.ring_bytes},
          {"kv_bytes", plan.kv_bytes},
          {"scratch_bytes", plan.scratch_bytes},
          {"context", plan.context},
          {"max_rows", plan.max_rows},
          {"smallest_device_bytes", plan.smallest_device_bytes},
          {"pass_seconds", plan.pass_seconds},
          {"tokens_per_second", plan.tokens_per_second},
          {"bound", plan.bound},
          {"bandwidths",
           {{"disk", rates.disk}, {"bus", rates.bus}, {"cpu_memory", rates.cpu_memory},
            {"device_memory", rates.device_memory}}},
          {"tensors", tensors}};
}

std::string plan_text(const PlanReport& plan, const Bandwidths& rates, bool tensors) {
  std::string text;
  const auto line = [&text](const char* name, const std::string& value) {
    text += fmt::format("{:<26}{}\n", name, value);
  };
  line("backend", plan.backend);
  line("device budget", bytes_text(plan.device_bytes));
  line("  resident weights", bytes_text(plan.resident_bytes));
  line("  stream ring", bytes_text(plan.ring_bytes));
  line("  KV cache", fmt::format("{} for {} positions", bytes_text(plan.kv_bytes), plan.context));
  line("  scratch", fmt::format("{} for passes of up to {} tokens", bytes_text(plan.scratch_bytes), plan.max_rows));
  line("  smallest that would do", bytes_text(plan.smallest_device_bytes));
  line("host budget", bytes_text(plan.host_bytes));
  line("  weights", bytes_text(plan.host_tier_bytes));
  line("disk, read in every pass", bytes_text(plan.disk_tier_bytes));
  const auto rate = [](double value) { return value > 0 ? rate_text(value) : std::string("unknown"); };
  line("bandwidths", fmt::format("disk {}, bus {}, memory {}, device memory {}", rate(rates.disk), rate(rates.bus),
                                 rate(rates.cpu_memory), rate(rates.device_memory)));
  if (plan.pass_seconds > 0) {
    line("predicted decode", fmt::format("{} a pass, {:.2f} tok/s, bound by {}", seconds_text(plan.pass_seconds),
                                         plan.tokens_per_second, plan.bound));
  }
  if (tensors) {
    for (const PlanReport::Tier& tier : plan.tensors) {
      text += fmt::format("{:<8}{:>12}  {}\n", tier.tier, bytes_text(tier.bytes), tier.tensor);
    }
  }
  return text;
}

Result<int> plan(const Flags& flags) {
  // A file that cannot be planned is refused before anything is measured.
  SLUICE_TRY_ASSIGN(unmeasured, plan_model(flags.path, flags.options, {}));
  const Bandwidths rates = bandwidths_of(flags, unmeasured.backend);
  SLUICE_TRY_ASSIGN(report, plan_model(flags.path, flags.options, rates));
  if (flags.json) SLUICE_TRY(print_json(plan_json(report, rates)));
  else SLUICE_TRY(print(plan_text(report, rates, flags.tensors)));
  return 0;
}

Result<int> advise(const Flags& flags) {
  AdviceOptions options = flags.advice;
  options.model = flags.path;
  options.machine = flags.options;
  options.bandwidths = flags.bandwidths;
  SLUICE_TRY_ASSIGN(report, advise(options));
  if (flags.advice.device.empty() && !flags.no_measure) {
    options.bandwidths = bandwidths_of(flags, report.backend);
    SLUICE_TRY_ASSIGN(measured, advise(options));
    report = std::move(measured);
  }
  if (flags.json) SLUICE_TRY(print_json(advice_json(report, options)));
  else SLUICE_TRY(print(advice_text(report, options)));
  return 0;
}

}  // namespace

void add_plan(CLI::App& app, Chosen& chosen) {
  auto flags = std::make_shared<Flags>();
  CLI::App* verb = app.add_subcommand("plan", "Show where the weights would go and predict the speed");
  verb->add_option("file", flags->path, "The .sluice file; with --advise also a checkpoint, or shapes (configs/models)")
      ->required();
  add_model_flags(*verb, flags->options);
  const auto rate = [verb](const char* name, double& target, const char* help) {
    add_size(*verb, name, [&target](uint64_t value) { target = static_cast<double>(value); }, help)
        ->group("Bandwidths, bytes a second (default: measured now)");
  };
  rate("--disk-rate", flags->bandwidths.disk, "Reading the container from disk");
  rate("--bus-rate", flags->bandwidths.bus, "Copying from host to device memory");
  rate("--memory-rate", flags->bandwidths.cpu_memory, "Reading host memory");
  rate("--device-memory-rate", flags->bandwidths.device_memory, "Reading device memory");
  verb->add_flag("--no-measure", flags->no_measure, "Do not measure; predict only from what is given");
  verb->add_flag("--tensors", flags->tensors, "List every tensor with its tier");
  verb->add_flag("--json", flags->json, "Print the plan as JSON");
  const char* group = "Advice";
  CLI::Option* advice = verb->add_flag("--advise", flags->advise, "Say which recipe to quantize the model by, and why")
                            ->group(group);
  add_choice<Workload>(*verb, "--workload",
                       {{"general", Workload::general}, {"math", Workload::math}, {"code", Workload::code}},
                       [flags](Workload workload) { flags->advice.workload = workload; },
                       "What the model is for: how much loss it bears (default general)")
      ->needs(advice)->group(group);
  verb->add_option("--device", flags->advice.device, "Another machine (configs/devices; default: this one)")
      ->type_name("FILE.toml")->needs(advice)->group(group);
  verb->add_option("--recipes", flags->advice.recipes, "Recipes to choose among (default configs/recipes)")
      ->type_name("FOLDER")->needs(advice)->group(group);
  verb->add_option("--rate", flags->advice.tokens_per_second,
                   "Tokens a second that are enough: beyond them no loss is worth more (default 10)")
      ->check(CLI::Range(0.0, 1e9))->type_name("N")->needs(advice)->group(group);
  verb->footer("Example:\n  sluice plan models/smollm2-135m.sluice --device-memory 48M --context 512\n"
               "  sluice plan configs/models/deepseek-r1-distill-llama-70b.toml --advise --workload math "
               "--device configs/devices/rtx-4090.toml");
  verb->callback([flags, &chosen] {
    chosen.action = [flags] { return flags->advise ? advise(*flags) : plan(*flags); };
  });
}

}  // namespace sluice::cli
