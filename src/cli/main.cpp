// SPDX-License-Identifier: Apache-2.0
// The `sluice` command: picks a verb, runs it, and turns its error into one line and an exit code.
#include <csignal>
#include <cerrno>
#include <exception>
#include <new>
#include <string>

#include "output.hpp"
#include "verb.hpp"
#include "sluice/sluice.hpp"

namespace {

using namespace sluice;

constexpr const char* kFooter = R"(Each verb explains itself: sluice VERB --help

Results go to standard output; progress, log and timing summary go to standard error.
Exit codes: 0 done, 1 doctor found something to remedy, 2 usage, 3 not found, 4 input/output, 5 corrupt file,
6 unsupported, 7 memory budget too small, 8 out of memory, 9 numeric, 10 device, 11 interrupted, 12 bug in Sluice.)";

int exit_code(ErrorCode code) { return static_cast<int>(code); }

int report(const Error& error) {
  // The reader of our output has gone, as in `sluice run ... | head -1`: nobody is left who wants more.
  if (cli::output_closed(error)) return 0;
  cli::note("sluice: " + error.message);
  return exit_code(error.code);
}

// The verb named on the command line, for "see sluice VERB --help".
std::string help_of(const CLI::App& app) {
  for (const CLI::App* verb : app.get_subcommands()) return "sluice " + verb->get_name() + " --help";
  return "sluice --help";
}

int run_main(int argc, char** argv) {
  CLI::App app{"Runs language models that are larger than the memory given to them.", "sluice"};
  cli::Chosen chosen;
  bool show_version = false;
  app.add_flag("--version", show_version, "Print the version");
  app.footer(kFooter);
  app.require_subcommand(0, 1);
  cli::add_import(app, chosen);
  cli::add_quantize(app, chosen);
  cli::add_inspect(app, chosen);
  cli::add_verify(app, chosen);
  cli::add_plan(app, chosen);
  cli::add_run(app, chosen);
  cli::add_chat(app, chosen);
  cli::add_bench(app, chosen);
  cli::add_score(app, chosen);
  cli::add_eval(app, chosen);
  cli::add_tokenize(app, chosen);
  cli::add_detokenize(app, chosen);
  cli::add_doctor(app, chosen);
  cli::add_synth(app, chosen);
  cli::add_trace(app, chosen);

  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    // CLI11 throws out of the verb, so the help wanted is that of the verb that was parsed last.
    for (CLI::App* verb : app.get_subcommands()) {
      Status printed = cli::print(verb->help());
      return printed ? 0 : report(printed.error());
    }
    Status printed = cli::print(app.help());
    return printed ? 0 : report(printed.error());
  } catch (const CLI::ParseError& error) {
    cli::note("sluice: " + std::string(error.what()) + " (see " + help_of(app) + ")");
    return exit_code(ErrorCode::usage);
  }

  if (show_version) {
    Status printed = cli::print(std::string("sluice ") + version() + "\n");
    return printed ? 0 : report(printed.error());
  }
  if (!chosen.action) {
    cli::note(app.help());
    return exit_code(ErrorCode::usage);
  }
  install_sigbus_handler();  // a container that shrinks under --io=mmap becomes a typed error, not a dead process
  Result<int> status = chosen.action();
  return status ? *status : report(status.error());
}

}  // namespace

int main(int argc, char** argv) {
  std::signal(SIGPIPE, SIG_IGN);  // a closed pipe is seen as EPIPE where it is written to
  std::signal(SIGXFSZ, SIG_IGN);  // ... and a file beyond `ulimit -f` as EFBIG
  try {
    return run_main(argc, argv);
  } catch (const std::bad_alloc&) {
    sluice::cli::note("sluice: out of memory; free some, or lower --context, --device-memory or --host-memory");
    return exit_code(ErrorCode::out_of_memory);
  } catch (const std::exception& error) {
    sluice::cli::note(std::string("sluice: internal error: ") + error.what());
    return exit_code(ErrorCode::internal);
  }
}
