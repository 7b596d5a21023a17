// SPDX-License-Identifier: Apache-2.0
// sluice run: one prompt, one answer.
#include <unistd.h>

#include <memory>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "flags.hpp"
#include "interrupt.hpp"
#include "output.hpp"
#include "timing_report.hpp"
#include "trace_summary.hpp"
#include "verb.hpp"
#include "sluice/sluice.hpp"

namespace sluice::cli {
namespace {

struct Flags {
  std::string path;
  std::string prompt, prompt_file, ids, system;
  CLI::Option* prompt_flag = nullptr;
  CLI::Option* ids_flag = nullptr;
  ModelOptions options;
  GenerateOptions generate;
  std::string trace;
  std::string precision_rules;
  bool automatic_precision = false;
  bool chat = false, json = false, quiet = false;
};

const char* reason_text(StopReason reason) {
  switch (reason) {
    case StopReason::end_of_text: return "end of text";
    case StopReason::max_tokens: return "token limit";
    case StopReason::stop_text: return "stop text";
    case StopReason::context_full: return "context full";
    case StopReason::cancelled: return "interrupted";
  }
  return "unknown";
}

// From -p, --prompt-file or standard input. The newline that ends a file is the file's, not the prompt's.
Result<std::string> prompt_text(const Flags& flags) {
  if (flags.prompt_flag->count() > 0) return flags.prompt;
  const std::string path = flags.prompt_file.empty() ? "-" : flags.prompt_file;
  if (path == "-" && ::isatty(STDIN_FILENO) == 1) note("reading the prompt from standard input; Ctrl-D ends it");
  SLUICE_TRY_ASSIGN(text, read_text(path));
  if (text.ends_with('\n')) text.pop_back();
  return text;
}

Result<std::vector<int32_t>> prompt_tokens(const Flags& flags, const Model& model, const std::string& text) {
  if (!model.info().has_tokenizer) {
    return fail(ErrorCode::unsupported,
                fmt::format("{} has no tokenizer, so it cannot read text; give token ids with --ids", flags.path));
  }
  if (!flags.chat) return model.tokenize(text);
  std::vector<ChatMessage> messages;
  if (!flags.system.empty()) messages.push_back({"system", flags.system});
  messages.push_back({"user", text});
  SLUICE_TRY_ASSIGN(rendered, model.render_chat(messages));
  return model.tokenize(rendered, true, false);  // the template writes begin-of-text itself
}

// What --precision auto comes to.
Result<PrecisionChoice> choose_precision(const Flags& flags, const std::string& prompt) {
  if (flags.ids_flag->count() > 0) {
    return fail(ErrorCode::usage, "--precision auto reads the prompt's words, and ids have none; give int4 or fine");
  }
  SLUICE_TRY_ASSIGN(rules, PrecisionRules::open(flags.precision_rules));
  return rules.choose(prompt);
}

std::string precision_text(const PrecisionChoice& choice, bool has_residuals) {
  const char* name = choice.precision == Precision::fine ? "fine" : "int4";
  return fmt::format("precision: {}, since {}{}", name, choice.why,
                     has_residuals ? "" : "; the file has no residuals, so both are the same");
}

Result<int> run(const Flags& flags) {
  // Everything that can be wrong with the prompt by itself is said before the model is opened.
  const bool given_as_ids = flags.ids_flag->count() > 0;
  std::string text;
  if (!given_as_ids) {
    SLUICE_TRY_ASSIGN(read, prompt_text(flags));
    text = std::move(read);
  }
  SLUICE_TRY_ASSIGN(tokens, parse_ids(flags.ids));
  ModelOptions options = flags.options;
  options.log = log_to_stderr(flags.quiet);
  PrecisionChoice precision;
  if (flags.automatic_precision) {
    SLUICE_TRY_ASSIGN(choice, choose_precision(flags, text));
    precision = std::move(choice);
    options.precision = precision.precision;
  }
  SLUICE_TRY_ASSIGN(model, open_model(flags.path, std::move(options)));
  if (!given_as_ids) {
    SLUICE_TRY_ASSIGN(encoded, prompt_tokens(flags, model, text));
    tokens = std::move(encoded);
  }
  if (tokens.empty()) {
    return fail(ErrorCode::usage, "the prompt is empty; give one with -p, --prompt-file or on standard input");
  }
  SLUICE_TRY_ASSIGN(session, model.new_session());
  SLUICE_TRY(session.append(tokens));

  if (!flags.trace.empty())
    SLUICE_TRY(model.start_trace(flags.trace, {.command = "run", .prompt = tokens, .generate = flags.generate}));
  CancelOnInterrupt interrupt(session);
  std::string answer;
  std::vector<int32_t> ids;
  Status written;
  Result<StopReason> stopped = session.generate(flags.generate, [&](const Token& token) {
    if (flags.json) {
      answer += token.text;
      ids.push_back(token.id);
      return true;
    }
    if (!token.text.empty()) written = print(token.text);
    if (token.text.size() > 0) answer.assign(1, token.text.back());
    return written.has_value();
  });
  Result<std::string> trace_lines = std::string();
  if (!flags.trace.empty()) trace_lines = finish_trace(model, flags.trace);
  // A terminal's prompt belongs on a line of its own; a file or pipe gets the text and nothing else.
  if (!flags.json && written && ::isatty(STDOUT_FILENO) == 1 && !answer.ends_with('\n')) written = print("\n");
  if (!flags.quiet) {
    note("");
    if (stopped && written) note(fmt::format("stopped: {}", reason_text(*stopped)));
    if (flags.automatic_precision) note(precision_text(precision, model.info().has_residuals));
    note(timing_summary(model.info(), session.timings()));
    if (trace_lines && !trace_lines->empty()) note("\n" + *trace_lines);
  }
  // The answer is there: a disk that became full on the way ends the trace and not the run.
  if (!trace_lines) note("warning: the trace is not whole: " + trace_lines.error().message);
  SLUICE_TRY(std::move(written));
  SLUICE_TRY_ASSIGN(reason, std::move(stopped));
  if (flags.json) {
    nlohmann::json json = {{"prompt_ids", tokens},
                           {"ids", ids},
                           {"text", answer},
                           {"stopped", reason_text(reason)},
                           {"timings", timing_json(model.info(), session.timings())}};
    if (flags.automatic_precision) {
      json["precision"] = {{"chosen", precision.precision == Precision::fine ? "fine" : "int4"},
                           {"rule", precision.rule},
                           {"found", precision.found},
                           {"why", precision.why}};
    }
    SLUICE_TRY(print_json(json));
  }
  return reason == StopReason::cancelled ? static_cast<int>(ErrorCode::cancelled) : 0;
}

}  // namespace

void add_run(CLI::App& app, Chosen& chosen) {
  auto flags = std::make_shared<Flags>();
  CLI::App* verb = app.add_subcommand("run", "Continue a prompt, or answer it with --chat");
  verb->add_option("file", flags->path, "The .sluice file")->required();
  flags->prompt_flag = verb->add_option("-p,--prompt", flags->prompt, "The prompt")->type_name("TEXT");
  CLI::Option* file = verb->add_option("--prompt-file", flags->prompt_file,
                                       "A file with the prompt; default: standard input")
                          ->type_name("FILE")->excludes(flags->prompt_flag);
  flags->ids_flag = verb->add_option("--ids", flags->ids, "The prompt as token ids: 1,2,3")
                        ->type_name("IDS")->excludes(flags->prompt_flag)->excludes(file);
  verb->add_flag("--chat", flags->chat, "Put the prompt through the model's chat template")->excludes(flags->ids_flag);
  verb->add_option("--system", flags->system, "System message, with --chat")->type_name("TEXT");
  verb->add_option("-n,--tokens", flags->generate.max_tokens, "Tokens to generate at most (default 128)")
      ->check(CLI::Range(1, 1 << 30))->type_name("N");
  verb->add_option("--stop", flags->generate.stop, "A text that ends the answer; may be repeated")
      ->type_name("TEXT")->expected(1)->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  verb->add_flag("--ignore-eos", flags->generate.ignore_eos, "Go on past the end of text");
  verb->add_flag("-q,--quiet", flags->quiet, "No log and no timing summary");
  verb->add_flag("--json", flags->json, "Print ids, text and timings as JSON instead of streaming the text");
  verb->add_option("--trace", flags->trace, "Write where every token's time goes to FILE, for `sluice trace`")
      ->type_name("FILE");
  verb->add_option("--inject", flags->options.inject,
                   "A fault made on purpose, to see whether the trace shows it: read:period=16,ms=30; may be repeated")
      ->type_name("KIND:...")->expected(1)->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  add_sampling_flags(*verb, flags->generate.sampling);
  add_model_flags(*verb, flags->options, &flags->automatic_precision);
  verb->add_option("--precision-rules", flags->precision_rules,
                   "Rules of --precision auto (default: those of configs/precision/default.toml)")
      ->type_name("FILE.toml")->group("Machine");
  verb->footer("Example:\n  sluice run models/smollm2-135m.sluice --chat -p \"Why is the sky blue?\" -n 100 "
               "--device-memory 48M --context 512");
  verb->callback([flags, &chosen] { chosen.action = [flags] { return run(*flags); }; });
}

}  // namespace sluice::cli
