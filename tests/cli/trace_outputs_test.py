# SPDX-License-Identifier: Apache-2.0
"""What `trace` writes for others holds every span of the trace; the report is a page that needs nothing else."""
import collections
import html.parser
import json
import os
import shutil
import subprocess
import unittest

import sluice_process as sp
from sluice_process import CliTest
from trace_file import records_of


def fields(data):
    """Fields of one protobuf message: (number, value), varints as numbers and length-delimited ones as bytes."""
    def varint(at):
        value = shift = 0
        while True:
            byte = data[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value, at
    at, found = 0, []
    while at < len(data):
        key, at = varint(at)
        value, at = varint(at)
        if key & 7 == 2:
            value, at = data[at:at + value], at + value
        else:
            assert key & 7 == 0, f"wire type {key & 7}"
        found.append((key >> 3, value))
    return found


class Page(html.parser.HTMLParser):
    VOID = {"meta", "link", "br", "line", "circle", "rect", "path"}

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.addresses, self.text = [], collections.Counter(), [], ""

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags[tag] += 1

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text += data


class Outputs(CliTest):
    @classmethod
    def setUpClass(cls):
        cls.trace = os.path.join(sp.SCRATCH, "out.sltrace")
        smallest = sp.smallest_budget(sp.talking(), "--context", "256")
        done = sp.sluice("run", sp.talking(), "-p", "Hello", "-n", 200, "--ignore-eos", "--context", 256, "-q",
                         "--device-memory", smallest, "--trace", cls.trace, "--inject", "callback:period=16,ms=8")
        assert done.returncode == 0, done.stderr
        cls.counts = records_of(cls.trace)

    def write(self, option, name):
        path = os.path.join(sp.SCRATCH, name)
        self.succeeds("trace", self.trace, option, path)
        with open(path, "rb") as file:
            return file.read()

    def test_the_trace_has_the_spans_of_a_streamed_run(self):
        for kind in ("token", "pass", "layer", "matmul", "disk_read", "check", "bus_copy", "stage_wait", "counter"):
            self.assertGreater(self.counts[kind], 0, kind)

    def test_perfetto_has_as_many_slices_of_each_kind_as_the_trace_has_spans(self):
        begun, ended, readings, tracks = collections.Counter(), 0, 0, {}
        depth, last = collections.Counter(), collections.Counter()
        for number, packet in fields(self.write("--perfetto", "out.pftrace")):
            self.assertEqual(number, 1)
            packet = dict(fields(packet))
            if 60 in packet:
                track = dict(fields(packet[60]))
                tracks[track[1]] = track
                continue
            event = dict(fields(packet[11]))
            uuid = event[11]
            self.assertIn(uuid, tracks)
            if event[9] == 4:
                self.assertIn(8, tracks[uuid])
                readings += 1
                continue
            self.assertGreaterEqual(packet[8], last[uuid], "slices of a track go forward in time")
            last[uuid] = packet[8]
            if event[9] == 1:
                begun[event[23].decode()] += 1
                depth[uuid] += 1
            else:
                self.assertEqual(event[9], 2)
                ended += 1
                depth[uuid] -= 1
            self.assertGreaterEqual(depth[uuid], 0)
        self.assertEqual(set(depth.values()), {0})
        self.assertEqual(ended, sum(begun.values()))
        self.assertEqual(readings, self.counts["counter"])
        self.assertEqual(begun, collections.Counter({k: v for k, v in self.counts.items() if k != "counter"}))

    def test_chrome_json_has_as_many_events_of_each_kind_as_the_trace_has_records(self):
        events = json.loads(self.write("--chrome", "out.json"))["traceEvents"]
        spans = collections.Counter(event["name"] for event in events if event["ph"] == "X")
        self.assertEqual(spans, collections.Counter({k: v for k, v in self.counts.items() if k != "counter"}))
        self.assertEqual(sum(event["ph"] == "C" for event in events), self.counts["counter"])
        self.assertTrue(all(event["dur"] >= 0 for event in events if event["ph"] == "X"))
        names = {event["args"]["name"] for event in events if event["ph"] == "M"}
        self.assertTrue({"engine", "session 0", "prefetcher", "drive", "machine"} <= names, names)

    def test_the_report_needs_nothing_else_and_says_what_stood_out(self):
        text = self.write("--html", "out.html").decode()
        page = Page()
        page.feed(text)
        self.assertEqual(page.open, [])
        self.assertEqual(page.addresses, ["data:,"])
        self.assertEqual(page.tags["script"], 0)
        self.assertNotIn("url(", text)
        self.assertGreaterEqual(page.tags["svg"], 4)
        self.assertIn("prefers-color-scheme:dark", text)
        self.assertIn("@media print", text)
        for words in ("Latency of each token", "Where the time goes", "Where the weights are", "Faults were injected",
                      "p99.9"):
            self.assertIn(words, page.text)

    def test_an_injected_train_is_found_with_its_cause(self):
        trains = self.prints_json("trace", self.trace, "--json")["trains"]
        consumer = [train for train in trains if train["cause"] == "consumer"]
        self.assertEqual(len(consumer), 1, trains)
        self.assertEqual(consumer[0]["clock"], "token")
        self.assertAlmostEqual(consumer[0]["period"], 16, delta=0.32)
        self.assertEqual(consumer[0]["grade"], "correlated")

    def test_an_output_that_cannot_be_written_and_a_fault_that_is_not_known_are_said(self):
        for option in ("--html", "--perfetto", "--chrome"):
            nowhere = os.path.join(sp.SCRATCH, "no-folder", "x")
            self.refuses(sp.NOT_FOUND, "no-folder", "trace", self.trace, option, nowhere)
            self.refuses(sp.IO, "/dev/full", "trace", self.trace, option, "/dev/full")
        self.refuses(sp.USAGE, ["moonlight", "evict"], "run", sp.talking(), "-p", "x", "--inject", "moonlight:period=3")

    def test_a_browser_shows_the_report_without_a_word_on_its_console(self):
        browser = shutil.which("chromium") or shutil.which("google-chrome")
        if browser is None:
            self.skipTest("no browser")
        self.write("--html", "shown.html")
        for width, dark in ((390, False), (1280, True)):
            shot = os.path.join(sp.SCRATCH, f"shown-{width}.png")
            flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
                     f"--user-data-dir={sp.SCRATCH}/browser", f"--window-size={width},2400", f"--screenshot={shot}"]
            if dark:
                flags.append("--force-dark-mode")
            page = "file://" + os.path.join(sp.SCRATCH, "shown.html")
            done = subprocess.run([browser, *flags, page], capture_output=True, timeout=120)
            self.assertEqual(done.returncode, 0, done.stderr[-2000:])
            self.assertNotIn(b"CONSOLE", done.stderr)
            self.assertGreater(os.path.getsize(shot), 20000)


if __name__ == "__main__":
    unittest.main(verbosity=2)
