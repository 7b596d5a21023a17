// SPDX-License-Identifier: Apache-2.0
// sluice chat: a conversation whose KV cache is kept from turn to turn.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <memory>
#include <optional>

#include <fmt/format.h>

#include "flags.hpp"
#include "interrupt.hpp"
#include "output.hpp"
#include "timing_report.hpp"
#include "verb.hpp"
#include "sluice/sluice.hpp"

namespace sluice::cli {
namespace {

struct Flags {
  std::string path;
  std::string system;
  ModelOptions options;
  GenerateOptions generate;
  bool quiet = false;
};

// Lines of standard input. Ctrl-C ends the wait, which std::getline would not let it do.
class LineReader {
 public:
  // Nothing at the end of input, or when a signal arrived.
  std::optional<std::string> next() {
    while (true) {
      const size_t newline = pending_.find('\n');
      if (newline != std::string::npos) {
        std::string line = pending_.substr(0, newline);
        pending_.erase(0, newline + 1);
        return line;
      }
      char buffer[4096];
      const ssize_t got = ::read(STDIN_FILENO, buffer, sizeof buffer);
      if (got > 0) {
        pending_.append(buffer, static_cast<size_t>(got));
        continue;
      }
      if (pending_.empty()) return std::nullopt;
      return std::exchange(pending_, {});
    }
  }

 private:
  std::string pending_;
};

// Makes the session hold exactly `tokens`: keeps what they have in common with its past, so that only the new turn goes
// through the model. (A template may rewrite earlier turns, as those that drop old reasoning do: then more of it does.)
Status continue_with(Session& session, std::span<const int32_t> tokens) {
  const std::span<const int32_t> past = session.tokens();
  size_t common = 0;
  while (common < past.size() && common < tokens.size() && past[common] == tokens[common]) ++common;
  if (common == tokens.size() && common > 0) --common;  // something must go through the model to get logits
  SLUICE_TRY(session.truncate(static_cast<uint32_t>(common)));
  return session.append(tokens.subspan(common));
}

Result<int> chat(const Flags& flags) {
  ModelOptions options = flags.options;
  options.log = log_to_stderr(flags.quiet);
  SLUICE_TRY_ASSIGN(model, open_model(flags.path, std::move(options)));
  if (!model.info().has_tokenizer || !model.info().has_chat_template) {
    return fail(ErrorCode::unsupported,
                fmt::format("{} has no chat template; `sluice run` continues a plain text", flags.path));
  }
  SLUICE_TRY_ASSIGN(session, model.new_session());
  const bool terminal = ::isatty(STDIN_FILENO) == 1;
  if (terminal) note("/reset starts anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer");

  std::vector<ChatMessage> messages;
  if (!flags.system.empty()) messages.push_back({"system", flags.system});
  const size_t opening = messages.size();
  CancelOnInterrupt interrupt(session);
  LineReader lines;
  Status outcome;
  while (outcome) {
    if (terminal && ::write(STDERR_FILENO, "> ", 2) < 0) break;
    std::optional<std::string> line = lines.next();
    if (!line || interrupt.interrupted() || *line == "/exit") break;
    if (*line == "/reset") {
      messages.resize(opening);
      continue;
    }
    if (line->find_first_not_of(" \t\r") == std::string::npos) continue;
    messages.push_back({"user", std::move(*line)});
    Result<std::string> rendered = model.render_chat(messages);
    if (!rendered) return fail(std::move(rendered.error()));
    outcome = continue_with(session, model.tokenize(*rendered, true, false));
    if (!outcome) break;

    std::string answer;
    Status written;
    Result<StopReason> stopped = session.generate(flags.generate, [&](const Token& token) {
      answer += token.text;
      if (!token.text.empty()) written = print(token.text);
      return written.has_value();
    });
    if (written) written = print("\n");
    if (!written) outcome = std::move(written);
    else if (!stopped) outcome = fail(std::move(stopped.error()));
    else if (*stopped == StopReason::context_full) note("the context is full; /reset starts anew");
    messages.push_back({"assistant", std::move(answer)});
    interrupt.clear();
  }
  if (!flags.quiet) {
    note("");
    note(timing_summary(model.info(), session.timings()));
  }
  SLUICE_TRY(std::move(outcome));
  return 0;
}

}  // namespace

void add_chat(CLI::App& app, Chosen& chosen) {
  auto flags = std::make_shared<Flags>();
  flags->generate.max_tokens = 1024;
  CLI::App* verb = app.add_subcommand("chat", "Talk with a model; one line of input is one turn");
  verb->add_option("file", flags->path, "The .sluice file")->required();
  verb->add_option("--system", flags->system, "System message")->type_name("TEXT");
  verb->add_option("-n,--tokens", flags->generate.max_tokens, "Tokens of an answer at most (default 1024)")
      ->check(CLI::Range(1, 1 << 30))->type_name("N");
  verb->add_option("--stop", flags->generate.stop, "A text that ends an answer; may be repeated")
      ->type_name("TEXT")->expected(1)->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  verb->add_flag("-q,--quiet", flags->quiet, "No log and no timing summary");
  add_sampling_flags(*verb, flags->generate.sampling);
  add_model_flags(*verb, flags->options);
  verb->footer("Example:\n  sluice chat models/smollm2-135m.sluice --system \"You answer in one sentence.\"");
  verb->callback([flags, &chosen] { chosen.action = [flags] { return chat(*flags); }; });
}

}  // namespace sluice::cli
