# SPDX-License-Identifier: Apache-2.0
"""run --precision auto: rules over the prompt choose between INT4 and INT4 with its residual."""
import json
import os
import unittest

import sluice_process as sp
from sluice_process import CliTest, sluice

RECIPES = os.environ["SLUICE_RECIPES"]


def with_residuals():
    def make(path):
        folder = os.path.join(sp.SCRATCH, "residual-source")
        sp.write_checkpoint(folder)
        return sluice("quantize", folder, "-o", path, "--method", "rtn", "--recipe", os.path.join(RECIPES, "int4.toml"),
                      "--residual")
    return sp.container("with-residuals", make)


def rules(name, text):
    path = os.path.join(sp.SCRATCH, name)
    with open(path, "w") as file:
        file.write(text)
    return path


RULE = 'default = "int4"\n[[rule]]\nname = "r"\npatterns = [{}]\nprecision = "fine"\n'


class Precision(CliTest):
    def chosen(self, prompt, *flags, model=None):
        report = self.prints_json("run", model or with_residuals(), "--prompt-file", "-", "-n", "2", "--json",
                                  "--precision", "auto", *flags,
                                  stdin=prompt if isinstance(prompt, bytes) else prompt.encode())
        return report["precision"]

    def test_the_shipped_rules_in_chinese_and_english(self):
        for prompt, rule, found in (
                ("请证明根号二是无理数", "proof", "证明"),
                ("Prove that there are infinitely many primes.", "proof", "Prove"),
                ("Give a PROOF of it", "proof", "PROOF"),
                ("帮我计算一下", "calculation", "计算"),
                ("How many apples are left?", "calculation", "How many"),
                ("What is 17 * 23?", "calculation", "7 * 2"),
                ("我想学编程", "programming", "编程"),
                ("Write a Python function", "programming", "Python")):
            with self.subTest(prompt):
                choice = self.chosen(prompt)
                self.assertEqual((choice["chosen"], choice["rule"], choice["found"]), ("fine", rule, found))
        for prompt in ("你好，今天天气怎么样", "Tell me a story about a dragon", "The approval improved",
                       "a recoded encoder", "on 2026-11-29, around 24/7"):
            with self.subTest(prompt):
                choice = self.chosen(prompt)
                self.assertEqual((choice["chosen"], choice["rule"]), ("int4", ""))
                self.assertIn("no rule", choice["why"])

    def test_it_runs_what_it_chose_and_the_summary_says_so(self):
        for prompt, precision, why in (("Prove it", "fine", 'precision: fine, since rule "proof" finds "Prove"'),
                                       ("Say it", "int4", "precision: int4, since no rule finds its words")):
            common = ["run", with_residuals(), "-p", prompt, "-n", "16", "--temp", "0", "--ignore-eos"]
            automatic = self.succeeds(*common, "--precision", "auto")
            given = self.succeeds(*common, "--precision", precision)
            self.assertEqual(automatic.stdout, given.stdout)
            self.assertIn(why, automatic.stderr.decode())
            self.assertNotIn("precision:", given.stderr.decode())
        without = self.succeeds("run", sp.talking(), "-p", "Prove it", "-n", "2", "--precision", "auto")
        self.assertIn(b"the file has no residuals, so both are the same", without.stderr)

    def test_rules_of_ones_own_and_the_first_that_matches(self):
        path = rules("own.toml", 'default = "fine"\n'
                     '[[rule]]\nname = "a"\npatterns = ["нет", "\\\\bstory\\\\b"]\nprecision = "int4"\n'
                     '[[rule]]\nname = "b"\npatterns = ["tale|story"]\nprecision = "fine"\n')
        self.assertEqual(self.chosen("a STORY", "--precision-rules", path)["rule"], "a")
        self.assertEqual(self.chosen("НЕТ", "--precision-rules", path)["chosen"], "int4")
        self.assertEqual(self.chosen("a tale", "--precision-rules", path)["rule"], "b")
        self.assertEqual(self.chosen("hello", "--precision-rules", path)["chosen"], "fine")

    def test_a_prompt_that_is_no_utf8_is_looked_at_all_the_same(self):
        self.assertEqual(self.chosen(b"\xff\xfe prove it \xc3")["rule"], "proof")
        self.assertEqual(self.chosen(b"\xff\xfe hello \xc3")["chosen"], "int4")

    def test_bad_rules(self):
        for name, text, words in (
                ("key", RULE.format("'a'") + 'colour = "red"\n', 'unknown key "colour"'),
                ("regex", RULE.format("'a(b'"), 'pattern "a(b"'),
                ("empty", RULE.format(""), '"patterns" is missing'),
                ("number", RULE.format("7"), "an entry that is no text"),
                ("precision", RULE.format("'a'").replace("fine", "int8"), "there are int4 and fine"),
                ("default", RULE.format("'a'").replace("default", "otherwise"), '"default" is missing'),
                ("table", 'default = "int4"\nrule = 3\n', "write [[rule]]"),
                ("toml", "default = \n", "line 1")):
            with self.subTest(name):
                path = rules(f"bad-{name}.toml", text)
                self.refuses(sp.CORRUPT, [path, words], "run", with_residuals(), "-p", "a", "--precision", "auto",
                             "--precision-rules", path)
        missing = os.path.join(sp.SCRATCH, "no-rules.toml")
        self.refuses(sp.NOT_FOUND, missing, "run", with_residuals(), "-p", "a", "--precision", "auto",
                     "--precision-rules", missing)

    def test_a_pattern_without_end_is_given_up(self):
        path = rules("endless.toml", RULE.format("'(a+)+$'"))
        done = sluice("run", with_residuals(), "--prompt-file", "-", "-n", "1", "--precision", "auto",
                      "--precision-rules", path, stdin=b"a" * 5000 + b"!")
        self.assert_refused(done, sp.USAGE, path, "gives up on this prompt")

    def test_ids_have_no_words_and_other_verbs_no_prompt(self):
        self.refuses(sp.USAGE, "ids have none", "run", with_residuals(), "--ids", "1,2", "--precision", "auto")
        self.refuses(sp.USAGE, "--precision", "bench", with_residuals(), "--precision", "auto")


if __name__ == "__main__":
    unittest.main(verbosity=2)
