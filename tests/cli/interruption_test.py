# SPDX-License-Identifier: Apache-2.0
"""What happens in the middle: Ctrl-C, a reader that leaves, a file that shrinks."""
import os
import subprocess
import time
import unittest

import sluice_process as sp
from sluice_process import CliTest, start

# Long enough to be interrupted, on any machine.
LONG = ["-n", "8000", "--ignore-eos", "--temp", "1", "--context", "8192", "--threads", "1"]


class Interrupts(CliTest):
    def started(self, *args):
        """The process, once its first text has come."""
        process = start("run", sp.slow(), "-p", "Once", *LONG, *args)
        self.addCleanup(process.kill)
        self.assertNotEqual(os.read(process.stdout.fileno(), 1), b"", "it ended before the first text")
        return process

    def test_ctrl_c_ends_run_with_the_summary_and_the_exit_code_of_cancelled(self):
        process = self.started()
        sp.interrupt(process)
        done = sp.finished(process)
        self.assert_no_crash(done)
        self.assertEqual(done.returncode, sp.CANCELLED)
        self.assertIn(b"stopped: interrupted", done.stderr)
        self.assertIn(b"per pass", done.stderr)
        self.assertNotIn(b"sluice: ", done.stderr)

    def test_ctrl_c_ends_a_streaming_run_as_well(self):
        smallest = sp.smallest_budget(sp.slow(), "--context", "8192")
        process = self.started("--device-memory", str(smallest))
        sp.interrupt(process)
        done = sp.finished(process)
        self.assertEqual(done.returncode, sp.CANCELLED, done.stderr)
        self.assertIn(b"disk:", done.stderr)

    def test_ctrl_c_ends_a_chat_that_waits_for_its_user(self):
        process = subprocess.Popen([sp.BINARY, "chat", sp.talking(), "-n", "4", "--context", "256"],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.addCleanup(process.kill)
        process.stdin.write(b"Hi\n")
        process.stdin.flush()
        self.assertNotEqual(os.read(process.stdout.fileno(), 1), b"")
        time.sleep(0.5)  # the answer of 4 tokens is done, or is being interrupted: both end
        sp.interrupt(process)
        done = sp.finished(process)
        self.assert_no_crash(done)
        self.assertIn(done.returncode, (0, sp.CANCELLED))
        self.assertIn(b"per pass", done.stderr)

    def test_ctrl_c_during_import_leaves_nothing(self):
        folder = os.path.join(sp.SCRATCH, "interrupted-import")
        sp.write_checkpoint(os.path.join(folder, "source"), layers=16, hidden=512, ffn=2048)
        out = os.path.join(folder, "out")
        os.makedirs(out)
        process = start("import", os.path.join(folder, "source"), "-o", os.path.join(out, "model.sluice"))
        self.addCleanup(process.kill)
        until = time.monotonic() + sp.TIMEOUT
        while not os.listdir(out) and time.monotonic() < until:
            time.sleep(0.001)
        sp.interrupt(process)
        done = sp.finished(process)
        self.assertEqual(done.returncode, sp.CANCELLED, done.stderr)
        self.assertIn(b"interrupted; nothing was written\n", done.stderr)
        self.assertEqual(os.listdir(out), [])

    def test_a_reader_that_leaves_ends_run_quietly(self):
        process = self.started()
        process.stdout.close()
        process.stdout = None
        begin = time.monotonic()
        done = sp.finished(process)
        self.assert_no_crash(done)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertNotIn(b"sluice: ", done.stderr)
        self.assertLess(time.monotonic() - begin, sp.TIMEOUT / 2)

    def test_a_file_that_shrinks_while_it_streams_is_a_typed_error(self):
        for io in ("auto", "pread", "mmap"):
            with self.subTest(io):
                path = sp.copy_of(sp.slow(), f"shrinking-{io}.sluice")
                smallest = sp.smallest_budget(path, "--context", "8192")
                process = start("run", path, "-p", "Once", *LONG, "--io", io, "--device-memory", str(smallest))
                self.addCleanup(process.kill)
                self.assertNotEqual(os.read(process.stdout.fileno(), 1), b"", "it ended before the first text")
                os.truncate(path, os.path.getsize(path) // 3 // 4096 * 4096)
                done = sp.finished(process)
                done.stdout = b""  # text made before is fine
                self.assert_refused(done, (sp.IO, sp.CORRUPT), path, log_lines=True)


if __name__ == "__main__":
    unittest.main(verbosity=2)
