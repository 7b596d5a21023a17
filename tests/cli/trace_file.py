# SPDX-License-Identifier: Apache-2.0
"""Trace files, read as docs/tracing.md and trace_file.hpp describe them. Standard library only."""
import collections
import struct

KINDS = ["none", "token", "run_model", "sampling", "detokenize", "callback", "evidence", "pass", "embed", "norm",
         "matmul", "rope", "attention", "activation", "lm_head", "disk_wait", "copy_wait", "layer", "finish",
         "disk_read", "bus_copy", "check", "stage_wait", "ring_wait", "counter", "injected", "turn_wait",
         "session", "collect", "slot_wait", "prepare"]


def records_of(path):
    """Records of a trace file by kind."""
    counts = collections.Counter()
    with open(path, "rb") as file:
        data = file.read()
    at = 64
    while at < len(data):
        tag, size = struct.unpack_from("<4sI", data, at)
        if tag == b"RECS":
            for record in range(at + 16 + 16, at + 16 + size, 32):
                counts[KINDS[struct.unpack_from("<H", data, record + 30)[0]]] += 1
        at += 16 + size
    return counts
