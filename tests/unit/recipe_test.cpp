// SPDX-License-Identifier: Apache-2.0
#include "calibrate/recipe.hpp"

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "catch.hpp"
#include "container_fixture.hpp"

namespace {

using namespace sluice;
using namespace sluice::calibrate;
using namespace sluice::test;
using storage::Role;
using storage::Scheme;

// The tensors of a llama.
std::vector<import::SourceTensor> tensors(uint32_t layers = 3) {
  storage::HyperParameters hyper = tiny_hyper();
  hyper.architecture = storage::Architecture::llama;
  hyper.layers = layers;
  std::vector<import::SourceTensor> all;
  for (const import::WantedTensor& wanted : import::wanted_tensors(hyper, false)) {
    import::SourceTensor tensor;
    tensor.role = wanted.role;
    tensor.layer = wanted.layer;
    tensor.rows = wanted.rows;
    tensor.cols = wanted.cols;
    tensor.vector = wanted.vector;
    tensor.name = wanted.name;
    all.push_back(tensor);
  }
  return all;
}

struct File {
  TempFolder folder;
  std::string path = folder.file("recipe.toml");
  explicit File(const std::string& text) { std::ofstream(path) << text; }
};

void refuses(const std::string& text, ErrorCode code, const std::string& words) {
  const File file(text);
  const auto recipe = read_recipe(file.path);
  if (recipe) {
    const auto choices = apply_recipe(*recipe, tensors(), std::nullopt);
    REQUIRE_FALSE(choices);
    INFO(choices.error().message);
    CHECK(choices.error().code == code);
    CHECK(mentions(choices.error(), words));
    return;
  }
  INFO(recipe.error().message);
  CHECK(recipe.error().code == code);
  CHECK(mentions(recipe.error(), words));
  CHECK(mentions(recipe.error(), file.path));
}

const std::string kRest = "[[rule]]\ntensors = \"*\"\nscheme = \"int8\"\n";

}  // namespace

TEST_CASE("the first rule that matches name and layer decides, and --method overrides it") {
  const File file(R"(
[[rule]]
tensors = ["*.q_proj.weight", "*.v_proj.weight"]
layers = "0, 2-5"  # a range may reach beyond the last layer
scheme = "keep"
[[rule]]
tensors = "model.layers.*"
scheme = "int4"
method = "gptq"
group = 64
symmetric = false
[[rule]]
tensors = "*"
scheme = "int8"
group = 32
)");
  const auto recipe = read_recipe(file.path);
  REQUIRE(recipe);
  const std::vector<import::SourceTensor> all = tensors();
  const auto choices = apply_recipe(*recipe, all, std::nullopt);
  REQUIRE(choices);
  for (size_t i = 0; i < all.size(); ++i) {
    INFO(all[i].name);
    const std::optional<Choice>& choice = (*choices)[i];
    REQUIRE(choice.has_value() == !all[i].vector);
    if (!choice) continue;
    if (all[i].layer < 0) {
      CHECK((choice->scheme == Scheme::int8 && choice->group_elems == 32));
    } else if ((all[i].role == Role::q || all[i].role == Role::v) && all[i].layer != 1) {
      CHECK_FALSE(choice->scheme);
    } else {
      CHECK((choice->scheme == Scheme::int4 && choice->group_elems == 64 && choice->method == Method::gptq));
      CHECK_FALSE(choice->symmetric);
    }
  }
  const auto nearest = apply_recipe(*recipe, all, Method::rtn);
  REQUIRE(nearest);
  for (const auto& choice : *nearest) {
    if (choice) CHECK((choice->method == Method::rtn && choice->symmetric));
  }
}

TEST_CASE("recipes with typos are refused with file and line") {
  refuses("[[rule]]\ntensors = \"*\"\nscheme = \"int8\"\ngruop = 32\n", ErrorCode::corrupt,
          "unknown key \"gruop\" in line 4");
  refuses("descripton = \"\"\n" + kRest, ErrorCode::corrupt, "unknown key \"descripton\"");
  refuses("[[rule]]\ntensors = \"*\"\nscheme = \"int5\"\n", ErrorCode::corrupt, "rule in line 1: scheme \"int5\"");
  refuses("[[rule]]\ntensors = \"*\"\nscheme = \"int8\"\ngroup = 48\n", ErrorCode::corrupt, "group 48");
  refuses("[[rule]]\ntensors = \"*\"\nscheme = \"int4\"\nmethod = \"awq\"\n", ErrorCode::corrupt, "method \"awq\"");
  refuses("[[rule]]\ntensors = \"*\"\nscheme = \"int8\"\nmethod = \"gptq\"\n", ErrorCode::corrupt, "gptq makes int4");
  refuses("[[rule]]\ntensors = \"*\"\nscheme = \"int4\"\nsymmetric = false\n", ErrorCode::corrupt, "zero points");
  refuses("[[rule]]\nscheme = \"int4\"\n", ErrorCode::corrupt, "\"tensors\" is missing");
  refuses("[[rule]]\ntensors = [1]\nscheme = \"int4\"\n", ErrorCode::corrupt, "no text");
  refuses("[[rule]]\ntensors = \"*\"\n", ErrorCode::corrupt, "\"scheme\" is missing");
  refuses("", ErrorCode::corrupt, "no [[rule]]");
  refuses("rule = [1]\n", ErrorCode::corrupt, "not a table");
  refuses("[[rule]\n", ErrorCode::corrupt, "line 1");
  for (const char* layers : {"1-", "x", "3-1", "1;2", "-1", "1,"}) {
    refuses(std::string("[[rule]]\ntensors = \"*\"\nscheme = \"int8\"\nlayers = \"") + layers + "\"\n",
            ErrorCode::corrupt, "expected numbers and ranges");
  }
}

TEST_CASE("a rule that gets nothing, a matrix without a rule and an int4 embedding are refused") {
  refuses(kRest + kRest, ErrorCode::usage, "the rule in line 4 (\"*\") gets no tensor");
  refuses("[[rule]]\ntensors = \"model.layers.*\"\nscheme = \"int4\"\n", ErrorCode::usage,
          "no rule matches tensor \"model.embed_tokens.weight\"");
  refuses("[[rule]]\ntensors = \"*\"\nscheme = \"int4\"\n", ErrorCode::usage, "makes the embedding int4");
}

TEST_CASE("a pattern or a range that matches nothing is named, alone and in a list of others that do") {
  const auto with = [](const std::string& tensors, const std::string& layers) {
    return "[[rule]]\ntensors = " + tensors + "\nscheme = \"f16\"\n" +
           (layers.empty() ? "" : "layers = \"" + layers + "\"\n") + kRest;
  };
  const std::string typo = "the rule in line 1: \"*.v_porj.weight\" matches no matrix of this model";
  refuses(with(R"("*.v_porj.weight")", ""), ErrorCode::usage, typo);
  refuses(with(R"(["*.q_proj.weight", "*.v_porj.weight"])", ""), ErrorCode::usage, typo);
  refuses(with(R"(["*.q_proj.weight", "*.v_porj.weight"])", "0-1"), ErrorCode::usage, typo);
  // It comes before the matrices that the typo leaves without a rule.
  refuses("[[rule]]\ntensors = [\"*.q_proj.weight\", \"*.v_porj.weight\"]\nscheme = \"f16\"\n", ErrorCode::usage, typo);
  // Vectors stay as they are, so naming them does nothing.
  refuses(with(R"(["*.q_proj.weight", "*.input_layernorm.weight"])", ""), ErrorCode::usage,
          "\"*.input_layernorm.weight\" matches no matrix of this model");
  for (const char* layers : {"99", "0-1, 99", "99, 0-1"}) {
    refuses(with(R"("*.q_proj.weight")", layers), ErrorCode::usage,
            "the rule in line 1: no matrix that it names lies in layer 99 of this model");
  }
  refuses(with(R"("*")", "0-1, 3-4"), ErrorCode::usage, "lies in layers 3-4 of this model");
  refuses(with(R"(["*.q_proj.weight", "lm_head.weight"])", "0-1"), ErrorCode::usage,
          "\"lm_head.weight\" matches no matrix in the rule's layers");
}

TEST_CASE("a pattern counts where an earlier rule takes what it matches") {
  const File file(R"(
[[rule]]
tensors = "*.q_proj.weight"
scheme = "f16"
[[rule]]
tensors = ["*.q_proj.weight", "*.k_proj.weight"]
layers = "0-1, 1"
scheme = "bf16"
[[rule]]
tensors = "*"
scheme = "int8"
)");
  const auto recipe = read_recipe(file.path);
  REQUIRE(recipe);
  const auto choices = apply_recipe(*recipe, tensors(), std::nullopt);
  if (!choices) FAIL(choices.error().message);
}

TEST_CASE("every shipped recipe reads and gives every matrix of every kind of model a choice") {
  const char* folder = std::getenv("SLUICE_RECIPES");
  const char* golden = std::getenv("SLUICE_GOLDEN");
  REQUIRE((folder != nullptr && golden != nullptr));
  std::vector<std::vector<import::SourceTensor>> models = {tensors(1), tensors(80)};
  for (const char* name : {"llama3", "llama-tied", "mistral", "qwen2", "qwen2-large-activations", "qwen3"}) {
    auto checkpoint = import::open_checkpoint(std::string(golden) + "/" + name, {});
    if (!checkpoint) FAIL(checkpoint.error().message);
    models.push_back(std::move(checkpoint->tensors));
  }
  size_t recipes = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    INFO(entry.path().string());
    const auto recipe = read_recipe(entry.path().string());
    REQUIRE(recipe);
    CHECK_FALSE(recipe->description.empty());
    for (const auto& model : models) {
      const auto choices = apply_recipe(*recipe, model, std::nullopt);
      if (!choices) FAIL(choices.error().message);
      for (size_t i = 0; i < model.size(); ++i) CHECK((*choices)[i].has_value() == !model[i].vector);
    }
    ++recipes;
  }
  CHECK(recipes == 7);
}
