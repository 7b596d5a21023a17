# SPDX-License-Identifier: Apache-2.0
"""With a tool attached that reads NVTX, the spans of a trace are its ranges too. SLUICE_NVTX_TOOL: such a tool."""
import os
import unittest

import sluice_process as sp
from sluice_process import CliTest
from trace_file import records_of

OUT = os.path.join(sp.SCRATCH, "ranges")


class Ranges(CliTest):
    def ranges(self, *flags):
        path = os.path.join(sp.SCRATCH, "nvtx.sltrace")
        os.environ.update(NVTX_INJECTION64_PATH=os.environ["SLUICE_NVTX_TOOL"], SLUICE_NVTX_OUT=OUT)
        try:
            self.succeeds("run", sp.talking(), "-p", "Hello", "-n", 20, "--ignore-eos", "-q", "--backend", "cpu",
                          "--trace", path, *flags)
        finally:
            del os.environ["NVTX_INJECTION64_PATH"]
        with open(OUT) as file:
            lines = [line.rsplit(" ", 1) for line in file]
        counts = {name.removeprefix("sluice "): int(count) for name, count in lines}
        self.assertEqual(counts.pop("unbalanced"), 0)
        return counts, records_of(path)

    def test_all_resident(self):
        ranges, spans = self.ranges()
        for kind in ("token", "pass", "embed", "layer", "norm", "matmul", "rope", "attention", "activation", "lm_head", "finish",
                     "sampling", "detokenize", "callback"):
            self.assertGreater(ranges[kind], 0, kind)
            self.assertEqual(ranges[kind], spans[kind], kind)

    def test_streamed(self):
        ranges, spans = self.ranges("--io", "pread", "--device-memory", sp.smallest_budget(sp.talking()))
        self.assertEqual(ranges["pass"], spans["pass"])
        for kind in ("check", "bus_copy", "stage_wait"):
            self.assertGreaterEqual(ranges[kind], spans[kind], kind)


if __name__ == "__main__":
    unittest.main(verbosity=2)
