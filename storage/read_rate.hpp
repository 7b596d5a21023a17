// SPDX-License-Identifier: Apache-2.0
// How fast a drive delivers a file: the ceiling that streaming is compared with.
#pragma once

#include <cstdint>
#include <string>

#include "sluice/result.hpp"
#include "storage/read_queue.hpp"

namespace sluice::storage {

// Reads the first `bytes` of `path` (all of it if it is shorter) in order, O_DIRECT, and returns bytes per second.
// `mode`: auto, uring or pread; `depth` reads of `block` bytes (a multiple of 4096, at most 1 MiB) are in flight.
// Takes depth * block bytes of memory while it runs. Any thread.
// Errors: those of ReadQueue; unsupported where the file system does not take O_DIRECT (what one would measure is the
// page cache); usage for a file or block under 4096 bytes.
Result<double> measure_read_rate(const std::string& path, uint64_t bytes, IoMode mode, uint32_t depth, uint32_t block);

}  // namespace sluice::storage
