// SPDX-License-Identifier: Apache-2.0
// Ctrl-C and SIGTERM.
#pragma once

#include <string>

#include "sluice/sluice.hpp"

namespace sluice::cli {

// While it lives, the first Ctrl-C or SIGTERM cancels `session`, which then ends its generation in an orderly way; a
// second one before clear() ends the process at once with status 130. One at a time; `session` must stay where it is.
class CancelOnInterrupt {
 public:
  explicit CancelOnInterrupt(Session& session);
  ~CancelOnInterrupt();
  CancelOnInterrupt(const CancelOnInterrupt&) = delete;
  CancelOnInterrupt& operator=(const CancelOnInterrupt&) = delete;

  bool interrupted() const;
  void clear();
};

// What an interruption leaves on purpose: `told` is said of it where `path` is there.
struct Kept {
  std::string path, told;
};

// While it lives, Ctrl-C and SIGTERM remove the temporary file that a container is written to ("OUTPUT.tmp-PID"), say
// what is left (nothing, but for `kept`) and end the process with the status of `cancelled`. Import, quantize and synth
// have no other state to put in order. One at a time.
class RemoveOnInterrupt {
 public:
  explicit RemoveOnInterrupt(const std::string& output, Kept kept = {});
  ~RemoveOnInterrupt();
  RemoveOnInterrupt(const RemoveOnInterrupt&) = delete;
  RemoveOnInterrupt& operator=(const RemoveOnInterrupt&) = delete;
};

}  // namespace sluice::cli
