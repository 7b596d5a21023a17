# SPDX-License-Identifier: Apache-2.0
"""eval on the command line: what is refused before a model is opened, that its losses are those of the logits, and what
its memory columns say."""
import array
import json
import math
import os
import shutil
import unittest

import sluice_process as sp
from sluice_process import CliTest

TEXT = b"The quick brown fox jumps over the lazy dog. " * 8
WINDOW = ["--window", "16", "--tokens", "64"]


def scratch(name, content):
    path = os.path.join(sp.SCRATCH, name)
    with open(path, "wb") as file:
        file.write(content)
    return path


class Refusals(CliTest):
    """None of them has a line of a model that was opened before it."""

    def test_a_text_that_is_not_utf8(self):
        latin = scratch("latin.txt", TEXT + b"caf\xe9 " + TEXT)
        words = f"the bytes at offset {len(TEXT) + 3} are not UTF-8"
        self.refuses(sp.CORRUPT, [latin, words], "eval", sp.talking(), "--text", latin, *WINDOW)
        self.refuses(sp.CORRUPT, ["standard input", words], "eval", sp.talking(), "--text", "-", *WINDOW,
                     stdin=TEXT + b"caf\xe9 ")

    def test_tasks_that_are_not_utf8(self):
        names = b"Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3\n"
        tasks = scratch("latin.csv", names + b"caf\xe9?,a,b,c,d\n")
        words = f"the bytes at offset {len(names) + 3} are not UTF-8"
        self.refuses(sp.CORRUPT, [tasks, words], "eval", sp.talking(), "--tasks", tasks)

    def test_a_page_or_answers_that_could_not_be_written(self):
        text = scratch("plain.txt", TEXT)
        tasks = scratch("one.jsonl", b'{"prompt": "p", "answer": "a"}\n')
        nowhere = os.path.join(sp.SCRATCH, "no-folder", "page")
        missing = os.path.join(sp.SCRATCH, "no-model.sluice")  # so that opening it would be refused otherwise
        for path in (nowhere, sp.SCRATCH):
            with self.subTest(path):
                self.refuses(sp.IO, [path, "cannot be written"], "eval", missing, "--text", text, "--html", path)
                self.refuses(sp.IO, [path, "cannot be written"], "eval", missing, "--tasks", tasks, "--answers", path)

    def test_what_is_there_already_stays_until_there_is_a_result(self):
        text = scratch("short.txt", b"short")
        old, fresh = scratch("old.html", b"old"), os.path.join(sp.SCRATCH, "fresh.html")
        for page in (old, fresh):
            self.refuses(sp.USAGE, "one window takes", "eval", sp.talking(), "--text", text, "--html", page,
                         log_lines=True)
        with open(old, "rb") as file:
            self.assertEqual(file.read(), b"old")
        self.assertFalse(os.path.exists(fresh))


class Losses(CliTest):
    WINDOW, WINDOWS = 32, 6

    def log_probabilities(self, model, ids):
        """Of every token at every position, in double, from the logits that score writes."""
        path = os.path.join(sp.SCRATCH, "logits.npy")
        self.succeeds("score", model, "--ids", ",".join(map(str, ids)), "--logits", path, "--backend", "cpu",
                      "--cpu-activations", "f32")
        with open(path, "rb") as file:
            content = file.read()
        logits = array.array("f", content[10 + int.from_bytes(content[8:10], "little"):])
        vocab = len(logits) // len(ids)
        rows = [logits[at:at + vocab] for at in range(0, len(logits), vocab)]
        self.assertEqual([len(row) for row in rows], [512] * len(ids))
        totals = [math.log(math.fsum(map(math.exp, row))) for row in rows]
        return [[logit - total for logit in row] for row, total in zip(rows, totals)]

    def test_they_are_those_of_the_logits(self):
        folder = os.path.join(sp.SCRATCH, "golden-with-tokenizer")
        shutil.copytree(os.path.join(sp.GOLDEN, "llama3"), folder)
        sp.write_tokenizer(folder)
        exact, rounded = (folder + "-" + weights for weights in ("keep", "int4"))
        for model, weights in ((exact, "keep"), (rounded, "int4")):
            self.succeeds("import", folder, "--weights", weights, "-o", model)
        divergences, agreements, surprises = [], [], {exact: [], rounded: []}
        for first in range(0, self.WINDOW * self.WINDOWS, self.WINDOW):
            ids = TEXT[first:first + self.WINDOW]  # a token is a byte
            rows = {model: self.log_probabilities(model, ids) for model in surprises}
            for model, sums in surprises.items():
                sums += [-row[token] for row, token in zip(rows[model], ids[1:])]
            for p, q in zip(rows[exact], rows[rounded]):
                divergences.append(math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q)))
                agreements.append(p.index(max(p)) == q.index(max(q)))
        divergences.sort()

        # The logits are the same floats. Sums of 512 terms in double are off by 1e-13 of their size, which for a
        # divergence is up to a hundred times its own.
        def near(value, expected):
            self.assertLess(abs(value - expected), 1e-10 * expected)

        # A few tokens more than whole windows: they are left out.
        report = self.prints_json("eval", rounded, "--reference", exact, "--text", "-", "--window", self.WINDOW,
                                  "--tokens", self.WINDOW * self.WINDOWS + 7, "--backend", "cpu", "--json", stdin=TEXT)
        reference, file = report["files"]
        count = len(divergences)
        self.assertEqual(count, self.WINDOW * self.WINDOWS)
        near(file["kl_mean"], math.fsum(divergences) / count)
        near(file["kl_p99"], divergences[99 * (count - 1) // 100])
        self.assertEqual(file["top1_agreement"], sum(agreements) / count)
        self.assertTrue(0 < sum(agreements) < count)  # or every way to count them would do
        for row, sums in ((reference, surprises[exact]), (file, surprises[rounded])):
            self.assertEqual(row["positions"], (self.WINDOW - 1) * self.WINDOWS)
            near(row["perplexity"], math.exp(math.fsum(sums) / len(sums)))


class Memory(CliTest):
    def test_the_peak_is_measured_for_each_file_and_the_plan_is_called_one(self):
        # The large one first: a peak of the whole process would be the small one's as well.
        args = ["eval", sp.slow(), sp.talking(), "--text", "-", *WINDOW, "--backend", "cpu"]
        files = self.prints_json(*args, "--json", stdin=TEXT)["files"]
        large, small = files
        for one in files:
            self.assertNotIn("memory_bytes", one)
            self.assertNotIn("device_planned_bytes", one)  # of the CPU it would be host memory
            self.assertGreater(one["host_peak_bytes"], 0)
        weights = os.path.getsize(sp.slow())
        self.assertGreater(large["host_peak_bytes"], 0.8 * weights)
        if any("host_peak_is_bound" in one for one in files):
            self.skipTest("/proc/self/clear_refs cannot be written here")
        self.assertLess(small["host_peak_bytes"] + weights / 2, large["host_peak_bytes"])
        heading = self.succeeds(*args, stdin=TEXT).stdout.decode().splitlines()[0]
        self.assertIn("| host peak, measured |", heading)
        self.assertNotIn("device", heading)


if __name__ == "__main__":
    unittest.main(verbosity=2)
