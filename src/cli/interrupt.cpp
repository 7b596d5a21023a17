// SPDX-License-Identifier: Apache-2.0
// A signal handler has no argument of ours, so what it acts on lies in this file's three statics; everything they do is
// async-signal-safe (lock-free atomics, unlink, write, _exit).
#include "interrupt.hpp"

#include <signal.h>
#include <unistd.h>

#include <atomic>

namespace sluice::cli {
namespace {

std::atomic<Session*> session_to_cancel{nullptr};
std::atomic<int> interrupts{0};
std::atomic<const char*> file_to_remove{nullptr};

void cancel_session(int) {
  if (interrupts.fetch_add(1) > 0) _exit(130);
  if (Session* session = session_to_cancel.load()) session->cancel();
}

void remove_file(int) {
  if (const char* path = file_to_remove.load()) ::unlink(path);
  constexpr char kLine[] = "\nsluice: interrupted; nothing was written\n";
  (void)!::write(STDERR_FILENO, kLine, sizeof kLine - 1);
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

RemoveOnInterrupt::RemoveOnInterrupt(const std::string& output) {
  // Kept for the process's life: the handler may be running while this object is destroyed.
  static std::string path;
  path = output + ".tmp-" + std::to_string(::getpid());
  file_to_remove = path.c_str();
  install(remove_file);
}

RemoveOnInterrupt::~RemoveOnInterrupt() {
  install(SIG_DFL);
  file_to_remove = nullptr;
}

}  // namespace sluice::cli
