// SPDX-License-Identifier: Apache-2.0
// Flags that several verbs share, and how their values are read.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>

#include "sluice/sluice.hpp"

namespace sluice::cli {

// "512", "64K", "1.5G", "24GiB" -> 512, 65536, ...; K, M, G, T are binary. Nothing for anything else or beyond 64 bits.
std::optional<uint64_t> parse_size(std::string_view text);

// "1,2,3" or "1 2 3" -> ids. Error: usage, naming the part that is not a token id.
Result<std::vector<int32_t>> parse_ids(std::string_view text);

// A flag that takes a size; `assign` gets the bytes.
CLI::Option* add_size(CLI::App& verb, const std::string& names, std::function<void(uint64_t)> assign,
                      const std::string& help);

// A flag that takes one of a few words.
template <class T>
CLI::Option* add_choice(CLI::App& verb, const std::string& names, std::vector<std::pair<std::string, T>> choices,
                        std::function<void(T)> assign, const std::string& help) {
  std::vector<std::string> words;
  for (const auto& choice : choices) words.push_back(choice.first);
  return verb
      .add_option_function<std::string>(
          names,
          [choices = std::move(choices), assign = std::move(assign)](const std::string& word) {
            for (const auto& choice : choices) {
              if (choice.first == word) assign(choice.second);
            }
          },
          help)
      ->check(CLI::IsMember(words))
      ->type_name(CLI::detail::join(words, "|"));
}

// The words of --weights, --embeddings, --lm-head.
std::vector<std::pair<std::string, WeightFormat>> weight_formats();

// --device-memory, --host-memory, --context, --io, --precision, --verify, --backend, --threads, --cpu-activations.
// `options` must live until the line is parsed. `automatic_precision`: where it is given, "auto" is a precision too.
void add_model_flags(CLI::App& verb, ModelOptions& options, bool* automatic_precision = nullptr);

// --temp, --top-k, --top-p, --min-p, --repeat-penalty, --seed.
void add_sampling_flags(CLI::App& verb, Sampling& sampling);

// Opens `path` with a loading bar.
Result<Model> open_model(const std::string& path, ModelOptions options);

// The bytes of a file, or of standard input where `path` is "-". Errors: not_found, io.
Result<std::string> read_text(const std::string& path);
// The same of text. Error besides: corrupt (bytes that are not UTF-8, with their offset).
Result<std::string> read_utf8(const std::string& path);

}  // namespace sluice::cli
