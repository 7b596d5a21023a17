// SPDX-License-Identifier: Apache-2.0
// Byte quantities: constants, alignment, and the K/M/G notation of the command line (binary, as in llama.cpp and dd).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace sluice {

inline constexpr uint64_t kKiB = 1024;
inline constexpr uint64_t kMiB = 1024 * kKiB;
inline constexpr uint64_t kGiB = 1024 * kMiB;

constexpr uint64_t align_up(uint64_t value, uint64_t alignment) { return (value + alignment - 1) / alignment * alignment; }
constexpr uint64_t align_down(uint64_t value, uint64_t alignment) { return value / alignment * alignment; }
constexpr uint64_t ceil_div(uint64_t value, uint64_t by) { return (value + by - 1) / by; }

// "512", "64K", "1.5G", "24GiB" -> bytes; nothing if it is not such a number or does not fit 64 bits.
std::optional<uint64_t> parse_bytes(std::string_view text);

// 1610612736 -> "1.50 GiB".
std::string format_bytes(uint64_t bytes);

// 0.01234 s -> "12.3 ms".
std::string format_seconds(double seconds);

}  // namespace sluice
