// SPDX-License-Identifier: Apache-2.0
// Not a test: the time of INT4 products on a Vulkan device, by its own clock, beside what its memory gives to a kernel.
//   kernel_vulkan_bench [--small]      shapes of a 70B model; --small: of SmolLM2, for software drivers
// Weights rotate through copies of 256 MiB or more together, so that no cache holds them. One line a shape and number
// of rows: the median, bytes of weights a second, and their share of the memory's rate; without matrix instructions
// too, where the device has them.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "backend/vulkan/devices.hpp"
#include "backend/vulkan/kernels.hpp"
#include "backend/vulkan/queue.hpp"
#include "base/check.hpp"
#include "base/units.hpp"

namespace {

using namespace sluice;
using namespace sluice::backend::vulkan;

constexpr uint64_t kColdBytes = 256 * kMiB;
constexpr int kRuns = 21;

void must(VkResult code) { SLUICE_CHECK(code == VK_SUCCESS); }

struct Problem {
  uint32_t outputs, columns;
  uint64_t value_bytes() const { return uint64_t{outputs} / 16 * (columns / 64) * 512; }
  uint32_t groups() const { return static_cast<uint32_t>(ceil_div(columns, 128)); }
  uint64_t scale_bytes() const { return uint64_t{outputs} * groups() * 2; }
  uint64_t bytes() const { return value_bytes() + scale_bytes(); }
};

// Milliseconds of each run, fastest first. The half form of X is made in the run where it is used.
std::vector<double> time_runs(Device& device, Queue& queue, Kernels& kernels, const Problem& p, uint32_t rows) {
  const uint64_t copies = std::max<uint64_t>(1, ceil_div(kColdBytes, p.bytes()));
  const uint64_t x_bytes = uint64_t{rows} * x_stride(p.columns) * 4;
  const uint64_t half_at = align_up(x_bytes, 256), scale_at = half_at + align_up(x_half_bytes(rows, p.columns), 256);
  const uint64_t out_at = scale_at + align_up(x_scale_bytes(rows, p.columns), 256);
  auto weights = device.create_buffer(copies * p.bytes(), MemoryKind::device, "weights");
  auto rest = device.create_buffer(out_at + uint64_t{rows} * p.outputs * 4, MemoryKind::device, "activations");
  SLUICE_CHECK(weights && rest);
  VkQueryPool queries = VK_NULL_HANDLE;
  const VkQueryPoolCreateInfo info{.sType = VK_STRUCTURE_TYPE_QUERY_POOL_CREATE_INFO, .queryType = VK_QUERY_TYPE_TIMESTAMP,
                                   .queryCount = 2 * kRuns};
  must(device.vk.vkCreateQueryPool(device.handle(), &info, nullptr, &queries));
  VkCommandBuffer commands = VK_NULL_HANDLE;
  must(queue.allocate(commands));
  must(queue.begin(commands, true));
  device.vk.vkCmdResetQueryPool(commands, queries, 0, 2 * kRuns);
  device.vk.vkCmdFillBuffer(commands, weights->handle, 0, VK_WHOLE_SIZE, 0x12345678);   // scales of 0.0007
  device.vk.vkCmdFillBuffer(commands, rest->handle, 0, VK_WHOLE_SIZE, 0x3f800000);      // ones
  for (int run = 0; run < kRuns; ++run) {
    const uint64_t at = weights->address + static_cast<uint64_t>(run) % copies * p.bytes();
    full_barrier(device.vk, commands);
    device.vk.vkCmdWriteTimestamp(commands, VK_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT, queries, 2 * run);
    shaders::MatvecArguments args{.values = at, .scales = at + p.value_bytes(), .x = rest->address,
                                  .out_rows = rest->address + out_at, .outputs = p.outputs, .columns = p.columns,
                                  .groups = p.groups(), .group_columns = 128, .rows = rows, .scale = 1};
    if (kernels.uses_matrices()) {
      args.x_half = rest->address + half_at;
      args.x_scale = rest->address + scale_at;
      must(kernels.halve_x(commands, {.x = args.x, .x_half = args.x_half, .x_scale = args.x_scale,
                                      .blocks = x_stride(p.columns) / 64}, rows));
      full_barrier(device.vk, commands);
    }
    must(kernels.matvec(commands, WeightFormat::int4, Offsets::none, args));
    device.vk.vkCmdWriteTimestamp(commands, VK_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT, queries, 2 * run + 1);
  }
  must(queue.end(commands));
  must(queue.submit(commands, {}));
  must(queue.wait(queue.submitted()));
  std::vector<uint64_t> stamps(2 * kRuns);
  must(device.vk.vkGetQueryPoolResults(device.handle(), queries, 0, 2 * kRuns, stamps.size() * 8, stamps.data(), 8,
                                       VK_QUERY_RESULT_64_BIT | VK_QUERY_RESULT_WAIT_BIT));
  std::vector<double> times;
  for (int run = 1; run < kRuns; ++run) {   // the first one loads the shader
    times.push_back(static_cast<double>(stamps[2 * run + 1] - stamps[2 * run]) * double{device.limits().timestampPeriod} * 1e-6);
  }
  std::sort(times.begin(), times.end());
  device.vk.vkDestroyQueryPool(device.handle(), queries, nullptr);
  queue.free(commands);
  device.destroy(*weights);
  device.destroy(*rest);
  return times;
}

}  // namespace

int main(int argc, char** argv) {
  const bool small = argc > 1 && std::strcmp(argv[1], "--small") == 0;
  const Result<Rates> rates = measure_rates({});
  if (!rates) {
    std::printf("%s\n", rates.error().message.c_str());
    return 77;
  }
  auto device = Device::open({});
  SLUICE_CHECK(device);
  auto queue = Queue::create(**device, (*device)->compute_queue());
  SLUICE_CHECK(queue);
  auto kernels = Kernels::create(**device, **queue);
  SLUICE_CHECK(kernels);
  const bool matrices = (*kernels)->uses_matrices();
  std::printf("%s, %s, %s; memory read by a kernel %.1f GB/s, copies %.1f GB/s; INT4 groups of 128, medians of %d\n",
              rates->device.c_str(), (*device)->report().driver.c_str(), (*device)->report().features.c_str(),
              rates->read * 1e-9, rates->bus * 1e-9, kRuns - 1);
  const std::vector<Problem> problems =
      small ? std::vector<Problem>{{1536, 576}, {576, 1536}}
            : std::vector<Problem>{{28672, 8192}, {8192, 28672}, {10240, 8192}, {8192, 8192}, {128256, 8192}};
  for (const Problem& p : problems) {
    for (const uint32_t rows : {1u, 2u, 4u, 8u, 64u, 512u}) {
      if (small && rows > 8) continue;
      for (const bool by_matrices : {true, false}) {
        if (by_matrices && !matrices) continue;
        if (!by_matrices && rows > 8 && !small) continue;
        (*kernels)->use_matrices(by_matrices);
        const std::vector<double> times = time_runs(**device, **queue, **kernels, p, rows);
        const double ms = times[times.size() / 2], rate = static_cast<double>(p.bytes()) / (ms * 1e-3);
        std::printf("%6ux%-5u rows %3u %-8s %9.1f us  %7.1f GB/s  %5.1f%%  %7.1f TFLOP/s\n", p.outputs, p.columns, rows,
                    by_matrices ? "matrices" : "plain", ms * 1e3, rate * 1e-9, 100 * rate / rates->read,
                    2.0 * p.outputs * p.columns * rows / (ms * 1e-3) * 1e-12);
      }
    }
  }
}
