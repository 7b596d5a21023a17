// SPDX-License-Identifier: Apache-2.0
// What GPU and drive say of themselves, from a library and a log page made for it; which files are read behind a token.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <fstream>
#include <map>
#include <span>

#include "catch.hpp"
#include "trace/device_evidence.hpp"
#include "trace/evidence.hpp"

using namespace sluice::trace;

namespace {

std::map<Counter, uint64_t> readings_of(const Track& track) {
  std::array<Record, 64> records;
  const Track::Taken taken = track.take(0, records);
  std::map<Counter, uint64_t> readings;
  for (const Record& record : std::span(records).first(taken.records)) readings[static_cast<Counter>(record.layer)] = record.value;
  return readings;
}

constexpr const char* kBusId = "0000:3B:00.0";   // of fake_nvml.cpp's GPU

const char* fake_library() { return std::getenv("SLUICE_FAKE_NVML"); }

}  // namespace

TEST_CASE("a GPU's clock, heat, power and reasons are read through its management library") {
  REQUIRE(fake_library() != nullptr);
  ::setenv("CUDA_VISIBLE_DEVICES", "3", 1);   // CUDA's numbers are not the library's
  Track track(0, "machine", 64);
  const auto gpu = GpuEvidence::open(track, kBusId, fake_library());
  ::unsetenv("CUDA_VISIBLE_DEVICES");
  REQUIRE(gpu);
  gpu->read();
  const auto readings = readings_of(track);
  CHECK(readings.at(Counter::gpu_clock_mhz) == 1234);
  CHECK(readings.at(Counter::gpu_celsius) == 91);
  CHECK(readings.at(Counter::gpu_milliwatts) == 700000);
  CHECK((readings.at(Counter::gpu_throttle) & kGpuSlowed) != 0);
}

TEST_CASE("without the library, the GPU, or an NVMe drive nothing is read") {
  Track track(0, "machine", 64);
  CHECK_FALSE(GpuEvidence::open(track, kBusId, "libno-such-library.so.1"));
  CHECK_FALSE(GpuEvidence::open(track, kBusId, "libc.so.6"));   // a library without these functions
  CHECK_FALSE(GpuEvidence::open(track, "0000:5E:00.0", fake_library()));   // another vendor's GPU
  CHECK_FALSE(GpuEvidence::open(track, "", fake_library()));               // lavapipe has no place on a bus
  CHECK_FALSE(DriveEvidence::open(track, "/proc/self/status"));
  CHECK_FALSE(DriveEvidence::open(track, "/no/such/file"));
  CHECK(track.written() == 0);
}

TEST_CASE("behind a slow token the pressure on memory is read, however shortly after the last time") {
  Track track(0, "session 0", 4096);
  const auto readings = [&](Counter counter) {
    std::array<Record, 4096> records;
    const Track::Taken taken = track.take(0, records);
    return std::count_if(records.begin(), records.begin() + static_cast<std::ptrdiff_t>(taken.records),
                         [&](const Record& record) { return record.layer == static_cast<uint16_t>(counter); });
  };
  const bool has_pressure = std::ifstream("/proc/pressure/memory").good();
  TokenEvidence evidence(track, "/proc/self/status", false);
  for (int i = 0; i < 20; ++i) evidence.read(1000);
  for (int slow = 0; slow < 5; ++slow) {
    const auto before = readings(Counter::resident_bytes), pressure = readings(Counter::psi_memory_us);
    evidence.read(3000);
    CHECK(readings(Counter::resident_bytes) == before + 1);   // by which the analysis knows that they were read
    CHECK(readings(Counter::psi_memory_us) == pressure + (has_pressure ? 1 : 0));
    for (int i = 0; i < 20; ++i) evidence.read(1000);
  }
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
