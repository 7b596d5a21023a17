// SPDX-License-Identifier: Apache-2.0
#include "import/text.hpp"

#include <fmt/format.h>

namespace sluice::import {

std::string in_quotes(std::string_view text) {
  constexpr size_t kLongest = 100;
  std::string out = "\"";
  for (const char c : text.substr(0, kLongest)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte >= 0x7f || c == '"') {
      out += fmt::format("\\x{:02x}", byte);
    } else {
      out += c;
    }
  }
  if (text.size() > kLongest) out += "...";
  return out + "\"";
}

}  // namespace sluice::import
