// SPDX-License-Identifier: Apache-2.0
#include <bit>
#include <cmath>

#include "base/half.hpp"
#include "base/units.hpp"
#include "catch.hpp"
#include "sluice/result.hpp"

TEST_CASE("byte quantities take binary suffixes and refuse nonsense") {
  CHECK(sluice::parse_bytes("512") == 512);
  CHECK(sluice::parse_bytes("64K") == 64 * sluice::kKiB);
  CHECK(sluice::parse_bytes("1.5g") == 1536 * sluice::kMiB);
  CHECK(sluice::parse_bytes("24GiB") == 24 * sluice::kGiB);
  for (const char* bad : {"", "x", "-1", "1X", "1e30G", "nan", "12 M", "G"}) {
    CAPTURE(bad);
    CHECK_FALSE(sluice::parse_bytes(bad).has_value());
  }
}

TEST_CASE("every half is the float that its sign, exponent and mantissa say") {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = sluice::float_from_half(static_cast<uint16_t>(bits));
    const int exponent = (bits >> 10) & 0x1f, mantissa = bits & 0x3ff;
    INFO("bits " << bits);
    REQUIRE(std::signbit(value) == (bits >= 0x8000));
    if (exponent == 0x1f) {
      REQUIRE((mantissa == 0 ? std::isinf(value) : std::isnan(value)));
      // A NaN's payload stays, so that a conversion back tells where it came from.
      REQUIRE((std::bit_cast<uint32_t>(value) & 0x7fffffu) == static_cast<uint32_t>(mantissa) << 13);
      continue;
    }
    const double magnitude = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    REQUIRE(std::abs(static_cast<double>(value)) == magnitude);
  }
}

TEST_CASE("every half survives the way through float and back") {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = sluice::float_from_half(half);
    if (std::isnan(value)) continue;
    REQUIRE(sluice::half_from_float(value) == half);
  }
}

TEST_CASE("float to half rounds to nearest even") {
  CHECK(sluice::half_from_float(1.0f + 0x1p-11f) == 0x3c00);           // tie, down to even
  CHECK(sluice::half_from_float(1.0f + 3 * 0x1p-11f) == 0x3c02);       // tie, up to even
  CHECK(sluice::half_from_float(65519.0f) == 0x7bff);
  CHECK(sluice::half_from_float(65520.0f) == 0x7c00);
  CHECK(sluice::half_from_float(-0x1p-25f) == 0x8000);
}

TEST_CASE("a result hands its error up") {
  auto inner = []() -> sluice::Result<int> { return sluice::fail(sluice::ErrorCode::corrupt, "bad"); };
  auto outer = [&]() -> sluice::Status {
    SLUICE_TRY_ASSIGN(value, inner());
    (void)value;
    return {};
  };
  const auto status = outer();
  REQUIRE_FALSE(status.has_value());
  CHECK(status.error().code == sluice::ErrorCode::corrupt);
}
