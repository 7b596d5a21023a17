// SPDX-License-Identifier: Apache-2.0
// A signal handler has no argument of ours, so what it acts on lies in this file's three statics; everything they do is
// async-signal-safe (lock-free atomics, unlink, access, write, _exit).
#include "interrupt.hpp"

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <string_view>
#include <utility>

namespace sluice::cli {
namespace {

std::atomic<Session*> session_to_cancel{nullptr};
std::atomic<int> interrupts{0};

// What remove_file needs, allocated before.
struct Removal {
  std::string file;
  Kept kept;
};
std::atomic<const Removal*> removal{nullptr};

void cancel_session(int) {
  if (interrupts.fetch_add(1) > 0) _exit(130);
  if (Session* session = session_to_cancel.load()) session->cancel();
}

void say(std::string_view text) { (void)!::write(STDERR_FILENO, text.data(), text.size()); }

void remove_file(int) {
  const Removal* what = removal.load();
  if (what != nullptr) ::unlink(what->file.c_str());
  const bool keeps = what != nullptr && !what->kept.path.empty() && ::access(what->kept.path.c_str(), F_OK) == 0;
  say("\nsluice: interrupted; ");
  say(keeps ? std::string_view(what->kept.told) : "nothing was written");
  say("\n");
  _exit(static_cast<int>(ErrorCode::cancelled));
}

// No SA_RESTART: a read of the terminal must return, so that Ctrl-C ends a chat that waits for its user.
void install(void (*handler)(int)) {
  struct sigaction action {};
  action.sa_handler = handler;
  sigemptyset(&action.sa_mask);
  for (int number : {SIGINT, SIGTERM}) ::sigaction(number, &action, nullptr);
}

}  // namespace

CancelOnInterrupt::CancelOnInterrupt(Session& session) {
  interrupts = 0;
  session_to_cancel = &session;
  install(cancel_session);
}

CancelOnInterrupt::~CancelOnInterrupt() {
  install(SIG_DFL);
  session_to_cancel = nullptr;
}

bool CancelOnInterrupt::interrupted() const { return interrupts.load() > 0; }
void CancelOnInterrupt::clear() { interrupts = 0; }

RemoveOnInterrupt::RemoveOnInterrupt(const std::string& output, Kept kept) {
  // For the process's life: the handler may be running while this object is destroyed.
  static Removal what;
  what = {.file = output + ".tmp-" + std::to_string(::getpid()), .kept = std::move(kept)};
  removal = &what;
  install(remove_file);
}

RemoveOnInterrupt::~RemoveOnInterrupt() {
  install(SIG_DFL);
  removal = nullptr;
}

}  // namespace sluice::cli
