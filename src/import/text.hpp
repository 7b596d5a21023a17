// SPDX-License-Identifier: Apache-2.0
// Names out of files, made fit for an error message.
#pragma once

#include <string>
#include <string_view>

namespace sluice::import {

// The text in double quotes, cut at 100 bytes, control characters and quotes as \xNN: a damaged file must not reach the
// terminal raw.
std::string in_quotes(std::string_view text);

}  // namespace sluice::import
