// SPDX-License-Identifier: Apache-2.0
// Writing a .sluice container: planes stream through, the header goes in last, then fsync and rename.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "sluice/result.hpp"
#include "storage/manifest.hpp"

namespace sluice::storage {

// Writes to `path` + ".tmp-<pid>" in the same folder. If it is destroyed before `finish` succeeds, the temporary file is
// removed and `path` is as it was. What killed writers of `path` left is removed at the start. One thread.
class ContainerWriter {
 public:
  static Result<ContainerWriter> create(const std::string& path);
  ContainerWriter(ContainerWriter&&) noexcept;
  ContainerWriter& operator=(ContainerWriter&&) noexcept;
  ~ContainerWriter();

  // Starts a tensor; `tensor.planes` is ignored. The order of calls is the order in the file (execution order).
  Status begin_tensor(const Tensor& tensor);
  // Starts the next plane of that tensor. Its size is expected_plane_bytes(tensor, kind).
  Status begin_plane(PlaneKind kind);
  // The next bytes of the plane, any amount.
  Status append(std::span<const std::byte> data);
  // Ends plane or tensor. A plane whose size is not the expected one is an `internal` error.
  Status end_plane();
  Status end_tensor();

  // One plane in one call: begin, append, end.
  Status write_plane(PlaneKind kind, std::span<const std::byte> data);

  // Bytes written so far, padding included.
  uint64_t bytes_written() const;

  // Writes manifest (its `tensors` are replaced by what was written) and header, syncs, renames, syncs the folder.
  // Errors: io (a full disk: "…: no space left …, N GiB more are needed at least" where it can be known).
  Status finish(Manifest manifest);

 private:
  struct State;
  explicit ContainerWriter(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace sluice::storage
