// SPDX-License-Identifier: Apache-2.0
// Opening a .sluice container: every check before any allocation by what the file says.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "base/handles.hpp"
#include "sluice/log.hpp"
#include "sluice/result.hpp"
#include "storage/manifest.hpp"

namespace sluice::storage {

inline constexpr uint32_t kFormatVersion = 1;
inline constexpr uint64_t kHeaderBytes = 4096;

// What of an INT4 tensor with residual planes is computed with.
enum class Precision : uint8_t {
  int4,   // the planes without the residual, whose bytes are never read
  fine,   // both: value = base + r * s_r
};

// An open container. Immutable after `open`; any thread may read it.
class Container {
 public:
  // Opens and validates in the order of docs/container.md: header checksum, magic, version, sizes against the file,
  // manifest checksum, FlatBuffers verifier, counts against caps, planes against the file, shapes against schemes,
  // roles against the architecture (every tensor a model of this shape needs is there once, with the right shape).
  // Errors: not_found, io, corrupt, unsupported (a newer version); the message names file, tensor and offset.
  static Result<Container> open(const std::string& path);

  const std::string& path() const { return path_; }
  const Manifest& manifest() const { return manifest_; }
  uint64_t file_bytes() const { return file_bytes_; }
  const std::string& uuid() const { return uuid_; }   // 36 characters
  int fd() const { return fd_.get(); }                // buffered, read-only

  // Whether any tensor has residual planes.
  bool has_residuals() const;
  // Once, before anything is planned: leaves the residual planes out of the manifest, or makes them tensors of their own
  // behind their base (int4, `values` and `scales`), so that each has a tier. Error: unsupported (a residual that is not
  // the tensor's last two planes, or one of a matrix in act-order).
  Status set_precision(Precision precision);

  // Reads every column permutation and compares its checksums: an entry that leads out of its matrix would be an address
  // out of a kernel's input. Errors: io, corrupt.
  Status check_permutations() const;

  // The tensor of that role and layer (of two, the base), or nullptr.
  const Tensor* find(Role role, int32_t layer = -1) const;

  // Reads every plane and compares every checksum, padding included (it must be zero). `progress` gets bytes done and
  // bytes in all. Errors: io, corrupt (tensor, plane kind, file offset of the first bad block).
  Status verify(const std::function<void(uint64_t done, uint64_t total)>& progress) const;

 private:
  std::string path_;
  UniqueFd fd_;
  uint64_t file_bytes_ = 0;
  std::string uuid_;
  Manifest manifest_;
};

// Compares one checksum block. `data` holds plane.block_sums[block]'s bytes (kBlockBytes, or what is left at the end).
// Error: corrupt, naming path, tensor, plane and offset.
Status check_block(const std::string& path, const Tensor& tensor, const Plane& plane, uint64_t block,
                   std::span<const std::byte> data);

// Bytes of checksum block `block` of `plane`, without padding.
uint64_t block_bytes(const Plane& plane, uint64_t block);

}  // namespace sluice::storage
