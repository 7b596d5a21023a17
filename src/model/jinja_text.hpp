// SPDX-License-Identifier: Apache-2.0
// Python's str operations that templates use, on UTF-8. Positions and lengths count code points, as in Python.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace sluice::model::jinja {

// What str.strip() removes: the White_Space property and U+001C to U+001F.
bool is_python_space(uint32_t code_point);

// Byte offset of the first `part`, or npos, in linear time.
size_t find(std::string_view text, std::string_view part);
size_t count_characters(std::string_view text);
// The character at `index`, which must be there.
std::string_view character_at(std::string_view text, size_t index);
std::vector<std::string_view> characters_of(std::string_view text);

enum class Side : uint8_t { left = 1, right = 2, both = 3 };
// Without `chars`, white space is stripped; else every character that is in it.
std::string_view strip(std::string_view text, Side side);
std::string_view strip(std::string_view text, Side side, std::string_view chars);

// str.split(): without a separator at runs of white space. `max_splits` < 0: no limit.
std::vector<std::string_view> split_at_space(std::string_view text, int64_t max_splits);
std::vector<std::string_view> split_at(std::string_view text, std::string_view separator, int64_t max_splits,
                                       bool from_right);

// Replaces up to `count` occurrences (< 0: all). Fails (false) where the result would pass `max_bytes`.
bool replace(std::string_view text, std::string_view from, std::string_view to, int64_t count, size_t max_bytes,
             std::string& out);

std::string to_upper(std::string_view text);
std::string to_lower(std::string_view text);
std::string to_title(std::string_view text);       // every word: first letter up, others down
std::string to_capitalized(std::string_view text); // first character up, others down

// A float as Python's repr prints it: the shortest digits that read back, "1.0", "1e+16".
std::string format_float(double value);

}  // namespace sluice::model::jinja
