// SPDX-License-Identifier: Apache-2.0
// Checkpoints into containers: a GGUF file or a Hugging Face folder, one tensor at a time.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "import/checkpoint.hpp"
#include "sluice/log.hpp"
#include "sluice/result.hpp"
#include "storage/manifest.hpp"

namespace sluice::import {

enum class Weights { keep, f16, int8, int4 };

struct Options {
  std::string source;                 // *.gguf, or a folder with config.json and *.safetensors
  std::string output;                 // the .sluice file; replaced only when everything succeeded
  Weights weights = Weights::int4;
  uint32_t group_elems = 128;         // of int4 and int8 made here: 32, 64 or 128
  std::optional<Weights> embeddings;  // override for the embedding (int4 there means int8: rows are never int4)
  std::optional<Weights> lm_head;
  LogHook log;                        // warnings (a lossy requantization, an ignored key), one line each
  // Source tensors finished, source tensors in all, bytes written so far, name of the one in work.
  std::function<void(uint64_t done, uint64_t total, uint64_t bytes, const std::string& name)> progress;
};

// What it cost to round matrices once more that were quantized already: those of one type that became one scheme.
struct RequantizationLoss {
  SourceType type = SourceType::q4_k;
  storage::Scheme scheme = storage::Scheme::int4;
  uint32_t group_elems = 0;
  uint64_t tensors = 0;
  double relative_error = 0;          // RMS of the change over RMS of the weights
};

struct Report {
  storage::HyperParameters hyper;
  uint64_t tensors = 0;
  uint64_t bytes = 0;                 // of the file
  uint64_t requantized = 0;           // tensors whose values changed beyond their own format's rounding
  std::vector<RequantizationLoss> losses;  // of those
  double seconds = 0;
};

// Memory: one source tensor and its encoded planes, plus the tokenizer. Writes by ContainerWriter: no partial output.
// Errors: not_found, io, corrupt, unsupported, numeric (NaN or infinite weights or scales, naming tensor and index).
Result<Report> import_model(const Options& options);

struct SynthOptions {
  std::string model_toml;             // configs/models/NAME.toml
  std::string output;
  std::optional<uint32_t> layers;     // fewer layers than the model has
  Weights weights = Weights::int4;
  uint32_t group_elems = 128;
  uint64_t seed = 1;
  std::function<void(uint64_t done_bytes, uint64_t total_bytes)> progress;
};

// A container of random weights in the true shapes, for benchmarks; written at disk speed. Activations stay finite: the
// scales follow 1/sqrt(K). It has a byte-level tokenizer of 256 tokens, so that text goes in and out.
Result<Report> synth_model(const SynthOptions& options);

}  // namespace sluice::import
