// SPDX-License-Identifier: Apache-2.0
// CHECK: an invariant of Sluice itself, active in release builds. Never used on input.
#pragma once

#include <cstdio>
#include <cstdlib>

#define SLUICE_CHECK(condition)                                                              \
  do {                                                                                       \
    if (!(condition)) [[unlikely]] {                                                         \
      std::fprintf(stderr, "sluice: bug at %s:%d: %s\n", __FILE__, __LINE__, #condition);    \
      std::abort();                                                                          \
    }                                                                                        \
  } while (0)
