// SPDX-License-Identifier: Apache-2.0
#include "kernel_table.hpp"

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "output.hpp"

namespace sluice::cli {
namespace {

// Of what a launch reads: weights alone. Its activations are small beside them, and come from L2.
double rate_of(const KernelTime& time) { return static_cast<double>(time.weight_bytes) / time.seconds; }
double flops_of(const KernelTime& time) { return 2.0 * time.outputs * time.inputs * time.rows / time.seconds; }

std::string line_of(const KernelTime& time, double ceiling) {
  std::string line = fmt::format("{:<10} {:<12} {:>6} x {:<6} {:>4} {:>9.2f} {:>6.2f} {:>6.1f}% {:>8.1f}", time.name,
                                 time.scheme, time.outputs, time.inputs, time.rows, time.seconds * 1e6,
                                 rate_of(time) * 1e-12, 100 * rate_of(time) / ceiling, flops_of(time) * 1e-12);
  if (time.cublas_seconds > 0) {
    line += fmt::format(" {:>9.2f} {:>6.2f}x", time.cublas_seconds * 1e6, time.cublas_seconds / time.seconds);
  }
  return line + '\n';
}

nlohmann::json json_of(const KernelReport& report) {
  nlohmann::json times = nlohmann::json::array();
  for (const KernelTime& time : report.times) {
    times.push_back({{"name", time.name}, {"scheme", time.scheme}, {"outputs", time.outputs}, {"inputs", time.inputs},
                     {"rows", time.rows}, {"weight_bytes", time.weight_bytes}, {"seconds", time.seconds},
                     {"bytes_per_second", rate_of(time)}, {"share_of_ceiling", rate_of(time) / report.read_before},
                     {"flops_per_second", flops_of(time)}, {"cublas_seconds", time.cublas_seconds}});
  }
  return {{"device", report.device}, {"cublas", report.cublas}, {"read_bytes_per_second", report.read_before},
          {"read_bytes_per_second_after", report.read_after}, {"times", times}};
}

}  // namespace

Result<int> bench_kernel_table(const std::string& path, const std::vector<uint32_t>& rows, bool json) {
  Status written;
  const auto print_last = [&](const KernelReport& report) {
    if (json || !written) return;
    std::string text;
    if (report.times.size() == 1) {
      text = fmt::format("{}, memory read {}; cuBLAS FP16: {}\n", report.device, rate_text(report.read_before),
                         report.cublas);
      text += fmt::format("{:<10} {:<12} {:>6} x {:<6} {:>4} {:>9} {:>6} {:>7} {:>8} {:>9} {:>7}\n", "matrices",
                          "weights", "N", "K", "rows", "us", "TB/s", "ceiling", "TFLOP/s", "cuBLAS us", "speedup");
    }
    written = print(text + line_of(report.times.back(), report.read_before));
  };
  SLUICE_TRY_ASSIGN(report, bench_kernels(path, rows, print_last));
  SLUICE_TRY(std::move(written));
  if (json) SLUICE_TRY(print_json(json_of(report)));
  else SLUICE_TRY(print(fmt::format("memory read after it all {}\n", rate_text(report.read_after))));
  return 0;
}

}  // namespace sluice::cli
