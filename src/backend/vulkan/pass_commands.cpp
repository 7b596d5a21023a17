// SPDX-License-Identifier: Apache-2.0
#include "backend/vulkan/pass_commands.hpp"

#include <algorithm>

#include "base/steady_ns.hpp"

namespace sluice::backend::vulkan {

namespace {

// About eight layers of a decoding pass; one layer of a prefill, whose kernels take milliseconds each.
constexpr size_t kSegmentCommands = 80, kLongSegmentCommands = 10;
constexpr uint32_t kLongRows = 64;
// Kinds of pass whose command buffers are kept.
constexpr size_t kMostKinds = 24;

}  // namespace

PassCommands::~PassCommands() {
  for (const std::unique_ptr<Pass>& pass : passes_) drop(*pass);
}

void PassCommands::drop(Pass& pass) {
  for (Segment& segment : pass.segments) queue_.free(segment.recorded);
  pass.segments.clear();
}

void PassCommands::begin(const PassKind& kind) {
  const auto found = std::find_if(passes_.begin(), passes_.end(), [&](const auto& pass) { return pass->kind == kind; });
  if (found != passes_.end()) {
    pass_ = found->get();
  } else {
    if (passes_.size() == kMostKinds) {
      const auto oldest = std::min_element(passes_.begin(), passes_.end(), [](const auto& a, const auto& b) {
        return a->last_used < b->last_used;
      });
      drop(**oldest);
      passes_.erase(oldest);
    }
    passes_.push_back(std::make_unique<Pass>());
    pass_ = passes_.back().get();
    pass_->kind = kind;
  }
  pass_->last_used = ++clock_;
  segment_ = count_ = 0;
  as_expected_ = true;
  recordings_.clear();
}

Status PassCommands::add(const Command& command) {
  if (segment_ == pass_->segments.size()) {
    pass_->segments.emplace_back();
    as_expected_ = false;
  }
  std::vector<Command>& commands = pass_->segments[segment_].commands;
  if (count_ == commands.size() || !(commands[count_] == command)) {
    commands.resize(count_);
    commands.push_back(command);
    as_expected_ = false;
  }
  const size_t most = pass_->kind.rows >= kLongRows ? kLongSegmentCommands : kSegmentCommands;
  return ++count_ == most ? flush() : Status();
}

Status PassCommands::flush() {
  if (count_ == 0) return {};
  Segment& segment = pass_->segments[segment_++];
  const bool known = as_expected_ && count_ == segment.commands.size() && segment.recorded != VK_NULL_HANDLE;
  segment.commands.resize(count_);
  count_ = 0;
  as_expected_ = true;
  if (!known) SLUICE_TRY(record(segment));
  return submit_(segment.recorded);
}

Status PassCommands::record(Segment& segment) {
  const uint64_t begin = steady_ns();
  if (segment.recorded == VK_NULL_HANDLE) {
    SLUICE_TRY(check_(queue_.allocate(segment.recorded), "allocating a command buffer"));
  }
  SLUICE_TRY(check_(queue_.begin(segment.recorded, false), "recording a pass"));
  for (const Command& command : segment.commands) SLUICE_TRY(record_(command, segment.recorded));
  SLUICE_TRY(check_(queue_.end(segment.recorded), "recording a pass"));
  recordings_.push_back({.begin_ns = begin, .end_ns = steady_ns()});
  return {};
}

}  // namespace sluice::backend::vulkan
