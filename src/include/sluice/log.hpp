// SPDX-License-Identifier: Apache-2.0
// Where log lines go. There is no global logger: whoever opens something passes the hook along.
#pragma once

#include <functional>
#include <string_view>

namespace sluice {

enum class LogLevel { info, warning };

// Called with one line, no newline, from any thread; must not call back into Sluice. Empty means silent.
using LogHook = std::function<void(LogLevel, std::string_view)>;

inline void log_info(const LogHook& hook, std::string_view line) {
  if (hook) hook(LogLevel::info, line);
}
inline void log_warning(const LogHook& hook, std::string_view line) {
  if (hook) hook(LogLevel::warning, line);
}

}  // namespace sluice
