// SPDX-License-Identifier: Apache-2.0
#include "exec/weights.hpp"

#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <system_error>
#include <thread>
#include <utility>

#include "base/check.hpp"
#include "base/units.hpp"

namespace sluice::exec {

namespace {

using backend::DeviceAddress;
using plan::Tier;
using storage::IoMode;
using storage::kBlockBytes;
using storage::Tensor;

// io_uring refuses larger fixed buffers with EFAULT, and drivers cap what they import.
constexpr uint64_t kSlabBytes = kGiB;

// Asks the kernel for the pages that reads will land in, ahead of the reads: a read into memory that was never touched
// has the thread that submits it wait for them, which on a virtual machine can take longer than the drive. A kernel
// that does not know the call (before 5.14) leaves it at that.
class PageSupply {
 public:
  explicit PageSupply(std::vector<std::span<std::byte>> memory) : memory_(std::move(memory)) {
    if (memory_.empty()) return;
    try {
      for (std::jthread& thread : threads_) thread = std::jthread([this] { work(); });
    } catch (const std::system_error&) {
      // No thread to be had: the reads wait for their pages themselves.
    }
  }
  ~PageSupply() { next_ = memory_.size(); }

 private:
  static constexpr uint64_t kThreads = 2;

  void work() {
    for (size_t i = next_.fetch_add(1); i < memory_.size(); i = next_.fetch_add(1)) {
      ::madvise(memory_[i].data(), memory_[i].size(), MADV_POPULATE_WRITE);
    }
  }

  std::vector<std::span<std::byte>> memory_;   // in the order of the reads, pieces of some MiB
  std::atomic<size_t> next_ = 0;
  std::jthread threads_[kThreads];             // last: they end before the rest goes
};

}  // namespace

Result<std::unique_ptr<Weights>> Weights::open(const storage::Container& container, const plan::Plan& plan,
                                               backend::Backend& backend, const Options& options) {
  std::unique_ptr<Weights> self(new Weights(container, plan, backend));
  SLUICE_TRY(self->allocate_tiers());
  SLUICE_TRY(self->allocate_host_tier());
  const bool in_place = options.io == IoMode::mmap;
  SLUICE_CHECK(!in_place || plan.stream.empty());
  if (in_place) SLUICE_TRY(self->map_file(options));

  const bool streams_disk = std::any_of(plan.stream.begin(), plan.stream.end(),
                                        [](const plan::StreamItem& item) { return item.tier == Tier::disk; });
  const bool stages = streams_disk || std::any_of(self->loads_.begin(), self->loads_.end(),
                                                  [](const Load& load) { return load.host == nullptr; });
  if (stages) {
    SLUICE_TRY_ASSIGN(staging, Mapping::anonymous(kStagingSlots * kBlockBytes, "staging ring"));
    self->staging_ = std::move(staging);
    SLUICE_TRY(backend.register_host(self->staging_.bytes()));
  }
  std::unique_ptr<storage::ReadQueue> queue;
  if (!self->loads_.empty() || streams_disk) {
    SLUICE_TRY_ASSIGN(opened, storage::ReadQueue::open(container.path(),
                                                       {.mode = in_place ? IoMode::automatic : options.io,
                                                        .depth = kReadDepth,
                                                        .direct = true,
                                                        .faults = options.faults,
                                                        .log = options.log}));
    queue = std::move(opened);
    if (!in_place) self->io_name_ = queue->name();
    if (stages) {
      const std::span<std::byte> buffers[] = {self->staging_.bytes()};
      queue->register_buffers(buffers);
    }
    SLUICE_TRY(self->load(options, *queue));
  }
  if (in_place && options.verify_mapping) SLUICE_TRY(self->verify_mapping(options));

  if (!plan.stream.empty()) {
    Prefetcher::Options prefetch{.ring = self->ring_, .host_weights = self->host_weights_, .staging = {}};
    if (streams_disk) prefetch.staging = self->staging_.bytes();
    else queue.reset();
    prefetch.recorder = options.recorder;
    SLUICE_TRY_ASSIGN(prefetcher, Prefetcher::start(container, plan, backend, std::move(queue), std::move(prefetch)));
    self->prefetcher_ = std::move(prefetcher);
  }
  return self;
}

// The prefetcher stops first, then the copies it started end, then their memory goes.
Weights::~Weights() {
  prefetcher_.reset();
  if (staging_.size() > 0) backend_.unregister_host(staging_.bytes());
  for (const Mapping& slab : host_slabs_) backend_.unregister_host(slab.bytes());
}

// One allocation for resident weights, or as few as the device's largest allows, and one for the ring. Every tensor gets its
// address.
Status Weights::allocate_tiers() {
  const std::vector<Tensor>& tensors = container_.manifest().tensors;
  addresses_.resize(tensors.size());
  const uint64_t most = align_down(backend_.max_allocation_bytes(), storage::kPlaneAlignment);
  uint64_t left = plan_.resident_bytes;   // of tensors that have no place yet
  uint64_t at = 0, end = 0;               // in the last allocation
  DeviceAddress resident;
  std::span<std::byte> view;
  for (uint32_t i = 0; i < tensors.size(); ++i) {
    if (plan_.tiers[i] != Tier::device) continue;
    const uint64_t bytes = tensors[i].padded_bytes();
    if (at + bytes > end) {
      // What follows must fit too: the end of a full allocation stays empty.
      end = std::max(bytes, std::min(left, most));
      SLUICE_TRY_ASSIGN(memory, backend_.allocate(end, "resident weights"));
      resident = memory;
      view = backend_.host_view(resident, end);
      at = 0;
    }
    addresses_[i] = resident + at;
    loads_.push_back({.tensor = i, .host = view.empty() ? nullptr : view.data() + at});
    at += bytes;
    left -= bytes;
  }
  SLUICE_CHECK(left == 0);
  if (plan_.ring_bytes > 0) {
    SLUICE_TRY_ASSIGN(ring, backend_.allocate(plan_.ring_bytes, "stream ring"));
    ring_ = ring;
  }
  for (const plan::StreamItem& item : plan_.stream) addresses_[item.tensor] = ring_ + item.ring_offset;
  return {};
}

Status Weights::allocate_host_tier() {
  const std::vector<Tensor>& tensors = container_.manifest().tensors;
  uint64_t left = plan_.host_bytes;   // of tensors that have no place yet
  uint64_t at = 0;                    // in the last slab
  std::vector<std::byte*> places(tensors.size(), nullptr);
  for (uint32_t i = 0; i < tensors.size(); ++i) {
    if (plan_.tiers[i] != Tier::host) continue;
    const uint64_t bytes = tensors[i].padded_bytes();
    if (host_slabs_.empty() || at + bytes > host_slabs_.back().size()) {
      SLUICE_TRY_ASSIGN(slab, Mapping::anonymous(std::max(bytes, std::min(left, kSlabBytes)), "host tier"));
      SLUICE_TRY(backend_.register_host(slab.bytes()));
      host_slabs_.push_back(std::move(slab));
      at = 0;
    }
    places[i] = host_slabs_.back().data() + at;
    at += bytes;
    left -= bytes;
    loads_.push_back({.tensor = i, .host = places[i]});
    if (plan_.stream.empty()) {
      SLUICE_TRY_ASSIGN(address, backend_.import_host({places[i], bytes}));
      addresses_[i] = address;
    }
  }
  for (const plan::StreamItem& item : plan_.stream) {
    host_weights_.emplace_back();
    if (item.tier == Tier::host) host_weights_.back() = {places[item.tensor], item.bytes};
  }
  std::sort(loads_.begin(), loads_.end(), [](const Load& a, const Load& b) { return a.tensor < b.tensor; });
  return {};
}

Status Weights::map_file(const Options& options) {
  const std::vector<Tensor>& tensors = container_.manifest().tensors;
  SLUICE_TRY_ASSIGN(mapping, Mapping::file(container_.fd(), container_.file_bytes(), container_.path()));
  file_ = std::move(mapping);
  guard_ = storage::GuardedRange(file_.bytes());
  if (!guard_.active()) {
    log_info(options.log, "no SIGBUS handler: if the mapped file shrinks, the process dies (install_sigbus_handler())");
  }
  SLUICE_TRY_ASSIGN(base, backend_.import_host(file_.bytes()));
  for (uint32_t i = 0; i < tensors.size(); ++i) {
    if (plan_.tiers[i] == Tier::disk) addresses_[i] = base + tensors[i].offset();
  }
  io_name_ = "mmap";
  return {};
}

uint64_t Weights::load_bytes() const {
  uint64_t bytes = 0;
  for (const Load& load : loads_) bytes += container_.manifest().tensors[load.tensor].padded_bytes();
  return bytes;
}

// Where reads land in host memory, in their order.
std::vector<std::span<std::byte>> Weights::landing_places() const {
  constexpr uint64_t kPiece = 4 * kMiB;
  std::vector<std::span<std::byte>> pieces;
  for (const Load& load : loads_) {
    if (load.host == nullptr) continue;
    const uint64_t bytes = container_.manifest().tensors[load.tensor].padded_bytes();
    for (uint64_t at = 0; at < bytes; at += kPiece) pieces.push_back({load.host + at, std::min(kPiece, bytes - at)});
  }
  return pieces;
}

// Keeps the queue full with the blocks of all loads, in file order. Blocks land in any order; all that are there are taken,
// and new reads started, before one is checked.
Status Weights::load(const Options& options, storage::ReadQueue& queue) {
  const auto begin = std::chrono::steady_clock::now();
  const uint64_t total = load_bytes();
  const PageSupply supply(landing_places());
  std::vector<Flight> flights(kStagingSlots);
  std::deque<uint32_t> idle;   // longest first: a copy out of that slot is the likeliest to be done
  std::deque<uint32_t> landed;
  for (uint32_t slot = 0; slot < flights.size(); ++slot) {
    SLUICE_TRY_ASSIGN(event, backend_.create_event());
    flights[slot].event = event;
    idle.push_back(slot);
  }
  size_t next_load = 0, next_read = 0;
  std::vector<BlockRead> reads;
  const auto start_reads = [&]() -> Status {
    while (!idle.empty() && next_load < loads_.size() && queue.in_flight() < queue.depth()) {
      if (next_read == 0) reads = reads_of(container_.manifest().tensors[loads_[next_load].tensor]);
      Flight& flight = flights[idle.front()];
      flight.read = std::move(reads[next_read]);
      flight.load = loads_[next_load];
      SLUICE_TRY(start_load(queue, flight, idle.front()));
      idle.pop_front();
      if (++next_read == reads.size()) {
        next_read = 0;
        ++next_load;
      }
    }
    return {};
  };
  while (true) {
    SLUICE_TRY(start_reads());
    while (queue.in_flight() > 0 && (landed.empty() || queue.ready())) {
      SLUICE_TRY_ASSIGN(done, queue.wait());
      landed.push_back(static_cast<uint32_t>(done.tag));
      SLUICE_TRY(start_reads());
    }
    if (landed.empty()) break;
    Flight& flight = flights[landed.front()];
    SLUICE_TRY(finish_load(flight));
    idle.push_back(landed.front());
    landed.pop_front();
    loaded_bytes_ += flight.read.bytes;
    if (options.progress) options.progress(loaded_bytes_, total);
  }
  for (const Flight& flight : flights) {
    if (flight.copying) SLUICE_TRY(backend_.host_wait(flight.event));
  }
  load_retries_ = queue.retries();
  load_seconds_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return {};
}

Status Weights::start_load(storage::ReadQueue& queue, Flight& flight, uint32_t slot) {
  if (flight.load.host != nullptr) {
    flight.data = {flight.load.host + flight.read.tensor_offset, flight.read.bytes};
  } else {
    if (std::exchange(flight.copying, false)) SLUICE_TRY(backend_.host_wait(flight.event));
    flight.data = staging_.bytes().subspan(slot * kBlockBytes, flight.read.bytes);
  }
  SLUICE_CHECK(queue.start(flight.read.offset, flight.data, slot));
  return queue.flush();
}

Status Weights::finish_load(Flight& flight) {
  const Tensor& tensor = container_.manifest().tensors[flight.load.tensor];
  SLUICE_TRY(check_read(container_, tensor, flight.read, flight.data));
  if (flight.load.host != nullptr) return {};
  SLUICE_TRY(backend_.copy_to_device(addresses_[flight.load.tensor] + flight.read.tensor_offset, flight.data));
  backend_.record_copy(flight.event);
  flight.copying = true;
  return {};
}

double Weights::disk_rate(uint64_t least_bytes) const {
  if (bytes_read() < least_bytes) return 0;
  const double seconds = load_seconds_ + (prefetcher_ ? prefetcher_->busy_seconds() : 0);
  return seconds > 0 ? static_cast<double>(bytes_read()) / seconds : 0;
}

// Compares what the kernels will read in place.
Status Weights::verify_mapping(const Options& options) {
  const std::vector<Tensor>& tensors = container_.manifest().tensors;
  uint64_t total = 0, done = 0;
  for (uint32_t i = 0; i < tensors.size(); ++i) {
    if (plan_.tiers[i] == Tier::disk) total += tensors[i].padded_bytes();
  }
  for (uint32_t i = 0; i < tensors.size(); ++i) {
    if (plan_.tiers[i] != Tier::disk) continue;
    for (const storage::Plane& plane : tensors[i].planes) {
      for (uint64_t block = 0; block < plane.block_sums.size(); ++block) {
        const uint64_t bytes = storage::block_bytes(plane, block);
        const std::span<const std::byte> data = file_.bytes().subspan(plane.offset + block * kBlockBytes, bytes);
        Status checked = storage::check_block(container_.path(), tensors[i], plane, block, data);
        SLUICE_TRY(check_mapping());   // a shrunk file is the better message
        SLUICE_TRY(std::move(checked));
        done += bytes;
        if (options.progress) options.progress(done, total);
      }
    }
  }
  return {};
}

Status Weights::check_mapping() const {
  if (!guard_.active() || !guard_.hit()) return {};
  return fail(ErrorCode::corrupt,
              fmt::format("{}: the mapped file shrank or could not be read at offset {}; restore it and open the model "
                          "again", container_.path(), guard_.hit_offset()));
}

}  // namespace sluice::exec
