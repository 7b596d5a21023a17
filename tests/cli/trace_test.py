# SPDX-License-Identifier: Apache-2.0
"""`run --trace` and `trace`: what is recorded is shown, on every way of reading, and bad input has one sentence."""
import json
import os
import signal
import time
import unittest

import sluice_process as sp
from sluice_process import CliTest

FIXED = ["-n", 24, "--ignore-eos", "--temp", 1, "--seed", 5, "--context", 64, "-q"]


class Trace(CliTest):
    def record(self, name, *args):
        path = os.path.join(sp.SCRATCH, name)
        done = self.succeeds("run", sp.talking(), "-p", "Hello", *FIXED, "--trace", path, *args)
        return path, done

    def test_every_tier_and_way_of_reading_is_accounted_for(self):
        smallest = sp.smallest_budget(sp.talking(), "--context", "64")
        for io in ("auto", "pread", "mmap"):
            for memory in ([], ["--device-memory", smallest], ["--device-memory", smallest, "--host-memory", "1G"]):
                with self.subTest(io=io, memory=memory):
                    path, _ = self.record("tiers.sltrace", "--io", io, *memory)
                    report = self.prints_json("trace", path, "--json")
                    self.assertEqual(report["tokens"], 24)
                    self.assertEqual(report["decoded_tokens"], 23)
                    self.assertTrue(report["complete"])
                    self.assertEqual(report["dropped"], 0)
                    named = sum(s for part, s in report["parts"].items() if part not in ("gap", "pass_gap"))
                    self.assertGreater(named, 0.95 * report["decode_seconds"])
                    self.assertLess(named, 1.01 * report["decode_seconds"])

    def test_tracing_changes_neither_text_nor_streams(self):
        plain = self.succeeds("run", sp.talking(), "-p", "Hello", *FIXED)
        _, traced = self.record("same.sltrace")
        self.assertEqual(traced.stdout, plain.stdout)
        self.assertEqual(traced.stderr, b"")

    def test_run_says_at_its_end_what_trace_says_later(self):
        path = os.path.join(sp.SCRATCH, "end.sltrace")
        done = self.succeeds("run", sp.talking(), "-p", "Hello", *FIXED[:-1], "--trace", path)
        summary = self.succeeds("trace", path).stdout.decode()
        self.assertIn("ITL: p50", summary)
        self.assertTrue(done.stderr.decode().endswith(summary), done.stderr.decode())

    def test_bad_input_gets_one_sentence(self):
        path, _ = self.record("good.sltrace")
        self.refuses(sp.NOT_FOUND, "none.sltrace", "trace", os.path.join(sp.SCRATCH, "none.sltrace"))
        self.refuses(sp.CORRUPT, "is not a trace", "trace", sp.talking())
        self.refuses(sp.IO, sp.SCRATCH, "trace", sp.SCRATCH)
        with open(path, "rb") as file:
            data = bytearray(file.read())
        data[len(data) // 2] ^= 1
        damaged = os.path.join(sp.SCRATCH, "damaged.sltrace")
        with open(damaged, "wb") as file:
            file.write(data)
        self.refuses(sp.CORRUPT, [damaged, "damaged, record it again"], "trace", damaged)

    def test_a_folder_that_is_not_there_or_a_full_disk_is_said(self):
        arguments = ["run", sp.talking(), "-p", "Hello", *FIXED, "--trace"]
        self.refuses(sp.NOT_FOUND, "no-folder", *arguments, os.path.join(sp.SCRATCH, "no-folder", "t.sltrace"))
        self.refuses(sp.IO, "cannot write the trace", *arguments, "/dev/full")

    def test_a_disk_that_fills_up_ends_the_trace_and_not_the_run(self):
        path = os.path.join(sp.SCRATCH, "filled.sltrace")
        tokens, limit = 2000, 1_000_000   # of a trace of 2 MB, which the thread writes every 0.2 s
        arguments = ["run", sp.slow(), "-p", "Hello", "-n", tokens, "--ignore-eos", "--context", 4096, "-q", "--json"]
        plain = self.prints_json(*arguments)
        done = self.succeeds(*arguments, "--trace", path, preexec=sp.limit_file_size(limit))
        self.assertEqual(json.loads(done.stdout)["ids"], plain["ids"])
        lines = done.stderr.decode().splitlines()
        self.assertEqual(len(lines), 1, lines)
        for words in ("the trace is not whole", path, "File too large", "what was written until then can be read"):
            self.assertIn(words, lines[0])
        self.assertEqual(os.path.getsize(path), limit)
        report = self.prints_json("trace", path, "--json")
        self.assertFalse(report["complete"])
        self.assertGreater(report["tokens"], 20)
        self.assertLess(report["tokens"], tokens)

    def test_a_killed_run_leaves_a_trace_that_can_be_read(self):
        path = os.path.join(sp.SCRATCH, "killed.sltrace")
        process = sp.start("run", sp.slow(), "-p", "Hello", "-n", 8000, "--ignore-eos", "--context", 8192, "-q",
                           "--trace", path)
        # Until the thread has written several times: each time takes it 0.2 s, or 128 KiB.
        until = time.monotonic() + sp.TIMEOUT
        while time.monotonic() < until and (not os.path.exists(path) or os.path.getsize(path) < 150_000):
            self.assertIsNone(process.poll(), "the run ended by itself")
            time.sleep(0.01)
        process.kill()
        done = sp.finished(process)
        self.assertEqual(done.returncode, -signal.SIGKILL)
        report = self.prints_json("trace", path, "--json")
        self.assertFalse(report["complete"])
        self.assertEqual(report["dropped"], 0)
        self.assertGreater(report["decoded_tokens"], 20)
        self.assertLess(report["tokens"], 8000)
        self.assertGreater(report["accounting"]["tokens_at_99_percent"], 0.9)
        page = os.path.join(sp.SCRATCH, "killed.html")
        summary = self.succeeds("trace", path, "--html", page).stdout.decode()
        self.assertIn("the run ended before its trace was finished", summary)
        with open(page) as file:
            self.assertIn("the run ended before its trace was finished", file.read())

    def injected(self, fault, *placement, model=None):
        """How often the trace says that each fault acted."""
        path = os.path.join(sp.SCRATCH, "fault.sltrace")
        self.succeeds("run", model or sp.talking(), "-p", "Hello", *FIXED, "--trace", path, "--inject",
                      fault + ":period=4,ms=1", *placement)
        said = self.prints_json("trace", path, "--json")["injected"]
        return {fault["fault"]: fault["times"] for fault in said}

    def test_faults_that_act_are_reported_as_often_as_they_did(self):
        streamed = ["--device-memory", sp.smallest_budget(sp.talking(), "--context", "64")]
        link = os.path.join(sp.SCRATCH, "link.sluice")
        os.symlink(sp.talking(), link)
        for fault, *placement in (["read", *streamed], ["copy", *streamed, "--host-memory", "1G"],
                                  ["evict", "--io", "mmap"], ["callback"], ["compute"], ["prefill"]):
            with self.subTest(fault=fault):
                counts = self.injected(fault, *placement, model=link)
                # Due after each fourth of 24 tokens; the last one has no token behind it to act in.
                self.assertIn(counts.pop(fault), (5, 6))
                self.assertEqual(counts, {})

    def test_a_fault_without_a_place_is_refused(self):
        streamed = ["--device-memory", sp.smallest_budget(sp.talking(), "--context", "64")]
        hosted = [*streamed, "--host-memory", "1G"]
        for fault, advice, *placement in (["read", "--device-memory"], ["read", "--host-memory", *hosted],
                                          ["read", "--device-memory", "--io", "mmap"],
                                          ["copy", "--host-memory"], ["copy", "--host-memory", *streamed],
                                          ["evict", "--io mmap"], ["evict", "--io mmap", *streamed],
                                          ["evict", "--device-memory", "--io", "mmap", "--device-memory", "1G"],
                                          ["callback:clock=bytes", "clock=token"]):
            with self.subTest(fault=fault, placement=placement):
                self.refuses(sp.USAGE, ["--inject " + fault.split(":")[0], advice], "run", sp.talking(), "-p", "Hello",
                             *FIXED, "--inject", fault, *placement)


if __name__ == "__main__":
    unittest.main(verbosity=2)
