// SPDX-License-Identifier: Apache-2.0
// Quantization of whole models: what GPTQ gains, that every path gives a container that runs, and what is refused.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <random>

#include <nlohmann/json.hpp>

#include "checkpoint_makers.hpp"
#include "golden_model.hpp"
#include "import_fixture.hpp"
#include "model/utf8.hpp"
#include "tiny_container.hpp"

namespace {

using namespace sluice;
using namespace sluice::test;

std::string recipe(const std::string& name) {
  return std::string(std::getenv("SLUICE_RECIPES")) + "/" + name + ".toml";
}

// At least so many bytes of characters of one and two bytes. A model of width 128 whose text has fewer kinds of tokens
// than that (ASCII has 95) sees its first inputs in a subspace, outside of which GPTQ moves weights as it likes.
std::string random_text(size_t bytes, std::mt19937& random) {
  std::string out;
  while (out.size() < bytes) model::append_utf8(out, static_cast<char32_t>(32 + random() % (0x800 - 32)));
  return out;
}

// A golden model's folder with a tokenizer of one token a byte.
struct Source {
  TempFolder folder;
  std::string path = folder.file("model");

  explicit Source(const std::string& model) {
    std::filesystem::create_directory(path);
    for (const char* name : {"config.json", "model.safetensors"}) {
      std::filesystem::copy_file(golden_folder(model) + "/" + name, path + "/" + name);
    }
    nlohmann::json vocab = nlohmann::json::object();
    for (uint32_t byte = 0; byte < 256; ++byte) {
      std::string text;
      model::append_utf8(text, model::byte_alphabet_char(static_cast<uint8_t>(byte)));
      vocab[text] = byte;
    }
    const nlohmann::json level = {
        {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}};
    std::ofstream(path + "/tokenizer.json")
        << nlohmann::json{{"version", "1.0"},
                          {"added_tokens", nlohmann::json::array()},
                          {"normalizer", nullptr},
                          {"pre_tokenizer", level},
                          {"post_processor", nullptr},
                          {"decoder", level},
                          {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", nlohmann::json::array()}}}};
  }

  std::string text(const std::string& name, size_t bytes, uint32_t seed) const {
    std::mt19937 random(seed);
    std::ofstream(folder.file(name)) << random_text(bytes, random);
    return folder.file(name);
  }

  QuantizeOptions options(const std::string& recipe_name) const {
    QuantizeOptions options;
    options.source = path;
    options.output = folder.file(recipe_name + ".sluice");
    options.recipe = recipe(recipe_name);
    options.windows = 32;
    options.window = 128;
    options.backend = "cpu";
    options.threads = 2;
    return options;
  }
};

QuantizeReport quantized(const QuantizeOptions& options) {
  Result<QuantizeReport> report = quantize_model(options);
  INFO((report ? std::string() : report.error().message));
  REQUIRE(report);
  CHECK_FALSE(std::filesystem::exists(options.output + ".work"));
  return std::move(*report);
}

// Mean KL divergence of the reference's distributions, nats.
double mean_kl(const std::vector<float>& reference, const std::vector<float>& logits, size_t vocab) {
  double sum = 0;
  const size_t rows = logits.size() / vocab;
  const auto log_total = [&](const float* row) {
    double total = 0;
    for (size_t i = 0; i < vocab; ++i) total += std::exp(static_cast<double>(row[i]));
    return std::log(total);
  };
  for (size_t r = 0; r < rows; ++r) {
    const float* p = reference.data() + r * vocab;
    const float* q = logits.data() + r * vocab;
    const double p_total = log_total(p), q_total = log_total(q);
    for (size_t i = 0; i < vocab; ++i) {
      const double log_p = static_cast<double>(p[i]) - p_total;
      sum += std::exp(log_p) * (log_p - (static_cast<double>(q[i]) - q_total));
    }
  }
  return sum / static_cast<double>(rows);
}

std::vector<float> logits_of(const std::string& path, const std::vector<int32_t>& tokens,
                             Precision precision = Precision::int4) {
  const Model model = open_or_fail(
      path, {.context = 512, .precision = precision, .backend = "cpu", .cpu_activations = Activations::f32});
  return score_all(model, tokens);
}

// Of text like the calibration's.
std::vector<int32_t> tokens_of_text(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens;
  for (const char byte : random_text(count, random).substr(0, count)) tokens.push_back(static_cast<uint8_t>(byte));
  return tokens;
}

std::vector<int32_t> random_tokens(size_t count) {
  const uint32_t seed = std::random_device{}();
  std::printf("seed %u\n", seed);
  return tokens_of_text(count, seed);
}

uint64_t smallest_budget(const std::string& path) {
  const auto report = plan_model(
      path, {.device_memory_bytes = uint64_t{1} << 40, .context = 512, .max_rows = 8}, {});
  REQUIRE(report);
  return report->smallest_device_bytes;
}

std::string bytes_behind_header(const std::string& path) {
  return read_whole(path).substr(4096);
}  // the uuid is new each time

void refused(const QuantizeOptions& options, ErrorCode code, const std::string& words) {
  const Result<QuantizeReport> report = quantize_model(options);
  REQUIRE_FALSE(report);
  INFO(report.error().message);
  CHECK(report.error().code == code);
  CHECK(report.error().message.find(words) != std::string::npos);
  CHECK_FALSE(std::filesystem::exists(options.output));
}

// Every layer and no container: a folder is in its place. The states before layer 0, which go with that layer.
std::string all_but_the_container(QuantizeOptions options) {
  const std::string work = options.output + ".work";
  std::string states;
  options.progress = [&](uint64_t, uint64_t, const std::string&) {
    if (states.empty()) states = read_whole(work + "/states-0");
  };
  std::filesystem::create_directory(options.output);
  const Result<QuantizeReport> report = quantize_model(options);
  std::filesystem::remove(options.output);
  REQUIRE_FALSE(report);
  INFO(report.error().message);
  REQUIRE(std::filesystem::exists(work + "/layer-1"));
  REQUIRE_FALSE(states.empty());
  return states;
}

}  // namespace

TEST_CASE("on golden shapes GPTQ has less than 0.9 of the divergence of rounding to nearest") {
  for (const char* name : {"llama3", "qwen2", "qwen3", "mistral"}) {
    const Source source(name);
    const std::string calibration = source.text("calibration.txt", 8192, 1);
    const std::vector<int32_t> tokens = tokens_of_text(400, 2);
    quantized(source.options("fp16"));
    const std::vector<float> reference = logits_of(source.options("fp16").output, tokens);
    const size_t vocab = reference.size() / tokens.size();
    double divergence[2] = {};
    for (const QuantizeMethod method : {QuantizeMethod::rtn, QuantizeMethod::gptq}) {
      QuantizeOptions options = source.options("int4");
      options.method = method;
      options.calibration = {calibration};
      const QuantizeReport report = quantized(options);
      CHECK(report.bits_per_weight < 4.3);
      divergence[method == QuantizeMethod::gptq] = mean_kl(reference, logits_of(options.output, tokens), vocab);
    }
    quantized(source.options("int8"));
    const double int8 = mean_kl(reference, logits_of(source.options("int8").output, tokens), vocab);
    std::printf("%s: KL %.3e by rounding to nearest, %.3e by GPTQ (%.2f), %.3e with INT8 (1/%.0f)\n", name,
                divergence[0], divergence[1], divergence[1] / divergence[0], int8, divergence[1] / int8);
    INFO(name);
    CHECK(divergence[1] < 0.9 * divergence[0]);
    CHECK(int8 < divergence[1] / 50);
  }
}

TEST_CASE("every shipped recipe gives a container that runs, with a report of every matrix") {
  const Source source("llama3");
  const std::string calibration = source.text("calibration.txt", 4096, 1);
  for (const char* name : {"fp16", "int8", "int4", "int4-attention-fp16-ffn", "int4-protect-critical",
                           "int8-critical-fp16", "int4-reasoning"}) {
    INFO(name);
    QuantizeOptions options = source.options(name);
    options.calibration = {calibration};
    options.windows = 4;
    const QuantizeReport report = quantized(options);
    REQUIRE(verify_file(options.output));
    const nlohmann::json json = nlohmann::json::parse(report.json);
    CHECK(json["matrices"].size() == 2 * 7 + 2);
    for (const auto& matrix : json["matrices"]) {
      INFO(matrix.dump());
      CHECK((matrix["relative_error"] >= 0.0 && matrix["relative_error"] < 0.2));
    }
    CHECK(logits_of(options.output, {65, 66, 67}).size() == 3 * 512);
  }
}

TEST_CASE("the result does not depend on the number of threads, and JSON lines are text") {
  const Source source("llama3");
  std::ofstream(source.folder.file("c.jsonl"))
      << R"({"question": ")" + std::string(600, 'q') + R"(", "answer": "42", "n": 1})"
      << "\n\n"
      << R"({"text": ")" + std::string(600, 'x') + "\"}\n";
  std::string first;
  for (const uint32_t threads : {1u, 3u}) {
    QuantizeOptions options = source.options("int4");
    options.calibration = {source.folder.file("c.jsonl")};
    options.threads = threads;
    quantized(options);
    const std::string bytes = bytes_behind_header(options.output);
    if (first.empty()) first = bytes;
    CHECK(bytes == first);
  }
}

// The second nibble is of the layers' matrices, so they are measured with the rest exact: INT8 of the embedding and the
// output matrix alone diverges by 9e-5 here, a fifth of what is left with it.
TEST_CASE("a residual brings divergence below a fiftieth of INT4's, and INT4 alone is as without it") {
  const Source source("llama3");
  quantized(source.options("fp16"));
  std::vector<std::vector<int32_t>> texts;
  std::vector<std::vector<float>> references;
  for (int i = 0; i < 6; ++i) {   // of one, the ratios below vary by a seventh
    texts.push_back(random_tokens(400));
    references.push_back(logits_of(source.options("fp16").output, texts.back()));
  }
  const std::string layers_alone = source.folder.file("layers.toml");
  std::ofstream(layers_alone) << R"(
[[rule]]
tensors = ["model.embed_tokens.weight", "lm_head.weight"]
scheme = "f16"

[[rule]]
tensors = "*"
scheme = "int4"
method = "gptq"
)";
  for (const QuantizeMethod method : {QuantizeMethod::rtn, QuantizeMethod::gptq}) {
    for (const std::string& recipe_path : {recipe("int4"), layers_alone}) {
      QuantizeOptions options = source.options("int4");
      options.recipe = recipe_path;
      options.method = method;
      options.calibration = {source.text("calibration.txt", 8192, 1)};
      const std::string plain = source.folder.file("plain.sluice"), both = source.folder.file("both.sluice");
      options.output = plain;
      quantized(options);
      options.output = both;
      options.residual = true;
      quantized(options);
      REQUIRE(verify_file(both));

      double base = 0, finer = 0;
      for (size_t i = 0; i < texts.size(); ++i) {
        const std::vector<float> int4 = logits_of(both, texts[i]);
        CHECK(int4 == logits_of(plain, texts[i]));
        base += mean_kl(references[i], int4, 512);
        finer += mean_kl(references[i], logits_of(both, texts[i], Precision::fine), 512);
      }
      base /= static_cast<double>(texts.size());
      finer /= static_cast<double>(texts.size());
      std::printf("%s, embedding %s: KL %.3e with INT4, %.3e with the residual (1/%.0f)\n",
                  method == QuantizeMethod::rtn ? "rtn" : "gptq", recipe_path == layers_alone ? "F16" : "INT8", base, finer,
                  base / finer);
      // GPTQ's base is three times better; INT8 of the rest is the same. 1/44 to 1/47 was seen, 1/55 to 1/58 without it.
      const bool int8_shows = method == QuantizeMethod::gptq && recipe_path != layers_alone;
      CHECK(finer <= base / (int8_shows ? 40 : 50));

      // What a pass reads and keeps: the same as of the file without residuals.
      for (const uint64_t budget : {uint64_t{1} << 30, smallest_budget(plain)}) {
        const auto of_both = plan_model(both, {.device_memory_bytes = budget, .context = 512, .max_rows = 8}, {});
        const auto of_plain = plan_model(plain, {.device_memory_bytes = budget, .context = 512, .max_rows = 8}, {});
        REQUIRE((of_both && of_plain));
        CHECK(of_both->disk_tier_bytes == of_plain->disk_tier_bytes);
        CHECK(of_both->resident_bytes == of_plain->resident_bytes);
      }
    }
  }
}

// Hidden: needs a GPU (suites cuda and vulkan).
TEST_CASE("calibration on a GPU gives nearly the codes of the CPU's", "[.gpu]") {
  for (const char* name : {"llama3", "qwen2"}) {
    const Source source(name);
    QuantizeOptions options = source.options("int4");
    options.calibration = {source.text("calibration.txt", 8192, 1)};
    quantized(options);
    const std::string on_cpu = options.output;
    options.output = source.folder.file("gpu.sluice");
    options.backend = backend_under_test();
    quantized(options);
    auto cpu = storage::Container::open(on_cpu), gpu = storage::Container::open(options.output);
    REQUIRE((cpu && gpu));
    size_t weights = 0, others = 0;
    for (const storage::Tensor& tensor : cpu->manifest().tensors) {
      if (tensor.scheme != storage::Scheme::int4) continue;
      const std::vector<float> a = stored_weights(*cpu, tensor.role, tensor.layer);
      const std::vector<float> b = stored_weights(*gpu, tensor.role, tensor.layer);
      for (size_t i = 0; i < a.size(); ++i) others += a[i] != b[i];
      weights += a.size();
    }
    std::printf("%s: %zu of %zu weights differ\n", name, others, weights);
    REQUIRE(weights > 0);
    // Sums in another order turn a rounding here and there, and FP16 activations (CUDA) more of them, which error
    // feedback carries on; inputs of other columns or rows would turn most, and cost accuracy.
    CHECK(static_cast<double>(others) < (options.backend == "cuda" ? 0.1 : 0.02) * static_cast<double>(weights));
    quantized(source.options("fp16"));
    const std::vector<int32_t> tokens = random_tokens(400);
    const std::vector<float> reference = logits_of(source.options("fp16").output, tokens);
    const size_t vocab = reference.size() / tokens.size();
    const double kl_cpu = mean_kl(reference, logits_of(on_cpu, tokens), vocab);
    const double kl_gpu = mean_kl(reference, logits_of(options.output, tokens), vocab);
    std::printf("%s: KL %.5f, quantized on the CPU %.5f\n", name, kl_gpu, kl_cpu);
    CHECK(kl_gpu < 1.05 * kl_cpu);
  }
}

namespace {

double median_of(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// What the logits may be off, relatively, against the F32 sums of both on the CPU, in the median: of tokens that have
// nothing before them, and of texts.
struct Tolerance {
  double alone, together;
};

void check_sum_of_both(QuantizeMethod method, const std::string& backend, Tolerance tolerance) {
  const Source source("qwen2");  // with biases
  QuantizeOptions options = source.options("int4");
  options.method = method;
  options.calibration = {source.text("calibration.txt", 8192, 1)};
  options.residual = true;
  quantized(options);
  const std::vector<int32_t> tokens = random_tokens(40);
  // Eight rows a pass at most, whose bits do not depend on each other.
  ModelOptions model{.context = 512, .max_rows = 8, .precision = Precision::fine, .backend = backend,
                     .cpu_activations = Activations::f32};
  const Model both = open_or_fail(options.output, model);
  const std::vector<float> fine = score_all(both, tokens);

  // The sums as an F32 checkpoint.
  auto container = storage::Container::open(options.output);
  REQUIRE(container);
  SafetensorsMaker sums;
  for (const storage::Tensor& tensor : container->manifest().tensors) {
    std::vector<float> values = stored_weights(*container, tensor.role, tensor.layer);
    if (tensor.plane(storage::PlaneKind::residual) != nullptr) {
      const std::vector<float> second =
          quant::dequantize(tensor.residual(), read_plane(*container, tensor, storage::PlaneKind::residual),
                            read_plane(*container, tensor, storage::PlaneKind::residual_scales), {}, {});
      for (size_t i = 0; i < values.size(); ++i) {
        values[i] = static_cast<float>(static_cast<double>(values[i]) + static_cast<double>(second[i]));
      }
    }
    Bytes data(values.size() * sizeof(float));
    std::memcpy(data.data(), values.data(), data.size());
    std::vector<uint64_t> shape = {tensor.rows, tensor.cols};
    if (tensor.is_vector()) shape = {tensor.cols};
    sums.tensors[tensor.name] = {"F32", shape, std::move(data)};
  }
  save(source.path + "/model.safetensors", sums.bytes());
  const std::string exact = source.folder.file("exact.sluice");
  REQUIRE(import_model({.source = source.path, .output = exact, .weights = WeightFormat::keep}));
  const Model added = open_or_fail(exact, {.context = 512, .backend = "cpu", .cpu_activations = Activations::f32});
  std::vector<double> alone;
  for (const int32_t token : tokens) {
    alone.push_back(relative_error(score_all(both, {&token, 1}), score_all(added, {&token, 1})));
  }
  std::vector<double> together = {relative_error(fine, score_all(added, tokens))};
  while (together.size() < 5) {
    const std::vector<int32_t> text = random_tokens(40);
    together.push_back(relative_error(score_all(both, text), score_all(added, text)));
  }
  std::printf("%s, against the sums in F32: tokens alone %.1e, texts %.1e\n", backend.c_str(), median_of(alone),
              median_of(together));
  CHECK(median_of(alone) < tolerance.alone);
  CHECK(median_of(together) < tolerance.together);

  model.device_memory_bytes = uint64_t{1} << 40;
  const auto report = plan_model(options.output, model, {});
  REQUIRE(report);
  const uint64_t smallest = report->smallest_device_bytes;
  const struct {
    uint64_t device, host;
  } mixes[] = {{smallest, 0}, {smallest, 1u << 30}, {smallest + 150000, 0}, {smallest + 150000, 200000}};
  for (const auto& mix : mixes) {
    model.device_memory_bytes = mix.device;
    model.host_memory_bytes = mix.host;
    INFO("device " << mix.device << ", host " << mix.host);
    CHECK(score_all(open_or_fail(options.output, model), tokens) == fine);
  }
}

}  // namespace

TEST_CASE("INT4 with its residual computes the sum of both, with the same bits in every mix of tiers") {
  // FP32 sums in another order. Now and then the FP16 of a key or a value falls the other way, by a unit in its last
  // place, and all tokens behind it see that: 1.4e-4 was met in one text.
  for (const QuantizeMethod method : {QuantizeMethod::rtn, QuantizeMethod::gptq}) {
    check_sum_of_both(method, "cpu", {.alone = 1e-6, .together = 1e-4});
  }
}

// Hidden: needs a GPU. CUDA's activations are FP16.
TEST_CASE("INT4 with its residual computes the sum of both on a GPU, with the same bits in every mix of tiers", "[.gpu]") {
  const double tolerance = backend_under_test() == "cuda" ? 6e-3 : 1e-3;
  check_sum_of_both(QuantizeMethod::gptq, backend_under_test(), {.alone = tolerance, .together = tolerance});
}

TEST_CASE("residuals become resident only when no base is streamed") {
  const Source source("llama3");
  QuantizeOptions options = source.options("int4");
  options.method = QuantizeMethod::rtn;
  options.residual = true;
  quantized(options);
  const auto planned = [&](Io io, uint64_t device) {
    auto report = plan_model(options.output, {.device_memory_bytes = device,
                                              .context = 512,
                                              .max_rows = 8,
                                              .io = io,
                                              .precision = Precision::fine,
                                              .backend = "cpu"},
                             {});
    REQUIRE(report);
    return std::move(*report);
  };
  // So small a model is all resident before a ring holds its residuals alone; in place there is no ring.
  for (const Io io : {Io::automatic, Io::mmap}) {
    const PlanReport roomy = planned(io, uint64_t{1} << 40);
    int bases = 0, residuals = 0;  // budgets that stream a base, and that leave a residual resident
    for (uint64_t extra = 0; extra <= roomy.resident_bytes; extra += 10000) {
      bool base_streamed = false, residual_resident = false;
      for (const PlanReport::Tier& tensor : planned(io, roomy.smallest_device_bytes + extra).tensors) {
        const bool residual = tensor.tensor.ends_with("(residual)");
        base_streamed = base_streamed || (!residual && tensor.tier == "disk");
        residual_resident = residual_resident || (residual && tensor.tier == "device");
      }
      INFO("extra " << extra);
      CHECK_FALSE((base_streamed && residual_resident));
      bases += base_streamed;
      residuals += residual_resident;
    }
    CHECK(bases > 10);
    CHECK(residuals > 0);
    if (io == Io::mmap) CHECK(residuals > 10);
  }
}

TEST_CASE("calibration that cannot be is refused before anything is written") {
  const Source source("llama3");
  QuantizeOptions options = source.options("int4");
  const auto with_text = [&](const std::string& name, const std::string& content) {
    std::ofstream(source.folder.file(name), std::ios::binary) << content;
    options.calibration = {source.folder.file(name)};
  };
  SECTION("none") { refused(options, ErrorCode::usage, "GPTQ needs text; give --calibration"); }
  SECTION("not there") {
    options.calibration = {source.folder.file("nowhere.txt")};
    refused(options, ErrorCode::not_found, "nowhere.txt");
  }
  SECTION("shorter than a window") {
    with_text("short.txt", std::string(100, 'a'));
    refused(options, ErrorCode::usage, "has 100 tokens, one window takes 128");
  }
  SECTION("not UTF-8") {
    with_text("latin.txt", std::string(300, 'a') + "\xe4\x20" + std::string(300, 'a'));
    refused(options, ErrorCode::corrupt, "latin.txt: the bytes at offset 300 are not UTF-8");
  }
  SECTION("a line that is no object") {
    with_text("lines.jsonl", "{\"text\": \"a\"}\n[1]\n");
    refused(options, ErrorCode::corrupt, "lines.jsonl: line 2 is not a JSON object");
  }
  SECTION("no windows") {
    options.windows = 0;
    refused(options, ErrorCode::usage, "0 windows");
  }
  SECTION("damping out of range") {
    options.damp = 0;
    refused(options, ErrorCode::usage, "damping 0");
  }
  SECTION("output over the source") {
    options.output = options.source;
    const Result<QuantizeReport> report = quantize_model(options);
    REQUIRE_FALSE(report);
    CHECK(report.error().message.find("both source and output") != std::string::npos);
  }
  SECTION("a model without a tokenizer") {
    std::filesystem::remove(source.path + "/tokenizer.json");
    with_text("text.txt", std::string(300, 'a'));
    refused(options, ErrorCode::unsupported, "has no tokenizer");
  }
}

TEST_CASE("a checkpoint that is INT4 already is not quantized once more") {
  const Source source("llama3-gptq");
  refused(source.options("int8"), ErrorCode::unsupported, "is GPTQ INT4 already");
}

TEST_CASE("a work folder of another quantization is refused, and --restart throws it away") {
  const Source source("llama3");
  QuantizeOptions options = source.options("int4");
  options.calibration = {source.text("a.txt", 4096, 1)};
  std::filesystem::create_directory(options.output + ".work");
  std::ofstream(options.output + ".work/job.json") << "{}";
  refused(options, ErrorCode::usage, "another quantization");
  options.restart = true;
  quantized(options);
}

TEST_CASE("states and layers of another quantization are not taken") {
  const Source source("llama3");
  QuantizeOptions options = source.options("int4");
  options.calibration = {source.text("a.txt", 4096, 1)};
  quantized(options);
  const std::string clean = bytes_behind_header(options.output);
  std::filesystem::remove(options.output);
  const std::string work = options.output + ".work";
  std::string job;
  SECTION("where there is no job.json") {}
  SECTION("beside the job.json of this one") {
    all_but_the_container(options);
    job = read_whole(work + "/job.json");
    std::filesystem::remove_all(work);
  }
  QuantizeOptions other = options;
  other.recipe = recipe("int4-reasoning");
  other.calibration = {source.text("b.txt", 4096, 2)};
  const std::string states = all_but_the_container(other);
  std::ofstream(work + "/states-0", std::ios::binary) << states;
  std::filesystem::remove(work + "/job.json");
  if (!job.empty()) std::ofstream(work + "/job.json", std::ios::binary) << job;
  CHECK(quantized(options).resumed_layers == 0);
  CHECK(bytes_behind_header(options.output) == clean);
}

TEST_CASE("an edited config.json makes another quantization of it, and the old one goes on where it was") {
  const Source source("llama3");
  QuantizeOptions options = source.options("int4");
  options.calibration = {source.text("a.txt", 4096, 1)};
  quantized(options);
  const std::string clean = bytes_behind_header(options.output);
  std::filesystem::remove(options.output);
  all_but_the_container(options);
  const std::string path = source.path + "/config.json", config = read_whole(path);
  for (const char* number : {"/rope_theta", "/rope_scaling/factor", "/rms_norm_eps"}) {
    INFO(number);
    nlohmann::json edited = nlohmann::json::parse(config);
    edited.at(nlohmann::json::json_pointer(number)).get_ref<double&>() *= 2;
    std::ofstream(path) << edited;
    refused(options, ErrorCode::usage, "another quantization");
  }
  std::ofstream(path) << config;
  CHECK(quantized(options).resumed_layers == 2);
  CHECK(bytes_behind_header(options.output) == clean);
}

TEST_CASE("a second run on one output is refused while the first is at work, and the first ends well") {
  const Source source("llama3");
  QuantizeOptions first = source.options("int4");
  first.calibration = {source.text("a.txt", 4096, 1)};
  QuantizeOptions second = first;
  int tried = 0;
  first.progress = [&](uint64_t, uint64_t, const std::string&) {
    if (tried == 2) return;
    second.restart = tried++ == 1;
    refused(second, ErrorCode::usage, "another run is at work in it");
  };
  quantized(first);
  CHECK(tried == 2);
  const std::string beside = bytes_behind_header(first.output);
  quantized(second);
  CHECK(bytes_behind_header(second.output) == beside);
}

TEST_CASE("a work folder that cannot be emptied is an error, and files of others stay in it") {
  const Source source("llama3");
  QuantizeOptions options = source.options("int4");
  options.calibration = {source.text("a.txt", 4096, 1)};
  const std::string work = options.output + ".work";
  std::filesystem::create_directories(work + "/states-0");
  std::ofstream(work + "/notes.txt") << "mine";
  for (const bool restart : {false, true}) {
    options.restart = restart;
    refused(options, ErrorCode::io, "states-0: cannot be removed");
    CHECK_FALSE(std::filesystem::exists(work + "/job.json"));
  }
  std::filesystem::remove(work + "/states-0");
  REQUIRE(quantize_model(options));
  CHECK(read_whole(work + "/notes.txt") == "mine");
  std::filesystem::remove(work + "/notes.txt");
  CHECK(std::filesystem::is_empty(work));
}
