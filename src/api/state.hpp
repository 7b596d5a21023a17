// SPDX-License-Identifier: Apache-2.0
// What a Model and a Session hold. The classes themselves are in sluice.hpp.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "backend/backend.hpp"
#include "exec/engine.hpp"
#include "model/chat_template.hpp"
#include "model/tokenizer.hpp"
#include "plan/planner.hpp"
#include "sluice/sluice.hpp"
#include "storage/container.hpp"
#include "trace/collector.hpp"
#include "trace/evidence.hpp"
#include "trace/recorder.hpp"

namespace sluice {

struct Model::State {
  State() = default;
  ~State();
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  ModelInfo info;
  ModelOptions options;                 // as given, without hooks
  std::unique_ptr<exec::Engine> engine;
  std::optional<model::Tokenizer> tokenizer;
  std::optional<model::ChatTemplate> chat_template;
  std::string chat_template_error;      // why there is none although the file has one
  Bandwidths bandwidths;
  std::once_flag memory_measured;       // bandwidths.device_memory is written under it
  double open_seconds = 0;

  std::mutex slots_mutex;
  std::vector<bool> slot_taken;         // KV cache of a session; under slots_mutex
  std::vector<trace::Track*> slot_tracks;   // of the session there; null until there was one; under slots_mutex
  std::unique_ptr<trace::Collector> collector;   // while a trace is written; goes before the engine

  std::optional<uint32_t> take_slot();
  void give_slot(uint32_t slot);
  trace::Track& track_of(uint32_t slot);
  Sampling default_sampling() const;    // of the generation config
  double disk_rate() const;             // given, or seen while loading and streaming so far; 0: neither
  // The planner's figure for a decode pass. Measures memory at the first call, where nobody said how fast it is.
  double predict_pass(double disk_rate);
};

struct Session::State {
  State(Model::State& model_state, uint32_t slot_number);
  ~State();
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  bool last_logits_known() const { return logits_at == tokens.size() && logits_at > 0; }
  uint32_t pending() const { return static_cast<uint32_t>(tokens.size()) - evaluated; }
  // Runs the pending tokens in passes of at most max_rows and leaves the last one's logits in `logits`; adds to `times`.
  // Error: those of a pass; cancelled, with what ran so far kept.
  Status run_pending(PassTimes& times);
  // One pass over the next `rows` pending tokens, all or only the last of which want logits.
  Status run_rows(uint32_t rows, bool all_logits, bool last_logits, std::span<float> out, PassTimes& times);
  void note_first_token();
  // Copies what the model counts into `timings`.
  void update_timings();
  // Adds the counters of one token to the trace, if there is one, as its last part. It began at this stamp.
  void record_evidence(uint64_t token_begin);
  bool take_cancel() { return cancelled.exchange(false); }

  Model::State& model;
  const uint32_t slot;
  trace::Track& track;
  trace::Chain parts{track};            // of a token, one behind the other
  std::optional<trace::TokenEvidence> evidence;   // opened with the first token of a trace
  std::vector<int32_t> tokens;          // capacity: the context
  uint32_t evaluated = 0;               // tokens that are in the KV cache
  std::vector<float> logits;            // of the token before position logits_at
  size_t logits_at = 0;                 // tokens.size() for which `logits` predicts the next; 0: none
  std::vector<backend::Row> rows;       // of one pass
  Timings timings;
  std::optional<double> disk_rate;      // known when the first token was there
  std::optional<std::chrono::steady_clock::time_point> first_append;
  std::atomic<bool> cancelled{false};
};

namespace api {

// Taken of the free memory without being asked: the rest of the machine goes on living.
inline constexpr double kShareOfFreeMemory = 0.8;

// The doors to the private constructors, for the library itself.
struct Access {
  static Result<Model> open(const std::string& path, ModelOptions options, const storage::FaultPlan* faults);
};

// A file opened and planned, nothing of its weights read.
struct Opening {
  storage::Container container;
  std::unique_ptr<backend::Backend> backend;
  backend::Shape shape;
  plan::Plan plan;
  uint32_t context = 0;                 // positions of a session; the shape's is rounded up to KV blocks
  uint64_t device_budget_bytes = 0;
  bool has_residuals = false;
};
// The backend that the options name. Errors: usage, not_found, device.
Result<std::unique_ptr<backend::Backend>> make_backend(const ModelOptions& options);

// Positions of a session: what the options say, else what the model was trained for but at most 4096. Error: usage.
Result<uint32_t> choose_context(uint32_t trained, const std::string& path, const ModelOptions& options);

// What may be taken of a device without being asked. Its overhead is taken already, and is part of a budget all the
// same.
uint64_t free_to_take(const backend::DeviceMemory& device);

// What the planner is told about a backend that will hold `shape` (its max_rows and max_logit_rows are still open) and
// takes `overhead_bytes` besides. Borrows the backend and what the shape spans. No device budget yet.
plan::Inputs planning_inputs(const backend::Backend& backend, const backend::Shape& shape, uint64_t overhead_bytes,
                             const ModelOptions& options, const Bandwidths& bandwidths);

// The shape of a model opened by these options, max_rows still open.
backend::Shape planned_shape(const storage::Manifest& manifest, uint32_t context, const ModelOptions& options);

// Errors: those of Container::open; usage, not_found (the backend), budget.
Result<Opening> open_and_plan(const std::string& path, const ModelOptions& options, const Bandwidths& bandwidths);

// Model::open, with faults injected into every read (tests).
Result<Model> open_model(const std::string& path, ModelOptions options, const storage::FaultPlan* faults);

}  // namespace api
}  // namespace sluice
