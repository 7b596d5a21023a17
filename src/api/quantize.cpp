// SPDX-License-Identifier: Apache-2.0
// quantize_model of sluice.hpp.
#include "calibrate/quantize.hpp"
#include "api/state.hpp"
#include "backend/cpu/thread_pool.hpp"
#include "sluice/sluice.hpp"

namespace sluice {

Result<QuantizeReport> quantize_model(const QuantizeOptions& options) {
  calibrate::Options inner;
  inner.source = options.source;
  inner.output = options.output;
  inner.recipe = options.recipe;
  inner.calibration = options.calibration;
  if (options.method == QuantizeMethod::rtn) inner.method = calibrate::Method::rtn;
  if (options.method == QuantizeMethod::gptq) inner.method = calibrate::Method::gptq;
  inner.windows = options.windows;
  inner.window = options.window;
  inner.damp = options.damp;
  inner.residual = options.residual;
  inner.restart = options.restart;
  inner.threads = options.threads != 0 ? options.threads : backend::cpu::physical_cores();
  inner.backend = options.backend;
  inner.make_backend = [&options](const std::string& name, const LogHook& log) {
    // FP32 activations: what a matrix sees must not depend on how a backend rounds them.
    ModelOptions model;
    model.backend = name;
    model.threads = options.threads;
    model.cpu_activations = Activations::f32;
    model.log = log;
    return api::make_backend(model);
  };
  inner.log = options.log;
  inner.progress = options.progress;
  SLUICE_TRY_ASSIGN(report, calibrate::quantize_model(inner));
  return QuantizeReport{.tensors = report.tensors,
                        .bytes = report.bytes,
                        .resumed_layers = report.resumed_layers,
                        .bits_per_weight = report.bits_per_weight,
                        .residual_bits_per_weight = report.residual_bits_per_weight,
                        .seconds = report.seconds,
                        .weights_per_second = report.weights_per_second,
                        .json = std::move(report.json)};
}

}  // namespace sluice
