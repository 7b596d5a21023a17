// SPDX-License-Identifier: Apache-2.0
// Files of a checkpoint: their size, and the small ones whole.
#pragma once

#include <cstdint>
#include <string>

#include "base/handles.hpp"
#include "sluice/result.hpp"

namespace sluice::import {

// Size of an open regular file. Errors: io, usage (a folder, a device).
Result<uint64_t> regular_file_bytes(const UniqueFd& fd, const std::string& path);

// A whole text file of at most `most` bytes. Errors: not_found, io, usage (not a file), unsupported (larger).
Result<std::string> read_text_file(const std::string& path, uint64_t most);

}  // namespace sluice::import
