# SPDX-License-Identifier: Apache-2.0
"""eval --tasks: problems with answers, and how many a model gets right."""
import json
import os
import unittest

import sluice_process as sp
from sluice_process import CliTest


def lines(name, objects):
    path = os.path.join(sp.SCRATCH, name)
    with open(path, "w") as file:
        for one in objects:
            file.write(json.dumps(one) + "\n")
    return path


def answers(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


class Tasks(CliTest):
    COMMON = ["--max-tokens", "12", "--context", "512"]

    def test_what_the_model_says_is_right_where_it_is_expected(self):
        prompts = [f"number {i}" for i in range(60)]
        # Hot enough for all bytes: some of these tokens are text.
        sampling = ["--temp", "5", "--max-tokens", "1", "--context", "512"]
        log = os.path.join(sp.SCRATCH, "answers.jsonl")
        asked = lines("asked.jsonl", [{"prompt": p, "answer": "?"} for p in prompts])
        report = self.prints_json("eval", sp.talking(), "--tasks", asked, "--answers", log, "--json", *sampling)
        task = report["files"][0]["tasks"][0]
        self.assertEqual((task["task"], task["problems"], task["samples"], task["right"]), ("asked", 60, 1, 0))
        self.assertNotIn("perplexity", report["files"][0])
        self.assertNotIn("text", report)
        said = answers(log)
        self.assertEqual([one["prompt"] for one in said], prompts)
        self.assertTrue(all(one["check"] == "exact" and not one["right"] for one in said))
        # Now with what it says in some, of those that are text.
        texts = [one["answer"].strip() for one in said]
        known = [i for i, text in enumerate(texts) if text and text.isprintable() and text.isascii()]
        self.assertTrue(known, texts)
        told = lines("told.jsonl", [{"prompt": p, "answer": texts[i] if i in known else "?"}
                                    for i, p in enumerate(prompts)])
        report = self.prints_json("eval", sp.talking(), "--tasks", told, "--json", *sampling)
        task = report["files"][0]["tasks"][0]
        self.assertEqual(task["pass_at_1"], len(known) / 60)
        self.assertTrue(0 < task["low_95"] < task["pass_at_1"] < task["high_95"] < 1)

    def test_samples_differ_and_a_seed_repeats_them(self):
        asked = lines("sampled.jsonl", [{"problem": "a?", "answer": "1"}, {"question": "b?", "answer": "#### 2"}])
        texts = []
        for seed in ("1", "1", "2"):
            log = os.path.join(sp.SCRATCH, "sampled-answers.jsonl")
            self.succeeds("eval", sp.talking(), "--tasks", asked, "--samples", "3", "--seed", seed, "--answers", log,
                          *self.COMMON)
            texts.append([one["answer"] for one in answers(log)])
        self.assertEqual(texts[0], texts[1])
        self.assertNotEqual(texts[0], texts[2])
        self.assertEqual(len(texts[0]), 6)
        self.assertGreater(len(set(texts[0][:3])), 1)

    def test_one_table_for_a_text_and_two_files_of_tasks(self):
        first = lines("first.jsonl", [{"prompt": str(i), "answer": "x"} for i in range(10)])
        second = lines("second.jsonl", [{"problem": "p", "answer": "1"}])
        html = os.path.join(sp.SCRATCH, "tasks.html")
        done = self.succeeds("eval", sp.talking(), "--reference", sp.talking(), "--text", "-", "--window", "16",
                             "--tasks", first, "--tasks", second, "--problems", "3", "--html", html, *self.COMMON,
                             stdin=b"The quick brown fox jumps over the lazy dog. " * 4)
        table = done.stdout.decode().splitlines()
        self.assertIn("| first pass@1, 3 x 1 | second pass@1, 1 x 1 |", table[0])
        self.assertIn("perplexity", table[0])
        self.assertEqual({row.count("|") for row in table}, {table[0].count("|")})
        self.assertIn("0.0% (0.0 to ", table[2])
        self.assertIn(b"answers were cut at 12 tokens", done.stderr)
        with open(html) as file:
            self.assertIn("first pass@1", file.read())

    def test_bad_input(self):
        good = lines("good.jsonl", [{"prompt": "p", "answer": "a"}])
        bad = lines("bad.jsonl", [{"prompt": "p", "answer": "a"}, {"text": "p"}])
        missing = os.path.join(sp.SCRATCH, "no-tasks.jsonl")
        self.refuses(sp.CORRUPT, [bad, "line 2"], "eval", sp.talking(), "--tasks", bad)
        self.refuses(sp.NOT_FOUND, missing, "eval", sp.talking(), "--tasks", missing)
        self.refuses(sp.USAGE, "there is nothing to measure on", "eval", sp.talking())
        self.refuses(sp.USAGE, "--tasks", "eval", sp.talking(), "--text", good, "--samples", "2")
        self.refuses(sp.USAGE, "all the same", "eval", sp.talking(), "--tasks", good, "--samples", "2", "--temp", "0")
        self.refuses(sp.USAGE, ["problem 1", "--context"], "eval", sp.talking(), "--tasks", good, "--context", "64",
                     "--max-tokens", "64", log_lines=True)
        self.refuses(sp.UNSUPPORTED, "has no tokenizer", "eval", sp.golden(), "--tasks", good, "--context", "512",
                     "--max-tokens", "8", log_lines=True)
        nowhere = os.path.join(sp.SCRATCH, "no-folder", "answers.jsonl")
        self.refuses(sp.IO, nowhere, "eval", sp.talking(), "--tasks", good, "--answers", nowhere, *self.COMMON,
                     log_lines=True)


if __name__ == "__main__":
    unittest.main(verbosity=2)
