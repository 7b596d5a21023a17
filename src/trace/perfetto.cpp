// SPDX-License-Identifier: Apache-2.0
// Perfetto's trace format, written by hand: protos/perfetto/trace/trace_packet.proto and track_event/*.proto of
// Perfetto.
//
//   Trace            1: TracePacket, again and again
//   TracePacket      8: timestamp (ns), 10: trusted_packet_sequence_id, 11: TrackEvent, 13: sequence_flags,
//                    60: TrackDescriptor
//   TrackDescriptor  1: uuid, 2: name, 3: ProcessDescriptor, 5: parent_uuid, 8: CounterDescriptor,
//                    11: child_ordering (3: by rank), 12: sibling_order_rank
//   TrackEvent       4: DebugAnnotation, 9: type (1 slice begins, 2 ends, 4 counter), 11: track_uuid, 22: categories,
//                    23: name, 30: counter_value
//   DebugAnnotation  3: uint_value, 10: name
#include <algorithm>
#include <array>
#include <vector>

#include "trace/export.hpp"

namespace sluice::trace {
namespace {

constexpr size_t kPiece = 1 << 16;
constexpr uint64_t kProcess = 1;                 // uuid of the process's track
constexpr uint64_t kOrderedByRank = 3;
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
    for (const TraceTrack& of : trace_.tracks) SLUICE_TRY(track(of));
    return sink_(text_);
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
    descriptor.number(11, kOrderedByRank);
    packet_.message(60, descriptor);
    packet_.number(13, 1);           // SEQ_INCREMENTAL_STATE_CLEARED
    return packet(packet_);
  }

  // Gives the new track's uuid; tracks are shown in the order of these.
  Status describe_track(uint64_t& uuid, uint64_t parent, std::string_view name, bool counter) {
    uuid = ++last_uuid_;
    Message descriptor, packet_;
    descriptor.number(1, uuid);
    descriptor.text(2, name);
    descriptor.number(5, parent);
    if (counter) descriptor.message(8, Message());
    descriptor.number(12, uuid);
    packet_.message(60, descriptor);
    return packet(packet_);
  }

  uint64_t nanoseconds(uint64_t at_ticks) const {
    return static_cast<uint64_t>(std::clamp(trace_.scale.steady_ns(at_ticks), 0.0, 9e18));
  }

  // Counters lie below the track that has them: side by side, those of two sessions would be taken for one.
  Status track(const TraceTrack& track) {
    const std::vector<Lane> lanes = lanes_of(track);
    std::vector<uint64_t> uuids(lanes.size());
    for (size_t i = 0; i < lanes.size(); ++i) SLUICE_TRY(describe_track(uuids[i], kProcess, lanes[i].name, false));
    std::array<uint64_t, static_cast<size_t>(Counter::count)> counters{};
    for (const Record& record : track.records) {
      if (record.kind != Kind::counter || record.layer >= counters.size()) continue;
      uint64_t& uuid = counters[record.layer];
      if (uuid == 0) SLUICE_TRY(describe_track(uuid, uuids[0], name_of(static_cast<Counter>(record.layer)), true));
      SLUICE_TRY(reading(uuid, record));
    }
    for (size_t i = 0; i < lanes.size(); ++i) SLUICE_TRY(slices(uuids[i], lanes[i]));
    return {};
  }

  // Begins and ends in the order of time, as a stack has them.
  Status slices(uint64_t uuid, const Lane& lane) {
    std::vector<const Record*> open;
    for (const Record* span : lane.spans) {
      while (!open.empty() && open.back()->end <= span->begin) SLUICE_TRY(close(uuid, open));
      SLUICE_TRY(begin(uuid, *span));
      open.push_back(span);
    }
    while (!open.empty()) SLUICE_TRY(close(uuid, open));
    return {};
  }

  Status begin(uint64_t uuid, const Record& record) {
    Message event, packet_;
    event.number(9, kSliceBegin);
    event.number(11, uuid);
    event.text(22, "sluice");
    event.text(23, slice_name(record));
    if (has_layer(record)) annotate(event, "layer", record.layer);
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
  uint64_t last_uuid_ = kProcess;
};

}  // namespace

Status write_perfetto(const Trace& trace, const Sink& sink) { return Writer(trace, sink).write(); }

}  // namespace sluice::trace
