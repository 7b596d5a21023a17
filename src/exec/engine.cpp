// SPDX-License-Identifier: Apache-2.0
#include "exec/engine.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <utility>

#include "base/check.hpp"
#include "trace/injection.hpp"
#include "trace/nvtx.hpp"

namespace sluice::exec {

namespace {

// Rows of the embedding in flight: two reads each, a few KiB.
constexpr uint32_t kRowDepth = 64;

// What a stage is called in a trace.
trace::Kind kind_of(Stage stage) {
  switch (stage) {
    case Stage::disk_wait: return trace::Kind::disk_wait;
    case Stage::copy_wait: return trace::Kind::copy_wait;
    case Stage::embed: return trace::Kind::embed;
    case Stage::norm: return trace::Kind::norm;
    case Stage::matmul: return trace::Kind::matmul;
    case Stage::rope: return trace::Kind::rope;
    case Stage::attention: return trace::Kind::attention;
    case Stage::activation: return trace::Kind::activation;
    case Stage::lm_head: return trace::Kind::lm_head;
    case Stage::count: break;
  }
  return trace::Kind::none;
}

uint16_t layer_of(const Step& step) {
  return step.for_logits ? trace::Record::kNoLayer : static_cast<uint16_t>(step.op.layer);
}

// Integer arithmetic, which the compiler turns into vectors: 128,256 logits take 10 us.
bool all_finite(std::span<const float> values) {
  constexpr uint32_t kExponent = 0x7f800000u;
  uint32_t bad = 0;
  for (const float value : values) bad |= (std::bit_cast<uint32_t>(value) & kExponent) == kExponent ? 1u : 0u;
  return bad == 0;
}

}  // namespace

backend::Shape Engine::shape_of(const storage::Manifest& manifest) {
  const storage::HyperParameters& hyper = manifest.hyper;
  backend::Shape shape;
  shape.layers = hyper.layers;
  shape.hidden = hyper.hidden;
  shape.heads = hyper.heads;
  shape.kv_heads = hyper.kv_heads;
  shape.head_dim = hyper.head_dim;
  shape.ffn = hyper.ffn;
  shape.vocab = hyper.vocab;
  shape.norm_eps = hyper.norm_eps;
  shape.inverse_frequencies = manifest.rope.inverse_frequencies;
  shape.rope_attention_factor = manifest.rope.attention_factor;
  shape.rotary_dims = manifest.rope.rotary_dims;
  shape.gathers = std::any_of(manifest.tensors.begin(), manifest.tensors.end(), [](const storage::Tensor& tensor) {
    return tensor.plane(storage::PlaneKind::perm) != nullptr;
  });
  return shape;
}

Engine::Engine(storage::Container container, plan::Plan plan, std::unique_ptr<backend::Backend> backend,
               const backend::Shape& shape)
    : container_(std::move(container)), plan_(std::move(plan)), backend_(std::move(backend)), shape_(shape),
      track_(recorder_.add_track("engine", trace::Recorder::kBusyCapacity)) {
  shape_.inverse_frequencies = container_.manifest().rope.inverse_frequencies;
  shape_.max_rows = plan_.max_rows;
  shape_.max_logit_rows = std::min(shape_.max_logit_rows, shape_.max_rows);
}

Result<std::unique_ptr<Engine>> Engine::open(storage::Container container, plan::Plan plan,
                                             std::unique_ptr<backend::Backend> backend, const backend::Shape& shape,
                                             const Weights::Options& options) {
  std::unique_ptr<Engine> self(new Engine(std::move(container), std::move(plan), std::move(backend), shape));
  SLUICE_TRY(self->container_.check_permutations());
  SLUICE_TRY(self->backend_->prepare(self->shape_));
  const bool in_place = options.io == storage::IoMode::mmap;
  SLUICE_TRY_ASSIGN(embedding, Embedding::open(self->container_, self->shape_.max_rows,
                                               {.mode = in_place ? storage::IoMode::automatic : options.io,
                                                .depth = kRowDepth,
                                                .direct = true,
                                                .faults = options.faults,
                                                .log = {}}));   // the weights' queue says the same lines
  self->embedding_ = std::make_unique<Embedding>(std::move(embedding));
  self->embeddings_.resize(size_t{self->shape_.max_rows} * self->shape_.hidden);
  Weights::Options recorded = options;
  recorded.recorder = &self->recorder_;
  SLUICE_TRY_ASSIGN(weights, Weights::open(self->container_, self->plan_, *self->backend_, recorded));
  self->weights_ = std::move(weights);
  SLUICE_TRY_ASSIGN(program, build_program(self->container_, self->plan_,
                                           [&](uint32_t tensor) { return self->weights_->address(tensor); }));
  self->program_ = std::move(program);
  return self;
}

Status Engine::run(std::span<const backend::Row> rows, std::span<const int32_t> ids, std::span<float> logits,
                   StageTimes& times, trace::Chain* caller) {
  const uint64_t asked = trace::ticks();
  if (caller != nullptr) caller->span_to(asked, trace::Kind::session);
  std::unique_lock<Turns> lock(turns_, std::try_to_lock);
  const bool waited = !lock.owns_lock();
  if (waited) lock.lock();
  trace::Chain chain(track_, asked);
  if (waited) chain.span(trace::Kind::turn_wait);
  SLUICE_CHECK(!rows.empty() && rows.size() <= shape_.max_rows && rows.size() == ids.size());
  const auto wanted = static_cast<size_t>(
      std::count_if(rows.begin(), rows.end(), [](const backend::Row& row) { return row.wants_logits; }));
  SLUICE_CHECK(wanted <= shape_.max_logit_rows && logits.size() == wanted * shape_.vocab);

  if (dead_) return fail(*dead_);
  const trace::NvtxRange range(trace::Kind::pass);
  const uint64_t begin = chain.last();
  StageTimes spent;   // in ticks
  trace::NvtxRange embed(trace::Kind::embed);
  const std::span<float> embeddings = std::span(embeddings_).first(rows.size() * shape_.hidden);
  SLUICE_TRY(embedding_->fetch(ids, embeddings));
  const uint64_t begun = trace::ticks();
  backend_->time_operations(recorder_.collected());
  SLUICE_TRY(backend_->begin_pass(rows, embeddings));
  spent[Stage::embed] += chain.span(trace::Kind::embed);
  embed.end();

  uint16_t layer = trace::Record::kNoLayer;
  uint64_t layer_begin = 0;
  trace::NvtxRange layer_range;
  for (const Step& step : program_) {
    if (layer_of(step) != layer) {
      layer_range.end();
      if (layer != trace::Record::kNoLayer) track_.record(trace::Kind::layer, layer_begin, chain.last(), layer);
      layer = layer_of(step);
      layer_begin = chain.last();
      if (layer != trace::Record::kNoLayer) layer_range.begin(trace::Kind::layer, layer);
    }
    if (Status status = run_step(step, wanted > 0, chain, spent); !status) {
      dead_ = status.error();  // the stream stands in the middle of a pass
      return status;
    }
  }
  const trace::NvtxRange finish(trace::Kind::finish);
  SLUICE_TRY(backend_->finish_pass(logits));
  const uint64_t done = trace::ticks();
  const trace::TickScale scale = recorder_.scale();
  if (!backend_->op_times().empty()) record_device(scale, begun, done, wanted > 0);
  SLUICE_TRY(weights_->check_mapping());
  SLUICE_TRY(check_logits(rows, logits));
  spent[Stage::lm_head] += chain.span(trace::Kind::finish);
  track_.record(trace::Kind::pass, begin, chain.last(), static_cast<uint16_t>(rows.front().session),
                static_cast<uint32_t>(rows.size()), rows.front().position);
  if (caller != nullptr) caller->skip_to(chain.last());
  add_times(spent, wanted > 0, scale, times);
  return {};
}

// The pass as the device saw it, on a track of its own: what each operation waited and ran, and in the engine's what the
// host recorded for later passes meanwhile.
void Engine::record_device(const trace::TickScale& scale, uint64_t begun, uint64_t done, bool wants_logits) {
  const std::span<const backend::OpTime> ops = backend_->op_times();
  if (device_track_ == nullptr) device_track_ = &recorder_.add_track("gpu", trace::Recorder::kBusyCapacity);
  device_clock_.bound(static_cast<int64_t>(scale.steady_ns(begun)), static_cast<int64_t>(scale.steady_ns(done)),
                      ops.front().begin_ns, ops.back().end_ns);
  // All of a pass from one of its moments: a tick is 0.3 ns, and the clocks are trillions of them.
  const auto ticks_of = [&, done_ns = scale.steady_ns(done)](double host_ns) {
    return done + static_cast<uint64_t>(static_cast<int64_t>((host_ns - done_ns) / scale.ns_per_tick()));
  };
  const auto device_ticks = [&](uint64_t ns) { return ticks_of(static_cast<double>(device_clock_.host_ns(ns))); };
  auto op = ops.begin();
  for (const Step& step : program_) {
    if (step.for_logits && !wants_logits) continue;
    SLUICE_CHECK(op != ops.end());
    const uint64_t ready = device_ticks(op->ready_ns);
    if (op->wait_ns() > 0) {
      device_track_->record(kind_of(wait_of(step, plan_)), device_ticks(op->begin_ns), ready, layer_of(step), 0,
                            static_cast<uint64_t>(step.stream_item));
    }
    if (op->run_ns() > 0) device_track_->record(kind_of(step.stage), ready, device_ticks(op->end_ns), layer_of(step));
    ++op;
  }
  device_track_->count(trace::Counter::device_clock_error_ns, done, device_clock_.error_ns());
  for (const backend::HostTime& time : backend_->recordings()) {
    track_.record(trace::Kind::prepare, ticks_of(static_cast<double>(time.begin_ns)),
                  ticks_of(static_cast<double>(time.end_ns)));
  }
}

// Ticks of a pass to nanoseconds, on top of `times`. A device that times its own operations knows their stages better.
void Engine::add_times(StageTimes spent, bool wants_logits, const trace::TickScale& scale, StageTimes& times) const {
  for (uint64_t& ns : spent.ns) ns = static_cast<uint64_t>(static_cast<double>(ns) * scale.ns_per_tick());
  if (const std::span<const backend::OpTime> ops = backend_->op_times(); !ops.empty()) {
    const uint64_t embed = std::exchange(spent[Stage::embed], 0);
    spent = device_stages(program_, plan_, wants_logits, ops, spent.total());
    spent[Stage::embed] += embed;
  }
  for (size_t i = 0; i < spent.ns.size(); ++i) times.ns[i] += spent.ns[i];
}

Status Engine::run_step(const Step& step, bool wants_logits, trace::Chain& chain, StageTimes& spent) {
  const trace::NvtxRange range(kind_of(step.stage), layer_of(step));
  const bool runs = wants_logits || !step.for_logits;
  if (step.stream_item >= 0) SLUICE_TRY(acquire(step, chain, spent));
  if (step.stage == Stage::matmul && recorder_.injector() != nullptr) {
    recorder_.injector()->take(trace::Fault::compute);
    recorder_.injector()->take(trace::Fault::alloc);
  }
  if (runs) SLUICE_TRY(backend_->run(step.op));
  if (step.stream_item >= 0) weights_->prefetcher()->release(static_cast<uint32_t>(step.stream_item));
  spent[step.stage] += chain.span(kind_of(step.stage), layer_of(step));
  return {};
}

// Waits for the step's item. What that takes is a wait only if there was one to be made.
Status Engine::acquire(const Step& step, trace::Chain& chain, StageTimes& spent) {
  AcquireTimes waits;
  const trace::NvtxRange range(trace::Kind::disk_wait, layer_of(step));   // or the copy's: that is known afterwards
  SLUICE_TRY(backend_->submit());   // the device works on while the item is waited for
  SLUICE_TRY(weights_->prefetcher()->acquire(static_cast<uint32_t>(step.stream_item), waits));
  if (waits.disk_wait_ns == 0 && waits.copy_wait_ns == 0) return {};
  const Stage stage = waits.disk_wait_ns > 0 ? Stage::disk_wait : Stage::copy_wait;
  spent[stage] += chain.span(kind_of(stage), layer_of(step), 0, static_cast<uint64_t>(step.stream_item));
  return {};
}

Status Engine::check_logits(std::span<const backend::Row> rows, std::span<const float> logits) const {
  size_t at = 0;
  for (const backend::Row& row : rows) {
    if (!row.wants_logits) continue;
    if (!all_finite(logits.subspan(at, shape_.vocab))) {
      return fail(
          ErrorCode::numeric,
          fmt::format("{}: the logits of position {} are not finite; check the file with `sluice verify`, or the "
                      "checkpoint that it was imported from",
                      container_.path(), row.position));
    }
    at += shape_.vocab;
  }
  return {};
}

}  // namespace sluice::exec
