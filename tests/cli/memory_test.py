# SPDX-License-Identifier: Apache-2.0
"""Budgets are kept: anonymous memory stays within device budget + host budget + 96 MB, whatever the tiers."""
import os
import time
import unittest

from sluice_process import CONFIGS, SCRATCH, TIMEOUT, CliTest, start

# Tokenizer, manifest, staging ring, logits, code of the libraries.
ALLOWANCE = 96 * 1000 * 1000
MIB = 1 << 20


def anonymous_bytes(pid):
    """RssAnon of /proc/PID/status; 0 once the process is gone."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


class MemoryTest(CliTest):
    def test_anonymous_memory_stays_within_the_budgets(self):
        # The shapes of SmolLM2-135M with more layers: 240 MiB of weights.
        path = os.path.join(SCRATCH, "memory.sluice")
        self.succeeds("synth", "--model", os.path.join(CONFIGS, "smollm2-135m.toml"), "--layers", 90, "-o", path)
        for io in ("uring", "pread"):
            for device, host in ((80, 0), (80, 60), (400, 0)):
                process = start("run", path, "--ids", ",".join(map(str, range(200))), "-n", 8, "--ignore-eos", "--context",
                                512, "--io", io, "--device-memory", f"{device}M", "--host-memory", f"{host}M", "-q")
                peak, deadline = 0, time.monotonic() + TIMEOUT
                while process.poll() is None and time.monotonic() < deadline:
                    peak = max(peak, anonymous_bytes(process.pid))
                    time.sleep(0.001)
                process.communicate(timeout=TIMEOUT)
                self.assertEqual(process.returncode, 0)
                bound = (device + host) * MIB + ALLOWANCE
                print(f"{io}, device {device}M, host {host}M: peak {peak / 1e6:.1f} MB of {bound / 1e6:.1f} MB")
                self.assertGreater(peak, 20 * MIB)   # it was seen at work
                if os.environ.get("ASAN_OPTIONS") is None:   # a sanitizer's shadow is not in the budget
                    self.assertLessEqual(peak, bound)


if __name__ == "__main__":
    unittest.main(verbosity=2)
