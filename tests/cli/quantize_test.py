# SPDX-License-Identifier: Apache-2.0
"""Quantization from the command line: killed and resumed, a full disk, and the table of eval."""
import json
import os
import random
import time
import unittest

import sluice_process as sp
from sluice_process import CliTest, start

RECIPES = os.environ["SLUICE_RECIPES"]


def source():
    """A model of six layers and text to calibrate it."""
    folder = os.path.join(sp.SCRATCH, "quantize-source")
    if not os.path.exists(folder):
        sp.write_checkpoint(folder, layers=6, hidden=256, ffn=512)
        letters = random.Random(1)
        with open(os.path.join(sp.SCRATCH, "calibration.txt"), "w") as file:
            file.write("".join(chr(letters.randrange(32, 127)) for _ in range(8000)))
    return folder


def arguments(out):
    source()
    return ["quantize", source(), "-o", out, "--recipe", os.path.join(RECIPES, "int4.toml"), "--calibration",
            os.path.join(sp.SCRATCH, "calibration.txt"), "--windows", "16", "--window", "256", "--threads", "1"]


def contents(path):
    """Everything behind the header, which holds a new uuid each time."""
    with open(path, "rb") as file:
        return file.read()[4096:]


class Quantize(CliTest):
    def test_killed_at_five_random_moments_it_resumes_to_the_same_bytes(self):
        whole = os.path.join(sp.SCRATCH, "whole.sluice")
        begun = time.monotonic()
        self.succeeds(*arguments(whole))
        seconds = time.monotonic() - begun
        seed = random.randrange(2**32)
        print(f"seed {seed}, {seconds:.1f} s undisturbed")
        moments = random.Random(seed)
        out = os.path.join(sp.SCRATCH, "killed.sluice")
        for _ in range(5):
            process = start(*arguments(out))
            time.sleep(moments.uniform(0.05, 0.5 * seconds))
            process.kill()
            process.communicate()
        # What the last one left; a run that had little left to do may have ended before it was killed.
        kept = 0
        if os.path.isdir(out + ".work"):
            kept = sum(name.startswith("layer-") and not name.endswith(".part") for name in os.listdir(out + ".work"))
        done = self.succeeds(*arguments(out))
        print(f"{kept} layers were kept")
        self.assertEqual(contents(out), contents(whole))
        self.assertFalse(os.path.exists(out + ".work"))
        if kept:
            self.assertIn(b"layers are done already", done.stderr)

    def test_a_full_disk_is_one_sentence_and_the_next_run_goes_on(self):
        out = os.path.join(sp.SCRATCH, "full.sluice")
        done = sp.sluice(*arguments(out), preexec=sp.limit_file_size(3 << 20))
        self.assert_no_crash(done)
        self.assertEqual(done.returncode, sp.IO, done.stderr)
        self.assertFalse(os.path.exists(out))
        self.succeeds(*arguments(out))
        self.assertFalse(os.path.exists(out + ".work"))

    def test_a_damaged_layer_is_found(self):
        out = os.path.join(sp.SCRATCH, "damaged.sluice")
        process = start(*arguments(out))
        path = os.path.join(out + ".work", "layer-0")
        while not os.path.exists(path):
            self.assertIsNone(process.poll(), "it ended before a layer was finished")
            time.sleep(0.01)
        process.kill()
        process.communicate()
        sp.flip_bit(path, os.path.getsize(path) // 2)
        done = sp.sluice(*arguments(out))
        self.assertEqual(done.returncode, sp.CORRUPT, done.stderr)
        self.assertIn(b"damaged", done.stderr)
        self.assertFalse(os.path.exists(out))

    def test_one_file_with_residuals_runs_in_both_precisions(self):
        paths = {}
        for name, flags in (("plain", []), ("residual", ["--residual"])):
            paths[name] = os.path.join(sp.SCRATCH, f"precision-{name}.sluice")
            self.succeeds("quantize", source(), "-o", paths[name], "--method", "rtn", "--recipe",
                          os.path.join(RECIPES, "int4.toml"), *flags)

        def score(path, *flags):
            done = self.succeeds("score", path, "--text", "The quick brown fox", *flags)
            return json.loads(done.stdout)["sum_logprob"], done.stderr

        self.assertEqual(score(paths["residual"])[0], score(paths["plain"])[0])
        self.assertNotEqual(score(paths["residual"], "--precision", "fine")[0], score(paths["plain"])[0])
        same, told = score(paths["plain"], "--precision", "fine")
        self.assertEqual(same, score(paths["plain"])[0])
        self.assertIn(b"has no residual planes", told)
        self.succeeds("verify", paths["residual"])

    def test_eval_compares_files_with_a_reference(self):
        paths = {}
        for recipe in ("fp16", "int8", "int4"):
            paths[recipe] = os.path.join(sp.SCRATCH, f"eval-{recipe}.sluice")
            self.succeeds("quantize", source(), "-o", paths[recipe], "--method", "rtn", "--recipe",
                          os.path.join(RECIPES, recipe + ".toml"))
        text = os.path.join(sp.SCRATCH, "calibration.txt")
        html = os.path.join(sp.SCRATCH, "eval.html")
        common = [paths["fp16"], paths["int8"], paths["int4"], "--reference", paths["fp16"], "--text", text, "--window",
                  "128", "--tokens", "1024"]
        done = self.succeeds("eval", *common, "--json", "--html", html)
        report = json.loads(done.stdout)
        reference, same, int8, int4 = report["files"]
        self.assertTrue(reference["reference"])
        self.assertNotIn("kl_mean", reference)
        self.assertEqual(same["kl_mean"], 0)
        self.assertEqual(same["top1_agreement"], 1)
        self.assertEqual(same["perplexity"], reference["perplexity"])
        self.assertLess(0, int8["kl_mean"])
        self.assertLess(int8["kl_mean"], int4["kl_mean"])
        self.assertGreaterEqual(int4["kl_p99"], int4["kl_mean"])
        self.assertLess(int4["bytes_per_weight"], int8["bytes_per_weight"])
        with open(html) as file:
            page = file.read()
        self.assertIn("<svg", page)
        self.assertNotIn("http", page.replace("http://www.w3.org", ""))
        table = self.succeeds("eval", *common).stdout.decode()
        self.assertEqual(len(table.splitlines()), 2 + 4)
        self.assertIn("| file | perplexity | KL mean |", table)

    def test_eval_refuses_a_text_shorter_than_a_window_and_another_vocabulary(self):
        done = sp.sluice("eval", sp.talking(), "--text", "-", stdin=b"short")
        self.assertEqual(done.returncode, sp.USAGE, done.stderr)
        self.assertIn(b"one window takes 512", done.stderr)
        other = os.path.join(sp.SCRATCH, "other-vocabulary")
        sp.write_checkpoint(other, vocab=300)
        self.succeeds("import", other, "-o", other + ".sluice")
        done = sp.sluice("eval", sp.talking(), other + ".sluice", "--text", "-", stdin=b"short")
        self.assertEqual(done.returncode, sp.USAGE, done.stderr)
        self.assertIn(b"only models of one tokenizer compare", done.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=2)
