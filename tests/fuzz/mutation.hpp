// SPDX-License-Identifier: Apache-2.0
// Seeded mutations of a valid input, for running a libFuzzer-style target as an ordinary test with any compiler.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

namespace sluice::test {

class Mutator {
 public:
  explicit Mutator(uint64_t seed) : random_(seed) {}

  // Changes `bytes` in 1 to 8 places at or behind `begin`; one in 16 cases also cuts or grows them.
  void mutate(std::vector<uint8_t>& bytes, size_t begin) {
    const uint64_t changes = 1 + below(8);
    for (uint64_t i = 0; i < changes && bytes.size() > begin; ++i) change(bytes, begin);
    if (below(16) == 0 && bytes.size() > begin) bytes.resize(begin + below(2 * (bytes.size() - begin)));
  }

  uint64_t below(uint64_t end) { return end == 0 ? 0 : random_() % end; }

 private:
  void change(std::vector<uint8_t>& bytes, size_t begin) {
    const size_t at = begin + below(bytes.size() - begin);
    switch (below(5)) {
      case 0: bytes[at] = static_cast<uint8_t>(bytes[at] ^ (1u << below(8))); break;
      case 1: bytes[at] = static_cast<uint8_t>(random_()); break;
      case 2: number<uint32_t>(bytes, at & ~size_t{3}); break;
      case 3: number<uint64_t>(bytes, at & ~size_t{7}); break;
      case 4: {  // a run from elsewhere
        const size_t from = begin + below(bytes.size() - begin);
        const size_t length = std::min<size_t>(1 + below(32), bytes.size() - std::max(at, from));
        std::memmove(bytes.data() + at, bytes.data() + from, length);
        break;
      }
    }
  }

  // Overwrites or nudges a little-endian number with what breaks arithmetic.
  template <class T>
  void number(std::vector<uint8_t>& bytes, size_t at) {
    if (bytes.size() < sizeof(T) || at > bytes.size() - sizeof(T)) return;
    T value;
    std::memcpy(&value, bytes.data() + at, sizeof(T));
    constexpr T kMax = static_cast<T>(~T{0});
    const std::array<T, 10> choices = {0,          1,        kMax,
                                       kMax / 2,   kMax / 2 + 1,
                                       static_cast<T>(kMax - 4095), static_cast<T>(value + 1),
                                       static_cast<T>(value - 1),   static_cast<T>(value * 2),
                                       static_cast<T>(bytes.size())};
    value = choices[below(choices.size())];
    std::memcpy(bytes.data() + at, &value, sizeof(T));
  }

  std::mt19937_64 random_;
};

}  // namespace sluice::test
