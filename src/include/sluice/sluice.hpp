// SPDX-License-Identifier: Apache-2.0
// Sluice: run language models that are larger than the memory given to them.
//
//   auto model = sluice::Model::open("model.sluice", {.device_memory_bytes = 8ull << 30});
//   auto session = model->new_session();
//   session->append(model->tokenize("The capital of France is"));
//   session->generate({.max_tokens = 32}, [](const sluice::Token& t) { std::cout << t.text; return true; });
//
// No global state: any number of models may live in one process. Nothing throws; see result.hpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sluice/log.hpp"
#include "sluice/result.hpp"

#if defined(_WIN32)
#define SLUICE_API
#else
#define SLUICE_API __attribute__((visibility("default")))
#endif

namespace sluice {

// Where disk-tier weights come from. `automatic`: io_uring, or pread where the kernel refuses it. `mmap`: the CPU computes
// straight out of the mapping.
enum class Io { automatic, uring, pread, mmap };
enum class Activations { int8, f32 };
// Of INT4 tensors with a residual (QuantizeOptions::residual): the INT4 alone, whose speed it has, or both.
enum class Precision { int4, fine };
enum class Verify { open, off };   // of a mapping; planes that are read are always verified

// Bytes per second; 0: unknown.
struct Bandwidths {
  double disk = 0, bus = 0, cpu_memory = 0, device_memory = 0;
};

struct ModelOptions {
  // Budgets in bytes. Device memory holds resident weights, the stream ring, the KV cache, scratch, and a GPU's context;
  // unset: all that the model needs, as far as the free memory goes (of a GPU's a twentieth, at least 512 MiB, is left),
  // and with Io::mmap no weights. Host memory holds weights
  // that are copied to the device in every pass; the rest stays on disk.
  std::optional<uint64_t> device_memory_bytes;
  uint64_t host_memory_bytes = 0;
  uint32_t context = 0;              // positions per session; 0: the model's own, at most 4096
  uint32_t sessions = 1;             // that may exist at a time
  uint32_t max_rows = 0;             // tokens of a prefill pass; 0: chosen by the planner, at most 512
  uint32_t max_logit_rows = 0;       // rows of a pass that may want logits; 0: 8
  Io io = Io::automatic;
  Verify verify = Verify::open;
  Precision precision = Precision::int4;
  std::string backend = "auto";      // "cuda", "vulkan", "cpu"; "auto": a GPU that works (CUDA first), else the CPU
  Activations cpu_activations = Activations::int8;
  uint32_t threads = 0;              // of the CPU backend; 0: one per core
  Bandwidths bandwidths;             // for the prediction in Timings; an unknown disk is what reading so far has shown
  // Faults made on purpose, to see whether a trace shows them: "read:period=16,ms=30" (docs/tracing.md). Error: usage,
  // for one that this run has no place for as well.
  std::vector<std::string> inject;
  LogHook log;
  std::function<void(uint64_t done, uint64_t total)> load_progress;   // bytes of resident and host weights
};

// Sampling. A negative field means: the model's generation config, else greedy / off.
struct Sampling {
  float temperature = -1;            // 0: greedy
  int32_t top_k = -1;
  float top_p = -1;
  float min_p = -1;
  float repeat_penalty = -1;         // over the last 64 tokens; 1: off
  uint64_t seed = 0;                 // 0: 1
};

struct GenerateOptions {
  uint32_t max_tokens = 128;
  Sampling sampling;
  std::vector<std::string> stop;     // texts that end the generation; not handed out
  bool ignore_eos = false;
};

// One generated token. `text` is what became final with it: whole UTF-8 characters, possibly none.
struct Token {
  int32_t id = 0;
  std::string_view text;             // valid during the callback
};

enum class StopReason { end_of_text, max_tokens, stop_text, context_full, cancelled };

// What rules chose for a prompt.
struct PrecisionChoice {
  Precision precision = Precision::int4;
  std::string rule;                  // its name; empty: none matched
  std::string found;                 // what it found in the prompt
  std::string why;                   // a sentence
};

// Which precision a prompt asks for, to be set in ModelOptions: regular expressions over its text, from a TOML file
// (configs/precision/default.toml shows the form). Const members may be called from any thread.
class SLUICE_API PrecisionRules {
 public:
  // An empty path: the rules that are shipped. Errors: not_found, io, corrupt (an unknown key, a pattern that is no
  // regular expression; each with its line).
  static Result<PrecisionRules> open(const std::string& path = {});
  PrecisionRules(PrecisionRules&&) noexcept;
  PrecisionRules& operator=(PrecisionRules&&) noexcept;
  ~PrecisionRules();
  // The first rule that matches decides, else the default. `prompt`: UTF-8; what is not matches nothing. Error: usage
  // (a pattern that backtracks without end).
  Result<PrecisionChoice> choose(std::string_view prompt) const;

 private:
  struct State;
  explicit PrecisionRules(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// Where the time of a session went, summed over passes of a kind. Seconds unless named otherwise.
struct PassTimes {
  uint64_t passes = 0;
  uint64_t tokens = 0;
  double total = 0;
  double disk_wait = 0;              // the pass waited for bytes from the drive
  double copy_wait = 0;              // ... for the copy into device memory
  double embed = 0, norm = 0, matmul = 0, rope = 0, attention = 0, activation = 0, lm_head = 0, sampling = 0, output = 0;
  double residual() const {
    return total - disk_wait - copy_wait - embed - norm - matmul - rope - attention - activation - lm_head - sampling - output;
  }
};

struct Timings {
  double open_seconds = 0;
  double first_token_seconds = 0;    // from the first append to the first generated token
  PassTimes prefill, decode;
  std::vector<double> token_latencies;   // seconds per decoded token, in order; at most 65536 are kept
  uint64_t disk_bytes = 0;           // read by this model so far, padding included, embedding rows included
  uint64_t disk_bytes_per_pass = 0;  // padded disk-tier planes
  uint64_t embedding_bytes = 0;      // of disk_bytes
  uint64_t retries = 0;
  double predicted_pass_seconds = 0; // the planner's, for a decode pass; 0: not measured
};

struct ModelInfo {
  std::string name, architecture, source, uuid, path, backend, device, io;
  uint32_t layers = 0, hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, ffn = 0, vocab = 0;
  uint32_t max_context = 0;          // what the model was trained for
  uint32_t context = 0;              // of this opening
  uint32_t max_rows = 0, max_logit_rows = 0;
  uint64_t file_bytes = 0, weight_bytes = 0;
  uint64_t device_weight_bytes = 0, host_weight_bytes = 0, disk_weight_bytes = 0;
  uint64_t ring_bytes = 0, kv_bytes = 0, scratch_bytes = 0, staging_bytes = 0;
  bool has_tokenizer = false, has_chat_template = false;
  bool has_residuals = false;        // Precision::fine differs from int4
};

struct ChatMessage {
  std::string role;                  // "system", "user", "assistant"
  std::string content;
};

// What a finished trace holds. A record is dropped when the disk takes the trace too slowly.
struct TraceTotals {
  uint64_t records = 0, dropped = 0;
};

// What a trace says of the run it is of.
struct TraceNote {
  std::string command;               // what is run, for the report
  // What goes through a new session, and how it goes on: with a prompt, confirm_trace() can run it again.
  std::vector<int32_t> prompt;
  GenerateOptions generate;
};

class Session;
namespace api {
struct Access;
}

// Weights in their tiers. Const members may be called from any thread; sessions of one model take turns inside. A Model
// must outlive its sessions.
class SLUICE_API Model {
 public:
  // Opens a container and places its weights. Errors: those of the file (not_found, io, corrupt, unsupported), `budget`
  // with the smallest budget that would do, out_of_memory.
  static Result<Model> open(const std::string& path, ModelOptions options = {});
  Model(Model&&) noexcept;
  Model& operator=(Model&&) noexcept;
  ~Model();

  const ModelInfo& info() const;
  Result<Session> new_session() const;       // error: budget, when options.sessions exist already

  // Empty if the model has no tokenizer. `special`: special tokens in the text are recognised. `bos`: begin-of-text is
  // added where the model asks for it.
  std::vector<int32_t> tokenize(std::string_view text, bool special = true, bool bos = true) const;
  std::string detokenize(std::span<const int32_t> tokens) const;
  // The conversation through the model's own template. Error: unsupported (none, or one beyond the subset).
  Result<std::string> render_chat(std::span<const ChatMessage> messages, bool add_generation_prompt = true) const;
  Sampling default_sampling() const;         // of the generation config, negative where it says nothing

  // Writes what happens from now on to a trace (docs/tracing.md), until stop_trace or the model's end; a file that was
  // not stopped lacks the last 0.2 s. Not while another trace is written (usage). Errors: usage, not_found, io. Sessions
  // may be in use; start_trace and stop_trace themselves take one thread at a time.
  Status start_trace(const std::string& path, const TraceNote& note = {});
  // Finishes the file. Errors: usage (none is written), io (the first write that failed, which ended the trace; what was
  // written until then can be read).
  Result<TraceTotals> stop_trace();

 private:
  friend class Session;
  friend struct api::Access;
  struct State;
  explicit Model(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// One sequence: KV cache, position, sampler. One thread at a time.
class SLUICE_API Session {
 public:
  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;
  ~Session();

  // Tokens of the sequence so far; the last may not have been through the model yet.
  std::span<const int32_t> tokens() const;
  // Puts tokens behind the sequence; the model sees them at the next generate, score or flush.
  // Error: budget (the context is full), usage (an id outside the vocabulary). Nothing is appended then.
  Status append(std::span<const int32_t> tokens);
  // Runs everything appended through the model, so that the next generate starts at once. Errors: those of a pass,
  // cancelled.
  Status flush();
  // Generates until a stop. The callback sees every token that becomes part of the text and returns false to stop
  // ("cancelled"); an empty one takes every token. A token that ends the text is handed out only if text before it was
  // still held back. Error: usage (an empty sequence), and those of a pass: io, corrupt, numeric, device.
  Result<StopReason> generate(const GenerateOptions& options, const std::function<bool(const Token&)>& on_token);
  // Ends the generate, flush or score that is running, or the next one, between two passes. Any thread, signal handlers
  // included.
  void cancel() noexcept;
  // Runs everything appended and returns the logits of every position run by this call: `on_logits(position, logits)`,
  // logits FP32 [vocab], valid during the call.
  Status score(const std::function<void(uint32_t position, std::span<const float> logits)>& on_logits);

  Status truncate(uint32_t length);          // forgets tokens length.. ; error: usage, if longer than the sequence
  Result<Session> fork() const;              // a second session with the same past; error: budget
  Status save(const std::string& path) const;   // tokens and KV cache, bound to this model's uuid
  Status restore(const std::string& path);   // replaces the sequence; errors: not_found, io, corrupt, usage (other model)

  // The first call behind a token measures the memory's rate for the prediction, 10 ms, where the options gave none.
  const Timings& timings() const;

 private:
  friend class Model;
  struct State;
  explicit Session(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// ---- Files -----------------------------------------------------------------------------------------------------

enum class WeightFormat { keep, f16, int8, int4 };

struct ImportOptions {
  std::string source;                // *.gguf, or a Hugging Face folder
  std::string output;
  WeightFormat weights = WeightFormat::int4;
  uint32_t group = 128;              // 32, 64, 128
  std::optional<WeightFormat> embeddings, lm_head;
  LogHook log;
  std::function<void(uint64_t done, uint64_t total, uint64_t bytes, const std::string& name)> progress;
};
// What it cost to round matrices once more that were quantized already: those of one type that became one scheme.
struct RequantizationLoss {
  std::string type, scheme;          // "Q4_K", "int4"
  uint32_t group = 0;                // weights that share a scale
  uint64_t tensors = 0;
  double relative_error = 0;         // RMS of the change over RMS of the weights
};
struct ImportReport {
  uint64_t tensors = 0, bytes = 0, requantized = 0;
  std::vector<RequantizationLoss> losses;   // of the requantized ones
  double seconds = 0;
};
SLUICE_API Result<ImportReport> import_model(const ImportOptions& options);

// A checkpoint into a container by a recipe (configs/recipes/*.toml), with GPTQ where it asks for that.
enum class QuantizeMethod { recipe, rtn, gptq };
struct QuantizeOptions {
  std::string source, output, recipe;
  std::vector<std::string> calibration;  // *.txt, *.jsonl; needed for GPTQ
  QuantizeMethod method = QuantizeMethod::recipe;   // of INT4
  uint32_t windows = 128, window = 2048; // of calibration text, in tokens
  float damp = 0.01f;
  bool residual = false;                 // a second nibble for every INT4 matrix: precision near INT8 in the same file
  bool restart = false;                  // throw away the layers that an interrupted run left in OUTPUT.work
  std::string backend = "auto";          // where the layers run for calibration: as of ModelOptions
  uint32_t threads = 0;                  // 0: one per core
  LogHook log;
  std::function<void(uint64_t done, uint64_t total, const std::string& detail)> progress;
};
struct QuantizeReport {
  uint64_t tensors = 0, bytes = 0;
  uint32_t resumed_layers = 0;
  double bits_per_weight = 0;            // of the matrices in the layers
  double residual_bits_per_weight = 0;   // ... of their residuals, besides
  double seconds = 0;
  double weights_per_second = 0;         // of the matrices that this call rounded
  std::string json;                      // with the error of every matrix
};
// Interrupted, even killed, it goes on where it was when called again with the same options.
SLUICE_API Result<QuantizeReport> quantize_model(const QuantizeOptions& options);

struct SynthOptions {
  std::string model_toml;            // configs/models/NAME.toml
  std::string output;
  std::optional<uint32_t> layers;
  WeightFormat weights = WeightFormat::int4;
  uint32_t group = 128;
  uint64_t seed = 1;
  std::function<void(uint64_t done_bytes, uint64_t total_bytes)> progress;
};
SLUICE_API Result<ImportReport> synth_model(const SynthOptions& options);

// What `sluice inspect` shows: a JSON object with hyperparameters, tokenizer, tensors with planes.
SLUICE_API Result<std::string> inspect_json(const std::string& path);
// Reads the whole file and compares every checksum. Error: corrupt, naming tensor and offset.
SLUICE_API Status verify_file(const std::string& path, const std::function<void(uint64_t done, uint64_t total)>& progress = {});

// Error: corrupt, where `text` has bytes that are not UTF-8, with the offset of the first; `name` begins the message.
SLUICE_API Status check_utf8(std::string_view text, const std::string& name);

// Encodes with the tokenizer of a container or of a tokenizer.json. Thread-safe when const.
class SLUICE_API TextCodec {
 public:
  static Result<TextCodec> open(const std::string& container_or_tokenizer_json);
  TextCodec(TextCodec&&) noexcept;
  TextCodec& operator=(TextCodec&&) noexcept;
  ~TextCodec();
  std::vector<int32_t> encode(std::string_view text, bool special = true, bool bos = false) const;
  std::string decode(std::span<const int32_t> tokens) const;

 private:
  struct State;
  explicit TextCodec(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// ---- Traces ----------------------------------------------------------------------------------------------------

// What a trace says, as a JSON object (docs/tracing.md). Errors: not_found, io, corrupt, unsupported (a later format
// version; a trace without a token).
SLUICE_API Result<std::string> analyze_trace(const std::string& path);
// The same trace for others: a page that needs nothing else, Perfetto's protobuf (ui.perfetto.dev), or the Trace Event
// Format of Chrome. `report`: for html, what analyze_trace or confirm_trace gave; empty: analyzed here. Errors: those of
// analyze_trace; io, not_found (the folder of `output`).
enum class TraceFormat { html, perfetto, chrome };
SLUICE_API Status export_trace(const std::string& path, TraceFormat format, const std::string& output,
                               const std::string& report = {});

struct ConfirmOptions {
  LogHook log;
  std::function<void(uint64_t done, uint64_t total)> progress;   // tokens of all runs
};
// Puts the causes of a trace's spike trains to the test: makes its run (TraceNote) again as it was, and once more for
// each cause that Sluice can take out of the way. Returns analyze_trace()'s object, with a `confirmation` in each train
// that has a cause and the grade `confirmed` where the spikes came again and went with the cause. Errors: those of
// analyze_trace; unsupported (the trace does not say what was run); those of Model::open and Session::generate.
SLUICE_API Result<std::string> confirm_trace(const std::string& path, const ConfirmOptions& options = {});

// ---- The machine -----------------------------------------------------------------------------------------------

// `path`: a file to read from (O_DIRECT), at most `bytes` of it; or a folder, in which a nameless file is made.
SLUICE_API Result<double> measure_disk(const std::string& path, uint64_t bytes, Io io = Io::automatic);
SLUICE_API double measure_memory_copy();
SLUICE_API double measure_memory_read(uint32_t threads);
// Bytes per second of the device that `backend` ("auto", "cuda", "vulkan", "cpu") computes on: its memory read by a kernel, and
// pinned host memory copied into it in chunks of 16 MiB. The CPU's are those of its memory. Takes up to 1.3 GiB of device
// memory for a second. Errors: not_found, out_of_memory, device.
struct DeviceRates {
  std::string device;                // "NVIDIA H200"; "cpu"
  double read = 0, bus = 0;
};
SLUICE_API Result<DeviceRates> measure_device(const std::string& backend);

// What the matrix products of a model take on the GPU, one by one, with weights that no cache holds: each distinct
// shape with each number of rows.
struct KernelTime {
  std::string name;                  // "q, k, v": the matrices of one launch
  std::string scheme;                // "int4 g128"
  uint32_t outputs = 0, inputs = 0;  // N of all its matrices, K
  uint32_t rows = 0;                 // M: tokens
  uint64_t weight_bytes = 0;         // that a launch reads
  double seconds = 0;
  double cublas_seconds = 0;         // cuBLAS with FP16 weights of the same shape; 0: not measured
};
struct KernelReport {
  std::string device, cublas;        // cuBLAS's version, or why there is none
  double read_before = 0, read_after = 0;   // the device's memory read by a kernel, bytes a second
  std::vector<KernelTime> times;
};
// `path`: a container, of which the shapes alone are used. `rows`: each 1..2048. `on_time`: called behind every
// figure with the report so far. Errors: those of the file; usage, not_found (no GPU), out_of_memory, device.
SLUICE_API Result<KernelReport> bench_kernels(const std::string& path, std::span<const uint32_t> rows,
                                              const std::function<void(const KernelReport&)>& on_time = {});

struct PlanReport {
  std::string backend;                              // what "auto" came to
  uint64_t device_bytes = 0, host_bytes = 0;        // budgets used
  uint64_t resident_bytes = 0, host_tier_bytes = 0, disk_tier_bytes = 0;
  uint64_t ring_bytes = 0, kv_bytes = 0, scratch_bytes = 0;
  uint32_t context = 0, max_rows = 0;
  uint64_t smallest_device_bytes = 0;               // budget that would still do
  double pass_seconds = 0, tokens_per_second = 0;   // predicted; 0 where a bandwidth is unknown
  std::string bound;                                // "disk", "bus", "device memory"
  struct Tier { std::string tensor; std::string tier; uint64_t bytes = 0; };
  std::vector<Tier> tensors;
};
SLUICE_API Result<PlanReport> plan_model(const std::string& path, const ModelOptions& options, const Bandwidths& bandwidths);

enum class Workload { general, math, code };
struct AdviceOptions {
  std::string model;                 // whose shapes count: configs/models/*.toml, a container, GGUF, a folder
  std::string device;                // configs/devices/*.toml; empty: this machine
  std::string recipes = "configs/recipes";   // a folder; of its *.toml those with a [measured] table are considered
  Workload workload = Workload::general;
  double tokens_per_second = 10;     // above this, a faster quantization is worth no loss
  // Budgets, context and backend; an unset budget is what is free to take of the device. Rates of `bandwidths` count
  // before the profile's; this machine has no others.
  ModelOptions machine;
  Bandwidths bandwidths;
};
// One recipe, with or without residuals, placed on the device.
struct AdviceCandidate {
  std::string recipe;                // the file's name without .toml
  bool residual = false;             // quantize --residual
  double kl = 0;                     // mean KL divergence, nats, as its [measured] says; with residuals of fine
  uint64_t bytes = 0;                // of all its planes
  bool fits = false;                 // else only smallest_device_bytes below
  // Weights by home in the precision that kl is of.
  uint64_t device_bytes = 0, host_bytes = 0, disk_bytes = 0;
  uint64_t smallest_device_bytes = 0;
  double tokens_per_second = 0;      // predicted, without the residual; 0: bandwidths are unknown
  double fine_tokens_per_second = 0; // with it; 0 where there is none
  std::string bound;                 // what kl's precision waits for
};
struct AdviceReport {
  std::string model, device, backend, measured_on;
  uint64_t device_bytes = 0, host_bytes = 0;   // budgets
  uint32_t context = 0;
  double kl_limit = 0;               // of the workload
  Bandwidths bandwidths;
  std::vector<AdviceCandidate> candidates;     // by recipe, the one without residuals first
  std::optional<size_t> chosen;      // nothing: none fits
  std::vector<std::string> reasons;  // one sentence each
};
// Which recipe to quantize a model by, for a device and a workload (docs/quantization.md has the rules). Reads no
// weights. Errors: those of the files; usage (no recipe with a [measured] table, several models measured), not_found
// (the backend).
SLUICE_API Result<AdviceReport> advise(const AdviceOptions& options);

// One finding of `sluice doctor`.
struct Finding {
  std::string name;                  // "io_uring"
  bool ok = false;
  std::string value;                 // "available, kernel 6.18"
  std::string remedy;                // empty if ok
};
// `folder`: where disk bandwidth and O_DIRECT are tried (a temporary file of 256 MiB, removed).
SLUICE_API std::vector<Finding> examine_machine(const std::string& folder);

// Installs the process-wide SIGBUS handler that keeps --io=mmap alive when a file shrinks. For programs that want it.
SLUICE_API bool install_sigbus_handler();

SLUICE_API const char* version();

}  // namespace sluice
