// SPDX-License-Identifier: Apache-2.0
#include "api/rerun.hpp"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace sluice::api {
namespace {

using nlohmann::json;

// Enumerations by number: a note is read by the version that wrote it, or by a later one, which keeps the numbers.
template <class Enum>
Enum enum_of(const json& value, Enum last) {
  const auto number = value.get<unsigned>();
  return number <= static_cast<unsigned>(last) ? static_cast<Enum>(number) : Enum();
}

ModelOptions options_of(const json& from) {
  ModelOptions options;
  if (const json& bytes = from.at("device_memory"); !bytes.is_null())
    options.device_memory_bytes = bytes.get<uint64_t>();
  options.host_memory_bytes = from.at("host_memory").get<uint64_t>();
  options.context = from.at("context").get<uint32_t>();
  options.sessions = from.at("sessions").get<uint32_t>();
  options.max_rows = from.at("max_rows").get<uint32_t>();
  options.max_logit_rows = from.at("max_logit_rows").get<uint32_t>();
  options.io = enum_of(from.at("io"), Io::mmap);
  options.verify = enum_of(from.at("verify"), Verify::off);
  options.precision = enum_of(from.at("precision"), Precision::fine);
  options.cpu_activations = enum_of(from.at("cpu_activations"), Activations::f32);
  options.backend = from.at("backend").get<std::string>();
  options.threads = from.at("threads").get<uint32_t>();
  options.inject = from.at("inject").get<std::vector<std::string>>();
  return options;
}

GenerateOptions generate_of(const json& from) {
  GenerateOptions generate;
  generate.max_tokens = from.at("max_tokens").get<uint32_t>();
  generate.ignore_eos = from.at("ignore_eos").get<bool>();
  generate.stop = from.at("stop").get<std::vector<std::string>>();
  generate.sampling = {.temperature = from.at("temperature").get<float>(), .top_k = from.at("top_k").get<int32_t>(),
                       .top_p = from.at("top_p").get<float>(), .min_p = from.at("min_p").get<float>(),
                       .repeat_penalty = from.at("repeat_penalty").get<float>(), .seed = from.at("seed").get<uint64_t>()};
  return generate;
}

}  // namespace

json rerun_json(const Rerun& rerun) {
  const ModelOptions& options = rerun.options;
  const GenerateOptions& generate = rerun.generate;
  const Sampling& sampling = generate.sampling;
  json device = nullptr;
  if (options.device_memory_bytes) device = *options.device_memory_bytes;
  return {{"path", rerun.path},
          {"prompt", rerun.prompt},
          {"options",
           {{"device_memory", device}, {"host_memory", options.host_memory_bytes}, {"context", options.context},
            {"sessions", options.sessions}, {"max_rows", options.max_rows}, {"max_logit_rows", options.max_logit_rows},
            {"io", options.io}, {"verify", options.verify}, {"precision", options.precision},
            {"cpu_activations", options.cpu_activations}, {"backend", options.backend}, {"threads", options.threads},
            {"inject", options.inject}}},
          {"generate",
           {{"max_tokens", generate.max_tokens}, {"ignore_eos", generate.ignore_eos}, {"stop", generate.stop},
            {"temperature", sampling.temperature}, {"top_k", sampling.top_k}, {"top_p", sampling.top_p},
            {"min_p", sampling.min_p}, {"repeat_penalty", sampling.repeat_penalty}, {"seed", sampling.seed}}}};
}

Result<Rerun> rerun_of(const json& run, const std::string& trace_path) {
  if (!run.is_object() || !run.contains("rerun")) {
    return fail(ErrorCode::unsupported, fmt::format("{} does not say what was run, so it cannot be run again; record it "
                                                    "with `sluice run --trace`", trace_path));
  }
  try {
    const json& from = run["rerun"];
    return Rerun{.path = from.at("path").get<std::string>(),
                 .options = options_of(from.at("options")),
                 .prompt = from.at("prompt").get<std::vector<int32_t>>(),
                 .generate = generate_of(from.at("generate"))};
  } catch (const json::exception& error) {
    return fail(ErrorCode::corrupt, fmt::format("{}: what it says of its run is not complete ({}); record it again",
                                                trace_path, error.what()));
  }
}

}  // namespace sluice::api
