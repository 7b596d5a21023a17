// SPDX-License-Identifier: Apache-2.0
// The Session class of sluice.hpp: what goes through the model when, and generation.
#include <algorithm>
#include <chrono>
#include <utility>

#include <fmt/format.h>

#include "api/state.hpp"
#include "base/check.hpp"
#include "model/sampler.hpp"
#include "model/text_stream.hpp"
#include "trace/injection.hpp"
#include "trace/nvtx.hpp"

namespace sluice {
namespace {

using Clock = std::chrono::steady_clock;
using exec::Stage;

constexpr size_t kMostLatencies = 65536;

double seconds_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

void add_stages(const exec::StageTimes& stages, PassTimes& times) {
  const auto seconds = [&stages](Stage stage) { return static_cast<double>(stages[stage]) * 1e-9; };
  times.disk_wait += seconds(Stage::disk_wait);
  times.copy_wait += seconds(Stage::copy_wait);
  times.embed += seconds(Stage::embed);
  times.norm += seconds(Stage::norm);
  times.matmul += seconds(Stage::matmul);
  times.rope += seconds(Stage::rope);
  times.attention += seconds(Stage::attention);
  times.activation += seconds(Stage::activation);
  times.lm_head += seconds(Stage::lm_head);
}

// The request's settings over the model's own over greedy.
model::SamplerSettings settings_of(const Sampling& asked, const Sampling& own) {
  const auto pick = [](auto asked_value, auto own_value, auto otherwise) {
    return asked_value >= 0 ? asked_value : own_value >= 0 ? own_value : otherwise;
  };
  return {.temperature = pick(asked.temperature, own.temperature, 0.0f),
          .top_k = pick(asked.top_k, own.top_k, 0),
          .top_p = pick(asked.top_p, own.top_p, 1.0f),
          .min_p = pick(asked.min_p, own.min_p, 0.0f),
          .repeat_penalty = pick(asked.repeat_penalty, own.repeat_penalty, 1.0f),
          .seed = asked.seed == 0 ? 1 : asked.seed};
}

// Adds the time since `begin` to `total` when it goes.
class Span {
 public:
  explicit Span(double& total) : total_(total) {}
  ~Span() { total_ += seconds(); }
  Span(const Span&) = delete;
  Span& operator=(const Span&) = delete;
  double seconds() const { return seconds_between(begin_, Clock::now()); }

 private:
  double& total_;
  Clock::time_point begin_ = Clock::now();
};

}  // namespace

Session::State::State(Model::State& model_state, uint32_t slot_number)
    : model(model_state), slot(slot_number), track(model_state.track_of(slot_number)) {
  const backend::Shape& shape = model.engine->shape();
  tokens.reserve(model.info.context);
  logits.resize(shape.vocab);
  rows.resize(shape.max_rows);
  timings.token_latencies.reserve(kMostLatencies);
  timings.open_seconds = model.open_seconds;
  timings.disk_bytes_per_pass = model.engine->plan().in_place ? 0 : model.engine->plan().disk_bytes;
  update_timings();
}

Session::State::~State() { model.give_slot(slot); }

void Session::State::note_first_token() {
  if (!first_append) return;
  if (timings.first_token_seconds == 0) timings.first_token_seconds = seconds_between(*first_append, Clock::now());
  if (!disk_rate) disk_rate = model.disk_rate();
}

void Session::State::update_timings() {
  const exec::Engine& engine = *model.engine;
  timings.embedding_bytes = engine.embedding().bytes_read();
  timings.disk_bytes = engine.weights().bytes_read() + timings.embedding_bytes;
  timings.retries = engine.weights().retries() + engine.embedding().retries();
}

Status Session::State::run_rows(uint32_t count, bool all_logits, bool last_logits, std::span<float> out,
                                PassTimes& times) {
  for (uint32_t i = 0; i < count; ++i) {
    rows[i] = {.session = slot, .position = evaluated + i, .wants_logits = all_logits || (last_logits && i + 1 == count)};
  }
  exec::StageTimes stages;
  SLUICE_TRY(model.engine->run(std::span(rows).first(count), std::span(tokens).subspan(evaluated, count), out, stages,
                               &parts));
  add_stages(stages, times);
  ++times.passes;
  times.tokens += count;
  evaluated += count;
  return {};
}

void Session::State::record_evidence(uint64_t token_begin) {
  if (!model.engine->recorder().collected()) return;
  if (!evidence) evidence.emplace(track, model.info.path, model.info.disk_weight_bytes > 0);
  evidence->read(parts.last() - token_begin);
  track.count(trace::Counter::context, parts.last(), tokens.size());
  track.count(trace::Counter::stream_bytes, parts.last(), model.engine->weights().bytes_read());
  parts.span(trace::Kind::evidence);
}

Status Session::State::run_pending(PassTimes& times) {
  while (pending() > 0) {
    const uint32_t count = std::min(pending(), model.engine->shape().max_rows);
    const bool last = count == pending();
    if (last) logits_at = 0;
    SLUICE_TRY(run_rows(count, false, last, last ? std::span(logits) : std::span<float>(), times));
    if (last) logits_at = tokens.size();
    if (!last && take_cancel()) return fail(ErrorCode::cancelled, "interrupted before the prompt was read");
  }
  return {};
}

Session::Session(std::unique_ptr<State> state) : state_(std::move(state)) {}
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;
Session::~Session() = default;

std::span<const int32_t> Session::tokens() const { return state_->tokens; }
// What the planner says of decoding, from what was known before it began. Here, because nobody waits for a token.
const Timings& Session::timings() const {
  if (state_->timings.predicted_pass_seconds == 0 && state_->disk_rate) {
    state_->timings.predicted_pass_seconds = state_->model.predict_pass(*state_->disk_rate);
  }
  return state_->timings;
}
void Session::cancel() noexcept { state_->cancelled.store(true); }

Status Session::append(std::span<const int32_t> tokens) {
  State& state = *state_;
  const uint32_t vocab = state.model.info.vocab;
  for (const int32_t id : tokens) {
    if (id < 0 || static_cast<uint32_t>(id) >= vocab) {
      return fail(ErrorCode::usage, fmt::format("token id {} is outside the vocabulary of {}", id, vocab));
    }
  }
  if (tokens.size() > state.model.info.context - state.tokens.size()) {
    return fail(ErrorCode::budget,
                fmt::format("{} tokens and {} more do not fit the context of {}; open the model with a longer one "
                            "(--context), or give less text", state.tokens.size(), tokens.size(),
                            state.model.info.context));
  }
  if (!state.first_append) state.first_append = Clock::now();
  state.tokens.insert(state.tokens.end(), tokens.begin(), tokens.end());
  return {};
}

Status Session::flush() {
  const Span total(state_->timings.prefill.total);
  state_->parts.skip_to(trace::ticks());
  Status status = state_->run_pending(state_->timings.prefill);
  state_->update_timings();
  return status;
}

Status Session::score(const std::function<void(uint32_t position, std::span<const float> logits)>& on_logits) {
  State& state = *state_;
  const backend::Shape& shape = state.model.engine->shape();
  std::vector<float> out(size_t{shape.max_logit_rows} * shape.vocab);
  while (state.pending() > 0) {
    if (state.take_cancel()) return fail(ErrorCode::cancelled, "interrupted before the text was scored");
    const uint32_t first = state.evaluated;
    const uint32_t count = std::min(state.pending(), shape.max_logit_rows);
    const auto row = [&](uint32_t i) { return std::span(out).subspan(size_t{i} * shape.vocab, shape.vocab); };
    {
      const Span total(state.timings.prefill.total);
      state.parts.skip_to(trace::ticks());
      SLUICE_TRY(state.run_rows(count, true, true, std::span(out).first(size_t{count} * shape.vocab),
                                state.timings.prefill));
    }
    state.update_timings();
    std::copy_n(row(count - 1).begin(), shape.vocab, state.logits.begin());
    state.logits_at = state.evaluated;
    for (uint32_t i = 0; i < count; ++i) on_logits(first + i, row(i));
  }
  return {};
}

Result<StopReason> Session::generate(const GenerateOptions& options, const std::function<bool(const Token&)>& on_token) {
  State& state = *state_;
  if (state.tokens.empty()) {
    return fail(ErrorCode::usage, "there is nothing to continue: append at least one token first");
  }
  const storage::TokenizerSpec& spec = state.model.engine->container().manifest().tokenizer;
  model::Sampler sampler(settings_of(options.sampling, state.model.default_sampling()), state.model.info.vocab);
  model::TextStream text(state.model.tokenizer ? &*state.model.tokenizer : nullptr, options.stop);
  const bool can_end = !options.ignore_eos;

  std::optional<StopReason> reason;
  trace::Chain& parts = state.parts;
  parts.skip_to(trace::ticks());
  trace::Injector* const injector = state.model.engine->recorder().injector();
  for (uint32_t generated = 0; !reason;) {
    if (generated >= options.max_tokens) reason = StopReason::max_tokens;
    else if (state.tokens.size() >= state.model.info.context) reason = StopReason::context_full;
    else if (state.take_cancel()) reason = StopReason::cancelled;
    if (reason) break;

    const bool decoding = generated > 0;
    PassTimes& times = decoding ? state.timings.decode : state.timings.prefill;
    const Span total(times.total);
    const uint64_t token_begin = parts.last();
    const trace::NvtxRange token_range(trace::Kind::token);
    const uint32_t pending = state.pending();
    if (state.pending() == 0 && !state.last_logits_known()) --state.evaluated;  // its logits went with a truncation
    if (Status status = state.run_pending(times); !status) {
      state.update_timings();
      if (status.error().code == ErrorCode::cancelled) return StopReason::cancelled;
      return fail(std::move(status.error()));
    }
    parts.span(trace::Kind::session);
    state.track.record(trace::Kind::run_model, token_begin, parts.last());
    int32_t id = 0;
    {
      const Span sampling(times.sampling);
      const trace::NvtxRange range(trace::Kind::sampling);
      if (injector != nullptr) injector->take(trace::Fault::sampling);
      id = sampler.sample(state.logits, state.tokens);
    }
    parts.span(trace::Kind::sampling);
    if (!decoding) state.note_first_token();
    state.tokens.push_back(id);
    ++generated;

    const Span output(times.output);
    if (can_end && std::find(spec.stop_ids.begin(), spec.stop_ids.end(), id) != spec.stop_ids.end()) {
      reason = text.finish() ? StopReason::stop_text : StopReason::end_of_text;
      if (on_token && !text.ready().empty()) on_token({.id = id, .text = text.ready()});
      break;
    }
    const bool last = generated == options.max_tokens || state.tokens.size() == state.model.info.context;
    {
      const trace::NvtxRange range(trace::Kind::detokenize);
      if (text.push(id, last)) reason = StopReason::stop_text;
    }
    parts.span(trace::Kind::detokenize);
    if (injector != nullptr) {
      injector->on_token(state.model.engine->weights().bytes_read());
      if (on_token) injector->take(trace::Fault::callback);
    }
    {
      const trace::NvtxRange range(trace::Kind::callback);
      if (on_token && !on_token({.id = id, .text = text.ready()}) && !reason) reason = StopReason::cancelled;
    }
    if (decoding && state.timings.token_latencies.size() < kMostLatencies) {
      state.timings.token_latencies.push_back(total.seconds());
    }
    parts.span(trace::Kind::callback);
    state.record_evidence(token_begin);
    state.track.record(trace::Kind::token, token_begin, parts.last(), trace::Record::kNoLayer, pending, state.tokens.size());
  }
  state.cancelled.store(false);
  state.update_timings();
  return *reason;
}

Status Session::truncate(uint32_t length) {
  State& state = *state_;
  if (length > state.tokens.size()) {
    return fail(ErrorCode::usage, fmt::format("cannot truncate to {} tokens: the sequence has {}", length,
                                              state.tokens.size()));
  }
  state.tokens.resize(length);
  state.evaluated = std::min(state.evaluated, length);
  if (state.logits_at > length) state.logits_at = 0;
  return {};
}

Result<Session> Session::fork() const {
  const State& state = *state_;
  const std::optional<uint32_t> slot = state.model.take_slot();
  if (!slot) {
    return fail(ErrorCode::budget, "no session is left to fork into; open the model with more (ModelOptions::sessions)");
  }
  auto copy = std::make_unique<State>(state.model, *slot);
  exec::Engine& engine = *state.model.engine;
  {
    const auto turn = engine.turn();
    SLUICE_TRY(engine.backend().copy_kv(state.slot, *slot, state.evaluated));
  }
  copy->tokens.assign(state.tokens.begin(), state.tokens.end());
  copy->evaluated = state.evaluated;
  copy->logits = state.logits;
  copy->logits_at = state.logits_at;
  return Session(std::move(copy));
}

}  // namespace sluice
