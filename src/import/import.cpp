// SPDX-License-Identifier: Apache-2.0
#include "import/import.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <map>
#include <new>
#include <system_error>
#include <thread>
#include <tuple>

#include "import/checkpoint.hpp"
#include "import/encode.hpp"
#include "import/packed_int4.hpp"
#include "import/text.hpp"
#include "storage/container_writer.hpp"

namespace sluice::import {
namespace {

constexpr uint32_t kMostThreads = 8;  // more would only wait for the disk

// Tensors that were requantized, by type, scheme and group.
class Requantized {
 public:
  void add(SourceType type, const Target& target, const quant::RoundingLoss& loss) {
    Sum& sum = sums_[{type, target.scheme, target.group_elems}];
    ++sum.tensors;
    sum.loss.merge(loss);
  }

  std::vector<RequantizationLoss> losses() const {
    std::vector<RequantizationLoss> all;
    for (const auto& [key, sum] : sums_) {
      const auto& [type, scheme, group_elems] = key;
      all.push_back({type, scheme, group_elems, sum.tensors, sum.loss.relative(sum.loss.error_squares)});
    }
    return all;
  }

 private:
  struct Sum {
    uint64_t tensors = 0;
    quant::RoundingLoss loss;
  };
  std::map<std::tuple<SourceType, storage::Scheme, uint32_t>, Sum> sums_;
};

// One line per kind of loss, not one per tensor.
void warn_of(const std::vector<RequantizationLoss>& losses, const Options& options) {
  for (const RequantizationLoss& loss : losses) {
    log_warning(options.log,
                fmt::format("{}: {} tensors of type {} were decoded and rounded to {} in groups of {}, at a relative "
                            "RMS error of {:.2f}%; a checkpoint in higher precision gives a better model",
                            options.source, loss.tensors, name_of(loss.type), storage::name_of(loss.scheme),
                            loss.group_elems, 100 * loss.relative_error));
  }
}

Status check_options(const Options& options) {
  if (options.group_elems != 32 && options.group_elems != 64 && options.group_elems != 128) {
    return fail(ErrorCode::usage, fmt::format("groups of {} weights; 32, 64 and 128 are possible", options.group_elems));
  }
  // Renaming the result over what it was made from would leave only the rounded copy.
  std::error_code ignored;
  if (std::filesystem::equivalent(options.source, options.output, ignored)) {
    return fail(ErrorCode::usage, fmt::format("{}: is both source and output; give another name for the output",
                                              options.output));
  }
  return {};
}

// A failed write names the output; which tensor it was tells how far it came.
Error at_tensor(Error error, const std::string& name) {
  if (error.message.find(name) == std::string::npos) error.message += fmt::format(" (at tensor {})", in_quotes(name));
  return error;
}

// A matrix that was published as INT4 stays what it is: anything else would be larger and no better.
Status check_packed_wish(const SourceTensor& source, const Options& options) {
  const bool head = source.role == storage::Role::lm_head;
  const Weights wish = head ? options.lm_head.value_or(Weights::keep) : options.weights;
  if (wish == Weights::keep || wish == Weights::int4) return {};
  return fail(ErrorCode::usage,
              fmt::format("{}: tensor {} is {} already; import the folder with --{} int4 or keep", options.source,
                          in_quotes(source.source_name), name_of(source.type), head ? "lm-head" : "weights"));
}

Result<Report> run_import(const Options& options) {
  const auto start = std::chrono::steady_clock::now();
  SLUICE_TRY(check_options(options));
  SLUICE_TRY_ASSIGN(checkpoint, open_checkpoint(options.source, options.log));
  SLUICE_TRY_ASSIGN(writer, storage::ContainerWriter::create(options.output));
  const uint32_t threads = std::clamp(std::thread::hardware_concurrency(), 1u, kMostThreads);
  const bool tied = checkpoint.manifest.hyper.tied_embeddings;
  const uint64_t total = checkpoint.tensors.size();
  Report report;
  Requantized requantized;
  for (const SourceTensor& source : checkpoint.tensors) {
    if (options.progress) options.progress(report.tensors, total, writer.bytes_written(), source.source_name);
    if (source.packed) {
      SLUICE_TRY(check_packed_wish(source, options));
      if (auto written = write_packed_tensor(checkpoint.files, source, threads, writer); !written) {
        return fail(at_tensor(std::move(written.error()), source.source_name));
      }
      ++report.tensors;
      continue;
    }
    const Target target = choose_target(source, options, tied);
    quant::RoundingLoss loss;
    if (auto written = write_tensor(checkpoint.files[source.file], source, target, threads, writer,
                                    target.requantized ? &loss : nullptr);
        !written) {
      return fail(at_tensor(std::move(written.error()), source.source_name));
    }
    ++report.tensors;
    if (!target.requantized) continue;
    ++report.requantized;
    requantized.add(source.type, target, loss);
  }
  if (options.progress) options.progress(total, total, writer.bytes_written(), "");
  report.hyper = checkpoint.manifest.hyper;
  SLUICE_TRY(writer.finish(std::move(checkpoint.manifest)));
  std::error_code error;
  report.bytes = std::filesystem::file_size(options.output, error);
  report.losses = requantized.losses();
  warn_of(report.losses, options);
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return report;
}

}  // namespace

Result<Report> import_model(const Options& options) {
  // The standard library reports exhaustion by throwing; this is where that ends.
  try {
    return run_import(options);
  } catch (const std::bad_alloc&) {
    return fail(ErrorCode::out_of_memory, fmt::format("{}: not enough memory to import it", options.source));
  } catch (const std::system_error& error) {
    return fail(ErrorCode::out_of_memory, fmt::format("{}: cannot start a thread: {}", options.source, error.what()),
                error.code().value());
  }
}

}  // namespace sluice::import
