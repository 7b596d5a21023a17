# SPDX-License-Identifier: Apache-2.0
"""Trace files, read and written as docs/tracing.md and trace_file.hpp describe them. Standard library and libxxhash."""
import collections
import ctypes
import struct

KINDS = ["none", "token", "run_model", "sampling", "detokenize", "callback", "evidence", "pass", "embed", "norm",
         "matmul", "rope", "attention", "activation", "lm_head", "disk_wait", "copy_wait", "layer", "finish",
         "disk_read", "bus_copy", "check", "stage_wait", "ring_wait", "counter", "injected", "turn_wait",
         "session", "collect", "slot_wait", "prepare"]
NO_LAYER = 0xFFFF

Record = collections.namedtuple("Record", "kind begin end layer bytes value", defaults=(NO_LAYER, 0, 0))


def chunks_of(data):
    """(tag, payload) of each chunk."""
    at = 64
    while at < len(data):
        tag, size = struct.unpack_from("<4sI", data, at)
        yield tag, data[at + 16:at + 16 + size]
        at += 16 + size


def unpacked(payload):
    """The records of a chunk."""
    words = iter(word for word, in struct.iter_unpack("<Q", payload))
    end = 0
    for first in words:
        flags = first >> 56
        begin = end + (next(words) if flags & 1 else 0) & (1 << 64) - 1
        end = begin + (next(words) if flags & 2 else first & 0xFFFFFFFF)
        size = next(words) if flags & 4 else 0
        value = next(words) if flags & 8 else 0
        yield Record(KINDS[first >> 48 & 0xFF], begin, end, first >> 32 & 0xFFFF, size, value)


def packed(records):
    """The same bytes as TraceFileWriter::add_records."""
    words, end = [], 0
    for record in records:
        length, extra, flags = record.end - record.begin, [], 0
        for flag, word, needed in ((1, record.begin - end & (1 << 64) - 1, record.begin != end),
                                   (2, length, length >= 1 << 32), (4, record.bytes, record.bytes != 0),
                                   (8, record.value, record.value != 0)):
            if needed:
                flags |= flag
                extra.append(word)
        words += [(0 if flags & 2 else length) | record.layer << 32 | KINDS.index(record.kind) << 48 | flags << 56]
        words += extra
        end = record.end
    return struct.pack(f"<{len(words)}Q", *words)


class TraceFile:
    """A whole file: `tracks` are (name, records) in the order of their numbers."""

    def __init__(self, path):
        with open(path, "rb") as file:
            data = file.read()
        self.first = struct.unpack_from("<2Q", data, 16)   # ticks, steady ns
        later = self.first
        self.tracks = []
        for tag, payload in chunks_of(data):
            if tag == b"TRAK":
                size = struct.unpack_from("<I", payload, 4)[0]
                self.tracks.append((payload[8:8 + size].decode(), []))
            elif tag == b"CLKS":
                later = struct.unpack_from("<2Q", payload)
            elif tag == b"RECS":
                records = self.tracks[struct.unpack_from("<I", payload)[0]][1]
                records.extend(unpacked(payload[16:]))
        ticks, ns = later[0] - self.first[0], later[1] - self.first[1]
        self.ns_per_tick = ns / ticks if ticks > 0 and ns > 0 else 1.0

    def steady_ns(self, ticks):
        """The same doubles as TickScale::steady_ns."""
        return float(self.first[1]) + float(ticks - self.first[0]) * self.ns_per_tick


def records_of(path):
    """Records of a trace file by kind."""
    return collections.Counter(record.kind for _, records in TraceFile(path).tracks for record in records)


def write_trace(path, tracks, note=b"{}", clock_errors=(50, 70)):
    """A file of these (name, records), finished; ticks are nanoseconds in it and begin at 1,000. `clock_errors`: of its
    first and its last reading of the clocks."""
    xxhash = ctypes.CDLL("libxxhash.so.0")
    xxhash.XXH3_64bits_withSeed.restype = ctypes.c_uint64
    xxhash.XXH3_64bits_withSeed.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint64]

    def chunk(tag, payload):
        payload += (b" " if tag == b"NOTE" else b"\0") * (-len(payload) % 8)
        head = struct.pack("<4sI", tag, len(payload))
        seed = struct.unpack("<Q", head)[0]
        return head + struct.pack("<Q", xxhash.XXH3_64bits_withSeed(payload, len(payload), seed)) + payload

    start = 10**12
    header = struct.pack("<8sIIQQQQQ", b"SLTRACE\n", 2, 64, 1000, start, 0, clock_errors[0], 0)
    data = header + struct.pack("<Q", xxhash.XXH3_64bits_withSeed(header, len(header), 0)) + chunk(b"NOTE", note)
    for number, (name, records) in enumerate(tracks):
        data += chunk(b"TRAK", struct.pack("<II", number, len(name)) + name.encode())
        data += chunk(b"RECS", struct.pack("<IIQ", number, len(records), 0) + packed(records))
    data += chunk(b"CLKS", struct.pack("<QQQ", 1000 + 10**9, start + 10**9, clock_errors[1]))
    data += chunk(b"ENDS", struct.pack("<QQ", sum(len(records) for _, records in tracks), 0))
    with open(path, "wb") as file:
        file.write(data)
