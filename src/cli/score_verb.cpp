// SPDX-License-Identifier: Apache-2.0
// sluice score: how likely a model finds a text.
#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "flags.hpp"
#include "interrupt.hpp"
#include "npy.hpp"
#include "output.hpp"
#include "verb.hpp"
#include "sluice/sluice.hpp"

namespace sluice::cli {
namespace {

struct Flags {
  std::string path;
  std::string ids, text, text_file, logits;
  CLI::Option* ids_flag = nullptr;
  CLI::Option* text_flag = nullptr;
  ModelOptions options;
  bool no_bos = false;
  bool json = true;  // there is no other form
};

Result<std::vector<int32_t>> tokens_to_score(const Flags& flags) {
  if (flags.ids_flag->count() > 0) return parse_ids(flags.ids);
  std::string text = flags.text;
  if (flags.text_flag->count() == 0) {
    SLUICE_TRY_ASSIGN(read, read_text(flags.text_file.empty() ? "-" : flags.text_file));
    text = std::move(read);
  }
  SLUICE_TRY_ASSIGN(codec, TextCodec::open(flags.path));
  return codec.encode(text, true, !flags.no_bos);
}

// log of the softmax at `token`, in double: with a vocabulary of 128k, sums in float lose the fourth digit.
double log_probability(std::span<const float> logits, int32_t token) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (float logit : logits) sum += std::exp(static_cast<double>(logit) - largest);
  return static_cast<double>(logits[static_cast<size_t>(token)]) - largest - std::log(sum);
}

Result<int> score(const Flags& flags) {
  SLUICE_TRY_ASSIGN(tokens, tokens_to_score(flags));
  if (tokens.size() < 2) {
    return fail(ErrorCode::usage, fmt::format("a text of {} tokens has nothing to score; it takes 2", tokens.size()));
  }
  ModelOptions options = flags.options;
  if (options.context == 0) options.context = static_cast<uint32_t>(tokens.size());
  // Logits of every position are wanted. Where memory is not the point, take more of them out of a pass.
  if (!options.device_memory_bytes) options.max_logit_rows = static_cast<uint32_t>(std::min<size_t>(tokens.size(), 64));
  if (tokens.size() > options.context) {
    return fail(ErrorCode::usage, fmt::format("the text has {} tokens and --context is {}; raise it, or score less",
                                              tokens.size(), options.context));
  }
  SLUICE_TRY_ASSIGN(model, open_model(flags.path, std::move(options)));
  SLUICE_TRY_ASSIGN(session, model.new_session());
  SLUICE_TRY(session.append(tokens));
  std::optional<NpyWriter> npy;
  if (!flags.logits.empty()) {
    SLUICE_TRY_ASSIGN(writer, NpyWriter::create(flags.logits, tokens.size(), model.info().vocab));
    npy.emplace(std::move(writer));
  }

  CancelOnInterrupt interrupt(session);
  Progress progress("scoring", Progress::Unit::items);
  double sum_logprob = 0;
  uint64_t positions = 0;
  Status written;
  SLUICE_TRY(session.score([&](uint32_t position, std::span<const float> logits) {
    if (position + 1 < tokens.size()) sum_logprob += log_probability(logits, tokens[position + 1]);
    if (npy && written) written = npy->write_row(position, logits);
    progress.update(++positions, tokens.size());
  }));
  SLUICE_TRY(std::move(written));
  if (interrupt.interrupted()) return fail(ErrorCode::cancelled, "interrupted before the text was scored");
  if (positions != tokens.size()) {
    return fail(ErrorCode::internal, fmt::format("{} of {} positions were scored", positions, tokens.size()));
  }
  if (npy) SLUICE_TRY(npy->finish());
  SLUICE_TRY(print_json({{"tokens", tokens.size()},
                         {"sum_logprob", sum_logprob},
                         {"perplexity", std::exp(-sum_logprob / static_cast<double>(tokens.size() - 1))}}));
  return 0;
}

}  // namespace

void add_score(CLI::App& app, Chosen& chosen) {
  auto flags = std::make_shared<Flags>();
  CLI::App* verb = app.add_subcommand("score", "Compute the log-probability and perplexity of a text, as JSON");
  verb->add_option("file", flags->path, "The .sluice file")->required();
  flags->ids_flag = verb->add_option("--ids", flags->ids, "Token ids: 1,2,3")->type_name("IDS");
  flags->text_flag = verb->add_option("--text", flags->text, "The text")->type_name("T")->excludes(flags->ids_flag);
  verb->add_option("--text-file", flags->text_file, "A file with the text; default: standard input")
      ->type_name("FILE")->excludes(flags->text_flag)->excludes(flags->ids_flag);
  verb->add_option("--logits", flags->logits, "Write the logits, float32 [tokens, vocabulary], as a NumPy file")
      ->type_name("OUT.npy");
  verb->add_flag("--no-bos", flags->no_bos, "Do not put begin-of-text before the text");
  verb->add_flag("--json", flags->json, "Accepted for symmetry: the output is always JSON");
  add_model_flags(*verb, flags->options);
  verb->footer("sum_logprob is over tokens 2 to n, each given those before it.\n"
               "perplexity = exp(-sum_logprob / (n - 1)).\n"
               "The context defaults to the number of tokens.\n"
               "Example:\n  sluice score models/smollm2-135m.sluice --text \"The sky is blue.\" --logits logits.npy");
  verb->callback([flags, &chosen] { chosen.action = [flags] { return score(*flags); }; });
}

}  // namespace sluice::cli
