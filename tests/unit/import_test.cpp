// SPDX-License-Identifier: Apache-2.0
// Hugging Face folders into containers, the golden models first; and synthetic models.
#include "import/import.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <nlohmann/json.hpp>

#include "checkpoint_folder.hpp"
#include "import_fixture.hpp"
#include "model/tokenizer.hpp"
#include "storage/container.hpp"

using namespace sluice;
using namespace sluice::test;
using import::Weights;
using storage::Role;
using storage::Scheme;
using Json = nlohmann::json;

namespace {

// How far a stored weight may lie from the original, of a group with this largest magnitude (see rounding_test.cpp).
double int8_bound(double largest) { return largest / 254 * (1 + 0x1p-10) + largest * 0x1p-11; }
double int4_bound(double largest) { return largest / 14 * (1 + 0x1p-10) + largest * 0x1p-11; }

void check_rounded(const storage::Tensor& tensor, const std::vector<float>& stored, const std::vector<float>& original) {
  REQUIRE(stored.size() == original.size());
  const uint32_t group = tensor.group_elems != 0 ? tensor.group_elems : tensor.cols;
  for (uint64_t row = 0; row < tensor.rows; ++row) {
    for (uint64_t col = 0; col < tensor.cols; col += group) {
      const uint64_t count = std::min<uint64_t>(group, tensor.cols - col);
      double largest = 0, worst = 0, squares = 0;
      for (uint64_t i = row * tensor.cols + col; i < row * tensor.cols + col + count; ++i) {
        largest = std::max(largest, std::fabs(static_cast<double>(original[i])));
        const double error = std::fabs(static_cast<double>(original[i]) - static_cast<double>(stored[i]));
        worst = std::max(worst, error);
        squares += error * error;
      }
      if (tensor.scheme == Scheme::int4) {
        REQUIRE(squares <= static_cast<double>(count) * int4_bound(largest) * int4_bound(largest));
      } else if (tensor.scheme == Scheme::int8) {
        REQUIRE(worst <= int8_bound(largest));
      } else {
        REQUIRE(worst <= std::max(largest * 0x1p-11, std::ldexp(1.0, -25 + tensor.scale_exponent)));
      }
    }
  }
}

Scheme expected_scheme(const storage::Tensor& tensor, Weights weights) {
  if (tensor.is_vector()) return Scheme::f32;
  const bool outer = tensor.role == Role::token_embedding || tensor.role == Role::lm_head;
  switch (weights) {
    case Weights::keep: return Scheme::bf16;
    case Weights::f16: return Scheme::f16;
    case Weights::int8: return Scheme::int8;
    case Weights::int4: return outer ? Scheme::int8 : Scheme::int4;
  }
  return Scheme::f32;
}

// Splits the checkpoint over two shards with an index.
void write_shards(Folder& folder) {
  SafetensorsMaker shards[2];
  Json map = Json::object();
  size_t next = 0;
  for (const auto& [name, tensor] : folder.weights.tensors) {
    shards[next % 2].tensors[name] = tensor;
    map[name] = "model-0000" + std::to_string(next % 2 + 1) + "-of-00002.safetensors";
    ++next;
  }
  for (int i = 0; i < 2; ++i) {
    save(folder.place.file("model-0000" + std::to_string(i + 1) + "-of-00002.safetensors"), shards[i].bytes());
  }
  folder.write("model.safetensors.index.json", Json{{"metadata", {{"total_size", 1}}}, {"weight_map", map}}.dump());
}

}  // namespace

TEST_CASE("golden models hold in the container what the safetensors hold, under every --weights") {
  const std::string name = GENERATE("llama3", "llama-tied", "mistral", "qwen2", "qwen3", "qwen2-large-activations");
  const Weights weights = GENERATE(Weights::keep, Weights::f16, Weights::int8, Weights::int4);
  CAPTURE(name, static_cast<int>(weights));
  Folder folder(name);
  const auto report = folder.run(weights);
  REQUIRE(report);
  CHECK(report->requantized == 0);
  const auto container = folder.container();
  REQUIRE(container.verify({}));
  const bool tied = container.manifest().hyper.tied_embeddings;
  CHECK(tied == (name == "llama-tied"));
  CHECK(container.manifest().source == "safetensors BF16");
  for (const storage::Tensor& tensor : container.manifest().tensors) {
    CAPTURE(tensor.name);
    CHECK(tensor.scheme == expected_scheme(tensor, weights));
    const bool tied_head = tied && tensor.role == Role::lm_head;
    const auto original = folder.values(tied_head ? "model.embed_tokens.weight" : tensor.name);
    const auto stored = stored_weights(container, tensor.role, tensor.layer);
    if (weights == Weights::keep || tensor.is_vector()) {
      CHECK(same_bits(stored, original));
    } else {
      check_rounded(tensor, stored, original);
    }
  }
  if (tied) CHECK(same_bits(stored_weights(container, Role::lm_head, -1), stored_weights(container, Role::token_embedding, -1)));
}

TEST_CASE("config.json becomes hyperparameters and RoPE") {
  Folder folder("llama3");
  REQUIRE(folder.run());
  const auto container = folder.container();
  const storage::HyperParameters& hyper = container.manifest().hyper;
  CHECK(hyper.architecture == storage::Architecture::llama);
  CHECK(hyper.layers == 2);
  CHECK(hyper.hidden == 128);
  CHECK(hyper.heads == 4);
  CHECK(hyper.kv_heads == 2);
  CHECK(hyper.head_dim == 32);
  CHECK(hyper.ffn == 256);
  CHECK(hyper.vocab == 512);
  CHECK(hyper.max_context == 2048);
  CHECK(hyper.norm_eps == 1e-5f);
  // theta 500000, llama3: the first wavelength is far below 128 / 4, the last far above 128 / 1.
  const auto& frequencies = container.manifest().rope.inverse_frequencies;
  REQUIRE(frequencies.size() == 16);
  CHECK(frequencies.front() == 1.0f);
  CHECK(frequencies.back() == Approx(std::pow(500000.0, -30.0 / 32) / 8).epsilon(1e-6));
  // In between (i = 3: wavelength 73.6 of 32..128) by the formula of transformers' modeling_rope_utils.
  const double plain = std::pow(500000.0, -6.0 / 32), smooth = (128 / (2 * M_PI / plain) - 1) / 3;
  CHECK(frequencies[3] == Approx((1 - smooth) * plain / 8 + smooth * plain).epsilon(1e-6));
}

TEST_CASE("transformers 5 puts theta and scaling into rope_parameters, with the same result") {
  Folder old_style("llama3");
  REQUIRE(old_style.run());
  Folder new_style("llama3");
  new_style.config["rope_parameters"] = new_style.config["rope_scaling"];
  new_style.config["rope_parameters"]["rope_theta"] = new_style.config["rope_theta"];
  new_style.config.erase("rope_scaling");
  new_style.config.erase("rope_theta");
  REQUIRE(new_style.run());
  CHECK(old_style.container().manifest().rope.inverse_frequencies ==
        new_style.container().manifest().rope.inverse_frequencies);
}

TEST_CASE("linear RoPE scaling divides, other scalings are refused by name") {
  Folder folder("llama3");
  folder.config["rope_scaling"] = {{"type", "linear"}, {"factor", 4.0}};
  REQUIRE(folder.run());
  CHECK(folder.container().manifest().rope.inverse_frequencies[0] == 0.25f);
  Folder yarn("llama3");
  yarn.config["rope_scaling"] = {{"rope_type", "yarn"}, {"factor", 4.0}};
  refuses(yarn, yarn.run(), ErrorCode::unsupported, {"config.json", "yarn"});
}

TEST_CASE("shards give the same container as one file") {
  Folder single("qwen2"), sharded("qwen2");
  REQUIRE(single.run(Weights::int4));
  write_shards(sharded);
  REQUIRE(sharded.run(Weights::int4, false));
  const auto a = single.container(), b = sharded.container();
  for (const storage::Tensor& tensor : a.manifest().tensors) {
    CHECK(same_bits(stored_weights(a, tensor.role, tensor.layer), stored_weights(b, tensor.role, tensor.layer)));
  }
}

TEST_CASE("an incomplete folder is refused with the name of what is missing") {
  Folder folder("llama3");
  SECTION("a shard") {
    write_shards(folder);
    std::filesystem::remove(folder.place.file("model-00002-of-00002.safetensors"));
    refuses(folder, folder.run(Weights::keep, false), ErrorCode::not_found, {"model-00002-of-00002.safetensors"});
  }
  SECTION("a tensor that the index promises") {
    write_shards(folder);
    save(folder.place.file("model-00001-of-00002.safetensors"), SafetensorsMaker().bytes());
    refuses(folder, folder.run(Weights::keep, false), ErrorCode::corrupt,
            {"model-00001-of-00002.safetensors", "lm_head.weight", "missing"});
  }
  SECTION("an index that leads out of the folder") {
    write_shards(folder);
    folder.write("model.safetensors.index.json", R"({"weight_map":{"lm_head.weight":"../../secret.safetensors"}})");
    refuses(folder, folder.run(Weights::keep, false), ErrorCode::corrupt, {"index.json", "lm_head.weight"});
  }
  SECTION("a tensor") {
    folder.weights.tensors.erase("model.layers.1.mlp.up_proj.weight");
    refuses(folder, folder.run(), ErrorCode::corrupt, {"model.layers.1.mlp.up_proj.weight", "missing"});
  }
  SECTION("lm_head of a model that is not tied") {
    folder.weights.tensors.erase("lm_head.weight");
    refuses(folder, folder.run(), ErrorCode::corrupt, {"lm_head.weight", "tie_word_embeddings"});
  }
  SECTION("all weights") { refuses(folder, folder.run(Weights::keep, false), ErrorCode::not_found, {"model.safetensors"}); }
  SECTION("config.json") { refuses(folder, folder.run_as_it_is(), ErrorCode::not_found, {"config.json"}); }
  SECTION("a key of config.json") {
    folder.config.erase("hidden_size");
    refuses(folder, folder.run(), ErrorCode::corrupt, {"config.json", "hidden_size"});
  }
  SECTION("the end of the file") {
    folder.run().has_value();
    std::filesystem::remove(folder.place.file("out.sluice"));
    std::filesystem::resize_file(folder.place.file("model.safetensors"), 400'000);
    refuses(folder, folder.run_as_it_is(), ErrorCode::corrupt, {"model.safetensors", "truncated"});
  }
}

TEST_CASE("a folder that contradicts itself is refused by name") {
  Folder folder("llama3");
  SECTION("a shape") {
    folder.weights.tensors.at("model.layers.0.self_attn.k_proj.weight").shape = {128, 64};
    refuses(folder, folder.run(), ErrorCode::corrupt, {"k_proj.weight", "128x64", "64x128"});
  }
  SECTION("KV heads") {
    folder.config["num_key_value_heads"] = 3;
    refuses(folder, folder.run(), ErrorCode::corrupt, {"config.json", "3 KV heads"});
  }
  SECTION("a negative size") {
    folder.config["num_hidden_layers"] = -2;
    refuses(folder, folder.run(), ErrorCode::corrupt, {"num_hidden_layers", "-2"});
  }
  SECTION("a size of billions") {
    folder.config["num_hidden_layers"] = 4'000'000'000u;
    refuses(folder, folder.run(), ErrorCode::corrupt, {"layers", "4000000000"});
  }
  SECTION("no JSON") {
    folder.write("config.json", "{\"model_type\": ");
    refuses(folder, folder.run_as_it_is(), ErrorCode::corrupt, {"config.json", "JSON"});
  }
}

TEST_CASE("models that would compute something else are refused by name") {
  Folder folder("llama3");
  SECTION("architecture") {
    folder.config["model_type"] = "gemma2";
    refuses(folder, folder.run(), ErrorCode::unsupported, {"config.json", "gemma2"});
  }
  SECTION("activation") {
    folder.config["hidden_act"] = "gelu";
    refuses(folder, folder.run(), ErrorCode::unsupported, {"gelu"});
  }
  SECTION("dtype") {
    folder.weights.tensors.at("lm_head.weight").dtype = "I16";
    refuses(folder, folder.run(), ErrorCode::unsupported, {"lm_head.weight", "I16"});
  }
  SECTION("a bias behind attention") {
    folder.weights.tensors["model.layers.0.self_attn.o_proj.bias"] = {"BF16", {128}, Bytes(256, 0x3f)};
    refuses(folder, folder.run(), ErrorCode::unsupported, {"o_proj.bias"});
  }
}

TEST_CASE("tensors that change nothing are left out with one warning") {
  Folder folder("llama3");
  folder.weights.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = {"F32", {16}, Bytes(64)};
  folder.weights.tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = {"F32", {16}, Bytes(64)};
  folder.weights.tensors["model.layers.0.self_attn.o_proj.bias"] = {"BF16", {128}, Bytes(256)};
  REQUIRE(folder.run());
  CHECK(folder.warnings_with("3 tensors are not part of the model") == 1);
}

TEST_CASE("weights that are not finite are refused with file, tensor, row and column") {
  Folder folder("llama3");
  const uint16_t nan = 0x7fc0;
  std::memcpy(folder.weights.tensors.at("model.layers.1.mlp.gate_proj.weight").data.data() + (7 * 128 + 9) * 2, &nan, 2);
  for (const Weights weights : {Weights::keep, Weights::f16, Weights::int8, Weights::int4}) {
    refuses(folder, folder.run(weights), ErrorCode::numeric,
            {"model.safetensors", "model.layers.1.mlp.gate_proj.weight", "row 7", "column 9"});
  }
}

TEST_CASE("F32 is kept as the narrowest scheme that holds it") {
  Folder folder("llama3");
  auto& tensor = folder.weights.tensors.at("model.layers.0.mlp.down_proj.weight");
  const auto set = [&](float (*value)(size_t)) {
    tensor.dtype = "F32";
    tensor.data.clear();
    for (size_t i = 0; i < 128 * 256; ++i) put(tensor.data, value(i));
    REQUIRE(folder.run());
    const auto container = folder.container();
    CHECK(same_bits(stored_weights(container, Role::down, 0), folder.values("model.layers.0.mlp.down_proj.weight")));
    return container.find(Role::down, 0)->scheme;
  };
  CHECK(set([](size_t i) { return static_cast<float>(i % 1000) * 0x1p-10f; }) == Scheme::f16);
  CHECK(set([](size_t i) { return std::ldexp(1.0f, static_cast<int>(i % 80) - 40); }) == Scheme::bf16);
  CHECK(set([](size_t i) { return 1.0f + static_cast<float>(i % 7) * 0x1p-20f; }) == Scheme::f32);
}

TEST_CASE("a sliding window shorter than the context limits the context") {
  Folder mistral("mistral");
  mistral.config["sliding_window"] = 512;
  REQUIRE(mistral.run());
  CHECK(mistral.container().manifest().hyper.max_context == 512);
  CHECK(mistral.warnings_with("512 positions") == 1);

  Folder unused("qwen2");  // Qwen2.5 names a window and does not use it
  unused.config["sliding_window"] = 512;
  REQUIRE(unused.run());
  CHECK(unused.container().manifest().hyper.max_context == 2048);

  Folder used("qwen2");
  used.config["sliding_window"] = 512;
  used.config["use_sliding_window"] = true;
  used.config["max_window_layers"] = 1;
  used.config.erase("layer_types");
  REQUIRE(used.run());
  CHECK(used.container().manifest().hyper.max_context == 512);
}

TEST_CASE("an embedding padded beyond vocab_size keeps its rows") {
  Folder folder("llama3");
  folder.config["vocab_size"] = 500;
  REQUIRE(folder.run());
  CHECK(folder.container().manifest().hyper.vocab == 512);
}

TEST_CASE("generation_config.json gives defaults, and do_sample false is greedy") {
  Folder folder("llama3");
  folder.write("generation_config.json",
               R"({"do_sample":true,"temperature":0.6,"top_k":20,"top_p":0.95,"repetition_penalty":1.05})");
  REQUIRE(folder.run());
  const auto sampled = folder.container().manifest().generation;
  CHECK(sampled.temperature == 0.6f);
  CHECK(sampled.top_k == 20);
  CHECK(sampled.top_p == 0.95f);
  CHECK(sampled.min_p == -1);
  CHECK(sampled.repetition_penalty == 1.05f);
  folder.write("generation_config.json", R"({"do_sample":false,"temperature":0.6})");
  REQUIRE(folder.run());
  CHECK(folder.container().manifest().generation.temperature == 0);
  std::filesystem::remove(folder.place.file("out.sluice"));
  folder.write("generation_config.json", R"({"temperature":-3})");
  refuses(folder, folder.run(), ErrorCode::corrupt, {"generation_config.json", "temperature"});
}

TEST_CASE("a folder without a tokenizer is imported with a warning, one with a tokenizer carries it") {
  Folder folder("llama3");
  REQUIRE(folder.run());
  CHECK(folder.warnings_with("tokenizer.json") == 1);
  CHECK(folder.container().manifest().tokenizer.model == storage::TokenizerModel::none);

  folder.write("tokenizer.json", R"({"model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2},"merges":["a b"]},
    "added_tokens":[{"id":3,"content":"<|end|>","special":true}],
    "pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false}})");
  folder.write("tokenizer_config.json", R"({"eos_token":"<|end|>"})");
  folder.write("chat_template.jinja", "{{ messages }}");
  REQUIRE(folder.run());
  const auto tokenizer = folder.container().manifest().tokenizer;
  CHECK(tokenizer.tokens == std::vector<std::string>{"a", "b", "ab", "<|end|>"});
  CHECK(tokenizer.eos == 3);
  CHECK(tokenizer.stop_ids == std::vector<int32_t>{3});
  CHECK(tokenizer.chat_template == "{{ messages }}");
}

TEST_CASE("a synthetic model opens, verifies and has the shapes asked for") {
  const std::string configs = std::string(std::getenv("SLUICE_GOLDEN")) + "/../../configs/models/";
  const Weights weights = GENERATE(Weights::int4, Weights::int8, Weights::f16);
  CAPTURE(static_cast<int>(weights));
  TempFolder folder;
  import::SynthOptions options;
  options.model_toml = configs + "smollm2-135m.toml";
  options.output = folder.file("synth.sluice");
  options.layers = 2;
  options.weights = weights;
  const auto report = import::synth_model(options);
  REQUIRE(report);
  const auto container = storage::Container::open(options.output);
  REQUIRE(container);
  REQUIRE(container->verify({}));
  CHECK(container->manifest().hyper.layers == 2);
  CHECK(report->bytes == container->file_bytes());
  CHECK(same_bits(stored_weights(*container, Role::lm_head, -1), stored_weights(*container, Role::token_embedding, -1)));
  // A row times a normalized activation is of order 1: variance 1/K, mean far below its deviation / sqrt(count).
  for (const auto& [role, cols] : {std::pair<Role, double>{Role::gate, 576}, {Role::down, 1536}}) {
    const auto matrix = stored_weights(*container, role, 1);
    double sum = 0, squares = 0;
    for (const float weight : matrix) {
      sum += static_cast<double>(weight);
      squares += static_cast<double>(weight) * static_cast<double>(weight);
    }
    const double count = static_cast<double>(matrix.size()), deviation = std::sqrt(squares / count);
    CHECK(deviation * std::sqrt(cols) > 0.6);
    CHECK(deviation * std::sqrt(cols) < 1.6);
    CHECK(std::fabs(sum / count) < 0.05 * deviation);
  }
  const auto tokenizer = model::Tokenizer::create(container->manifest().tokenizer);
  REQUIRE(tokenizer);
  const std::string text = "any b\xc3\xbcte \x01";
  CHECK(tokenizer->encode(text).size() == text.size());
  CHECK(tokenizer->decode(tokenizer->encode(text)) == text);

  options.output = folder.file("again.sluice");
  REQUIRE(import::synth_model(options));
  const auto again = storage::Container::open(options.output);
  REQUIRE(again);
  CHECK(again->find(Role::gate, 1)->planes[0].block_sums == container->find(Role::gate, 1)->planes[0].block_sums);
  options.seed = 2;
  REQUIRE(import::synth_model(options));
  const auto other = storage::Container::open(options.output);
  REQUIRE(other);
  CHECK(other->find(Role::gate, 1)->planes[0].block_sums != container->find(Role::gate, 1)->planes[0].block_sums);
}

TEST_CASE("every shipped model description reads, and a misspelt key does not") {
  const std::string configs = std::string(std::getenv("SLUICE_GOLDEN")) + "/../../configs/models/";
  TempFolder folder;
  for (const std::string name : {"deepseek-r1-distill-llama-70b", "deepseek-r1-distill-llama-8b", "qwen-72b", "smollm2-135m"}) {
    CAPTURE(name);
    const auto text = read_all(configs + name + ".toml");
    import::SynthOptions options;
    options.model_toml = folder.file("model.toml");
    options.output = folder.file("model.sluice");
    options.layers = 0;  // refused after the file was read: nothing of 36 GB is written here
    write_all(options.model_toml, text);
    auto report = import::synth_model(options);
    REQUIRE_FALSE(report);
    CHECK(mentions(report.error(), "number of layers is 0"));
    std::string misspelt = "hiden = 1\n";
    misspelt.append(reinterpret_cast<const char*>(text.data()), text.size());
    write_all(options.model_toml, std::as_bytes(std::span(misspelt)));
    report = import::synth_model(options);
    REQUIRE_FALSE(report);
    CHECK(report.error().code == ErrorCode::corrupt);
    CHECK(mentions(report.error(), "\"hiden\""));
  }
}
