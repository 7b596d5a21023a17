// SPDX-License-Identifier: Apache-2.0
// sluice tokenize, sluice detokenize.
#include <memory>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "flags.hpp"
#include "output.hpp"
#include "verb.hpp"
#include "sluice/sluice.hpp"

namespace sluice::cli {
namespace {

struct Flags {
  std::string path;
  std::string text, ids, file = "-";
  CLI::Option* text_flag = nullptr;
  CLI::Option* ids_flag = nullptr;
  bool no_special = false, bos = false, json = false;
};

Result<int> tokenize(const Flags& flags) {
  SLUICE_TRY_ASSIGN(codec, TextCodec::open(flags.path));
  std::string text = flags.text;
  if (flags.text_flag->count() == 0) {
    SLUICE_TRY_ASSIGN(read, read_text(flags.file));
    text = std::move(read);
  }
  const std::vector<int32_t> ids = codec.encode(text, !flags.no_special, flags.bos);
  if (flags.json) {
    SLUICE_TRY(print(fmt::format("{{\"ids\": [{}]}}\n", fmt::join(ids, ", "))));
  } else {
    SLUICE_TRY(print(fmt::format("{}\n", fmt::join(ids, " "))));
  }
  return 0;
}

Result<int> detokenize(const Flags& flags) {
  SLUICE_TRY_ASSIGN(codec, TextCodec::open(flags.path));
  std::string list = flags.ids;
  if (flags.ids_flag->count() == 0) {
    SLUICE_TRY_ASSIGN(read, read_text(flags.file));
    list = std::move(read);
  }
  SLUICE_TRY_ASSIGN(ids, parse_ids(list));
  const std::string text = codec.decode(ids);
  if (flags.json) SLUICE_TRY(print_json({{"text", text}}));
  else SLUICE_TRY(print(text));
  return 0;
}

}  // namespace

void add_tokenize(CLI::App& app, Chosen& chosen) {
  auto flags = std::make_shared<Flags>();
  CLI::App* verb = app.add_subcommand("tokenize", "Turn text into token ids");
  verb->add_option("model", flags->path, "A .sluice file or a tokenizer.json")->required();
  flags->text_flag = verb->add_option("--text", flags->text, "The text")->type_name("T");
  verb->add_option("--file", flags->file, "A file with the text; default: standard input")
      ->type_name("FILE")->excludes(flags->text_flag);
  verb->add_flag("--no-special", flags->no_special, "Take special tokens in the text as plain text");
  verb->add_flag("--bos", flags->bos, "Put begin-of-text first where the model asks for it");
  verb->add_flag("--json", flags->json, "Print {\"ids\": [...]}");
  verb->footer("Example:\n  sluice tokenize models/smollm2-135m.sluice --text \"The capital of France is\" --json");
  verb->callback([flags, &chosen] { chosen.action = [flags] { return tokenize(*flags); }; });
}

void add_detokenize(CLI::App& app, Chosen& chosen) {
  auto flags = std::make_shared<Flags>();
  CLI::App* verb = app.add_subcommand("detokenize", "Turn token ids into text");
  verb->add_option("model", flags->path, "A .sluice file or a tokenizer.json")->required();
  flags->ids_flag = verb->add_option("--ids", flags->ids, "The ids: 1,2,3")->type_name("IDS");
  verb->add_option("--file", flags->file, "A file with the ids; default: standard input")
      ->type_name("FILE")->excludes(flags->ids_flag);
  verb->add_flag("--json", flags->json, "Print {\"text\": ...}");
  verb->footer("Example:\n  sluice detokenize models/smollm2-135m.sluice --ids 504,3575,282,4649,314");
  verb->callback([flags, &chosen] { chosen.action = [flags] { return detokenize(*flags); }; });
}

}  // namespace sluice::cli
