// SPDX-License-Identifier: Apache-2.0
#include "calibrate/work_folder.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>

#include "base/units.hpp"
#include "import/source_file.hpp"
#include "storage/checksum.hpp"

namespace sluice::calibrate {
namespace {

using Json = nlohmann::ordered_json;
using storage::PlaneKind;

constexpr uint64_t kMaxJobBytes = 16 * kMiB;
constexpr const char* kPartial = ".part";

Unexpected failed(const std::string& path, const char* what) {
  const int code = errno;
  return fail(ErrorCode::io,
              fmt::format("{}: cannot {}: {}; mend that and run the command again, finished layers are kept", path,
                          what, std::strerror(code)),
              code);
}

Status write_all(int fd, std::span<const std::byte> bytes, const std::string& path) {
  while (!bytes.empty()) {
    const ssize_t wrote = ::write(fd, bytes.data(), bytes.size());
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote < 0) return failed(path, "be written");
    bytes = bytes.subspan(static_cast<size_t>(wrote));
  }
  return {};
}

Result<UniqueFd> create(const std::string& path) {
  UniqueFd fd(::open(path.c_str(), O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0644));
  if (!fd) return failed(path, "be made");
  return fd;
}

Status sync_folder(const std::string& folder) {
  const UniqueFd fd(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd || ::fsync(fd.get()) != 0) return failed(folder, "be synced");
  return {};
}

// Under its own name only when all of it is on the drive.
Status commit(UniqueFd fd, const std::string& path, const std::string& folder) {
  if (::fsync(fd.get()) != 0) return failed(path, "be synced");
  if (::rename((path + kPartial).c_str(), path.c_str()) != 0) return failed(path, "be renamed");
  return sync_folder(folder);
}

Status write_file(const std::string& path, const std::string& folder, const std::string& text) {
  SLUICE_TRY_ASSIGN(fd, create(path + kPartial));
  SLUICE_TRY(write_all(fd.get(), std::as_bytes(std::span(text)), path));
  return commit(std::move(fd), path, folder);
}

// What a tensor is, planes included.
Json describe(const EncodedTensor& encoded) {
  const storage::Tensor& t = encoded.tensor;
  Json planes = Json::array();
  for (const auto& [kind, bytes] : planes_of(encoded.planes)) planes.push_back({static_cast<int>(kind), bytes->size()});
  return {{"name", t.name},
          {"role", static_cast<int>(t.role)},
          {"layer", t.layer},
          {"rows", t.rows},
          {"cols", t.cols},
          {"scheme", static_cast<int>(t.scheme)},
          {"layout", static_cast<int>(t.layout)},
          {"group", t.group_elems},
          {"residual_group", t.residual_group_elems},
          {"scale_exponent", t.scale_exponent},
          {"planes", std::move(planes)}};
}

std::vector<std::byte>* plane_of(quant::Planes& planes, PlaneKind kind) {
  switch (kind) {
    case PlaneKind::values:
      return &planes.values;
    case PlaneKind::scales:
      return &planes.scales;
    case PlaneKind::zeros:
      return &planes.zeros;
    case PlaneKind::bias:
      return &planes.bias;
    case PlaneKind::residual:
      return &planes.residual;
    case PlaneKind::residual_scales:
      return &planes.residual_scales;
    default:
      return nullptr;
  }
}

EncodedTensor tensor_from(const Json& json) {
  EncodedTensor encoded;
  storage::Tensor& t = encoded.tensor;
  t.name = json["name"];
  t.role = static_cast<storage::Role>(json["role"].get<int>());
  t.layer = json["layer"];
  t.rows = json["rows"];
  t.cols = json["cols"];
  t.scheme = static_cast<storage::Scheme>(json["scheme"].get<int>());
  t.layout = static_cast<storage::Layout>(json["layout"].get<int>());
  t.group_elems = json["group"];
  t.residual_group_elems = json["residual_group"];
  t.scale_exponent = json["scale_exponent"];
  for (const Json& plane : json["planes"]) {
    if (auto* bytes = plane_of(encoded.planes, static_cast<PlaneKind>(plane[0].get<int>()))) bytes->resize(plane[1]);
  }
  place_planes(encoded);
  return encoded;
}

Unexpected damaged(const std::string& path) {
  return fail(ErrorCode::corrupt,
              fmt::format("{}: is missing, damaged or of another quantization; give --restart to begin anew", path));
}

Unexpected cannot_remove(const std::string& path, int code) {
  return fail(ErrorCode::io, fmt::format("{}: cannot be removed: {}; remove it by hand", path, std::strerror(code)),
              code);
}

bool is_ours(const std::string& name) {
  return name.starts_with("job.json") || name.starts_with("states-") || name.starts_with("layer-");
}

// Makes the folder and locks it.
Result<UniqueFd> hold(const std::string& path) {
  for (int attempt = 0;; ++attempt) {
    std::error_code error;
    std::filesystem::create_directories(path, error);
    if (error) {
      return fail(ErrorCode::io, fmt::format("{}: the folder cannot be made: {}", path, error.message()),
                  error.value());
    }
    Result<UniqueFd> lock = open_locked(path + "/lock", O_RDWR | O_CREAT | O_NOFOLLOW);
    if (lock) return lock;
    if (lock.error().os_code == EWOULDBLOCK) {
      return fail(ErrorCode::usage,
                  fmt::format("{}: another run is at work in it; wait until it ends, or give another --output", path),
                  EWOULDBLOCK);
    }
    // Not found: the run before has just removed the folder.
    if (lock.error().code != ErrorCode::not_found || attempt == 16) return lock;
  }
}

}  // namespace

Result<WorkFolder> WorkFolder::open(const std::string& path, const Json& job, bool restart) {
  SLUICE_TRY_ASSIGN(lock, hold(path));
  const std::string wanted = job.dump(2, ' ', false, Json::error_handler_t::replace);  // a path may be no UTF-8
  WorkFolder self(path, std::move(lock), storage::checksum(std::as_bytes(std::span(wanted))));
  const std::string job_path = path + "/job.json";
  const Result<std::string> found = import::read_text_file(job_path, kMaxJobBytes);
  if (restart || (!found && found.error().code == ErrorCode::not_found)) {
    SLUICE_TRY(self.clear());
    SLUICE_TRY(write_file(job_path, path, wanted));
    return self;
  }
  if (!found) return fail(found.error());
  if (*found != wanted) {
    return fail(ErrorCode::usage,
                fmt::format("{}: holds the layers of another quantization (source, recipe, calibration or options "
                            "differ); give --restart to throw them away",
                            path));
  }
  for (; self.is_of_this_job(self.layer_path(self.layers_done_)); ++self.layers_done_) {
    self.drop_states(self.layers_done_);  // a kill between a layer and the end of its states leaves them
  }
  return self;
}

std::string WorkFolder::states_path(uint32_t layer) const { return fmt::format("{}/states-{}", path_, layer); }
std::string WorkFolder::layer_path(uint32_t layer) const { return fmt::format("{}/layer-{}", path_, layer); }

bool WorkFolder::is_of_this_job(const std::string& file) const {
  const Result<UniqueFd> fd = open_file(file, O_RDONLY);
  uint64_t job_sum = 0;
  return fd && read_exactly(fd->get(), std::as_writable_bytes(std::span(&job_sum, 1)), 0, file) &&
         job_sum == job_sum_;
}

bool WorkFolder::has_states(uint32_t layer) const { return is_of_this_job(states_path(layer)); }

Result<UniqueFd> WorkFolder::open_states(uint32_t layer) const {
  if (!has_states(layer)) return damaged(states_path(layer));
  return open_file(states_path(layer), O_RDONLY);
}

// u64 xxh3 of job.json, then of each window the states and u64 xxh3 of them. A layer's states are hashed three times,
// at 7 GB/s: 1.8 s of the 26 s that a layer of an 8B takes with 128 windows of 2048.
Status WorkFolder::read_states(const UniqueFd& fd, uint32_t layer, uint32_t window, std::span<float> out) const {
  const std::string path = states_path(layer);
  const uint64_t offset = sizeof job_sum_ + window * (out.size_bytes() + sizeof(uint64_t));
  uint64_t expected = 0;
  SLUICE_TRY(read_exactly(fd.get(), std::as_writable_bytes(out), offset, path));
  SLUICE_TRY(read_exactly(fd.get(), std::as_writable_bytes(std::span(&expected, 1)), offset + out.size_bytes(), path));
  if (storage::checksum(std::as_bytes(out)) != expected) return damaged(path);
  return {};
}

Result<UniqueFd> WorkFolder::begin_states(uint32_t layer) const {
  SLUICE_TRY_ASSIGN(fd, create(states_path(layer) + kPartial));
  SLUICE_TRY(write_all(fd.get(), std::as_bytes(std::span(&job_sum_, 1)), states_path(layer)));
  return fd;
}

Status WorkFolder::append_states(const UniqueFd& fd, uint32_t layer, std::span<const float> states) const {
  const uint64_t checksum = storage::checksum(std::as_bytes(states));
  SLUICE_TRY(write_all(fd.get(), std::as_bytes(states), states_path(layer)));
  return write_all(fd.get(), std::as_bytes(std::span(&checksum, 1)), states_path(layer));
}

Status WorkFolder::finish_states(UniqueFd fd, uint32_t layer) const {
  return commit(std::move(fd), states_path(layer), path_);
}

// u64 xxh3 of job.json, u64 bytes of the JSON, the JSON, the planes in its order, u64 xxh3 of everything before.
Status WorkFolder::finish_layer(uint32_t layer, const std::vector<EncodedTensor>& tensors, const Json& notes) {
  const std::string path = layer_path(layer);
  Json described = Json::array();
  for (const EncodedTensor& encoded : tensors) described.push_back(describe(encoded));
  const std::string head = Json{{"tensors", std::move(described)}, {"notes", notes}}.dump();
  SLUICE_TRY_ASSIGN(fd, create(path + kPartial));
  storage::StreamingChecksum sum;
  const auto put = [&](std::span<const std::byte> bytes) {
    sum.update(bytes);
    return write_all(fd.get(), bytes, path);
  };
  const uint64_t begin[] = {job_sum_, head.size()};
  SLUICE_TRY(put(std::as_bytes(std::span(begin))));
  SLUICE_TRY(put(std::as_bytes(std::span(head))));
  for (const EncodedTensor& encoded : tensors) {
    for (const auto& plane : planes_of(encoded.planes)) SLUICE_TRY(put(*plane.second));
  }
  const uint64_t checksum = sum.finish();
  SLUICE_TRY(write_all(fd.get(), std::as_bytes(std::span(&checksum, 1)), path));
  SLUICE_TRY(commit(std::move(fd), path, path_));
  layers_done_ = layer + 1;
  drop_states(layer);
  return {};
}

// What cannot be removed only takes up space.
void WorkFolder::drop_states(uint32_t layer) const { static_cast<void>(::unlink(states_path(layer).c_str())); }

Result<WorkFolder::Layer> WorkFolder::read_layer(uint32_t layer) const {
  const std::string path = layer_path(layer);
  SLUICE_TRY_ASSIGN(fd, open_file(path, O_RDONLY));
  SLUICE_TRY_ASSIGN(bytes, import::regular_file_bytes(fd, path));
  std::vector<std::byte> whole(bytes);
  SLUICE_TRY(read_exactly(fd.get(), whole, 0, path));
  uint64_t begin[2] = {}, expected = 0;  // the job, bytes of the JSON
  if (bytes < sizeof begin + sizeof expected) return damaged(path);
  std::memcpy(begin, whole.data(), sizeof begin);
  std::memcpy(&expected, whole.data() + bytes - sizeof expected, sizeof expected);
  if (storage::checksum(std::span(whole).first(bytes - sizeof expected)) != expected || begin[0] != job_sum_) {
    return damaged(path);
  }
  const uint64_t head_bytes = begin[1];
  const auto* text = reinterpret_cast<const char*>(whole.data()) + sizeof begin;
  const Json head = Json::parse(text, text + head_bytes);  // the checksum says that we wrote it
  Layer read;
  read.notes = head["notes"];
  uint64_t at = sizeof begin + head_bytes;
  for (const Json& json : head["tensors"]) {
    read.tensors.push_back(tensor_from(json));
    for (const auto& plane : planes_of(read.tensors.back().planes)) {
      auto* into = const_cast<std::vector<std::byte>*>(plane.second);
      std::memcpy(into->data(), whole.data() + at, into->size());
      at += into->size();
    }
  }
  return read;
}

// job.json goes first. The lock stays, and so does what no run has made.
Status WorkFolder::clear() const {
  const std::string job_path = path_ + "/job.json";
  if (::unlink(job_path.c_str()) != 0 && errno != ENOENT) return cannot_remove(job_path, errno);
  SLUICE_TRY(sync_folder(path_));
  std::error_code error;
  for (std::filesystem::directory_iterator entry(path_, error), end; !error && entry != end; entry.increment(error)) {
    const std::string file = entry->path().string();
    if (!is_ours(entry->path().filename().string())) continue;
    if (::unlink(file.c_str()) != 0) return cannot_remove(file, errno);
  }
  if (error) return cannot_remove(path_, error.value());
  return {};
}

// The lock's name goes while it is held: who opens it afterwards makes a new one, and then the folder stays.
Status WorkFolder::remove() {
  SLUICE_TRY(clear());
  static_cast<void>(::unlink((path_ + "/lock").c_str()));
  lock_.reset();
  static_cast<void>(::rmdir(path_.c_str()));
  return {};
}

}  // namespace sluice::calibrate
