// SPDX-License-Identifier: Apache-2.0
// How much memory this process may still take without the kernel swapping or killing.
#pragma once

#include <cstdint>

namespace sluice {

// Bytes: MemAvailable of /proc/meminfo, or what the process's cgroup (v2) leaves below its memory.max where that is less.
// Page cache counts as available. UINT64_MAX where neither can be read.
uint64_t available_memory();

}  // namespace sluice
