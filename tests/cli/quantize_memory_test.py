# SPDX-License-Identifier: Apache-2.0
"""quantize holds one layer at a time: its memory is that of docs/quantization.md, whatever the number of layers."""
import os
import random
import time
import unittest

import sluice_process as sp
from sluice_process import CliTest, start

HIDDEN, FFN, VOCAB = 512, 1536, 512
TEXT_BYTES = 20000  # and as many tokens
FEW, MANY = 2, 10  # layers


def peak_bytes(pid):
    """VmHWM of /proc/PID/status; 0 once the process is gone. Unlike ru_maxrss it has nothing of the parent's."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as status:
            return next((1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:")), 0)
    except OSError:
        return 0


@unittest.skipIf("ASAN_OPTIONS" in os.environ, "a sanitizer's shadow and quarantine are not Sluice's memory")
class QuantizeMemory(CliTest):
    @classmethod
    def setUpClass(cls):
        letters = random.Random(1)
        cls.text = os.path.join(sp.SCRATCH, "memory.txt")
        with open(cls.text, "w") as file:
            file.write("".join(chr(letters.randrange(32, 127)) for _ in range(TEXT_BYTES)))
        for layers in (FEW, MANY):
            config = sp.write_checkpoint(cls.source(layers), layers, HIDDEN, FFN, VOCAB)
        shapes = sp.tensor_shapes(config).items()
        cls.layer = sum(2 * sp.product(shape) for name, shape in shapes if ".layers.0." in name)  # bytes, in F16

    @staticmethod
    def source(layers):
        return os.path.join(sp.SCRATCH, f"memory-{layers}")

    def peak_of(self, layers, *flags):
        """One thread: every other has slabs of its own."""
        begun = time.monotonic()
        process = start("quantize", self.source(layers), "-o", self.source(layers) + ".sluice", "--recipe",
                        os.path.join(os.environ["SLUICE_RECIPES"], "int4.toml"), "--backend", "cpu", "--threads", 1,
                        *flags)
        self.addCleanup(process.kill)
        peak = 0
        while process.poll() is None and time.monotonic() < begun + sp.TIMEOUT:
            peak = max(peak, peak_bytes(process.pid))
            time.sleep(0.002)
        done = sp.finished(process)
        self.assertEqual(done.returncode, 0, done.stderr)
        print(f"{layers} layers, {' '.join(map(str, flags[:2]))}: {peak / 1e6:.1f} MB, "
              f"{time.monotonic() - begun:.1f} s")
        return peak

    def test_a_walk_holds_one_layer_and_the_moments_of_its_widest_matrix(self):
        layer = self.layer
        walk = ["--method", "gptq", "--calibration", self.text, "--windows", 4, "--window", 64]
        base = self.peak_of(FEW, "--method", "rtn")  # the program, its tokenizer and slabs of rows
        few, many = self.peak_of(FEW, *walk), self.peak_of(MANY, *walk)
        rounded = layer * 4.125 / 16  # a scale of 16 bits for 128 weights
        bound = base + 2 * (layer + rounded) + 2 * FFN**2 * 4 + 5 * TEXT_BYTES
        print(f"a layer: {layer / 1e6:.1f} MB, all: {MANY * layer / 1e6:.1f} MB, base: {base / 1e6:.1f} MB, bound: "
              f"{bound / 1e6:.1f} MB")
        self.assertGreater(few, base + layer)  # it was seen at work
        self.assertLess(many, few + layer)
        self.assertLess(many, bound)

    def test_without_a_walk_it_holds_no_layer(self):
        few, many = self.peak_of(FEW, "--method", "rtn"), self.peak_of(MANY, "--method", "rtn")
        self.assertLess(many, few + self.layer)


if __name__ == "__main__":
    unittest.main(verbosity=2)
