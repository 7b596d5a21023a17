// SPDX-License-Identifier: Apache-2.0
// Causes put to the test: the same run twice more, once as it was and once with the suspect out of the way.
//
//   trace --cause of a train--> change --control run, changed run--> what the spikes cost in each --> confirmed, or not
//
// The control run is there because a train may end by itself: what has gone without any change proves nothing.
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "api/rerun.hpp"
#include "base/units.hpp"
#include "sluice/sluice.hpp"
#include "trace/injection.hpp"

namespace sluice {
namespace {

using api::Rerun;
using nlohmann::json;

// The control run has the train if its spikes cost at least this share of what they cost in the trace; the change has
// taken it away if at most this share of the control's cost is left.
constexpr double kSeenAgain = 0.5, kLeft = 0.3;
// Two trains are the same one if their periods differ by less.
constexpr double kSamePeriod = 0.05;
constexpr int kHighestPriority = -20;

// How one run differs from the one in the trace.
struct Change {
  std::string text;               // "the weights in host memory"; empty: not at all
  bool ahead = false;             // before other tasks
  bool no_consumer = false;
};

// Leaves out the faults that have no place in a run with `places`: opening a model refuses them.
void leave_out(std::vector<std::string>& inject, const trace::FaultPlaces& places) {
  std::erase_if(inject, [&](const std::string& text) {
    const Result<trace::Injection> injection = trace::parse_injection(text);
    return injection && !trace::check_place(*injection, places);
  });
}

// Changes `rerun` so that `cause` cannot act. Error: unsupported, saying why that cannot be done.
Result<Change> take_away(const std::string& cause, const json& run, Rerun& rerun) {
  ModelOptions& options = rerun.options;
  const json bytes = run.value("bytes", json::object());
  const auto bytes_in = [&](const char* tier) { return bytes.value(tier, uint64_t{0}); };
  if (cause == "disk_tail" || cause == "competing_reads") {
    if (bytes_in("disk") == 0) return fail(ErrorCode::unsupported, "no weights were streamed from the drive");
    options.host_memory_bytes = bytes_in("disk") + bytes_in("host") + 64 * kMiB;
    leave_out(options.inject, {.host = true});
    return Change{.text = "the weights in host memory, not on the drive"};
  }
  if (cause == "bus") {
    options.device_memory_bytes.reset();
    options.host_memory_bytes = 0;
    leave_out(options.inject, {});
    return Change{.text = "all weights resident, nothing copied"};
  }
  if (cause == "page_faults") {
    if (options.io != Io::mmap) return fail(ErrorCode::unsupported, "the weights were not mapped");
    options.io = Io::automatic;
    options.device_memory_bytes.reset();
    leave_out(options.inject, {});
    return Change{.text = "the weights read into memory of the process, not mapped"};
  }
  if (cause == "interference") {
    const size_t others = std::erase_if(options.inject, [](const std::string& text) { return text.starts_with("prefill"); });
    options.sessions = 1;
    if (others == 0) return fail(ErrorCode::unsupported, "other sessions are not Sluice's to start");
    return Change{.text = "no other session"};
  }
  if (cause == "consumer") return Change{.text = "nobody who takes the tokens", .no_consumer = true};
  if (cause == "scheduling") return Change{.text = "a priority above all other tasks", .ahead = true};
  return fail(ErrorCode::unsupported, fmt::format("Sluice cannot take {} out of the way", cause));
}

// The priority of this thread, and so of those that it starts meanwhile.
class Ahead {
 public:
  explicit Ahead(bool wanted) : before_(::getpriority(PRIO_PROCESS, 0)), raised_(wanted) {}
  ~Ahead() {
    if (raised_) (void)::setpriority(PRIO_PROCESS, 0, before_);
  }
  Ahead(const Ahead&) = delete;
  Ahead& operator=(const Ahead&) = delete;

  Status raise() {
    if (!raised_ || ::setpriority(PRIO_PROCESS, 0, kHighestPriority) == 0) return {};
    raised_ = false;
    return fail(ErrorCode::unsupported, fmt::format("this user may not raise the priority of a process ({}); run it as "
                                                    "root, or allow it with `ulimit -e`", std::strerror(errno)), errno);
  }

 private:
  int before_;
  bool raised_;
};

// A name for a trace of a rerun, and the end of that file.
class TemporaryTrace {
 public:
  TemporaryTrace() {
    static std::atomic<unsigned> number{0};
    std::error_code ignored;
    path_ = std::filesystem::temp_directory_path(ignored) /
            fmt::format("sluice-confirm-{}-{}.sltrace", ::getpid(), number.fetch_add(1));
  }
  ~TemporaryTrace() {
    std::error_code ignored;
    std::filesystem::remove(path_, ignored);
  }
  TemporaryTrace(const TemporaryTrace&) = delete;
  TemporaryTrace& operator=(const TemporaryTrace&) = delete;
  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

// Runs again and gives the new trace's report. `on_token`: after each token; its consumer's time does not count.
Result<json> run_again(const Rerun& rerun, const Change& change, const std::function<void()>& on_token) {
  Ahead ahead(change.ahead);
  SLUICE_TRY(ahead.raise());
  SLUICE_TRY_ASSIGN(model, Model::open(rerun.path, rerun.options));
  SLUICE_TRY_ASSIGN(session, model.new_session());
  SLUICE_TRY(session.append(rerun.prompt));
  const TemporaryTrace trace;
  SLUICE_TRY(model.start_trace(trace.path(), {.command = "confirm", .prompt = {}, .generate = {}}));
  std::function<bool(const Token&)> consumer;
  if (!change.no_consumer) consumer = [&](const Token&) { return on_token(), true; };
  SLUICE_TRY_ASSIGN(stopped, session.generate(rerun.generate, consumer));
  (void)stopped;
  SLUICE_TRY_ASSIGN(totals, model.stop_trace());
  (void)totals;
  SLUICE_TRY_ASSIGN(text, analyze_trace(trace.path()));
  return json::parse(text);
}

// Seconds a token that the spikes of `train` cost in the run of `report`: those of trains with its period or its cause.
double cost_of(const json& train, const json& report) {
  double seconds = 0;
  for (const json& other : report["trains"]) {
    const double ratio = other["period"].get<double>() / train["period"].get<double>();
    const bool same_period = other["clock"] == train["clock"] && std::abs(ratio - 1) < kSamePeriod;
    if (!same_period && other["cause"] != train["cause"]) continue;
    seconds += other["excess_each"].get<double>() * static_cast<double>(other["tokens"].size());
  }
  return seconds / std::max(1.0, report["decoded_tokens"].get<double>());
}

json verdict(const json& train, const json& report, const json& control, const json& changed, const std::string& change) {
  const double traced = cost_of(train, report), again = cost_of(train, control), left = cost_of(train, changed);
  const bool seen = again >= kSeenAgain * traced;
  const bool confirmed = seen && left <= kLeft * again;
  std::string text = fmt::format("the spikes cost {} a token here, {} when run again as it was, {} with {}",
                                 format_seconds(traced), format_seconds(again), format_seconds(left), change);
  if (!seen) text = fmt::format("not seen again when run as it was ({} a token here, {} then), so nothing is proved",
                                format_seconds(traced), format_seconds(again));
  return {{"change", change}, {"traced", traced}, {"again", again}, {"changed", left}, {"confirmed", confirmed},
          {"text", text}};
}

}  // namespace

Result<std::string> confirm_trace(const std::string& path, const ConfirmOptions& options) {
  SLUICE_TRY_ASSIGN(text, analyze_trace(path));
  json report = json::parse(text);
  SLUICE_TRY_ASSIGN(rerun, api::rerun_of(report["run"], path));
  rerun.options.log = options.log;

  struct Plan {
    Rerun rerun;
    Change change;
  };
  std::map<std::string, Plan> plans;          // by cause
  std::map<std::string, std::string> refused;
  for (const json& train : report["trains"]) {
    const std::string cause = train["cause"];
    if (cause == "unknown" || plans.contains(cause) || refused.contains(cause)) continue;
    Plan plan{.rerun = rerun, .change = {}};
    Result<Change> change = take_away(cause, report["run"], plan.rerun);
    if (!change) {
      refused[cause] = change.error().message;
      continue;
    }
    plan.change = std::move(*change);
    plans.emplace(cause, std::move(plan));
  }

  const uint64_t tokens = report["tokens"].get<uint64_t>(), total = tokens * (plans.size() + 1);
  uint64_t runs = 0, done = 0;
  const auto on_token = [&] {
    if (options.progress) options.progress(std::min(++done, runs * tokens), total);
  };
  const auto again = [&](const Rerun& what, const Change& change) {
    done = runs++ * tokens;
    return run_again(what, change, on_token);
  };
  json control;
  if (!plans.empty()) {
    SLUICE_TRY_ASSIGN(made, again(rerun, {}));
    control = std::move(made);
  }
  std::map<std::string, json> changed;
  for (const auto& [cause, plan] : plans) {
    Result<json> made = again(plan.rerun, plan.change);
    if (made) changed[cause] = std::move(*made);
    else refused[cause] = made.error().message;
  }
  for (json& train : report["trains"]) {
    const std::string cause = train["cause"];
    if (cause == "unknown") continue;
    if (const auto why = refused.find(cause); why != refused.end()) {
      train["confirmation"] = {{"confirmed", false}, {"text", "not tried: " + why->second}};
      continue;
    }
    train["confirmation"] = verdict(train, report, control, changed[cause], plans[cause].change.text);
    if (train["confirmation"]["confirmed"].get<bool>()) train["grade"] = "confirmed";
  }
  return report.dump(-1, ' ', false, json::error_handler_t::replace);
}

}  // namespace sluice
