// SPDX-License-Identifier: Apache-2.0
// The layer pipeline: takes rows of tokens through the model, from the embedding to the logits.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "backend/backend.hpp"
#include "exec/device_clock.hpp"
#include "exec/device_stages.hpp"
#include "exec/embedding.hpp"
#include "exec/program.hpp"
#include "exec/turns.hpp"
#include "exec/weights.hpp"
#include "plan/planner.hpp"
#include "sluice/result.hpp"
#include "storage/container.hpp"
#include "trace/recorder.hpp"

namespace sluice::exec {

class Engine {
 public:
  // Takes over the container and the backend; `shape` is completed from the plan and the manifest by shape_of().
  static Result<std::unique_ptr<Engine>> open(storage::Container container, plan::Plan plan,
                                              std::unique_ptr<backend::Backend> backend, const backend::Shape& shape,
                                              const Weights::Options& options);

  // What of a Shape the manifest says. `inverse_frequencies` borrows from it.
  static backend::Shape shape_of(const storage::Manifest& manifest);

  // One pass. rows[i] is token ids[i]; at most shape().max_rows rows, of which at most max_logit_rows want logits.
  // `logits`: FP32 [rows that want logits][vocab], exact. Adds to `times`. Any thread; passes take turns in the order in
  // which they were asked for.
  // Errors: usage (an id outside the vocabulary), io, corrupt, numeric (a logit that is not finite: the row's
  // position), device. After an error in the middle of a pass, every later pass fails the same way.
  // `caller`: the chain of whoever runs the pass, or null: its time up to the pass becomes a `session` span, and it goes
  // on where the pass ended.
  Status run(std::span<const backend::Row> rows, std::span<const int32_t> ids, std::span<float> logits,
             StageTimes& times, trace::Chain* caller = nullptr);

  const storage::Container& container() const { return container_; }
  const plan::Plan& plan() const { return plan_; }
  const backend::Shape& shape() const { return shape_; }
  const Weights& weights() const { return *weights_; }
  const Embedding& embedding() const { return *embedding_; }
  trace::Recorder& recorder() { return recorder_; }
  // For the KV calls, which are made between passes: hold `turn()` meanwhile.
  backend::Backend& backend() { return *backend_; }
  std::unique_lock<Turns> turn() { return std::unique_lock(turns_); }

 private:
  Engine(storage::Container container, plan::Plan plan, std::unique_ptr<backend::Backend> backend,
         const backend::Shape& shape);
  Status run_step(const Step& step, bool wants_logits, trace::Chain& chain, StageTimes& spent);
  Status acquire(const Step& step, trace::Chain& chain, StageTimes& spent);
  void add_times(StageTimes spent, bool wants_logits, const trace::TickScale& scale, StageTimes& times) const;
  void record_device(const trace::TickScale& scale, uint64_t begun, uint64_t done, bool wants_logits);
  Status check_logits(std::span<const backend::Row> rows, std::span<const float> logits) const;

  storage::Container container_;
  plan::Plan plan_;
  std::unique_ptr<backend::Backend> backend_;
  backend::Shape shape_;
  trace::Recorder recorder_;             // before whoever records
  trace::Track& track_;                  // of passes; its writer has the turn
  trace::Track* device_track_ = nullptr;   // the same by a device's own clock, if it has one
  DeviceClock device_clock_;
  std::unique_ptr<Weights> weights_;     // after the backend that it uses
  std::unique_ptr<Embedding> embedding_;
  std::vector<Step> program_;
  std::vector<float> embeddings_;        // [max_rows][hidden]
  std::optional<Error> dead_;            // of a pass that ended in its middle
  Turns turns_;
};

}  // namespace sluice::exec
