// SPDX-License-Identifier: Apache-2.0
#include "base/units.hpp"

#include <fmt/format.h>

#include <cctype>
#include <charconv>
#include <cmath>

namespace sluice {

std::optional<uint64_t> parse_bytes(std::string_view text) {
  double number = 0;
  const auto [end, errc] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (errc != std::errc{} || !std::isfinite(number) || number < 0) return std::nullopt;

  std::string suffix;
  for (const char* c = end; c != text.data() + text.size(); ++c) {
    suffix += static_cast<char>(std::toupper(static_cast<unsigned char>(*c)));
  }
  if (suffix.size() > 1 && suffix.ends_with('B')) suffix.pop_back();
  if (suffix.size() > 1 && suffix.ends_with('I')) suffix.pop_back();

  double scale = 0;
  if (suffix.empty() || suffix == "B") scale = 1;
  else if (suffix == "K") scale = static_cast<double>(kKiB);
  else if (suffix == "M") scale = static_cast<double>(kMiB);
  else if (suffix == "G") scale = static_cast<double>(kGiB);
  else if (suffix == "T") scale = static_cast<double>(kGiB) * 1024;
  else return std::nullopt;

  const double bytes = number * scale;
  if (bytes >= 9.2e18) return std::nullopt;
  return static_cast<uint64_t>(bytes);
}

std::string format_bytes(uint64_t bytes) {
  if (bytes < kKiB) return fmt::format("{} B", bytes);
  if (bytes < kMiB) return fmt::format("{:.1f} KiB", static_cast<double>(bytes) / kKiB);
  if (bytes < kGiB) return fmt::format("{:.1f} MiB", static_cast<double>(bytes) / kMiB);
  return fmt::format("{:.2f} GiB", static_cast<double>(bytes) / kGiB);
}

std::string format_seconds(double seconds) {
  if (seconds < 1e-6) return fmt::format("{:.0f} ns", seconds * 1e9);
  if (seconds < 1e-3) return fmt::format("{:.1f} us", seconds * 1e6);
  if (seconds < 1) return fmt::format("{:.1f} ms", seconds * 1e3);
  return fmt::format("{:.2f} s", seconds);
}

}  // namespace sluice
