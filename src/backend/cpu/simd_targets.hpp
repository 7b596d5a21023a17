// SPDX-License-Identifier: Apache-2.0
// Which Highway targets the kernels are compiled for; comes before every header of Highway, in every kernel file alike.
#pragma once

// With AVX-512 VNNI, which Highway 1.0.3 compiles only on request.
#define HWY_WANT_AVX3_DL
// SSSE3 without SSE4.1 is a CPU of 2006. Vectors of unknown length (SVE) cannot be elements of arrays, which the
// kernels' accumulators are; such CPUs run the NEON code.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SVE | HWY_SVE_256 | HWY_SVE2 | HWY_SVE2_128 | HWY_RVV)
