// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/pass_graphs.hpp"

#include <algorithm>
#include <chrono>

#include "base/steady_ns.hpp"

namespace sluice::backend::cuda {

namespace {

// About eight layers: a replay of that many kernels takes the GPU longer than the host needs to submit the next one.
constexpr size_t kSegmentCommands = 80;
// Kinds of pass whose graphs are kept; a graph of 900 kernels takes about 1 MiB of host memory.
constexpr size_t kMostKinds = 32;
// Passes of more rows are long enough for launches to hide behind their kernels.
constexpr uint32_t kMostGraphRows = 64;
// Of the host in one pass, for graphs of the next kind.
constexpr std::chrono::milliseconds kTimeAhead{1};

bool same(DeviceAddress a, DeviceAddress b) { return a.buffer == b.buffer && a.offset == b.offset; }

bool same(const Weight& a, const Weight& b) {
  return same(a.values, b.values) && same(a.scales, b.scales) && same(a.zeros, b.zeros) && same(a.bias, b.bias) &&
         a.scheme == b.scheme && a.layout == b.layout && a.rows == b.rows && a.cols == b.cols &&
         a.group_elems == b.group_elems && a.scale == b.scale && a.has_zeros == b.has_zeros && a.has_bias == b.has_bias;
}

bool same(const Command& a, const Command& b) {
  if (a.kind != b.kind || a.index != b.index || a.rows != b.rows) return false;
  if (a.kind != CommandKind::operation) return true;
  const Op& x = a.op;
  const Op& y = b.op;
  if (x.kind != y.kind || x.layer != y.layer || x.weight_count != y.weight_count || x.accumulate != y.accumulate ||
      x.in != y.in) {
    return false;
  }
  for (int i = 0; i < kMaxWeights; ++i) {
    if (x.has_vector[i] != y.has_vector[i] || x.out[i] != y.out[i]) return false;
    if (x.has_vector[i] && !same(x.vectors[i], y.vectors[i])) return false;
    if (i < x.weight_count && !same(x.weights[i], y.weights[i])) return false;
  }
  return true;
}

}  // namespace

PassGraphs::~PassGraphs() {
  for (const std::unique_ptr<Pass>& pass : passes_) {
    for (Segment& segment : pass->segments) drop(segment);
  }
}

void PassGraphs::drop(Segment& segment) {
  if (segment.graph != nullptr) cudaGraphExecDestroy(segment.graph);
  segment.graph = nullptr;
}

PassGraphs::Pass& PassGraphs::pass_of(const PassKind& kind) {
  const auto found = std::find_if(passes_.begin(), passes_.end(), [&](const auto& pass) { return pass->kind == kind; });
  if (found != passes_.end()) return **found;
  if (passes_.size() == kMostKinds) {
    const auto oldest = std::min_element(passes_.begin(), passes_.end(), [](const auto& a, const auto& b) {
      return a->last_used < b->last_used;
    });
    for (Segment& segment : (*oldest)->segments) drop(segment);
    passes_.erase(oldest);
  }
  passes_.push_back(std::make_unique<Pass>());
  passes_.back()->kind = kind;
  return *passes_.back();
}

void PassGraphs::begin(const PassKind& kind) {
  pass_ = &pass_of(kind);
  pass_->last_used = ++clock_;
  segment_ = count_ = 0;
  as_expected_ = true;
  captures_.clear();
}

Status PassGraphs::add(const Command& command) {
  if (segment_ == pass_->segments.size()) {
    pass_->segments.emplace_back();
    as_expected_ = false;
  }
  std::vector<Command>& commands = pass_->segments[segment_].commands;
  if (count_ == commands.size() || !same(commands[count_], command)) {
    commands.resize(count_);
    commands.push_back(command);
    as_expected_ = false;
  }
  return ++count_ == kSegmentCommands ? flush() : Status();
}

Status PassGraphs::flush() {
  if (count_ == 0) return {};
  Segment& segment = pass_->segments[segment_++];
  if (count_ != segment.commands.size()) {
    segment.commands.resize(count_);
    as_expected_ = false;
  }
  const bool known = as_expected_;
  count_ = 0;
  as_expected_ = true;
  if (!known) drop(segment);
  if (!known || !worth_a_graph(segment, pass_->kind)) return launch_all(segment, pass_->kind, compute_);
  if (segment.graph == nullptr) SLUICE_TRY(capture(segment, pass_->kind));
  return check_(cudaGraphLaunch(segment.graph, compute_), "starting a graph");
}

Status PassGraphs::capture_ahead(const PassKind& kind) {
  Pass& ahead = pass_of(kind);
  ahead.last_used = clock_;
  if (ahead.segments.empty()) {
    for (const Segment& segment : pass_->segments) ahead.segments.push_back({.commands = segment.commands});
  }
  const auto begin = std::chrono::steady_clock::now();
  for (Segment& segment : ahead.segments) {
    if (segment.graph != nullptr || !worth_a_graph(segment, kind)) continue;
    SLUICE_TRY(capture(segment, kind));
    if (std::chrono::steady_clock::now() - begin > kTimeAhead) break;
  }
  return {};
}

// One kernel is no faster from a graph.
bool PassGraphs::worth_a_graph(const Segment& segment, const PassKind& kind) {
  return segment.commands.size() > 1 && kind.rows <= kMostGraphRows;
}

Status PassGraphs::launch_all(const Segment& segment, const PassKind& kind, cudaStream_t stream) {
  for (size_t i = 0; i < segment.commands.size(); ++i) SLUICE_TRY(launch_(segment.commands[i], kind, i > 0, stream));
  return {};
}

// Relaxed: what other threads do meanwhile (the prefetcher's copies) is none of the capture's business.
Status PassGraphs::capture(Segment& segment, const PassKind& kind) {
  const uint64_t begin = steady_ns();
  SLUICE_TRY(check_(cudaStreamBeginCapture(capture_, cudaStreamCaptureModeRelaxed), "capturing a graph"));
  Status launched = launch_all(segment, kind, capture_);
  cudaGraph_t graph = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(capture_, &graph);
  Status status = launched ? check_(ended, "capturing a graph") : std::move(launched);
  if (status) status = check_(cudaGraphInstantiate(&segment.graph, graph, 0), "instantiating a graph");
  if (!status) segment.graph = nullptr;
  if (graph != nullptr) cudaGraphDestroy(graph);
  captures_.push_back({.begin_ns = begin, .end_ns = steady_ns()});
  return status;
}

}  // namespace sluice::backend::cuda
