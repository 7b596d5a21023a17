// SPDX-License-Identifier: Apache-2.0
// sluice bench: prefill and decode speed beside the bandwidth that this machine has in the same run.
#include <algorithm>
#include <chrono>
#include <memory>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "flags.hpp"
#include "interrupt.hpp"
#include "kernel_table.hpp"
#include "output.hpp"
#include "timing_report.hpp"
#include "verb.hpp"
#include "sluice/sluice.hpp"

namespace sluice::cli {
namespace {

using Clock = std::chrono::steady_clock;

struct Flags {
  std::string path;
  uint32_t prompt = 512, generate = 128, repeats = 3;
  ModelOptions options;
  bool json = false, kernels = false;
  std::vector<uint32_t> kernel_rows = {1, 2, 4, 8, 16, 64, 512};
};

// One repetition.
struct Repetition {
  double prefill_seconds = 0;
  double first_token_seconds = 0;
  double decode_seconds = 0;                // from the first token to the last
  std::vector<double> token_seconds;        // between neighbouring tokens
};

// What the same machine could do at best, right now. Zero: not measured.
struct Ceiling {
  double disk_rate = 0, bus_rate = 0, memory_rate = 0;
  double pass_seconds = 0;                  // of a decode pass that only moved its bytes
  std::string bound;
};

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Ids spread over the vocabulary, so that embedding rows come from everywhere. Any ids cost the same otherwise.
std::vector<int32_t> prompt_ids(uint32_t count, uint32_t vocab) {
  std::vector<int32_t> ids(count);
  uint64_t state = 0x9e3779b97f4a7c15u;
  for (int32_t& id : ids) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    id = static_cast<int32_t>((state >> 33) % vocab);
  }
  return ids;
}

Result<Repetition> repeat_once(Session& session, std::span<const int32_t> prompt, uint32_t tokens) {
  SLUICE_TRY(session.truncate(0));
  Repetition times;
  const auto start = Clock::now();
  SLUICE_TRY(session.append(prompt));
  SLUICE_TRY(session.flush());
  times.prefill_seconds = seconds_since(start);
  GenerateOptions options;
  options.max_tokens = tokens;
  options.ignore_eos = true;
  options.sampling.temperature = 0;
  options.sampling.repeat_penalty = 1;
  auto last = start;
  bool first = true;
  SLUICE_TRY_ASSIGN(reason, session.generate(options, [&](const Token&) {
    const auto now = Clock::now();
    const double gap = std::chrono::duration<double>(now - last).count();
    if (first) times.first_token_seconds = gap;
    else times.token_seconds.push_back(gap);
    first = false;
    last = now;
    return true;
  }));
  if (reason == StopReason::cancelled) return fail(ErrorCode::cancelled, "interrupted; the benchmark was not finished");
  for (double gap : times.token_seconds) times.decode_seconds += gap;
  return times;
}

// The drive's raw rate over the whole benchmark: samples before the first repetition and behind each, because a shared
// drive moves by a third from second to second (docs/benchmarks.md).
class DriveRate {
 public:
  explicit DriveRate(const Flags& flags) : flags_(flags) {}

  void sample() {
    constexpr uint64_t kSampleBytes = uint64_t{2} << 30;
    const Result<double> rate = measure_disk(flags_.path, kSampleBytes, flags_.options.io);
    if (!rate) {
      note("warning: the disk could not be measured: " + rate.error().message);
      return;
    }
    seconds_per_byte_ += 1 / *rate;
    ++samples_;
  }
  // Bytes of all samples by their time; 0: not measured.
  double mean() const { return samples_ == 0 ? 0 : samples_ / seconds_per_byte_; }

 private:
  const Flags& flags_;
  double seconds_per_byte_ = 0;             // of samples of one size
  int samples_ = 0;
};

// Disk bytes at the drive's rate, streamed bytes at the bus's, all weights at the device memory's: whichever takes longest.
Ceiling measure_ceiling(const Flags& flags, const ModelInfo& model, const Timings& timings, double disk_rate) {
  Ceiling ceiling;
  const auto stage = [&ceiling](const char* name, uint64_t bytes, double rate) {
    const double seconds = rate > 0 ? static_cast<double>(bytes) / rate : 0;
    if (seconds <= ceiling.pass_seconds) return;
    ceiling.pass_seconds = seconds;
    ceiling.bound = name;
  };
  const uint64_t streamed = model.host_weight_bytes + model.disk_weight_bytes;
  if (model.backend != "cpu") {
    Result<DeviceRates> device = measure_device(model.backend);
    if (!device) note("warning: the GPU could not be measured: " + device.error().message);
    if (device) ceiling.memory_rate = device->read, ceiling.bus_rate = device->bus;
    stage("bus", streamed, ceiling.bus_rate);
  } else {
    ceiling.memory_rate = measure_memory_read(flags.options.threads);
  }
  stage("memory", model.device_weight_bytes + streamed, ceiling.memory_rate);
  ceiling.disk_rate = disk_rate;
  stage("disk", timings.disk_bytes_per_pass, ceiling.disk_rate);
  return ceiling;
}

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

// The figures of all repetitions: medians, and percentiles over every token of every repetition.
nlohmann::json figures(const Flags& flags, const std::vector<Repetition>& repetitions, const Ceiling& ceiling,
                       const ModelInfo& model, const Timings& timings) {
  std::vector<double> prefill, decode, first, gaps;
  for (const Repetition& repetition : repetitions) {
    prefill.push_back(flags.prompt / repetition.prefill_seconds);
    first.push_back(repetition.first_token_seconds);
    if (!repetition.token_seconds.empty()) {
      decode.push_back(static_cast<double>(repetition.token_seconds.size()) / repetition.decode_seconds);
    }
    gaps.insert(gaps.end(), repetition.token_seconds.begin(), repetition.token_seconds.end());
  }
  const double decode_rate = median(decode);
  return {{"file", flags.path},
          {"model", model.name},
          {"device", model.device},
          {"prompt_tokens", flags.prompt},
          {"generated_tokens", flags.generate},
          {"repetitions", flags.repeats},
          {"prefill_tokens_per_second", median(prefill)},
          {"decode_tokens_per_second", decode_rate},
          {"ttft_seconds", median(first)},
          {"itl_seconds",
           {{"p50", percentile(gaps, 0.5)}, {"p90", percentile(gaps, 0.9)}, {"p99", percentile(gaps, 0.99)},
            {"p99_9", percentile(gaps, 0.999)},
            {"max", percentile(gaps, 1.0)}}},
          {"disk_bytes_per_pass", timings.disk_bytes_per_pass},
          {"weight_bytes_per_pass", model.device_weight_bytes + model.host_weight_bytes + model.disk_weight_bytes},
          {"ceiling",
           {{"bound", ceiling.bound}, {"disk_bytes_per_second", ceiling.disk_rate},
            {"bus_bytes_per_second", ceiling.bus_rate},
            {"memory_bytes_per_second", ceiling.memory_rate}, {"pass_seconds", ceiling.pass_seconds},
            {"share", ceiling.pass_seconds * decode_rate}}},
          {"timings", timing_json(model, timings)}};
}

std::string table(const nlohmann::json& f) {
  const auto seconds = [](const nlohmann::json& value) { return seconds_text(value.get<double>()); };
  std::string text;
  text += fmt::format("{:<18}{:.2f} tok/s ({} tokens)\n", "prefill", f["prefill_tokens_per_second"].get<double>(),
                      f["prompt_tokens"].get<uint32_t>());
  text += fmt::format("{:<18}{:.2f} tok/s ({} tokens)\n", "decode", f["decode_tokens_per_second"].get<double>(),
                      f["generated_tokens"].get<uint32_t>());
  text += fmt::format("{:<18}{}\n", "TTFT", seconds(f["ttft_seconds"]));
  const nlohmann::json& itl = f["itl_seconds"];
  text += fmt::format("{:<18}p50 {}, p90 {}, p99 {}, p99.9 {}, max {}\n", "ITL", seconds(itl["p50"]),
                      seconds(itl["p90"]), seconds(itl["p99"]), seconds(itl["p99_9"]), seconds(itl["max"]));
  text += fmt::format("{:<18}{} from disk, {} of weights\n", "bytes per pass",
                      bytes_text(f["disk_bytes_per_pass"].get<uint64_t>()),
                      bytes_text(f["weight_bytes_per_pass"].get<uint64_t>()));
  const nlohmann::json& ceiling = f["ceiling"];
  if (ceiling["pass_seconds"].get<double>() > 0) {
    const std::string bound = ceiling["bound"];
    text += fmt::format("{:<18}decode reaches {:.1f}% of the {} bandwidth measured beside it ({})\n", "ceiling",
                        ceiling["share"].get<double>() * 100, bound,
                        rate_text(ceiling[bound + "_bytes_per_second"].get<double>()));
  }
  return text;
}

Result<int> bench(const Flags& flags) {
  ModelOptions options = flags.options;
  const uint64_t positions = uint64_t{flags.prompt} + flags.generate + 1;
  if (options.context == 0) options.context = static_cast<uint32_t>(positions);
  SLUICE_TRY_ASSIGN(model, open_model(flags.path, std::move(options)));
  const ModelInfo& info = model.info();
  const std::vector<int32_t> prompt = prompt_ids(flags.prompt, info.vocab);
  const auto session_of = [&model] { return model.new_session(); };
  {
    // Page faults, frequency and the first fill of the ring are not what is measured.
    SLUICE_TRY_ASSIGN(warm_up, session_of());
    CancelOnInterrupt interrupt(warm_up);
    const size_t tokens = std::min<size_t>(prompt.size(), 16);
    SLUICE_TRY(repeat_once(warm_up, std::span(prompt).first(tokens), std::min(flags.generate, 2u)));
  }
  SLUICE_TRY_ASSIGN(session, session_of());
  CancelOnInterrupt interrupt(session);
  Progress progress("repetition", Progress::Unit::items);
  std::vector<Repetition> repetitions;
  DriveRate drive(flags);
  if (info.disk_weight_bytes > 0) drive.sample();
  for (uint32_t i = 0; i < flags.repeats; ++i) {
    progress.update(i, flags.repeats);
    SLUICE_TRY_ASSIGN(times, repeat_once(session, prompt, flags.generate));
    repetitions.push_back(std::move(times));
    if (info.disk_weight_bytes > 0) drive.sample();
  }
  const Timings& timings = session.timings();
  const nlohmann::json result =
      figures(flags, repetitions, measure_ceiling(flags, info, timings, drive.mean()), info, timings);
  note(timing_summary(info, timings));
  if (flags.json) SLUICE_TRY(print_json(result));
  else SLUICE_TRY(print(table(result)));
  return 0;
}

}  // namespace

void add_bench(CLI::App& app, Chosen& chosen) {
  auto flags = std::make_shared<Flags>();
  CLI::App* verb = app.add_subcommand("bench", "Measure prefill and decode beside the machine's own bandwidth");
  verb->add_option("file", flags->path, "The .sluice file")->required();
  verb->add_option("-p,--prompt", flags->prompt, "Prompt tokens (default 512)")
      ->check(CLI::Range(1, 1 << 20))->type_name("N");
  verb->add_option("-n,--tokens", flags->generate, "Generated tokens (default 128)")
      ->check(CLI::Range(1, 1 << 20))->type_name("N");
  verb->add_option("-r,--repeat", flags->repeats, "Repetitions; figures are their medians (default 3)")
      ->check(CLI::Range(1, 1000))->type_name("N");
  verb->add_flag("--json", flags->json, "Print the figures as JSON");
  CLI::Option* kernels = verb->add_flag("--kernels", flags->kernels,
                                        "Time the matrix kernels of the GPU in the model's shapes instead, weights not "
                                        "in any cache, beside the memory's read rate and cuBLAS");
  verb->add_option("--rows", flags->kernel_rows, "Tokens of a launch (default 1,2,4,8,16,64,512)")
      ->needs(kernels)->delimiter(',')->check(CLI::Range(1, 2048))->type_name("M,M,...");
  add_model_flags(*verb, flags->options);
  verb->footer("Example:\n  sluice bench models/smollm2-135m.sluice -p 512 -n 128 -r 3 --device-memory 48M\n"
               "  sluice bench models/smollm2-135m.sluice --kernels --rows 1,8,512");
  verb->callback([flags, &chosen] {
    chosen.action = [flags] {
      return flags->kernels ? bench_kernel_table(flags->path, flags->kernel_rows, flags->json) : bench(*flags);
    };
  });
}

}  // namespace sluice::cli
