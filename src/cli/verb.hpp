// SPDX-License-Identifier: Apache-2.0
// The verbs of the command line: one file each, one function each that declares its flags.
#pragma once

#include <functional>

#include <CLI/CLI.hpp>

#include "sluice/result.hpp"

namespace sluice::cli {

// What the parsed command line asks for: the verb's work. Its value is the exit status, its error's code is the exit
// status where it fails.
struct Chosen {
  std::function<Result<int>()> action;
};

void add_import(CLI::App& app, Chosen& chosen);
void add_inspect(CLI::App& app, Chosen& chosen);
void add_verify(CLI::App& app, Chosen& chosen);
void add_plan(CLI::App& app, Chosen& chosen);
void add_run(CLI::App& app, Chosen& chosen);
void add_chat(CLI::App& app, Chosen& chosen);
void add_bench(CLI::App& app, Chosen& chosen);
void add_score(CLI::App& app, Chosen& chosen);
void add_tokenize(CLI::App& app, Chosen& chosen);
void add_detokenize(CLI::App& app, Chosen& chosen);
void add_doctor(CLI::App& app, Chosen& chosen);
void add_synth(CLI::App& app, Chosen& chosen);
void add_trace(CLI::App& app, Chosen& chosen);
void add_quantize(CLI::App& app, Chosen& chosen);
void add_eval(CLI::App& app, Chosen& chosen);

}  // namespace sluice::cli
