# SPDX-License-Identifier: Apache-2.0
"""`trace --confirm`: a suspect that can be taken out of the way is confirmed, one that cannot stays as it was."""
import os
import unittest

import sluice_process as sp
from sluice_process import CliTest


class Confirm(CliTest):
    def trains(self, inject, *placement, model=None, tokens=200):
        self.trace = os.path.join(sp.SCRATCH, "confirm.sltrace")
        self.succeeds("run", model or sp.talking(), "-p", "Hello", "-n", tokens, "--ignore-eos", "--context", 512, "-q",
                      "--trace", self.trace, "--inject", inject, *placement)
        return self.prints_json("trace", self.trace, "--confirm", "--json")["trains"]

    def the_one(self, cause, trains):
        """The largest train of that cause: smaller ones may follow it."""
        found = [train for train in trains if train["cause"] == cause]
        self.assertTrue(found, trains)
        return max(found, key=lambda train: train["share_of_time"])

    def assert_confirmed(self, cause, trains):
        train = self.the_one(cause, trains)
        confirmation = train["confirmation"]
        self.assertEqual(train["grade"], "confirmed", confirmation)
        self.assertGreater(confirmation["again"], 0.5 * confirmation["traced"])
        self.assertLess(confirmation["changed"], 0.3 * confirmation["again"])
        self.assertIn("a token", confirmation["text"])

    def smallest(self):
        return sp.smallest_budget(sp.talking(), "--context", "512")

    def test_a_slow_consumer_is_confirmed_by_taking_nobody(self):
        self.assert_confirmed("consumer", self.trains("callback:period=16,ms=20"))

    def test_late_reads_are_confirmed_by_host_memory(self):
        self.assert_confirmed("disk_tail", self.trains("read:period=16,ms=25", "--device-memory", self.smallest()))

    def test_late_copies_are_confirmed_by_resident_weights(self):
        self.assert_confirmed("bus", self.trains("copy:period=16,ms=25", "--device-memory", self.smallest(),
                                                 "--host-memory", "1G"))

    def test_dropped_pages_are_confirmed_by_reading_instead_of_mapping(self):
        trains = self.trains("evict:period=16", "--io", "mmap", model=sp.slow())
        self.skip_where_faults_drown(sp.slow())
        self.assert_confirmed("page_faults", trains)

    def test_another_session_is_confirmed_by_leaving_it_out(self):
        self.assert_confirmed("interference", self.trains("prefill:period=25,ms=1", model=sp.slow(), tokens=400))

    def test_what_cannot_be_taken_away_stays_correlated_and_says_why(self):
        train = self.the_one("compute", self.trains("compute:period=16,ms=20"))
        self.assertEqual(train["grade"], "correlated")
        self.assertFalse(train["confirmation"]["confirmed"])
        self.assertIn("not tried: Sluice cannot take compute out of the way", train["confirmation"]["text"])
        self.assertNotIn("again", train["confirmation"])

    def test_the_verdict_is_in_summary_and_report(self):
        self.trains("callback:period=16,ms=20")
        page = os.path.join(sp.SCRATCH, "confirmed.html")
        done = self.succeeds("trace", self.trace, "--confirm", "--html", page)
        self.assertIn("consumer (confirmed)", done.stdout.decode())
        self.assertIn("when run again as it was", done.stdout.decode())
        with open(page) as file:
            text = file.read()
        self.assertIn("(confirmed)", text)
        self.assertIn("when run again as it was", text)

    def test_a_model_that_is_gone_is_said(self):
        copy = sp.copy_of(sp.talking(), "gone.sluice")
        trace = os.path.join(sp.SCRATCH, "gone.sltrace")
        self.succeeds("run", copy, "-p", "Hello", "-n", 200, "--ignore-eos", "--context", 256, "-q", "--trace", trace,
                      "--inject", "callback:period=16,ms=20")
        os.remove(copy)
        self.refuses(sp.NOT_FOUND, "gone.sluice", "trace", trace, "--confirm")


if __name__ == "__main__":
    unittest.main(verbosity=2)
