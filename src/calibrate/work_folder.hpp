// SPDX-License-Identifier: Apache-2.0
// What a quantization keeps on disk until it is finished, so that one that was killed goes on where it was:
//
//   OUTPUT.work/lock          locked by the run that is at work
//   OUTPUT.work/job.json      what is being made of what; another job finds it and is refused
//   OUTPUT.work/states-N      the input of layer N: FP32 [window][hidden] of each window, with its checksum behind it
//   OUTPUT.work/layer-N       the finished tensors of layer N, with a checksum behind them
//
// Every file is written under another name, synced and renamed. states-(N+1) comes before layer-N, and states-N goes
// after it: whenever the process ends, the layers that are there and the states behind them are whole. Both begin with
// the checksum of their job.json, and count for no other job. job.json is the first to be removed: without it, what is
// left of a removal that was killed is removed before a new one is written.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/handles.hpp"
#include "calibrate/layer_runner.hpp"
#include "sluice/result.hpp"

namespace sluice::calibrate {

class WorkFolder {
 public:
  // Opens or makes `path`, for this object alone. `job`: everything that the result depends on. `restart`: what is
  // there is thrown away. Errors: io, usage (it belongs to another job, or another run is at work in it).
  static Result<WorkFolder> open(const std::string& path, const nlohmann::ordered_json& job, bool restart);

  // Layers that are finished, from 0 on.
  uint32_t layers_done() const { return layers_done_; }

  // The states before layer `layer`, window by window. Errors: corrupt (a checksum, or none of this job), io.
  bool has_states(uint32_t layer) const;
  Result<UniqueFd> open_states(uint32_t layer) const;
  Status read_states(const UniqueFd& fd, uint32_t layer, uint32_t window, std::span<float> out) const;
  // The states before layer `layer` in the making: windows are appended, then `finish_states`.
  Result<UniqueFd> begin_states(uint32_t layer) const;
  Status append_states(const UniqueFd& fd, uint32_t layer, std::span<const float> states) const;
  Status finish_states(UniqueFd fd, uint32_t layer) const;

  // Marks the layer as finished and drops its input states. `notes`: of the report, kept with it.
  Status finish_layer(uint32_t layer, const std::vector<EncodedTensor>& tensors, const nlohmann::ordered_json& notes);
  struct Layer {
    std::vector<EncodedTensor> tensors;
    nlohmann::ordered_json notes;
  };
  // Error: corrupt (the checksum), io.
  Result<Layer> read_layer(uint32_t layer) const;

  // Removes everything: the result is complete. The last call.
  Status remove();

 private:
  WorkFolder(std::string path, UniqueFd lock, uint64_t job_sum)
      : path_(std::move(path)), lock_(std::move(lock)), job_sum_(job_sum) {}
  std::string states_path(uint32_t layer) const;
  std::string layer_path(uint32_t layer) const;
  bool is_of_this_job(const std::string& file) const;
  void drop_states(uint32_t layer) const;
  Status clear() const;

  std::string path_;
  UniqueFd lock_;
  uint64_t job_sum_;  // of job.json
  uint32_t layers_done_ = 0;
};

}  // namespace sluice::calibrate
