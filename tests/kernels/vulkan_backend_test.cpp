// SPDX-License-Identifier: Apache-2.0
// The Vulkan backend where things go wrong: no loader, no driver, no memory, a device that is lost; copies where host
// memory cannot be imported; and the times of a pass.
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "backend/vulkan/vulkan_backend.hpp"
#include "base/handles.hpp"
#include "temp_folder.hpp"
#include "vulkan_fixture.hpp"

namespace {

using namespace sluice;
using namespace sluice::backend;
using namespace sluice::testing;
using vulkan::VulkanBackend;

Shape small_shape() {
  static const std::vector<float> frequencies(16, 0.5f);
  Shape shape;
  shape.layers = 2, shape.hidden = 64, shape.heads = 2, shape.kv_heads = 1, shape.head_dim = 32, shape.ffn = 128;
  shape.vocab = 96, shape.inverse_frequencies = frequencies, shape.rotary_dims = 32;
  shape.context = 128, shape.sessions = 2, shape.max_rows = 4, shape.max_logit_rows = 2;
  return shape;
}

std::unique_ptr<VulkanBackend> backend_or_fail() {
  gpu();   // skips where there is no device
  auto made = VulkanBackend::create({}, {});
  INFO((made ? std::string() : made.error().message));
  REQUIRE(made);
  return std::move(*made);
}

// Functions in the place of the driver's.
VkResult lost_submit(VkQueue, uint32_t, const VkSubmitInfo*, VkFence) { return VK_ERROR_DEVICE_LOST; }
VkResult lost_wait(VkDevice, const VkSemaphoreWaitInfo*, uint64_t) { return VK_ERROR_DEVICE_LOST; }
VkResult lost_counter(VkDevice, VkSemaphore, uint64_t*) { return VK_ERROR_DEVICE_LOST; }
VkResult no_memory(VkDevice, const VkMemoryAllocateInfo*, const VkAllocationCallbacks*, VkDeviceMemory*) {
  return VK_ERROR_OUT_OF_DEVICE_MEMORY;
}
VkResult no_buffer(VkDevice, const VkBufferCreateInfo*, const VkAllocationCallbacks*, VkBuffer*) {
  return VK_ERROR_OUT_OF_HOST_MEMORY;
}
VkResult no_import(VkDevice, VkExternalMemoryHandleTypeFlagBits, const void*, VkMemoryHostPointerPropertiesEXT*) {
  return VK_ERROR_INVALID_EXTERNAL_HANDLE;
}
VkResult no_pipeline(VkDevice, VkPipelineCache, uint32_t, const VkComputePipelineCreateInfo*, const VkAllocationCallbacks*,
                     VkPipeline*) {
  return VK_ERROR_OUT_OF_HOST_MEMORY;
}

Op norm_op() {
  Op op;
  op.kind = OpKind::rms_norm;
  op.in = Slot::residual;
  op.out[0] = Slot::normed;
  return op;
}

// One operation of one row.
Status one_pass(Backend& backend) {
  const Row row{.session = 0, .position = 0, .wants_logits = false};
  const std::vector<float> embedding(64, 1.0f);
  SLUICE_TRY(backend.begin_pass({&row, 1}, embedding));
  SLUICE_TRY(backend.run(norm_op()));
  return backend.finish_pass({});
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST_CASE("without a loader the error says what to install, and what runs instead") {
  const auto made = VulkanBackend::create({.library = "libvulkan-not-there.so.1"}, {});
  REQUIRE(!made);
  CHECK(made.error().code == ErrorCode::not_found);
  CHECK(contains(made.error().message, "libvulkan1"));
  CHECK(contains(made.error().message, "--backend cpu"));
}

TEST_CASE("a library without Vulkan in it is no loader") {
  const auto made = VulkanBackend::create({.library = "libm.so.6"}, {});
  REQUIRE(!made);
  CHECK(made.error().code == ErrorCode::not_found);
}

TEST_CASE("without a driver, and with a broken one, the error names the remedy") {
  gpu();
  for (const char* driver : {"/nonexistent/driver.json", "/dev/null"}) {
    ::setenv("VK_ICD_FILENAMES", driver, 1);
    ::setenv("VK_DRIVER_FILES", driver, 1);
    const auto made = VulkanBackend::create({}, {});
    const auto listed = vulkan::list_devices({});
    ::unsetenv("VK_ICD_FILENAMES");
    ::unsetenv("VK_DRIVER_FILES");
    INFO(driver);
    REQUIRE(!made);
    CHECK(made.error().code == ErrorCode::not_found);
    CHECK(contains(made.error().message, "--backend cpu"));
    CHECK((!listed || listed->empty()));
  }
}

TEST_CASE("a device that computes on the CPU is taken by name only") {
  const auto devices = vulkan::list_devices({});
  REQUIRE(devices);
  gpu();
  REQUIRE(!devices->empty());
  bool only_software = true;
  for (const vulkan::DeviceReport& device : *devices) {
    std::printf("%s (%s), %s, Vulkan %s%s%s\n", device.name.c_str(), device.kind.c_str(), device.driver.c_str(),
                device.version.c_str(), device.missing.empty() ? "" : ", lacks ", device.missing.c_str());
    only_software = only_software && device.kind == "software";
  }
  const auto made = VulkanBackend::create({.software = false}, {});
  CHECK(made.has_value() == !only_software);
  if (made) return;
  CHECK(made.error().code == ErrorCode::not_found);
  CHECK(contains(made.error().message, "only by name"));
}

TEST_CASE("a GPU is looked for among device files before any driver is loaded") {
  const test::TempFolder folder;
  const std::string dev = folder.path();
  CHECK(!vulkan::has_gpu_file(dev));
  for (const char* name : {"/nvidiactl", "/dri/renderD129"}) {
    if (std::string(name).starts_with("/dri")) REQUIRE(::mkdir((dev + "/dri").c_str(), 0700) == 0);
    std::fclose(std::fopen((dev + name).c_str(), "w"));
    CHECK(vulkan::has_gpu_file(dev));
    REQUIRE(::unlink((dev + name).c_str()) == 0);
    CHECK(!vulkan::has_gpu_file(dev));
  }
}

TEST_CASE("refused memory is a typed error that names its use, and the backend goes on working") {
  auto backend = backend_or_fail();
  auto& vk = backend->device().vk;
  const auto allocate = vk.vkAllocateMemory;
  vk.vkAllocateMemory = no_memory;
  auto refused = backend->allocate(uint64_t{1} << 20, "resident weights");
  REQUIRE(!refused);
  CHECK(refused.error().code == ErrorCode::out_of_memory);
  CHECK(contains(refused.error().message, "resident weights"));
  CHECK(contains(refused.error().message, "--device-memory"));
  CHECK(contains(refused.error().message, backend->device_name().c_str()));
  const auto prepared = backend->prepare(small_shape());
  REQUIRE(!prepared);
  CHECK(prepared.error().code == ErrorCode::out_of_memory);
  vk.vkAllocateMemory = allocate;

  const auto create = vk.vkCreateBuffer;
  vk.vkCreateBuffer = no_buffer;
  refused = backend->allocate(4096, "stream ring");
  REQUIRE(!refused);
  CHECK(refused.error().code == ErrorCode::out_of_memory);
  vk.vkCreateBuffer = create;

  refused = backend->allocate(uint64_t{1} << 60, "resident weights");
  REQUIRE(!refused);
  CHECK(refused.error().code == ErrorCode::out_of_memory);
  CHECK(contains(refused.error().message, "--device-memory"));

  REQUIRE(backend->prepare(small_shape()));
  REQUIRE(one_pass(*backend));
}

TEST_CASE("a pipeline that cannot be made fails the pass with a typed error") {
  auto backend = backend_or_fail();
  REQUIRE(backend->prepare(small_shape()));
  backend->device().vk.vkCreateComputePipelines = no_pipeline;
  const Status status = one_pass(*backend);
  REQUIRE(!status);
  CHECK(status.error().code == ErrorCode::out_of_memory);
}

TEST_CASE("a lost device ends the backend with the same error from every call, and a new backend works") {
  const auto lose = [](VulkanBackend& backend, int where) {
    auto& vk = backend.device().vk;
    if (where == 0) vk.vkQueueSubmit = lost_submit;
    if (where == 1) vk.vkWaitSemaphores = lost_wait;
    if (where == 2) vk.vkGetSemaphoreCounterValue = lost_counter;
  };
  for (const int where : {0, 1, 2}) {
    INFO("lost in call " << where);
    auto backend = backend_or_fail();
    REQUIRE(backend->prepare(small_shape()));
    const auto memory = backend->allocate(4096, "weights");
    REQUIRE(memory);
    const auto event = backend->create_event();
    REQUIRE(event);
    REQUIRE(one_pass(*backend));
    lose(*backend, where);

    const std::vector<std::byte> bytes(64);
    if (where == 2) {
      backend->record_copy(*event);
      CHECK(backend->done(*event));
    } else {
      CHECK(!one_pass(*backend));
    }
    Status status = one_pass(*backend);
    REQUIRE(!status);
    CHECK(status.error().code == ErrorCode::device);
    CHECK(status.error().os_code == VK_ERROR_DEVICE_LOST);
    CHECK(contains(status.error().message, backend->device_name().c_str()));
    CHECK(contains(status.error().message, "open the model again"));
    std::vector<std::byte> kv(backend->kv_bytes(1));
    for (const Status& other : {backend->copy_to_device(*memory, bytes), backend->host_wait(*event),
                                backend->save_kv(0, 1, kv), backend->load_kv(0, 1, kv), backend->copy_kv(0, 1, 1)}) {
      REQUIRE(!other);
      CHECK(other.error().message == status.error().message);
    }
    CHECK(!backend->allocate(4096, "weights"));
    CHECK(backend->done(*event));
    backend->record_compute(*event);   // returns
    backend->compute_waits(*event);
    backend->copy_waits(*event);
    backend.reset();

    auto again = backend_or_fail();
    REQUIRE(again->prepare(small_shape()));
    CHECK(one_pass(*again));
  }
}

namespace {

// What lies at `place`, as sums of 64 neighbours: the logits of an FP32 matrix [96][64] there, for activations that
// are all 1 / sqrt(1 + eps).
std::vector<float> sums_at(Backend& backend, DeviceAddress place) {
  const Row row{.session = 0, .position = 0, .wants_logits = true};
  const std::vector<float> embedding(64, 1.0f);
  std::vector<float> logits(96);
  Op product;
  product.kind = OpKind::matmul;
  product.in = Slot::normed;
  product.out[0] = Slot::logits;
  product.weight_count = 1;
  product.weights[0] = {.scheme = storage::Scheme::f32, .layout = storage::Layout::rows, .rows = 96, .cols = 64,
                        .values = place};
  REQUIRE(backend.begin_pass({&row, 1}, embedding));
  REQUIRE(backend.run(norm_op()));
  REQUIRE(backend.run(product));
  REQUIRE(backend.finish_pass(logits));
  return logits;
}

}  // namespace

TEST_CASE("copies arrive from memory that is imported, that cannot be, and that nobody registered") {
  for (const int how : {0, 1, 2}) {
    INFO("way " << how);
    auto backend = backend_or_fail();
    REQUIRE(backend->prepare(small_shape()));
    constexpr size_t kBytes = size_t{10} << 20;   // several pieces of the bounce buffer
    auto memory = Mapping::anonymous(kBytes, "a test");
    REQUIRE(memory);
    const std::span<std::byte> bytes = memory->bytes().first(kBytes);
    auto* floats = reinterpret_cast<float*>(bytes.data());
    for (size_t i = 0; i < kBytes / sizeof(float); ++i) floats[i] = static_cast<float>(i * 2654435761u % 1009);
    if (how == 1) backend->device().vk.vkGetMemoryHostPointerPropertiesEXT = no_import;
    if (how < 2) REQUIRE(backend->register_host(bytes));
    const auto place = backend->allocate(kBytes, "weights");
    const auto event = backend->create_event();
    REQUIRE(place);
    REQUIRE(event);
    REQUIRE(backend->copy_to_device(*place, bytes.first(kBytes / 2)));
    REQUIRE(backend->copy_to_device(*place + kBytes / 2, bytes.subspan(kBytes / 2)));
    backend->record_copy(*event);
    backend->compute_waits(*event);
    constexpr size_t kWindow = 96 * 64 * sizeof(float);
    for (const size_t at : {size_t{0}, (size_t{2} << 20) - 4096, kBytes / 2 - 8192, kBytes - kWindow}) {
      const std::vector<float> sums = sums_at(*backend, *place + at);
      size_t wrong = 0;
      for (size_t n = 0; n < 96; ++n) {
        double sum = 0;
        for (size_t k = 0; k < 64; ++k) sum += double{floats[at / sizeof(float) + n * 64 + k]};
        // The norm's factor is within 1e-5 / 2 of 1; a float in another place is off by 1 in 30000 or more.
        wrong += std::fabs(double{sums[n]} - sum) <= 1e-5 * sum ? 0 : 1;
      }
      INFO("offset " << at);
      CHECK(wrong == 0);
    }
    REQUIRE(backend->host_wait(*event));
    CHECK(backend->done(*event));
    if (how < 2) backend->unregister_host(bytes);
  }
}

namespace {

// Recordings and stamps counted in the driver's place, and results that are never there.
PFN_vkBeginCommandBuffer driver_begin = nullptr;
int recordings = 0;
VkResult counted_begin(VkCommandBuffer commands, const VkCommandBufferBeginInfo* info) {
  ++recordings;
  return driver_begin(commands, info);
}
PFN_vkCmdWriteTimestamp driver_stamp = nullptr;
PFN_vkCmdResetQueryPool driver_reset = nullptr;
int stamps = 0, resets = 0;
void counted_stamp(VkCommandBuffer commands, VkPipelineStageFlagBits stage, VkQueryPool pool, uint32_t query) {
  ++stamps;
  driver_stamp(commands, stage, pool, query);
}
void counted_reset(VkCommandBuffer commands, VkQueryPool pool, uint32_t first, uint32_t count) {
  ++resets;
  driver_reset(commands, pool, first, count);
}
VkResult not_ready(VkDevice, VkQueryPool, uint32_t, uint32_t, size_t, void*, VkDeviceSize, VkQueryResultFlags) {
  return VK_NOT_READY;
}

// Passes of `norms` operations, in front of the second of which `copied` bytes are copied and waited for.
class TimedPasses {
 public:
  static constexpr size_t kBytes = size_t{32} << 20;

  TimedPasses() : backend_(backend_or_fail()) {
    Shape shape = small_shape();
    shape.layers = 8;   // room for two segments
    REQUIRE(backend_->prepare(shape));
    const auto place = backend_->allocate(kBytes, "weights");
    const auto event = backend_->create_event();
    REQUIRE(place);
    REQUIRE(event);
    place_ = *place;
    event_ = *event;
  }

  VulkanBackend& backend() { return *backend_; }

  // Returns the nanoseconds that the host saw.
  uint64_t run(uint32_t norms, size_t copied) {
    const auto start = std::chrono::steady_clock::now();
    const Row row{.session = 0, .position = 0, .wants_logits = false};
    REQUIRE(backend_->begin_pass({&row, 1}, embedding_));
    CHECK(backend_->op_times().empty());
    for (uint32_t i = 0; i < norms; ++i) {
      if (i == 1 && copied > 0) {
        REQUIRE(backend_->submit());
        REQUIRE(backend_->copy_to_device(place_, std::span(bytes_).first(copied)));
        backend_->record_copy(event_);
        backend_->compute_waits(event_);
      }
      REQUIRE(backend_->run(norm_op()));
    }
    REQUIRE(backend_->finish_pass({}));
    const auto elapsed = std::chrono::steady_clock::now() - start;
    return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(elapsed).count());
  }

 private:
  std::unique_ptr<VulkanBackend> backend_;
  std::vector<float> embedding_ = std::vector<float>(64, 1.0f);
  std::vector<std::byte> bytes_ = std::vector<std::byte>(kBytes);
  DeviceAddress place_;
  EventId event_ = 0;
};

// Ends the test, passed, where the queue has no clock: there are no times then.
bool has_clock(VulkanBackend& backend) {
  if (backend.device().timestamp_bits() > 0) return true;
  std::printf("the queue has no clock\n");
  CHECK(backend.op_times().empty());
  return false;
}

}  // namespace

TEST_CASE("operations have times one behind the other, also in a pass that is submitted again as it was recorded") {
  TimedPasses passes;
  auto& vk = passes.backend().device().vk;
  driver_begin = vk.vkBeginCommandBuffer;
  vk.vkBeginCommandBuffer = counted_begin;
  // Some of them in a second segment.
  for (const uint32_t norms : {3u, 120u, 3u}) {
    for (const bool again : {false, true}) {
      INFO(norms << " operations" << (again ? ", again" : ""));
      recordings = 0;
      const uint64_t host_ns = passes.run(norms, 0);
      CHECK((recordings == 0) == again);
      if (!has_clock(passes.backend())) return;
      const std::span<const OpTime> times = passes.backend().op_times();
      REQUIRE(times.size() == norms);
      for (size_t i = 0; i < times.size(); ++i) {
        CHECK(times[i].begin_ns == (i > 0 ? times[i - 1].end_ns : times[0].begin_ns));
        CHECK(times[i].wait_ns() == 0);
        CHECK(times[i].ready_ns <= times[i].end_ns);
      }
      // Two clocks, of which one may be a little faster.
      CHECK(times.back().end_ns > times.front().begin_ns);
      CHECK(times.back().end_ns - times.front().begin_ns <= host_ns + host_ns / 100);
    }
  }
}

TEST_CASE("an operation whose weights are copied meanwhile has a wait, and its neighbours have none") {
  TimedPasses passes;
  uint64_t before_ns = 0;
  // The same pass with and without a wait: its later operations have other queries.
  for (const size_t copied : {TimedPasses::kBytes, TimedPasses::kBytes, size_t{0}, TimedPasses::kBytes}) {
    INFO(copied << " bytes");
    const uint64_t host_ns = passes.run(4, copied);
    if (!has_clock(passes.backend())) return;
    const std::span<const OpTime> times = passes.backend().op_times();
    REQUIRE(times.size() == 4);
    CHECK((times[1].wait_ns() > 0) == (copied > 0));
    for (const size_t i : {0, 2, 3}) CHECK(times[i].wait_ns() == 0);
    CHECK(times[3].end_ns - times[0].begin_ns <= host_ns + host_ns / 100);
    CHECK(times[0].begin_ns > before_ns);
    before_ns = times[3].end_ns;
    std::printf("%zu bytes: wait %.3f ms of a pass of %.3f ms\n", copied,
                static_cast<double>(times[1].wait_ns()) * 1e-6, static_cast<double>(host_ns) * 1e-6);
  }
}

TEST_CASE("a pass of too many operations, or without results, has no times, and the next one has") {
  TimedPasses passes;
  passes.run(400, 0);
  CHECK(passes.backend().op_times().empty());
  passes.run(2, 0);
  if (!has_clock(passes.backend())) return;
  CHECK(passes.backend().op_times().size() == 2);

  auto& vk = passes.backend().device().vk;
  const auto results = vk.vkGetQueryPoolResults;
  vk.vkGetQueryPoolResults = not_ready;
  passes.run(2, 0);
  CHECK(passes.backend().op_times().empty());
  vk.vkGetQueryPoolResults = results;
  passes.run(2, 0);
  CHECK(passes.backend().op_times().size() == 2);
}

TEST_CASE("passes whose times nobody wants get no stamps, and both kinds of pass stay recorded") {
  TimedPasses passes;
  VulkanBackend& backend = passes.backend();
  const bool clock = backend.device().timestamp_bits() > 0;
  if (!clock) std::printf("the queue has no clock\n");
  auto& vk = backend.device().vk;
  driver_stamp = vk.vkCmdWriteTimestamp;
  driver_reset = vk.vkCmdResetQueryPool;
  vk.vkCmdWriteTimestamp = counted_stamp;
  vk.vkCmdResetQueryPool = counted_reset;
  for (const size_t copied : {size_t{0}, size_t{4096}}) {
    bool known[2] = {};
    for (const bool on : {false, true, true, false, true, false, false}) {
      INFO((on ? "times wanted, " : "no times wanted, ") << copied << " bytes waited for");
      const std::vector<OpTime> before(backend.op_times().begin(), backend.op_times().end());
      backend.time_operations(on);
      CHECK(backend.op_times().size() == before.size());   // it is passes that follow it that have none
      stamps = resets = 0;
      passes.run(3, copied);
      const bool timed = on && clock;
      CHECK(backend.op_times().size() == (timed ? 3 : 0));
      CHECK(backend.recordings().empty() == known[timed]);
      // Behind the pass's begin and each operation, and where the wait ends.
      const bool anew = timed && !known[timed];
      CHECK(stamps == (anew ? 4 + (copied > 0) : 0));
      CHECK(resets == (anew ? 1 : 0));
      known[timed] = true;
    }
  }
}

TEST_CASE("operations on rows that want logits have times only where there are such rows") {
  auto backend = backend_or_fail();
  REQUIRE(backend->prepare(small_shape()));
  Op select;
  select.kind = OpKind::select_rows;
  const std::vector<float> embeddings(2 * 64, 1.0f);
  for (const bool wants : {true, false, true}) {
    const Row rows[] = {{.session = 0, .position = 0}, {.session = 0, .position = 1, .wants_logits = wants}};
    REQUIRE(backend->begin_pass(rows, embeddings));
    REQUIRE(backend->run(norm_op()));
    REQUIRE(backend->run(select));
    REQUIRE(backend->run(norm_op()));
    REQUIRE(backend->finish_pass({}));
    if (!has_clock(*backend)) return;
    CHECK(backend->op_times().size() == (wants ? 3 : 1));
  }
}

TEST_CASE("a KV cache is saved, loaded and copied without a bit lost, and nothing past its end is saved") {
  auto backend = backend_or_fail();
  REQUIRE(backend->prepare(small_shape()));
  std::mt19937 random(printed_seed());
  std::vector<std::byte> in(backend->kv_bytes(70)), out(in.size());
  for (std::byte& byte : in) byte = static_cast<std::byte>(random());
  REQUIRE(backend->load_kv(0, 70, in));
  REQUIRE(backend->copy_kv(0, 1, 128));
  REQUIRE(backend->save_kv(1, 70, out));
  // [layers][kv_heads][K, V][64 positions][head_dim] in each block; the second one holds 6 positions.
  const size_t row = 32 * sizeof(uint16_t), part = 64 * row, block = 4 * part;
  REQUIRE(in.size() == 2 * block);
  size_t different = 0;
  for (size_t i = 0; i < out.size(); ++i) {
    const bool used = i < block || i % part < 6 * row;
    different += out[i] != (used ? in[i] : std::byte{0});
  }
  CHECK(different == 0);
}

// Not run by name of the suite: proof that a mistake does reach the test's output (tests/validated.py fails on it).
TEST_CASE("the validation layer reports a mistake", "[.provoke]") {
  auto backend = backend_or_fail();
  auto& device = backend->device();
  const VkBufferCreateInfo nothing{.sType = VK_STRUCTURE_TYPE_BUFFER_CREATE_INFO, .size = 0,
                                   .usage = VK_BUFFER_USAGE_TRANSFER_SRC_BIT};
  VkBuffer buffer = VK_NULL_HANDLE;
  if (device.vk.vkCreateBuffer(device.handle(), &nothing, nullptr, &buffer) == VK_SUCCESS) {
    device.vk.vkDestroyBuffer(device.handle(), buffer, nullptr);
  }
}
