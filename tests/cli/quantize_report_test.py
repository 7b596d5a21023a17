# SPDX-License-Identifier: Apache-2.0
"""What quantize says: its report, where that cannot go, what it reads of the text, and what an interruption leaves."""
import json
import os
import random
import struct
import time
import unittest

import sluice_process as sp
from sluice_process import CliTest, start

RECIPES = os.environ["SLUICE_RECIPES"]
CONTEXT = 64  # positions of the model, fewer than --window asks for


def recipe(name):
    return os.path.join(RECIPES, name + ".toml")


def source():
    """A model of six layers and a short context, and text to calibrate it."""
    folder = os.path.join(sp.SCRATCH, "report-source")
    if not os.path.exists(folder):
        config = sp.write_checkpoint(folder, layers=6, hidden=256, ffn=512)
        config["max_position_embeddings"] = CONTEXT
        with open(os.path.join(folder, "config.json"), "w") as file:
            json.dump(config, file)
        letters = random.Random(1)
        with open(os.path.join(sp.SCRATCH, "report.txt"), "w") as file:
            file.write("".join(chr(letters.randrange(32, 127)) for _ in range(8000)))
    return folder


def arguments(out, *flags):
    return ["quantize", source(), "-o", out, "--recipe", recipe("int4"), "--threads", "1", "--backend", "cpu", *flags]


def calibrated(out, windows):
    path = source()
    return arguments(out, "--calibration", os.path.join(os.path.dirname(path), "report.txt"), "--windows", str(windows),
                     "--window", "256")


class Reports(CliTest):
    def report(self, name, args):
        """Of both --report and --json, which are one."""
        path = os.path.join(sp.SCRATCH, name + ".json")
        printed = self.prints_json(*args, "--report", path, "--json")
        with open(path) as file:
            self.assertEqual(json.load(file), printed)
        return printed

    def test_tokens_are_those_of_the_windows_that_were_used(self):
        out = os.path.join(sp.SCRATCH, "tokens.sluice")
        self.assertEqual(self.report("tokens", calibrated(out, 4))["calibration_tokens"], 4 * CONTEXT)
        self.assertEqual(self.report("none", arguments(out, "--method", "rtn"))["calibration_tokens"], 0)

    def test_a_matrix_with_a_residual_has_its_bits_and_its_error(self):
        out = os.path.join(sp.SCRATCH, "residual.sluice")
        # GPTQ moves weights of inputs that hardly come far from both.
        for method, args, factor in (("rtn", arguments(out, "--method", "rtn"), 5), ("gptq", calibrated(out, 4), 1)):
            with self.subTest(method):
                plain = {one["name"]: one for one in self.report("plain", args)["matrices"]}
                both = {one["name"]: one for one in self.report("residual", [*args, "--residual"])["matrices"]}
                self.assertEqual(plain.keys(), both.keys())
                for name, one in both.items():
                    self.assertEqual(one["bits_per_weight"], plain[name]["bits_per_weight"])
                    self.assertNotIn("fine_relative_error", plain[name])
                    self.assertNotIn("residual_bits_per_weight", plain[name])
                    if one["scheme"] != "int4":
                        self.assertNotIn("fine_relative_error", one)
                        continue
                    self.assertEqual(one["method"], method)
                    self.assertEqual(one["residual_bits_per_weight"], 4 + 16 / 32)  # a scale for 32 of them
                    self.assertLess(factor * one["fine_relative_error"], one["relative_error"])
                self.assertEqual(sum("fine_relative_error" in one for one in both.values()), 6 * 7)

    def test_the_whole_has_the_bits_of_its_residuals(self):
        out = os.path.join(sp.SCRATCH, "whole.sluice")
        plain = self.report("whole-plain", arguments(out, "--method", "rtn"))
        self.assertNotIn("residual_bits_per_weight", plain)
        args = arguments(out, "--method", "rtn", "--residual")
        both = self.report("whole-residual", args)
        self.assertEqual(both["bits_per_weight"], plain["bits_per_weight"])
        self.assertEqual(both["residual_bits_per_weight"], 4.5)
        self.assertIn(b"bits per weight and 4.50 of residuals", self.succeeds(*args).stderr)

    def test_a_report_that_could_not_be_written_is_found_before_the_work(self):
        out = os.path.join(sp.SCRATCH, "unreported.sluice")
        for path in (os.path.join(sp.SCRATCH, "no-folder", "report.json"), sp.SCRATCH):
            with self.subTest(path):
                self.refuses(sp.IO, [path, "cannot be written"], *calibrated(out, 4), "--report", path)
                self.assertFalse(os.path.exists(out))
                self.assertFalse(os.path.exists(out + ".work"))


class Calibration(CliTest):
    TEXT = bytes(range(32, 127))  # each byte is its own token
    WINDOW, HIDDEN, VOCAB = 16, 128, 512

    def arguments(self, begin, *flags):
        """With `begin` every window starts with token 256. There is one layer."""
        folder = os.path.join(sp.SCRATCH, f"begin-{begin}")
        text = folder + ".txt"
        if not os.path.exists(folder):
            sp.write_checkpoint(folder, layers=1, hidden=self.HIDDEN, vocab=self.VOCAB)
            with open(os.path.join(folder, "tokenizer_config.json"), "w") as file:
                json.dump({"bos_token": "<|im_start|>", "add_bos_token": begin}, file)
            with open(text, "wb") as file:
                file.write(self.TEXT)
        return ["quantize", folder, "-o", folder + ".sluice", "--recipe", recipe("int4"), "--calibration", text,
                "--window", self.WINDOW, *flags]

    def windows_of(self, path):
        """Token ids out of the states before layer 0, whose rows are those of the embedding."""
        row = f"<{self.HIDDEN}"
        embedding = sp.f16_noise(self.VOCAB * self.HIDDEN)
        ids = {values: token for token, values in enumerate(struct.iter_unpack(row + "e", embedding))}
        with open(path, "rb") as file:
            states = file.read()[8:]  # behind the hash of the job
        size = 4 * self.WINDOW * self.HIDDEN
        return [[ids[values] for values in struct.iter_unpack(row + "f", states[at:at + size])]
                for at in range(0, len(states), size + 8)]  # each with a checksum

    def test_windows_are_spread_over_the_text_and_start_with_the_begin_token(self):
        for begin in (False, True):
            with self.subTest(begin=begin):
                args = self.arguments(begin, "--windows", 3)
                # Enough for three windows of states, and not for the layer.
                self.refuses(sp.IO, ["layer-0: cannot be written: File too large"], *args,
                             preexec=sp.limit_file_size(40000), log_lines=True)
                first, taken = ([256], self.WINDOW - 1) if begin else ([], self.WINDOW)
                self.assertEqual(self.windows_of(args[3] + ".work/states-0"),
                                 [first + list(self.TEXT[at:at + taken]) for at in (0, 31, 62)])

    def test_fewer_windows_than_were_asked_for_are_said(self):
        for begin, there in ((False, 5), (True, 6)):
            with self.subTest(begin=begin):
                told = f"the calibration text has {there} windows of {self.WINDOW} tokens, 128 were asked for"
                done = self.succeeds(*self.arguments(begin, "--restart", "--json"))
                self.assertIn(told, done.stderr.decode())
                self.assertEqual(json.loads(done.stdout)["calibration_tokens"], there * self.WINDOW)
                done = self.succeeds(*self.arguments(begin, "--windows", there))
                self.assertNotIn(b"were asked for", done.stderr)


class Interruptions(CliTest):
    def interrupted(self, out, args, until):
        process = start(*args)
        self.addCleanup(process.kill)
        deadline = time.monotonic() + sp.TIMEOUT
        while not until() and time.monotonic() < deadline:
            self.assertIsNone(process.poll(), "it ended before it was interrupted")
            time.sleep(0.005)
        sp.interrupt(process)
        done = sp.finished(process)
        self.assertEqual(done.returncode, sp.CANCELLED, done.stderr)
        self.assertFalse(os.path.exists(out))
        self.assertEqual([name for name in os.listdir(os.path.dirname(out)) if ".tmp-" in name], [])
        said = [line for line in done.stderr.decode().splitlines() if line.startswith("sluice: ")]
        self.assertEqual(len(said), 1, done.stderr)
        return said[0]

    def test_finished_layers_stay_and_the_same_command_goes_on_as_it_was_told(self):
        out = os.path.join(sp.SCRATCH, "interrupted.sluice")
        work = out + ".work"
        args = calibrated(out, 32)
        said = self.interrupted(out, args, lambda: os.path.exists(os.path.join(work, "layer-0")))
        self.assertEqual(said, f"sluice: interrupted; {work} keeps the finished layers, and the same command goes on "
                               "there")
        done = self.succeeds(*args)
        self.assertIn(b"layers are done already", done.stderr)
        self.assertFalse(os.path.exists(work))

    def test_without_calibration_nothing_stays(self):
        folder = os.path.join(sp.SCRATCH, "interrupted-rtn")
        sp.write_checkpoint(os.path.join(folder, "source"), layers=16, hidden=512, ffn=2048)
        os.makedirs(os.path.join(folder, "out"))
        out = os.path.join(folder, "out", "model.sluice")
        args = ["quantize", os.path.join(folder, "source"), "-o", out, "--recipe", recipe("int4"), "--method", "rtn"]
        said = self.interrupted(out, args, lambda: os.listdir(os.path.dirname(out)))
        self.assertEqual(said, "sluice: interrupted; nothing was written")


if __name__ == "__main__":
    unittest.main(verbosity=2)
