// SPDX-License-Identifier: Apache-2.0
#include "trace/collector.hpp"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <utility>

namespace sluice::trace {
namespace {

// A ring of 16384 records lasts this long at 800,000 records a second; SmolLM2 on two cores writes 60,000.
constexpr std::chrono::milliseconds kInterval{20};
constexpr int kIntervalsPerReading = 5;   // of the machine: 10 a second

}  // namespace

Result<std::unique_ptr<Collector>> Collector::start(Recorder& recorder, const std::string& path,
                                                    const std::string& note_json) {
  SLUICE_TRY_ASSIGN(file, TraceFileWriter::create(path, read_clocks(), note_json));
  std::unique_ptr<Collector> self(new Collector(recorder, std::move(file)));
  for (Track* track : recorder.tracks()) {
    self->sources_.push_back({.track = track, .next = track->written()});
    SLUICE_TRY(self->file_.add_track(track->number(), track->name()));
  }
  self->machine_ = std::make_unique<MachineEvidence>(recorder.machine_track());
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
  // Behind everything that computes: this thread may be late by as long as a ring lasts.
  (void)::setpriority(PRIO_PROCESS, static_cast<id_t>(::syscall(SYS_gettid)), 5);
  for (int interval = 0;; ++interval) {
    {
      std::unique_lock lock(mutex_);
      if (wake_.wait_for(lock, kInterval, [this] { return stopping_; })) return;
    }
    if (interval % kIntervalsPerReading == 0) machine_->read();
    if (Status status = collect(); !status) {
      status_ = std::move(status);
      recorder_.set_collected(false);
      return;
    }
  }
}

Status Collector::collect() {
  const std::vector<Track*> tracks = recorder_.tracks();
  while (sources_.size() < tracks.size()) {   // sessions that began meanwhile
    Track* track = tracks[sources_.size()];
    sources_.push_back({.track = track});
    SLUICE_TRY(file_.add_track(track->number(), track->name()));
  }
  for (Source& source : sources_) {
    records_.clear();
    const uint64_t dropped = source.dropped;
    source.next = source.track->read(source.next, records_, source.dropped);
    if (records_.empty() && source.dropped == dropped) continue;
    totals_.records += records_.size();
    totals_.dropped += source.dropped - dropped;
    SLUICE_TRY(file_.add_records(source.track->number(), records_, source.dropped));
  }
  return file_.add_clock(read_clocks());
}

Result<Totals> Collector::stop() {
  join();
  SLUICE_TRY(std::move(status_));
  SLUICE_TRY(collect());
  SLUICE_TRY(file_.finish(totals_.records, totals_.dropped));
  return totals_;
}

}  // namespace sluice::trace
