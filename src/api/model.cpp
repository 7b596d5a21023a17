// SPDX-License-Identifier: Apache-2.0
// The Model class of sluice.hpp.
#include <algorithm>
#include <chrono>
#include <new>
#include <system_error>
#include <utility>

#include <fmt/format.h>

#include "api/state.hpp"
#include "base/memory_rate.hpp"
#include "trace/injection.hpp"

namespace sluice {
namespace {

// Bytes after which a rate of reading says something.
constexpr uint64_t kTellingBytes = 32ull << 20;
// Of memory, read twice for the prediction: 10 ms, and as large as most caches.
constexpr uint64_t kRateSampleBytes = 32ull << 20;

// Of a pass of a `prefill` fault.
constexpr uint32_t kRivalRows = 256;

storage::IoMode mode_of(Io io) {
  switch (io) {
    case Io::automatic: return storage::IoMode::automatic;
    case Io::uring: return storage::IoMode::uring;
    case Io::pread: return storage::IoMode::pread;
    case Io::mmap: return storage::IoMode::mmap;
  }
  return storage::IoMode::automatic;
}

ModelInfo info_of(const exec::Engine& engine, uint32_t context) {
  const storage::Container& container = engine.container();
  const storage::Manifest& manifest = container.manifest();
  const storage::HyperParameters& hyper = manifest.hyper;
  const plan::Plan& plan = engine.plan();
  ModelInfo info;
  info.name = manifest.model_name;
  info.architecture = storage::name_of(hyper.architecture);
  info.source = manifest.source;
  info.uuid = container.uuid();
  info.path = container.path();
  info.io = engine.weights().io_name();
  info.layers = hyper.layers;
  info.hidden = hyper.hidden;
  info.heads = hyper.heads;
  info.kv_heads = hyper.kv_heads;
  info.head_dim = hyper.head_dim;
  info.ffn = hyper.ffn;
  info.vocab = hyper.vocab;
  info.max_context = hyper.max_context;
  info.context = context;
  info.max_rows = engine.shape().max_rows;
  info.max_logit_rows = engine.shape().max_logit_rows;
  info.file_bytes = container.file_bytes();
  for (const storage::Tensor& tensor : manifest.tensors) info.weight_bytes += tensor.padded_bytes();
  info.device_weight_bytes = plan.resident_bytes;
  info.host_weight_bytes = plan.host_bytes;
  info.disk_weight_bytes = plan.disk_bytes;
  info.ring_bytes = plan.ring_bytes;
  info.kv_bytes = plan.kv_bytes;
  info.scratch_bytes = plan.scratch_bytes + plan.overhead_bytes;
  info.staging_bytes = engine.weights().staging_bytes();
  return info;
}

// The other session of a `prefill` fault, in a slot of its own: prompts that nobody reads an answer to.
std::function<bool()> rival_pass(exec::Engine& engine, uint32_t slot) {
  std::vector<backend::Row> rows(std::min({kRivalRows, engine.shape().max_rows, engine.shape().context}));
  for (uint32_t i = 0; i < rows.size(); ++i) rows[i] = {.session = slot, .position = i, .wants_logits = false};
  const std::vector<int32_t> ids(rows.size());
  return [&engine, rows, ids] {
    exec::StageTimes times;
    return engine.run(rows, ids, {}, times).has_value();
  };
}

trace::FaultPlaces places_of(const plan::Plan& plan) {
  const auto streams = [&](plan::Tier tier) {
    return std::any_of(plan.stream.begin(), plan.stream.end(),
                       [&](const plan::StreamItem& item) { return item.tier == tier; });
  };
  return {.drive = streams(plan::Tier::disk), .host = streams(plan::Tier::host),
          .mapped = plan.in_place && plan.disk_bytes > 0};
}

}  // namespace

Model::State::~State() {
  if (engine && engine->recorder().injector() != nullptr) engine->recorder().injector()->stop();
}

std::optional<uint32_t> Model::State::take_slot() {
  const std::lock_guard lock(slots_mutex);
  const auto free = std::find(slot_taken.begin(), slot_taken.end(), false);
  if (free == slot_taken.end()) return std::nullopt;
  *free = true;
  return static_cast<uint32_t>(free - slot_taken.begin());
}

void Model::State::give_slot(uint32_t slot) {
  const std::lock_guard lock(slots_mutex);
  slot_taken[slot] = false;
}

trace::Track& Model::State::track_of(uint32_t slot) {
  const std::lock_guard lock(slots_mutex);
  trace::Track*& track = slot_tracks[slot];
  if (track == nullptr) {
    track = &engine->recorder().add_track(fmt::format("session {}", slot), trace::Recorder::kBusyCapacity);
  }
  return *track;
}

Sampling Model::State::default_sampling() const {
  const storage::GenerationDefaults& defaults = engine->container().manifest().generation;
  return {.temperature = defaults.temperature, .top_k = defaults.top_k, .top_p = defaults.top_p, .min_p = defaults.min_p,
          .repeat_penalty = defaults.repetition_penalty, .seed = 0};
}

double Model::State::disk_rate() const {
  return bandwidths.disk > 0 ? bandwidths.disk : engine->weights().disk_rate(kTellingBytes);
}

double Model::State::predict_pass(double disk_rate) {
  std::call_once(memory_measured, [this] {
    if (bandwidths.device_memory > 0 || info.backend != "cpu") return;
    bandwidths.device_memory = memory_read_rate(options.threads, kRateSampleBytes, 2);
  });
  const plan::Bandwidths rates{.disk = disk_rate, .bus = bandwidths.bus, .device_memory = bandwidths.device_memory};
  plan::Plan plan = engine->plan();
  plan::predict(plan, rates, 0);
  return plan.pass_seconds;
}

namespace api {

Result<Model> Access::open(const std::string& path, ModelOptions options, const storage::FaultPlan* faults) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<trace::Injection> injections;
  for (const std::string& text : options.inject) {
    SLUICE_TRY_ASSIGN(injection, trace::parse_injection(text));
    injections.push_back(injection);
  }
  auto state = std::make_unique<Model::State>();
  state->options = options;
  state->options.log = nullptr;
  state->options.load_progress = nullptr;
  const bool has_rival = std::any_of(injections.begin(), injections.end(), [](const trace::Injection& injection) {
    return injection.fault == trace::Fault::prefill;
  });
  if (has_rival) ++options.sessions;
  SLUICE_TRY_ASSIGN(opening, open_and_plan(path, options, options.bandwidths));
  for (const trace::Injection& injection : injections) {
    SLUICE_TRY(trace::check_place(injection, places_of(opening.plan)));
  }
  const std::string backend_name = opening.backend->name();
  const std::string device_name = opening.backend->device_name();

  const storage::TokenizerSpec& spec = opening.container.manifest().tokenizer;
  if (spec.model != storage::TokenizerModel::none) {
    SLUICE_TRY_ASSIGN(tokenizer, model::Tokenizer::create(spec));
    state->tokenizer.emplace(std::move(tokenizer));
  }
  if (!spec.chat_template.empty()) {
    // A model whose template is beyond the subset still runs; render_chat says what is wrong.
    Result<model::ChatTemplate> chat = model::ChatTemplate::create(spec.chat_template);
    if (chat) state->chat_template.emplace(std::move(*chat));
    else state->chat_template_error = chat.error().message;
  }

  SLUICE_TRY_ASSIGN(engine, exec::Engine::open(std::move(opening.container), std::move(opening.plan),
                                               std::move(opening.backend), opening.shape,
                                               {.io = mode_of(options.io),
                                                .verify_mapping = options.verify == Verify::open,
                                                .faults = faults,
                                                .log = options.log,
                                                .progress = options.load_progress}));
  if (!injections.empty()) {
    trace::Recorder& recorder = engine->recorder();
    trace::Track& track = recorder.add_track("injected", 1u << 10);
    SLUICE_TRY_ASSIGN(injector, trace::Injector::create(std::move(injections), path, track));
    recorder.set_injector(std::move(injector));
    log_warning(options.log, "faults are being injected: times of this run say nothing about the machine");
  }
  state->info = info_of(*engine, opening.context);
  state->info.backend = backend_name;
  state->info.device = device_name;
  state->info.has_residuals = opening.has_residuals;
  state->info.has_tokenizer = state->tokenizer.has_value();
  state->info.has_chat_template = state->chat_template.has_value();
  state->slot_taken.assign(opening.shape.sessions, false);
  state->slot_tracks.assign(opening.shape.sessions, nullptr);
  if (has_rival) {
    state->slot_taken.back() = true;
    engine->recorder().injector()->set_rival(rival_pass(*engine, opening.shape.sessions - 1));
  }
  state->bandwidths = options.bandwidths;
  state->engine = std::move(engine);
  state->open_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return Model(std::move(state));
}

Result<Model> open_model(const std::string& path, ModelOptions options, const storage::FaultPlan* faults) {
  // The standard library reports exhaustion by throwing; this is where that ends.
  try {
    return Access::open(path, std::move(options), faults);
  } catch (const std::bad_alloc&) {
    return fail(ErrorCode::out_of_memory, fmt::format("{}: not enough memory to open it; lower --context, "
                                                      "--device-memory or --host-memory", path));
  } catch (const std::system_error& error) {
    return fail(ErrorCode::out_of_memory, fmt::format("{}: cannot start a thread: {}", path, error.what()),
                error.code().value());
  }
}

}  // namespace api

Model::Model(std::unique_ptr<State> state) : state_(std::move(state)) {}
Model::Model(Model&&) noexcept = default;
Model& Model::operator=(Model&&) noexcept = default;
Model::~Model() = default;

Result<Model> Model::open(const std::string& path, ModelOptions options) {
  return api::open_model(path, std::move(options), nullptr);
}

const ModelInfo& Model::info() const { return state_->info; }

Result<Session> Model::new_session() const {
  const std::optional<uint32_t> slot = state_->take_slot();
  if (!slot) {
    return fail(ErrorCode::budget, fmt::format("all {} sessions of this model are taken; close one, or open the model "
                                               "with more (ModelOptions::sessions)", state_->slot_taken.size()));
  }
  return Session(std::make_unique<Session::State>(*state_, *slot));
}

std::vector<int32_t> Model::tokenize(std::string_view text, bool special, bool bos) const {
  if (!state_->tokenizer) return {};
  return state_->tokenizer->encode(text, {.special = special, .bos_eos = bos});
}

std::string Model::detokenize(std::span<const int32_t> tokens) const {
  return state_->tokenizer ? state_->tokenizer->decode(tokens) : std::string();
}

Result<std::string> Model::render_chat(std::span<const ChatMessage> messages, bool add_generation_prompt) const {
  if (!state_->chat_template) {
    if (state_->chat_template_error.empty()) {
      return fail(ErrorCode::unsupported, fmt::format("{} has no chat template", state_->info.path));
    }
    return fail(ErrorCode::unsupported,
                fmt::format("{}: its chat template: {}", state_->info.path, state_->chat_template_error));
  }
  std::vector<model::ChatTurn> turns;
  for (const ChatMessage& message : messages) turns.push_back({message.role, message.content});
  const storage::TokenizerSpec& spec = state_->engine->container().manifest().tokenizer;
  const auto text_of = [&spec](int32_t id) {
    return id >= 0 && static_cast<size_t>(id) < spec.tokens.size() ? spec.tokens[static_cast<size_t>(id)] : std::string();
  };
  model::ChatOptions options;
  options.add_generation_prompt = add_generation_prompt;
  options.bos_token = text_of(spec.bos);
  options.eos_token = text_of(spec.eos);
  return state_->chat_template->render(turns, options);
}

Sampling Model::default_sampling() const { return state_->default_sampling(); }

}  // namespace sluice
