// SPDX-License-Identifier: Apache-2.0
#include "trace/collector.hpp"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <utility>

namespace sluice::trace {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

// Waking costs a core its caches, so that this thread sleeps as long as the rings allow: from kLongest on, it halves its
// interval where one was a quarter full, and doubles it where none was a sixteenth. SmolLM2 on two cores writes 60,000
// records a second.
constexpr milliseconds kShortest{5}, kLongest{200};
constexpr double kFull = 1.0 / 4, kEmpty = 1.0 / 16;
constexpr milliseconds kReading{200};     // of the machine
constexpr uint64_t kReadingsPerDrive = 5;

bool is_session(const Track& track) { return track.name().starts_with("session "); }

}  // namespace

Result<std::unique_ptr<Collector>> Collector::start(Recorder& recorder, const std::string& path,
                                                    const std::string& note_json, const Watched& watched) {
  SLUICE_TRY_ASSIGN(file, TraceFileWriter::create(path, read_clocks(), note_json));
  std::unique_ptr<Collector> self(new Collector(recorder, std::move(file)));
  for (Track* track : recorder.tracks()) {
    track->populate();
    self->sources_.push_back({.track = track, .next = track->written(), .of_session = is_session(*track)});
    SLUICE_TRY(self->file_.add_track(track->number(), track->name()));
  }
  self->machine_ = std::make_unique<MachineEvidence>(recorder.machine_track());
  self->gpu_ = GpuEvidence::open(recorder.machine_track(), watched.gpu_bus_id);
  if (!watched.weights.empty()) self->drive_ = DriveEvidence::open(recorder.machine_track(), watched.weights);
  self->read_machine();   // what later readings are compared with
  recorder.set_collected(true);
  self->thread_ = std::thread([raw = self.get()] { raw->run(); });
  return self;
}

Collector::~Collector() { join(); }

void Collector::join() {
  recorder_.set_collected(false);
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void Collector::run() {
  // Behind everything that computes, in its pauses: this thread may be late by as long as a ring lasts.
  (void)::setpriority(PRIO_PROCESS, static_cast<id_t>(::syscall(SYS_gettid)), 19);
  milliseconds interval = kLongest;
  Clock::time_point read_at = Clock::now();   // the machine, last
  for (;;) {
    {
      std::unique_lock lock(mutex_);
      if (wake_.wait_for(lock, interval, [this] { return stopping_; })) return;
    }
    const uint64_t begin = ticks();
    if (const Clock::time_point now = Clock::now(); now - read_at >= kReading) {
      read_machine();
      read_at = now;
    }
    if (Status status = collect(); !status) {
      status_ = std::move(status);
      recorder_.set_collected(false);
      return;
    }
    recorder_.machine_track().record(Kind::collect, begin, ticks());
    if (fill_ >= kFull) interval = std::max(kShortest, interval / 2);
    else if (fill_ < kEmpty) interval = std::min(kLongest, interval * 2);
  }
}

void Collector::read_machine() {
  machine_->read();
  if (gpu_) gpu_->read();
  if (drive_ && readings_ % kReadingsPerDrive == 0) drive_->read();
  ++readings_;
}

Status Collector::collect() {
  const std::vector<Track*> tracks = recorder_.tracks();
  while (sources_.size() < tracks.size()) {   // sessions that began meanwhile
    Track* track = tracks[sources_.size()];
    track->populate();
    sources_.push_back({.track = track, .of_session = is_session(*track)});
    SLUICE_TRY(file_.add_track(track->number(), track->name()));
  }
  fill_ = 0;
  // A token is recorded behind its parts, which lie on other tracks. What is known of the sessions' tracks is asked for
  // first and written last: wherever the file ends, no token is in it without them.
  for (const bool of_session : {true, false}) {
    for (Source& source : sources_) {
      if (source.of_session == of_session) source.end = source.track->written();
    }
  }
  for (const bool of_session : {false, true}) {
    for (Source& source : sources_) {
      if (source.of_session == of_session) SLUICE_TRY(collect(source));
    }
  }
  SLUICE_TRY(file_.add_clock(read_clocks()));
  return file_.flush();
}

Status Collector::collect(Source& source) {
  if (source.next >= source.end) return {};
  const auto waiting = static_cast<double>(source.end - source.next);
  fill_ = std::max(fill_, waiting / static_cast<double>(source.track->capacity()));
  while (source.next < source.end) {
    const auto most = static_cast<size_t>(std::min<uint64_t>(piece_.size(), source.end - source.next));
    const Track::Taken taken = source.track->take(source.next, std::span(piece_).first(most));
    source.next = taken.next;
    source.dropped += taken.dropped;
    totals_.records += taken.records;
    totals_.dropped += taken.dropped;
    SLUICE_TRY(file_.add_records(source.track->number(), std::span(piece_).first(taken.records), source.dropped));
  }
  return {};
}

Result<Totals> Collector::stop() {
  join();
  if (status_) status_ = collect();
  if (status_) status_ = file_.finish(totals_.records, totals_.dropped);
  if (status_) return totals_;
  status_.error().message += "; it ended there, before the run, and what was written until then can be read";
  return fail(std::move(status_.error()));
}

}  // namespace sluice::trace
