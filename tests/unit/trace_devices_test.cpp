// SPDX-License-Identifier: Apache-2.0
// What GPU and drive say of themselves, from a library and a log page made for it.
#include <array>
#include <cstdlib>
#include <map>
#include <span>

#include "catch.hpp"
#include "trace/device_evidence.hpp"

using namespace sluice::trace;

namespace {

std::map<Counter, uint64_t> readings_of(const Track& track) {
  std::array<Record, 64> records;
  const Track::Taken taken = track.take(0, records);
  std::map<Counter, uint64_t> readings;
  for (const Record& record : std::span(records).first(taken.records)) readings[static_cast<Counter>(record.layer)] = record.value;
  return readings;
}

const char* fake_library() { return std::getenv("SLUICE_FAKE_NVML"); }

}  // namespace

TEST_CASE("a GPU's clock, heat, power and reasons are read through its management library") {
  REQUIRE(fake_library() != nullptr);
  for (const char* visible : {"", "0,1", "GPU-fake"}) {
    ::setenv("CUDA_VISIBLE_DEVICES", visible, 1);
    Track track(0, "machine", 64);
    const auto gpu = GpuEvidence::open(track, fake_library());
    REQUIRE(gpu);
    gpu->read();
    const auto readings = readings_of(track);
    CHECK(readings.at(Counter::gpu_clock_mhz) == 1234);
    CHECK(readings.at(Counter::gpu_celsius) == 91);
    CHECK(readings.at(Counter::gpu_milliwatts) == 700000);
    CHECK((readings.at(Counter::gpu_throttle) & kGpuSlowed) != 0);
  }
  ::unsetenv("CUDA_VISIBLE_DEVICES");
}

TEST_CASE("without the library, the GPU, or an NVMe drive nothing is read") {
  Track track(0, "machine", 64);
  CHECK_FALSE(GpuEvidence::open(track, "libno-such-library.so.1"));
  CHECK_FALSE(GpuEvidence::open(track, "libc.so.6"));   // a library without these functions
  ::setenv("CUDA_VISIBLE_DEVICES", "3", 1);
  CHECK_FALSE(GpuEvidence::open(track, fake_library()));
  ::unsetenv("CUDA_VISIBLE_DEVICES");
  CHECK_FALSE(DriveEvidence::open(track, "/proc/self/status"));
  CHECK_FALSE(DriveEvidence::open(track, "/no/such/file"));
  CHECK(track.written() == 0);
}

TEST_CASE("a drive's health page says its heat and how often it slowed down") {
  std::array<uint8_t, kHealthPageBytes> page{};
  page[1] = 0x5f, page[2] = 0x01;      // 351 K
  page[192] = 2, page[197] = 1;        // 2 minutes too warm, 256 critical
  page[216] = 5, page[220] = 7;        // light and heavy throttling began so often
  const DriveHealth health = health_of(page);
  CHECK(health.celsius == 78);
  CHECK(health.throttles == 2 + 256 + 5 + 7);
  CHECK(health_of(std::array<uint8_t, kHealthPageBytes>{}).celsius == 0);
}
