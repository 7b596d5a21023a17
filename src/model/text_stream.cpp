// SPDX-License-Identifier: Apache-2.0
#include "model/text_stream.hpp"

#include <algorithm>

namespace sluice::model {

namespace {
constexpr size_t kRoomBytes = 4096;
}

TextStream::TextStream(const Tokenizer* tokenizer, const std::vector<std::string>& stops) : stops_(stops) {
  if (tokenizer != nullptr) decoder_.emplace(*tokenizer);
  held_.reserve(kRoomBytes);
  ready_.reserve(kRoomBytes);
}

bool TextStream::push(int32_t id, bool last) {
  ready_.clear();
  if (!decoder_) return false;
  decoder_->push(id, held_);
  if (last) held_ += decoder_->finish();
  return release(last);
}

bool TextStream::finish() {
  ready_.clear();
  if (!decoder_) return false;
  held_ += decoder_->finish();
  return release(true);
}

// Moves text from held_ to ready_: up to a complete stop text, or all but the longest end that begins one.
bool TextStream::release(bool all) {
  size_t stop_at = std::string::npos;
  size_t keep = 0;
  for (const std::string& stop : stops_) {
    if (stop.empty()) continue;
    stop_at = std::min(stop_at, held_.find(stop));
    for (size_t length = std::min(stop.size(), held_.size()); !all && length > keep; --length) {
      if (held_.ends_with(std::string_view(stop).substr(0, length))) keep = length;
    }
  }
  const bool stopped = stop_at != std::string::npos;
  const size_t final_bytes = stopped ? stop_at : held_.size() - keep;
  ready_.append(held_, 0, final_bytes);
  held_.erase(0, stopped ? held_.size() : final_bytes);
  return stopped;
}

}  // namespace sluice::model
