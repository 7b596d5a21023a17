// SPDX-License-Identifier: Apache-2.0
#include "flags.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstring>

#include <fmt/format.h>

#include "output.hpp"

namespace sluice::cli {
namespace {

// 2^64 as a double: the first value that does not fit.
constexpr double kTooLarge = 18446744073709551616.0;

std::string name_of_input(const std::string& path) { return path == "-" ? "standard input" : path; }

// Leaves a positive integer or zero in `options_field`, from a size.
void set_u32(uint64_t value, uint32_t& field, const char* flag) {
  if (value > UINT32_MAX) throw CLI::ValidationError(flag, fmt::format("{} is too large", value));
  field = static_cast<uint32_t>(value);
}

}  // namespace

std::optional<uint64_t> parse_size(std::string_view text) {
  size_t digits = 0;
  while (digits < text.size() && ((text[digits] >= '0' && text[digits] <= '9') || text[digits] == '.')) ++digits;
  double number = 0;
  const char* end = text.data() + digits;
  const auto parsed = std::from_chars(text.data(), end, number, std::chars_format::fixed);
  if (parsed.ec != std::errc{} || parsed.ptr != end) return std::nullopt;
  std::string_view unit = text.substr(digits);
  double factor = 1;
  if (!unit.empty()) {
    const size_t power = std::string_view("kKmMgGtT").find(unit.front());
    if (power == std::string_view::npos) return std::nullopt;
    factor = std::pow(1024.0, static_cast<double>(power / 2 + 1));
    unit.remove_prefix(1);
    if (!unit.empty() && unit != "B" && unit != "iB") return std::nullopt;
  } else if (text.find('.') != std::string_view::npos) {
    return std::nullopt;  // half a byte
  }
  const double bytes = number * factor;
  if (!(bytes < kTooLarge)) return std::nullopt;
  return static_cast<uint64_t>(bytes);
}

Result<std::vector<int32_t>> parse_ids(std::string_view text) {
  constexpr std::string_view kSeparators = ", \t\r\n[]";
  std::vector<int32_t> ids;
  while (true) {
    const size_t start = text.find_first_not_of(kSeparators);
    if (start == std::string_view::npos) return ids;
    text.remove_prefix(start);
    const std::string_view part = text.substr(0, text.find_first_of(kSeparators));
    int32_t id = 0;
    const auto parsed = std::from_chars(part.data(), part.data() + part.size(), id);
    if (parsed.ec != std::errc{} || parsed.ptr != part.data() + part.size() || id < 0) {
      return fail(ErrorCode::usage, fmt::format("\"{}\" is not a token id; give numbers such as 1,2,3", part));
    }
    ids.push_back(id);
    text.remove_prefix(part.size());
  }
}

CLI::Option* add_size(CLI::App& verb, const std::string& names, std::function<void(uint64_t)> assign,
                      const std::string& help) {
  return verb
      .add_option_function<std::string>(
          names,
          [names, assign = std::move(assign)](const std::string& text) {
            const std::optional<uint64_t> size = parse_size(text);
            if (!size) {
              throw CLI::ValidationError(
                  names, fmt::format("\"{}\" is not a size; write it as 512M, 1.5G or a plain number", text));
            }
            assign(*size);
          },
          help)
      ->type_name("SIZE");
}

std::vector<std::pair<std::string, WeightFormat>> weight_formats() {
  return {{"keep", WeightFormat::keep}, {"f16", WeightFormat::f16}, {"int8", WeightFormat::int8},
          {"int4", WeightFormat::int4}};
}

void add_model_flags(CLI::App& verb, ModelOptions& options, bool* automatic_precision) {
  add_size(verb, "--device-memory", [&options](uint64_t bytes) { options.device_memory_bytes = bytes; },
           "Budget for all that is taken of the device's memory: resident weights, stream ring, KV cache, scratch, a GPU's "
           "context (default: all that the model needs)")
      ->group("Memory");
  add_size(verb, "--host-memory", [&options](uint64_t bytes) { options.host_memory_bytes = bytes; },
           "Budget for weights that are copied to the device in every pass (default 0); the rest stays on disk")
      ->group("Memory");
  add_size(verb, "-c,--context", [&options](uint64_t value) { set_u32(value, options.context, "--context"); },
           "Positions of a sequence (default: the model's own, at most 4096)")
      ->group("Memory");
  add_choice<Io>(verb, "--io",
                 {{"auto", Io::automatic}, {"uring", Io::uring}, {"pread", Io::pread}, {"mmap", Io::mmap}},
                 [&options](Io io) { options.io = io; }, "How weights are read from disk (default auto)")
      ->group("Machine");
  std::vector<std::pair<std::string, std::optional<Precision>>> precisions = {{"int4", Precision::int4},
                                                                              {"fine", Precision::fine}};
  if (automatic_precision != nullptr) precisions.emplace_back("auto", std::nullopt);
  add_choice<std::optional<Precision>>(
      verb, "--precision", std::move(precisions),
      [&options, automatic_precision](std::optional<Precision> precision) {
        if (automatic_precision != nullptr) *automatic_precision = !precision;
        if (precision) options.precision = *precision;
      },
      automatic_precision == nullptr
          ? "INT4 tensors with a residual (quantize --residual): without it or with it (default int4)"
          : "INT4 tensors with a residual (quantize --residual): without it, with it, or as the prompt asks (default "
            "int4)")
      ->group("Machine");
  add_choice<Verify>(verb, "--verify", {{"open", Verify::open}, {"off", Verify::off}},
                     [&options](Verify verify) { options.verify = verify; },
                     "Checksums of a mapping (--io mmap) at opening (default open); what is read is always checked")
      ->group("Machine");
  add_choice<std::string>(verb, "--backend", {{"auto", "auto"}, {"cuda", "cuda"}, {"vulkan", "vulkan"}, {"cpu", "cpu"}},
                          [&options](const std::string& name) { options.backend = name; },
                          "What computes (default auto: a GPU where there is one, else the CPU)")
      ->group("Machine");
  verb.add_option("-t,--threads", options.threads, "Threads of the CPU backend (default: one per core)")
      ->check(CLI::Range(0, 1024))
      ->type_name("N")
      ->group("Machine");
  add_choice<Activations>(verb, "--cpu-activations", {{"int8", Activations::int8}, {"f32", Activations::f32}},
                          [&options](Activations a) { options.cpu_activations = a; },
                          "Arithmetic of the CPU backend with INT4 and INT8 weights (default int8)")
      ->group("Machine");
}

void add_sampling_flags(CLI::App& verb, Sampling& sampling) {
  const char* group = "Sampling (default: the model's generation config)";
  verb.add_option("--temp", sampling.temperature, "Temperature; 0 takes the likeliest token")
      ->check(CLI::Range(0.0f, 100.0f))->type_name("T")->group(group);
  verb.add_option("--top-k", sampling.top_k, "Only the K likeliest tokens; 0: off")
      ->check(CLI::Range(0, 1 << 30))->type_name("K")->group(group);
  verb.add_option("--top-p", sampling.top_p, "Only the likeliest tokens that hold this probability; 1: off")
      ->check(CLI::Range(0.0f, 1.0f))->type_name("P")->group(group);
  verb.add_option("--min-p", sampling.min_p, "Only tokens of at least P times the likeliest's probability; 0: off")
      ->check(CLI::Range(0.0f, 1.0f))->type_name("P")->group(group);
  verb.add_option("--repeat-penalty", sampling.repeat_penalty, "Penalty of the last 64 tokens; 1: off")
      ->check(CLI::Range(0.01f, 100.0f))->type_name("X")->group(group);
  verb.add_option("--seed", sampling.seed, "Seed; the same seed gives the same text")->type_name("N")->group(group);
}

Result<Model> open_model(const std::string& path, ModelOptions options) {
  Progress progress("loading", Progress::Unit::bytes);
  if (!options.log) options.log = log_to_stderr();
  options.load_progress = [&progress](uint64_t done, uint64_t total) { progress.update(done, total); };
  return Model::open(path, std::move(options));
}

Result<std::string> read_text(const std::string& path) {
  const bool standard_input = path == "-";
  const std::string name = name_of_input(path);
  const int fd = standard_input ? STDIN_FILENO : ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    const int failure = errno;
    return fail(failure == ENOENT ? ErrorCode::not_found : ErrorCode::io,
                fmt::format("cannot open {}: {}", name, std::strerror(failure)), failure);
  }
  std::string text;
  int failure = 0;
  while (true) {
    char buffer[65536];
    const ssize_t got = ::read(fd, buffer, sizeof buffer);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) failure = errno;
    if (got <= 0) break;
    text.append(buffer, static_cast<size_t>(got));
  }
  if (!standard_input) ::close(fd);
  if (failure == 0) return text;
  return fail(ErrorCode::io, fmt::format("cannot read {}: {}", name, std::strerror(failure)), failure);
}

Result<std::string> read_utf8(const std::string& path) {
  SLUICE_TRY_ASSIGN(text, read_text(path));
  SLUICE_TRY(check_utf8(text, name_of_input(path)));
  return text;
}

}  // namespace sluice::cli
