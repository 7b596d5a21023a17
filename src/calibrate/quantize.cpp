// SPDX-License-Identifier: Apache-2.0
#include "calibrate/quantize.hpp"

#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <new>
#include <system_error>
#include <utility>

#include "base/units.hpp"
#include "calibrate/calibration.hpp"
#include "calibrate/quantize_layer.hpp"
#include "calibrate/work_folder.hpp"
#include "import/encode.hpp"
#include "import/source_file.hpp"
#include "import/text.hpp"
#include "quant/rounding.hpp"
#include "storage/checksum.hpp"
#include "storage/container_writer.hpp"
#include "storage/manifest_codec.hpp"

namespace sluice::calibrate {
namespace {

using import::Checkpoint;
using import::SourceTensor;
using storage::Role;
using storage::Scheme;
using Json = nlohmann::ordered_json;

constexpr uint64_t kMaxRecipeBytes = 1 * kMiB;

uint64_t checksum_of_text(std::string_view text) { return storage::checksum(std::as_bytes(std::span(text))); }

// How a matrix that needs no calibration gets into the container.
import::Target target_of(const SourceTensor& source, const Choice& choice, bool tied, bool residual) {
  using import::Conversion;
  if (choice.scheme == Scheme::int4) {
    return {Scheme::int4, choice.group_elems, Conversion::round, !import::is_plain(source.type), residual};
  }
  if (choice.scheme == Scheme::bf16) {
    return {Scheme::bf16, 0, source.type == import::SourceType::bf16 ? Conversion::copy : Conversion::round, false};
  }
  import::Options options;
  options.group_elems = choice.group_elems;
  options.weights = !choice.scheme                   ? import::Weights::keep
                    : *choice.scheme == Scheme::int8 ? import::Weights::int8
                                                     : import::Weights::f16;
  return import::choose_target(source, options, tied);
}

class Quantizer {
 public:
  explicit Quantizer(const Options& options) : options_(options) {}

  Result<Report> run() {
    const auto start = std::chrono::steady_clock::now();
    SLUICE_TRY(check_options());
    SLUICE_TRY_ASSIGN(recipe, read_recipe(options_.recipe));
    SLUICE_TRY_ASSIGN(checkpoint, import::open_checkpoint(options_.source, options_.log));
    checkpoint_ = std::move(checkpoint);
    SLUICE_TRY(refuse_packed());
    SLUICE_TRY_ASSIGN(choices, apply_recipe(recipe, checkpoint_.tensors, options_.method));
    choices_ = std::move(choices);
    const bool calibrates = std::any_of(choices_.begin(), choices_.end(), [](const std::optional<Choice>& choice) {
      return choice && choice->method == Method::gptq;
    });
    warn_of_second_rounding();
    std::optional<WorkFolder> work;
    if (calibrates) {
      SLUICE_TRY_ASSIGN(folder, walk_layers());
      work.emplace(std::move(folder));
    }
    SLUICE_TRY(write_container(work ? &*work : nullptr));
    if (work) SLUICE_TRY(work->remove());
    report_.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return finish_report();
  }

 private:
  uint32_t layers() const { return checkpoint_.manifest.hyper.layers; }

  Status check_options() const {
    if (options_.windows == 0 || options_.window < 8) {
      return fail(ErrorCode::usage, fmt::format("calibration with {} windows of {} tokens; it takes one of 8 at least",
                                                options_.windows, options_.window));
    }
    if (!(options_.damp > 0) || options_.damp > 1) {
      return fail(ErrorCode::usage, fmt::format("damping {}; it lies above 0 and up to 1", options_.damp));
    }
    std::error_code ignored;
    if (std::filesystem::equivalent(options_.source, options_.output, ignored)) {
      return fail(ErrorCode::usage,
                  fmt::format("{}: is both source and output; give another name for the output", options_.output));
    }
    return {};
  }

  Status refuse_packed() const {
    for (const SourceTensor& tensor : checkpoint_.tensors) {
      if (!tensor.packed) continue;
      return fail(
          ErrorCode::unsupported,
          fmt::format("{}: tensor {} is {} already; quantize the F16 or BF16 original, or take the checkpoint as it is "
                      "by `sluice import`",
                      options_.source, import::in_quotes(tensor.source_name), import::name_of(tensor.type)));
    }
    return {};
  }

  void warn_of_second_rounding() const {
    const auto count =
        std::count_if(checkpoint_.tensors.begin(), checkpoint_.tensors.end(),
                      [](const SourceTensor& tensor) { return !tensor.vector && !import::is_plain(tensor.type); });
    if (count == 0) return;
    log_warning(options_.log,
                fmt::format("{}: {} matrices are quantized already ({}) and are rounded once more; the report "
                            "says what that costs",
                            options_.source, count, import::name_of(import::most_common_type(checkpoint_.tensors))));
  }

  // ---------------------------------------------------------------------------------------------- calibration

  // Everything that a layer's result depends on.
  Result<Json> job(const Windows& windows) const {
    Json files = Json::array();
    for (const import::SourceFile& file : checkpoint_.files) {
      struct stat info = {};
      if (::fstat(file.fd.get(), &info) != 0)
        return fail(ErrorCode::io, fmt::format("{}: cannot ask for its size", file.path));
      files.push_back({file.path, info.st_size, info.st_mtim.tv_sec, info.st_mtim.tv_nsec});
    }
    SLUICE_TRY_ASSIGN(recipe, import::read_text_file(options_.recipe, kMaxRecipeBytes));
    // A folder's config.json is none of those files; what comes of it is hashed as a container would hold it.
    storage::Manifest model;
    model.hyper = checkpoint_.manifest.hyper;
    model.rope = checkpoint_.manifest.rope;
    SLUICE_TRY_ASSIGN(encoded, storage::encode_manifest(model, options_.source));
    return Json{{"format", 2},
                {"source", std::move(files)},
                {"model", storage::checksum(encoded)},
                {"recipe", checksum_of_text(recipe)},
                {"method", options_.method ? static_cast<int>(*options_.method) : -1},
                {"backend", backend_},
                {"device_moments", device_moments_},
                {"tokens", storage::checksum(std::as_bytes(std::span(windows.ids)))},
                {"residual", options_.residual ? quant::kResidualGroup : 0},
                {"windows", windows.count},
                {"window", windows.window},
                {"damp", options_.damp}};
  }

  // For all layers, and what there is to say about it once.
  Status choose_backend() {
    SLUICE_TRY_ASSIGN(backend, options_.make_backend(options_.backend, options_.log));
    backend_ = backend->name();
    device_moments_ = backend->calibration() != nullptr;
    return {};
  }

  Result<WorkFolder> walk_layers() {
    if (options_.calibration.empty()) {
      return fail(ErrorCode::usage,
                  fmt::format("{}: GPTQ needs text; give --calibration FILE, or --method rtn", options_.recipe));
    }
    if (checkpoint_.manifest.tokenizer.model == storage::TokenizerModel::none) {
      return fail(ErrorCode::unsupported,
                  fmt::format("{}: has no tokenizer, so no text can calibrate it", options_.source));
    }
    const uint32_t window = std::min(options_.window, checkpoint_.manifest.hyper.max_context);
    SLUICE_TRY_ASSIGN(windows, read_windows(options_.calibration, checkpoint_.manifest.tokenizer, options_.windows,
                                            window, options_.log));
    SLUICE_TRY(choose_backend());
    SLUICE_TRY_ASSIGN(what, job(windows));
    SLUICE_TRY_ASSIGN(work, WorkFolder::open(options_.output + ".work", what, options_.restart));
    report_.resumed_layers = work.layers_done();
    calibration_tokens_ = uint64_t{windows.count} * windows.window;
    const uint64_t steps = layer_steps(windows.count);
    done_ = steps * work.layers_done();
    total_ = steps * layers();
    if (work.layers_done() > 0) {
      log_info(options_.log, fmt::format("{} of {} layers are done already", work.layers_done(), layers()));
    } else if (!work.has_states(0)) {
      SLUICE_TRY(write_embeddings(windows, work));
    }
    const LayerContext context{.checkpoint = checkpoint_,
                               .choices = choices_,
                               .options = options_,
                               .backend = backend_,
                               .windows = windows.count,
                               .window = windows.window,
                               .advance = [this](uint64_t step, const std::string& detail) {
                                 done_ += step;
                                 if (options_.progress) options_.progress(done_, total_, detail);
                               }};
    while (work.layers_done() < layers()) SLUICE_TRY(quantize_layer(context, work.layers_done(), work));
    return work;
  }

  Status write_embeddings(const Windows& windows, const WorkFolder& work) const {
    const SourceTensor& embedding = checkpoint_.tensors.front();
    SLUICE_TRY_ASSIGN(fd, work.begin_states(0));
    std::vector<float> sequence;
    for (size_t i = 0; i < windows.ids.size(); ++i) {
      SLUICE_TRY_ASSIGN(row, import::read_matrix_rows(checkpoint_.files[embedding.file], embedding,
                                                      static_cast<uint32_t>(windows.ids[i]), 1));
      sequence.insert(sequence.end(), row.begin(), row.end());
      if ((i + 1) % windows.window != 0) continue;
      SLUICE_TRY(work.append_states(fd, 0, sequence));
      sequence.clear();
    }
    return work.finish_states(std::move(fd), 0);
  }

  // ------------------------------------------------------------------------------------------------ the container

  Status write_container(const WorkFolder* work) {
    SLUICE_TRY_ASSIGN(writer, storage::ContainerWriter::create(options_.output));
    WorkFolder::Layer layer;
    int32_t read_layer = -1;
    for (size_t i = 0; i < checkpoint_.tensors.size(); ++i) {
      const SourceTensor& source = checkpoint_.tensors[i];
      if (work != nullptr && source.layer >= 0 && source.layer != read_layer) {
        SLUICE_TRY_ASSIGN(read, work->read_layer(static_cast<uint32_t>(source.layer)));
        layer = std::move(read);
        read_layer = source.layer;
        for (const Json& note : layer.notes) matrices_.push_back(note);
      }
      const auto finished = std::find_if(layer.tensors.begin(), layer.tensors.end(), [&](const EncodedTensor& one) {
        return source.layer >= 0 && one.tensor.layer == source.layer && one.tensor.role == source.role;
      });
      if (finished != layer.tensors.end()) {
        SLUICE_TRY(writer.begin_tensor(finished->tensor));
        for (const auto& [kind, bytes] : planes_of(finished->planes)) SLUICE_TRY(writer.write_plane(kind, *bytes));
        SLUICE_TRY(writer.end_tensor());
      } else {
        SLUICE_TRY(write_source(i, writer));
      }
      ++report_.tensors;
      if (options_.progress && work == nullptr) options_.progress(i + 1, checkpoint_.tensors.size(), source.name);
    }
    SLUICE_TRY(writer.finish(std::move(checkpoint_.manifest)));
    std::error_code ignored;
    report_.bytes = std::filesystem::file_size(options_.output, ignored);
    return {};
  }

  Status write_source(size_t index, storage::ContainerWriter& writer) {
    const SourceTensor& source = checkpoint_.tensors[index];
    const import::SourceFile& file = checkpoint_.files[source.file];
    if (source.vector) return import::write_tensor(file, source, {}, options_.threads, writer);
    const Choice& choice = *choices_[index];
    const import::Target target =
        target_of(source, choice, checkpoint_.manifest.hyper.tied_embeddings, options_.residual);
    quant::RoundingLoss loss;
    SLUICE_TRY(import::write_tensor(file, source, target, options_.threads, writer, &loss));
    if (choice.scheme)
      matrices_.push_back(matrix_notes(import::tensor_of(source, target.scheme, target.group_elems), choice, loss, -1));
    return {};
  }

  Report finish_report() {
    // Weighted by size; every layer matrix that is not kept has an entry.
    double bits = 0, residual_bits = 0, weights = 0, of_this_run = 0;
    for (const SourceTensor& source : checkpoint_.tensors) {
      if (source.vector) continue;
      const bool resumed = source.layer >= 0 && static_cast<uint32_t>(source.layer) < report_.resumed_layers;
      if (!resumed) of_this_run += double{1} * source.rows * source.cols;
      if (source.layer < 0) continue;
      const auto found = std::find_if(matrices_.begin(), matrices_.end(),
                                      [&](const Json& note) { return note["name"] == source.name; });
      const double size = double{1} * source.rows * source.cols;
      bits +=
          size * (found != matrices_.end() ? (*found)["bits_per_weight"].get<double>()
                                           : 8.0 * import::block_bytes(source.type) / import::block_elems(source.type));
      if (found != matrices_.end()) residual_bits += size * found->value("residual_bits_per_weight", 0.0);
      weights += size;
    }
    report_.bits_per_weight = bits / weights;
    report_.residual_bits_per_weight = residual_bits / weights;
    if (report_.seconds > 0) report_.weights_per_second = of_this_run / report_.seconds;
    Json json = {{"source", options_.source},
                 {"output", options_.output},
                 {"recipe", options_.recipe},
                 {"bytes", report_.bytes},
                 {"bits_per_weight", report_.bits_per_weight}};
    if (options_.residual) json["residual_bits_per_weight"] = report_.residual_bits_per_weight;
    json.update({{"calibration_tokens", calibration_tokens_},
                 {"resumed_layers", report_.resumed_layers},
                 {"seconds", report_.seconds},
                 {"weights_per_second", report_.weights_per_second},
                 {"matrices", matrices_}});
    report_.json = json.dump(2, ' ', false, Json::error_handler_t::replace);
    return std::move(report_);
  }

  const Options& options_;
  Checkpoint checkpoint_;
  std::vector<std::optional<Choice>> choices_;
  Json matrices_ = Json::array();
  Report report_;
  std::string backend_;  // its name
  bool device_moments_ = false;  // summed and factored there, not on the host
  uint64_t calibration_tokens_ = 0;
  uint64_t done_ = 0, total_ = 0;  // steps
};

}  // namespace

Result<Report> quantize_model(const Options& options) {
  // The standard library reports exhaustion by throwing; this is where that ends.
  try {
    return Quantizer(options).run();
  } catch (const std::bad_alloc&) {
    return fail(ErrorCode::out_of_memory, fmt::format("{}: not enough memory to quantize it", options.source));
  } catch (const std::system_error& error) {
    return fail(ErrorCode::out_of_memory, fmt::format("{}: cannot start a thread: {}", options.source, error.what()),
                error.code().value());
  }
}

}  // namespace sluice::calibrate
