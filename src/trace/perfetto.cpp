// SPDX-License-Identifier: Apache-2.0
// Perfetto's trace format, written by hand: protos/perfetto/trace/trace_packet.proto and track_event/*.proto of
// Perfetto.
//
//   Trace            1: TracePacket, again and again
//   TracePacket      8: timestamp (ns), 10: trusted_packet_sequence_id, 11: TrackEvent, 13: sequence_flags, 60:
//   TrackDescriptor TrackDescriptor  1: uuid, 2: name, 3: ProcessDescriptor, 4: ThreadDescriptor, 5: parent_uuid, 8:
//   CounterDescriptor TrackEvent       9: type (1 slice begins, 2 ends, 4 counter), 11: track_uuid, 22: categories, 23:
//   name, 4: DebugAnnotation,
//                    30: counter_value
//   DebugAnnotation  10: name, 3: uint_value
#include <algorithm>
#include <vector>

#include "trace/export.hpp"

namespace sluice::trace {
namespace {

constexpr size_t kPiece = 1 << 16;
constexpr uint64_t kProcess = 1;                 // uuid of the process's track
constexpr uint64_t kFirstTrack = 100, kFirstCounter = 100000;
constexpr uint64_t kSequence = 1;
constexpr uint64_t kSliceBegin = 1, kSliceEnd = 2, kCounter = 4;

// One protobuf message. Wire types: 0 varint, 2 length-delimited.
class Message {
 public:
  void number(uint32_t field, uint64_t value) {
    varint(uint64_t{field} << 3);
    varint(value);
  }
  void text(uint32_t field, std::string_view value) {
    varint(uint64_t{field} << 3 | 2);
    varint(value.size());
    bytes_ += value;
  }
  void message(uint32_t field, const Message& value) { text(field, value.bytes_); }
  const std::string& bytes() const { return bytes_; }

 private:
  void varint(uint64_t value) {
    for (; value >= 0x80; value >>= 7) bytes_ += static_cast<char>(value | 0x80);
    bytes_ += static_cast<char>(value);
  }
  std::string bytes_;
};

class Writer {
 public:
  Writer(const Trace& trace, const Sink& sink) : trace_(trace), sink_(sink) {}

  Status write() {
    SLUICE_TRY(describe_process());
    for (size_t i = 0; i < trace_.tracks.size(); ++i) SLUICE_TRY(track(i));
    Status last = sink_(text_);
    return last;
  }

 private:
  Status packet(Message& packet) {
    packet.number(10, kSequence);
    Message trace;
    trace.message(1, packet);
    text_ += trace.bytes();
    if (text_.size() < kPiece) return {};
    SLUICE_TRY(sink_(text_));
    text_.clear();
    return {};
  }

  Status describe_process() {
    Message process, descriptor, packet_;
    process.number(1, 1);            // pid
    process.text(6, "sluice");
    descriptor.number(1, kProcess);
    descriptor.message(3, process);
    packet_.message(60, descriptor);
    packet_.number(13, 1);           // SEQ_INCREMENTAL_STATE_CLEARED
    return packet(packet_);
  }

  Status describe_track(uint64_t uuid, std::string_view name, bool counter) {
    Message descriptor, packet_;
    descriptor.number(1, uuid);
    descriptor.text(2, name);
    descriptor.number(5, kProcess);
    if (counter) descriptor.message(8, Message());
    packet_.message(60, descriptor);
    return packet(packet_);
  }

  uint64_t nanoseconds(uint64_t at_ticks) const {
    return static_cast<uint64_t>(std::max(0.0, trace_.scale.steady_ns(at_ticks)));
  }

  // Slices of a track nest: of those that begin together the longer one is outside. Begins and ends go out in the order
  // of time, as a stack has them.
  Status track(size_t index) {
    const TraceTrack& track = trace_.tracks[index];
    const uint64_t uuid = kFirstTrack + index;
    SLUICE_TRY(describe_track(uuid, track.name, false));
    std::vector<const Record*> slices;
    std::vector<bool> described(static_cast<size_t>(Counter::count));
    for (const Record& record : track.records) {
      if (record.kind != Kind::counter) {
        slices.push_back(&record);
      } else if (record.layer < static_cast<uint16_t>(Counter::count)) {
        const uint64_t counter_uuid = kFirstCounter + index * 256 + record.layer;
        if (!described[record.layer])
          SLUICE_TRY(describe_track(counter_uuid, name_of(static_cast<Counter>(record.layer)), true));
        described[record.layer] = true;
        SLUICE_TRY(reading(counter_uuid, record));
      }
    }
    std::stable_sort(slices.begin(), slices.end(), [](const Record* a, const Record* b) {
      return a->begin != b->begin ? a->begin < b->begin : a->end > b->end;
    });
    std::vector<const Record*> open;
    for (const Record* slice : slices) {
      while (!open.empty() && open.back()->end <= slice->begin) SLUICE_TRY(close(uuid, open));
      // Spans that overlap without nesting (reads in flight) end together with the one around them at the latest.
      SLUICE_TRY(begin(uuid, *slice));
      open.push_back(slice);
      std::stable_sort(open.begin(), open.end(), [](const Record* a, const Record* b) { return a->end > b->end; });
    }
    while (!open.empty()) SLUICE_TRY(close(uuid, open));
    return {};
  }

  Status begin(uint64_t uuid, const Record& record) {
    Message event, packet_;
    event.number(9, kSliceBegin);
    event.number(11, uuid);
    event.text(22, "sluice");
    event.text(23, name_of(record.kind));
    if (record.layer != Record::kNoLayer) annotate(event, "layer", record.layer);
    if (record.bytes != 0) annotate(event, "bytes", record.bytes);
    if (record.value != 0) annotate(event, "value", record.value);
    packet_.number(8, nanoseconds(record.begin));
    packet_.message(11, event);
    return packet(packet_);
  }

  static void annotate(Message& event, std::string_view name, uint64_t value) {
    Message annotation;
    annotation.text(10, name);
    annotation.number(3, value);
    event.message(4, annotation);
  }

  Status close(uint64_t uuid, std::vector<const Record*>& open) {
    Message event, packet_;
    event.number(9, kSliceEnd);
    event.number(11, uuid);
    packet_.number(8, nanoseconds(open.back()->end));
    packet_.message(11, event);
    open.pop_back();
    return packet(packet_);
  }

  Status reading(uint64_t uuid, const Record& record) {
    Message event, packet_;
    event.number(9, kCounter);
    event.number(11, uuid);
    event.number(30, record.value);
    packet_.number(8, nanoseconds(record.begin));
    packet_.message(11, event);
    return packet(packet_);
  }

  const Trace& trace_;
  const Sink& sink_;
  std::string text_;
};

}  // namespace

Status write_perfetto(const Trace& trace, const Sink& sink) { return Writer(trace, sink).write(); }

}  // namespace sluice::trace
