# SPDX-License-Identifier: Apache-2.0
"""Every verb on good input: help with an example, JSON that parses, results alone on stdout, exit codes."""
import glob
import json
import math
import os
import struct
import unittest

import sluice_process as sp
from sluice_process import CliTest, sluice

VERBS = ["import", "inspect", "verify", "plan", "run", "chat", "bench", "score", "tokenize", "detokenize", "doctor",
         "synth", "trace"]


class Help(CliTest):
    def test_each_verb_explains_itself_with_an_example(self):
        for verb in VERBS:
            with self.subTest(verb):
                done = self.succeeds(verb, "--help")
                self.assertIn(f"Example:\n  sluice {verb} ", done.stdout.decode())
                self.assertEqual(done.stderr, b"")

    def test_the_command_names_every_verb_and_exit_code(self):
        text = self.succeeds("--help").stdout.decode()
        for verb in VERBS:
            self.assertRegex(text, rf"(?m)^ +{verb} ")
        self.assertIn("Exit codes:", text)

    def test_without_a_verb_the_help_goes_to_stderr_and_the_exit_code_is_that_of_usage(self):
        done = sluice()
        self.assertEqual(done.returncode, sp.USAGE)
        self.assertEqual(done.stdout, b"")
        self.assertIn(b"import", done.stderr)

    def test_version(self):
        self.assertRegex(self.succeeds("--version").stdout.decode(), r"^sluice \d+\.\d+\.\d+\n$")


class Kernels(CliTest):
    def test_kernels_are_timed_where_there_is_a_gpu_and_refused_in_a_sentence_elsewhere(self):
        done = sluice("bench", sp.golden(), "--kernels", "--rows", "1,8", "--json")
        if done.returncode != 0:
            self.assert_refused(done, sp.NOT_FOUND)
            return
        times = sp.json.loads(done.stdout)["times"]
        self.assertEqual([time["rows"] for time in times], [1, 8] * (len(times) // 2))
        for time in times:
            self.assertGreater(time["seconds"], 0)
            self.assertLess(time["share_of_ceiling"], 1.5)

    def test_rows_belong_to_kernels(self):
        self.assert_refused(sluice("bench", sp.golden(), "--rows", "1"), sp.USAGE, "--kernels")
        self.assert_refused(sluice("bench", sp.golden(), "--kernels", "--rows", "4096"), sp.USAGE, "--rows")


class Files(CliTest):
    def test_import_reports_as_json_and_its_output_verifies(self):
        output = os.path.join(sp.SCRATCH, "imported.sluice")
        source = os.path.join(sp.GOLDEN, "qwen3")
        report = self.prints_json("import", source, "--weights", "f16", "-o", output, "--json")
        self.assertEqual(report["output"], output)
        self.assertEqual(report["bytes"], os.path.getsize(output))
        self.assertTrue(self.prints_json("verify", output, "--json")["ok"])

    def test_import_says_what_rounding_a_second_time_cost(self):
        source = os.path.join(sp.SCRATCH, "requantized.gguf")
        output = os.path.join(sp.SCRATCH, "requantized.sluice")
        sp.write_gguf(source)
        done = self.succeeds("import", source, "--weights", "int4", "--group", "32", "-o", output, "--json")
        report = json.loads(done.stdout)
        self.assertEqual(report["requantized"], 7)  # the embedding and the output matrix stay INT8
        self.assertEqual(len(report["losses"]), 1)
        loss = report["losses"][0]
        self.assertEqual((loss["type"], loss["scheme"], loss["group"], loss["tensors"]), ("Q8_0", "int4", 32, 7))
        # 16 steps over uniform weights: a step is an eighth of the largest, and its error 1 / sqrt(12) of it.
        self.assertTrue(0.02 < loss["relative_error"] < 0.1, loss)
        told = [line for line in done.stderr.decode().splitlines() if "relative RMS error" in line]
        self.assertEqual(len(told), 1, done.stderr)
        self.assertIn("7 tensors of type Q8_0 were decoded and rounded to int4 in groups of 32, at a relative RMS "
                      f"error of {100 * loss['relative_error']:.2f}%", told[0])
        kept = self.prints_json("import", source, "--weights", "keep", "-o", output, "--json")
        self.assertEqual((kept["requantized"], kept["losses"]), (0, []))

    def test_import_without_json_prints_nothing_on_stdout(self):
        output = os.path.join(sp.SCRATCH, "silent.sluice")
        done = self.succeeds("import", os.path.join(sp.GOLDEN, "qwen2"), "--weights", "int8", "-o", output)
        self.assertEqual(done.stdout, b"")

    def test_inspect_shows_shapes_and_planes(self):
        path = sp.golden()
        report = self.prints_json("inspect", path, "--json")
        self.assertEqual(report["hyperparameters"]["layers"], 2)
        self.assertEqual(report["file_bytes"], os.path.getsize(path))
        schemes = {tensor["role"]: tensor["scheme"] for tensor in report["tensors"]}
        self.assertEqual((schemes["q"], schemes["token_embedding"], schemes["attn_norm"]), ("int4", "int8", "f32"))
        ends = [plane["offset"] + plane["bytes"] for tensor in report["tensors"] for plane in tensor["planes"]]
        self.assertLess(max(ends), os.path.getsize(path))
        text = self.succeeds("inspect", path, "--tensors").stdout.decode()
        self.assertIn("model.layers.1.mlp.down_proj.weight", text)

    def test_verify_says_so(self):
        self.assertIn(b"all checksums match", self.succeeds("verify", sp.golden()).stdout)

    def test_plan_places_every_byte_within_the_budget(self):
        path = sp.talking()
        budget = sp.smallest_budget(path, "--context", "64") + 65536
        report = self.prints_json("plan", path, "--no-measure", "--json", "--context", 64, "--device-memory", budget)
        used = sum(report[key] for key in ("resident_bytes", "ring_bytes", "kv_bytes", "scratch_bytes"))
        self.assertLessEqual(used, budget)
        self.assertGreater(report["disk_tier_bytes"], 0)
        self.assertEqual({tensor["tier"] for tensor in report["tensors"]} - {"device", "host", "disk", "rows"}, set())
        self.assertIn(b"stream ring", self.succeeds("plan", path, "--no-measure", "--tensors").stdout)

    def test_synth_writes_a_container_that_verifies_and_the_same_seed_the_same_weights(self):
        shapes = [path for path in glob.glob(os.path.join(sp.CONFIGS, "*.toml")) if "135m" in path.lower()]
        self.assertEqual(len(shapes), 1, f"SmolLM2-135M's shapes in {sp.CONFIGS}")
        sums = []
        for name in ("synth-a.sluice", "synth-b.sluice"):
            output = os.path.join(sp.SCRATCH, name)
            report = self.prints_json("synth", "--model", shapes[0], "--layers", 1, "--seed", 7, "-o", output, "--json")
            self.assertEqual(report["bytes"], os.path.getsize(output))
            with open(output, "rb") as file:
                file.seek(4096)
                sums.append(hash(file.read(1 << 20)))
        self.succeeds("verify", output)
        self.assertEqual(sums[0], sums[1])
        self.assertEqual(self.prints_json("inspect", output, "--json")["hyperparameters"]["layers"], 1)


class Text(CliTest):
    SAMPLE = "A grüße: 語, 🙂 <|im_end|> end"

    def test_tokenize_and_detokenize_are_inverse_on_container_and_tokenizer_json(self):
        for model in (sp.talking(), os.path.join(sp.SCRATCH, "talking", "tokenizer.json")):
            with self.subTest(model):
                ids = self.prints_json("tokenize", model, "--text", self.SAMPLE, "--json")["ids"]
                self.assertIn(257, ids)
                again = self.prints_json("detokenize", model, "--ids", ",".join(map(str, ids)), "--json")
                self.assertEqual(again["text"], self.SAMPLE)
                plain = self.succeeds("detokenize", model, stdin=json.dumps(ids).encode())
                self.assertEqual(plain.stdout.decode(), self.SAMPLE)

    def test_no_special_takes_special_tokens_as_text(self):
        ids = self.prints_json("tokenize", sp.talking(), "--text", self.SAMPLE, "--no-special", "--json")["ids"]
        self.assertLess(max(ids), 256)
        self.assertEqual(len(ids), len(self.SAMPLE.encode()))

    def test_tokenize_reads_files_and_standard_input(self):
        path = os.path.join(sp.SCRATCH, "text.txt")
        with open(path, "w") as file:
            file.write(self.SAMPLE)
        expected = self.prints_json("tokenize", sp.talking(), "--text", self.SAMPLE, "--json")
        self.assertEqual(self.prints_json("tokenize", sp.talking(), "--file", path, "--json"), expected)
        self.assertEqual(self.prints_json("tokenize", sp.talking(), "--json", stdin=self.SAMPLE.encode()), expected)


class Models(CliTest):
    FIXED = ["-n", 12, "--ignore-eos", "--temp", 1, "--seed", 5, "--context", 64]

    def test_run_prints_the_generated_text_and_nothing_else(self):
        report = self.prints_json("run", sp.talking(), "-p", "Hello", "--json", *self.FIXED)
        self.assertEqual(len(report["ids"]), 12)
        done = self.succeeds("run", sp.talking(), "-p", "Hello", *self.FIXED)
        self.assertEqual(done.stdout.decode(), report["text"])
        self.assertIn(b"per pass", done.stderr)

    def test_quiet_leaves_stderr_empty(self):
        self.assertEqual(self.succeeds("run", sp.talking(), "-p", "Hello", "-q", *self.FIXED).stderr, b"")

    def test_the_prompt_comes_from_a_file_or_standard_input_as_well(self):
        path = os.path.join(sp.SCRATCH, "prompt.txt")
        with open(path, "w") as file:
            file.write("Hello\n")
        expected = self.succeeds("run", sp.talking(), "-p", "Hello", *self.FIXED).stdout
        self.assertEqual(self.succeeds("run", sp.talking(), "--prompt-file", path, *self.FIXED).stdout, expected)
        self.assertEqual(self.succeeds("run", sp.talking(), *self.FIXED, stdin=b"Hello").stdout, expected)

    def test_every_tier_and_way_of_reading_gives_the_same_tokens(self):
        path = sp.talking()
        smallest = sp.smallest_budget(path, "--context", "64")
        expected = self.prints_json("run", path, "--ids", "1,2,3", "--json", *self.FIXED)["ids"]
        for io in ("auto", "pread", "mmap"):
            for memory in (["--device-memory", smallest], ["--device-memory", smallest, "--host-memory", "1G"],
                           ["--device-memory", smallest + 100000, "--host-memory", 50000]):
                with self.subTest(io=io, memory=memory):
                    got = self.prints_json("run", path, "--ids", "1,2,3", "--json", "--io", io, *memory, *self.FIXED)
                    self.assertEqual(got["ids"], expected)

    def test_a_stop_text_ends_the_answer_and_is_not_printed(self):
        text = self.prints_json("run", sp.talking(), "-p", "Hello", "--json", *self.FIXED)["text"]
        stop = next(character for character in text[1:] if character not in text[:1])
        done = self.succeeds("run", sp.talking(), "-p", "Hello", "--stop", stop, *self.FIXED)
        self.assertEqual(done.stdout.decode(), text[:text.index(stop)])
        self.assertIn(b"stop text", done.stderr)

    def test_chat_answers_each_line_and_keeps_to_stdout(self):
        done = self.succeeds("chat", sp.talking(), "-n", 4, "--context", 512, "--temp", 0, stdin=b"Hi\nAgain\n/exit\n")
        self.assertGreaterEqual(done.stdout.count(b"\n"), 2)
        self.assertIn(b"per pass", done.stderr)

    def test_run_with_chat_goes_through_the_template(self):
        report = self.prints_json("run", sp.talking(), "--chat", "-p", "Hi", "--json", "-n", 2, "--context", 64)
        expected = self.prints_json("tokenize", sp.talking(), "--text",
                                    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "--json")
        self.assertEqual(report["prompt_ids"], expected["ids"])

    def test_score_sums_the_log_probabilities_that_its_logits_give(self):
        output = os.path.join(sp.SCRATCH, "logits.npy")
        ids = [5, 9, 200, 31, 400]
        report = self.prints_json("score", sp.golden(), "--ids", ",".join(map(str, ids)), "--logits", output, "--json")
        self.assertEqual(report["tokens"], len(ids))
        with open(output, "rb") as file:
            data = file.read()
        self.assertTrue(data.startswith(b"\x93NUMPY\x01\x00"))
        length = struct.unpack_from("<H", data, 8)[0]
        self.assertIn(b"(5, 512)", data[10:10 + length])
        logits = struct.unpack_from(f"<{5 * 512}f", data, 10 + length)
        self.assertEqual(len(data), 10 + length + 4 * 5 * 512)
        total = 0.0
        for position in range(4):
            row = logits[512 * position:512 * (position + 1)]
            total += row[ids[position + 1]] - math.log(sum(math.exp(x) for x in row))
        self.assertAlmostEqual(report["sum_logprob"], total, places=4)
        self.assertAlmostEqual(report["perplexity"], math.exp(-total / 4), places=2)

    def test_bench_reports_rates_and_the_ceiling(self):
        report = self.prints_json("bench", sp.talking(), "-p", 16, "-n", 4, "-r", 2, "--json")
        for key in ("prefill_tokens_per_second", "decode_tokens_per_second", "ttft_seconds"):
            self.assertGreater(report[key], 0)
        self.assertLessEqual(report["itl_seconds"]["p50"], report["itl_seconds"]["max"])
        # The first token of each repetition comes out of its prefill.
        self.assertEqual(report["timings"]["decode"]["tokens"], 2 * (4 - 1))


class Doctor(CliTest):
    def test_each_failure_has_a_remedy_and_nothing_is_left_in_the_folder(self):
        folder = os.path.join(sp.SCRATCH, "examined")
        os.makedirs(folder)
        done = sluice("doctor", "--folder", folder, "--json")
        self.assert_no_crash(done)
        findings = json.loads(done.stdout)
        self.assertTrue({"kernel", "memory", "cpu", "disk read"} <= {finding["name"] for finding in findings})
        for finding in findings:
            self.assertEqual(finding["ok"], finding["remedy"] == "", finding)
        self.assertEqual(done.returncode, 0 if all(finding["ok"] for finding in findings) else 1)
        self.assertEqual(os.listdir(folder), [])


if __name__ == "__main__":
    unittest.main(verbosity=2)
