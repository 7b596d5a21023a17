# SPDX-License-Identifier: Apache-2.0
"""What `trace` writes for others holds every span of the trace; the report is a page that needs nothing else."""
import collections
import html.parser
import itertools
import json
import math
import os
import unittest

import browser
import sluice_process as sp
from sluice_process import CliTest
from trace_file import NO_LAYER, Record, TraceFile, write_trace

FAULTS = ["read", "copy", "compute", "sampling", "callback", "preempt", "alloc", "compete", "evict", "prefill"]
COUNTERS = {"context": 17, "stream_bytes": 13, "device_clock_error_ns": 29, "ring_bytes": 30}   # some of them

# A slice as a viewer has it. `layer`: None where it has none.
Slice = collections.namedtuple("Slice", "name begin end layer bytes value")


def slice_of(record, begin, end):
    if record.kind == "injected":
        return Slice("injected " + FAULTS[record.layer], begin, end, None, record.bytes, record.value)
    layer = None if record.layer == NO_LAYER else record.layer
    return Slice(record.kind, begin, end, layer, record.bytes, record.value)


def track_of(name, known):
    """The trace's track that a lane ("drive 3") is of."""
    return name if name in known else name.rpartition(" ")[0]


def made_trace(path, tokens=4):
    """Tokens as a GPU that streams would record them, with reads in flight together; the consumer of every sixteenth is
    20 ms late. The GPU's clock is known badly in the first pass, which compiles."""
    ms = 10**6
    tracks = {name: [] for name in ("machine", "engine", "prefetcher", "drive", "gpu", "session 0", "injected")}
    add = lambda track, *fields: tracks[track].append(Record(*fields))
    next_at = 1000
    for token in range(tokens):
        at, next_at = next_at, next_at + (30 if token % 16 == 7 else 10) * ms
        add("engine", "matmul", at, at + 4 * ms, 0)
        add("engine", "attention", at + 4 * ms, at + 5 * ms, 0)
        add("engine", "layer", at, at + 5 * ms, 0)
        add("engine", "finish", at + 5 * ms, at + 8 * ms)
        add("engine", "pass", at, at + 8 * ms, 0, 1, token)
        add("gpu", "disk_wait", at + ms // 2, at + 2 * ms, NO_LAYER, 0, 3)
        add("gpu", "copy_wait", at + 2 * ms, at + 3 * ms)
        add("gpu", "matmul", at + 3 * ms, at + 6 * ms, 0)
        add("gpu", "attention", at + 6 * ms, at + 7 * ms, 0)
        add("gpu", "counter", at, at, COUNTERS["device_clock_error_ns"], 0,
            900 + 400 * token if token > 0 else 156 * ms)
        # The first two overlap; the third lies inside of both; the fourth overlaps with both; the fifth is alone.
        for begin, end in ((0, 3), (1, 4), (2.25, 2.5), (2, 5), (6, 7)):
            add("drive", "disk_read", at + int(begin * ms), at + int(end * ms), NO_LAYER, 4096, token)
        add("prefetcher", "stage_wait", at, at + 3 * ms)
        add("prefetcher", "counter", at, at, COUNTERS["ring_bytes"], 0, 65536 * token)
        add("session 0", "run_model", at, at + 8 * ms)
        add("session 0", "sampling", at + 8 * ms, at + 9 * ms)
        add("session 0", "callback", at + 9 * ms, next_at)
        add("session 0", "counter", at, at, COUNTERS["context"], 0, token + 1)
        add("session 0", "token", at, next_at, NO_LAYER, 1, token + 1)
        add("injected", "injected", at, at, FAULTS.index("compete"), 0, 5 * ms)
    write_trace(path, tracks.items(), clock_errors=(50, 70))


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
        self.rows = []   # of tables, as lists of texts

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "link"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags[tag] += 1

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text += data
        if "td" in self.open:
            self.rows[-1][-1] += data


class Exports(CliTest):
    """What other programs are given, as they read it: begins and ends on a stack of each track."""

    def write(self, trace, option):
        path = os.path.join(sp.SCRATCH, "exported")
        self.succeeds("trace", trace, option, path)
        with open(path, "rb") as file:
            return file.read()

    def perfetto(self, trace):
        """Names of tracks in order, slices by track's name, (counter, track) by readings."""
        tracks, slices, open_slices, last = {}, collections.defaultdict(collections.Counter), {}, collections.Counter()
        readings = collections.defaultdict(list)
        for number, packet in fields(self.write(trace, "--perfetto")):
            self.assertEqual(number, 1)
            packet = dict(fields(packet))
            if 60 in packet:
                track = dict(fields(packet[60]))
                self.assertNotIn(track[1], tracks)
                tracks[track[1]] = track
                continue
            parts = fields(packet[11])
            event, uuid = dict(parts), dict(parts)[11]
            self.assertIn(uuid, tracks)
            if event[9] == 4:
                self.assertIn(8, tracks[uuid])
                owner = tracks[tracks[uuid][5]]
                readings[tracks[uuid][2].decode(), owner[2].decode()].append((packet[8], event[30]))
                continue
            self.assertNotIn(8, tracks[uuid])
            self.assertGreaterEqual(packet[8], last[uuid], "slices of a track go forward in time")
            last[uuid] = packet[8]
            stack = open_slices.setdefault(uuid, [])
            if event[9] == 1:
                notes = {note[10].decode(): note[3] for note in (dict(fields(v)) for n, v in parts if n == 4)}
                stack.append((event[23].decode(), packet[8], notes))
                continue
            self.assertEqual(event[9], 2)
            name, begin, notes = stack.pop()   # a viewer ends the slice that began last
            slices[tracks[uuid][2].decode()][Slice(name, begin, packet[8], notes.get("layer"), notes.get("bytes", 0),
                                                   notes.get("value", 0))] += 1
        self.assertTrue(all(not stack for stack in open_slices.values()))
        names = [track[2].decode() for track in tracks.values() if 2 in track and 8 not in track]
        return names, slices, readings

    def chrome(self, trace):
        """The same of Chrome's JSON; an event that does not nest in those around it fails."""
        names, slices, stacks = {}, collections.defaultdict(collections.Counter), collections.defaultdict(list)
        readings = collections.defaultdict(list)
        for event in json.loads(self.write(trace, "--chrome"))["traceEvents"]:
            if event["ph"] == "M":
                if event["name"] == "thread_name":
                    names[event["tid"]] = event["args"]["name"]
                continue
            begin = round(event["ts"] * 1000)
            if event["ph"] == "C":
                readings[event["name"], event["id"]].append((begin, event["args"]["value"]))
                continue
            self.assertEqual(event["ph"], "X")
            args, end = event["args"], begin + round(event["dur"] * 1000)
            stack = stacks[event["tid"]]
            if stack:
                self.assertGreaterEqual(begin, stack[-1][0], "events of a thread go forward in time")
            while stack and stack[-1][1] <= begin:
                stack.pop()
            if stack:
                self.assertLessEqual(end, stack[-1][1], f"{event} ends after the one around it")
            stack.append((begin, end))
            slices[names[event["tid"]]][Slice(event["name"], begin, end, args.get("layer"), args.get("bytes", 0),
                                              args["value"])] += 1
        return list(names.values()), slices, readings

    def check(self, path, read, moment):
        """Slices and readings of an export are those of the trace, each with its begin and end. Returns track names."""
        trace = TraceFile(path)
        names, slices, readings = read(path)
        known = [name for name, _ in trace.tracks]
        by_track = collections.defaultdict(collections.Counter)
        for name, found in slices.items():
            by_track[track_of(name, known)] += found
        for name, records in trace.tracks:
            with self.subTest(track=name):
                wanted = collections.Counter(slice_of(r, moment(trace, r.begin), moment(trace, r.end))
                                             for r in records if r.kind != "counter")
                found = by_track.pop(name, collections.Counter())
                self.assertEqual(found.total(), wanted.total())
                wrong = found - wanted
                self.assertEqual(wrong.total(), 0, f"{wrong.total()} of {found.total()} slices of {name} are not the "
                                                   f"trace's, such as {list(wrong)[:2]}; {list(wanted - found)[:2]} "
                                                   "are missing")
                counted = [(moment(trace, r.begin), r.value) for r in records if r.kind == "counter"]
                self.assertEqual(sorted(sum((at for (_, track), at in readings.items()
                                             if track_of(track, known) == name), [])), sorted(counted))
        self.assertFalse(by_track)
        return names, readings

    def check_both(self, path):
        perfetto = self.check(path, self.perfetto, lambda trace, at: int(max(0.0, trace.steady_ns(at))))
        chrome = self.check(path, self.chrome,
                            lambda trace, at: math.floor(trace.steady_ns(at) - float(trace.first[1])))
        self.assertEqual(perfetto[0], chrome[0])
        return perfetto

    def test_every_span_of_a_streamed_run_keeps_its_begin_and_end(self):
        trace = recorded_trace()
        counts = collections.Counter(record.kind for _, records in TraceFile(trace).tracks for record in records)
        for kind in ("token", "pass", "layer", "matmul", "disk_read", "check", "bus_copy", "stage_wait", "counter"):
            self.assertGreater(counts[kind], 0, kind)
        names, _ = self.check_both(trace)
        self.assertTrue({"engine", "session 0", "prefetcher", "drive 0", "drive 1", "machine", "injected"} <=
                        set(names), names)

    def test_spans_that_overlap_get_lanes_and_all_others_one_track(self):
        path = os.path.join(sp.SCRATCH, "made.sltrace")
        made_trace(path)
        names, readings = self.check_both(path)
        self.assertEqual(names, ["machine", "engine", "prefetcher", "drive 0", "drive 1", "drive 2", "gpu", "session 0",
                                 "injected"])
        self.assertEqual(set(readings), {("ring_bytes", "prefetcher"), ("device_clock_error_ns", "gpu"),
                                         ("context", "session 0")})

    def test_the_error_of_each_clock_is_said_everywhere(self):
        path = os.path.join(sp.SCRATCH, "clocks.sltrace")
        made_trace(path, 10)
        self.assertEqual(self.prints_json("trace", path, "--json")["clock"],
                         {"host_error_ns": 70, "device_error_ns": 4500})
        sentence = "the GPU's clock is known to within 4.5 us in nine of ten passes"
        self.assertIn(sentence, self.succeeds("trace", path).stdout.decode())
        self.assertIn(sentence, self.write(path, "--html").decode())

    def test_faults_whose_settings_the_trace_does_not_say_are_counted(self):
        path = os.path.join(sp.SCRATCH, "faults.sltrace")
        made_trace(path)
        self.assertEqual(self.prints_json("trace", path, "--json")["injected"],
                         [{"fault": "compete", "times": 4, "text": "compete"}])
        self.assertIn("compete, 4 times", self.succeeds("trace", path).stdout.decode())


class Report(CliTest):
    """The page, the terminal and the JSON say the same."""

    def write(self):
        path = os.path.join(sp.SCRATCH, "out.html")
        self.succeeds("trace", recorded_trace(), "--html", path)
        with open(path, encoding="utf-8") as file:
            return file.read()

    def test_the_report_needs_nothing_else_and_says_what_stood_out(self):
        text = self.write()
        page = Page()
        page.feed(text)
        self.assertEqual(page.open, [])
        self.assertEqual(page.addresses, ["data:,"])
        self.assertEqual(page.tags["script"], 0)
        self.assertNotIn("url(", text)
        self.assertGreaterEqual(page.tags["svg"], 4)
        for words in ("Latency of each token", "Where the time goes", "Where the weights are", "Faults were injected",
                      "p99.9", "callback every 16 tokens, 8 ms", "tokens of context"):
            self.assertIn(words, page.text)
        rows = dict(row for row in page.rows if len(row) == 2)
        for name, value in {"seed": "7", "temperature": "0.8", "top k": "40", "most tokens": "260",
                            "precision": "int4", "prompt": "5 tokens", "host memory": "none",
                            "fault": "callback every 16 tokens, 8 ms"}.items():
            self.assertEqual(rows.get(name), value, (name, rows))
        self.assertRegex(rows["device memory"], r"^[0-9.]+ [KM]iB$")

    def test_an_injected_train_is_found_with_its_cause(self):
        # Resident, so that nobody else at the drive has a part in it.
        path = os.path.join(sp.SCRATCH, "resident.sltrace")
        self.succeeds("run", sp.talking(), "-p", "Hello", "-n", 260, "--ignore-eos", "--context", 512, "-q", "--trace",
                      path, "--inject", "callback:period=16,ms=8")
        report = self.prints_json("trace", path, "--json")
        # Its aftermath may be a train of its own, of much smaller spikes.
        train = max(report["trains"], key=lambda train: train["share_of_time"])
        self.assertEqual((train["cause"], train["grade"]), ("consumer", "correlated"), report["trains"])
        self.assertEqual(train["clock"], "token")
        self.assertAlmostEqual(train["period"], 16, delta=0.32)

    def test_an_injected_fault_has_its_settings_and_how_many_times_it_came(self):
        [fault] = self.prints_json("trace", recorded_trace(), "--json")["injected"]
        self.assertGreater(fault.pop("times"), 10)
        self.assertEqual(fault, {"fault": "callback", "period": 16, "ms": 8, "jitter": 0, "clock": "token",
                                 "text": "callback every 16 tokens, 8 ms"})

    def test_page_and_terminal_say_of_a_train_what_the_json_holds(self):
        path, page = (os.path.join(sp.SCRATCH, name) for name in ("train.sltrace", "train.html"))
        made_trace(path, 320)
        report = self.prints_json("trace", path, "--json")
        [train] = report["trains"]
        self.assertEqual((train["clock"], train["cause"]), ("token", "consumer"))
        self.assertAlmostEqual(train["period"], 16, delta=0.01)
        self.assertAlmostEqual(train["phase"], 6, delta=0.1)   # the first token is none that is decoded
        self.assertIn("outside of Sluice", train["meaning"])
        self.assertEqual(report["trend"]["context_first"], 2)
        for words in ("phase 6.0 tokens", "20 of 20 places", "consumer (correlated)", "at 2 tokens of context",
                      "at 320", "the clocks are known to within 70 ns", "the time clock fits as well"):
            self.assertIn(words, self.succeeds("trace", path).stdout.decode())
        self.succeeds("trace", path, "--html", page)
        with open(page, encoding="utf-8") as file:
            text = file.read()
        for words in ("Every 16.0 tokens</b> (phase 6.0 tokens)", "<b>consumer</b> (correlated)", train["meaning"],
                      "2 tokens of context", "keeps the token clock; on time it is as regular"):
            self.assertIn(words, text)

    def test_the_terminal_says_the_settings_of_a_fault(self):
        text = self.succeeds("trace", recorded_trace()).stdout.decode()
        for words in ("callback every 16 tokens, 8 ms", "the clocks are known to within", "tokens of context"):
            self.assertIn(words, text)

    def test_an_output_that_cannot_be_written_and_a_fault_that_is_not_known_are_said(self):
        for option in ("--html", "--perfetto", "--chrome"):
            nowhere = os.path.join(sp.SCRATCH, "no-folder", "x")
            self.refuses(sp.NOT_FOUND, "no-folder", "trace", recorded_trace(), option, nowhere)
            self.refuses(sp.IO, "/dev/full", "trace", recorded_trace(), option, "/dev/full")
        self.refuses(sp.USAGE, ["moonlight", "evict"], "run", sp.talking(), "-p", "x", "--inject", "moonlight:period=3")


@unittest.skipIf(browser.path() is None, "no browser; tools/install-packages installs one")
class Shown(CliTest):
    """The page in a browser. SLUICE_SCREENSHOTS: a folder to leave the pictures in."""

    @classmethod
    def setUpClass(cls):
        wide = os.path.join(sp.SCRATCH, "wide.sltrace")   # times of many digits: 132.9 to 988.8 ms
        ends = [10**6 * i * 132.9 + (856 * 10**6 if i >= 60 else 0) for i in range(100)]
        tokens = [Record("token", 1000 + int(begin), 1000 + int(end), NO_LAYER, 1, i)
                  for i, (begin, end) in enumerate(zip(ends, ends[1:]))]
        write_trace(wide, [("machine", []), ("engine", []), ("session 0", tokens)])
        cls.pages = []
        for name, trace in (("shown", recorded_trace()), ("wide", wide)):
            cls.pages.append(os.path.join(sp.SCRATCH, name + ".html"))
            done = sp.sluice("trace", trace, "--html", cls.pages[-1])
            assert done.returncode == 0, done.stderr
        cls.page = cls.pages[0]
        cls.browser = browser.Browser(os.path.join(sp.SCRATCH, "browser"))

    @classmethod
    def tearDownClass(cls):
        cls.browser.close()

    def test_phone_and_desktop_light_and_dark(self):
        for width in (390, 1280):
            for dark in (False, True):
                with self.subTest(width=width, dark=dark):
                    self.browser.show("file://" + self.page, width, dark)
                    self.assertEqual(self.browser.console, [])
                    self.assertEqual(self.browser.value("innerWidth"), width)
                    self.assertLessEqual(self.browser.value("document.documentElement.scrollWidth"), width)
                    shot = self.browser.screenshot()
                    folder = os.environ.get("SLUICE_SCREENSHOTS")
                    if folder:
                        with open(f"{folder}/{width}-{'dark' if dark else 'light'}.png", "wb") as file:
                            file.write(shot)
                    shown_width, height = browser.png_size(shot)
                    self.assertEqual(shown_width, width)
                    self.assertGreater(height, 1500)
                    background = browser.png_first_pixel(shot)
                    self.assertTrue(max(background) < 64 if dark else min(background) > 224, background)

    def test_wide_numbers_fit_a_phone(self):
        self.browser.show("file://" + self.pages[1], 390, False)
        self.assertIn("988.9 ms", self.browser.value("document.body.innerText"))
        self.assertEqual(self.browser.value("innerWidth"), 390)
        self.assertLessEqual(self.browser.value("document.documentElement.scrollWidth"), 390)

    def test_no_label_is_cut_off_or_lies_on_another(self):
        # Boxes of the labels of each figure, with its own box first.
        boxes = """[...document.querySelectorAll('svg')].map(svg => [svg, ...svg.querySelectorAll('text')].map(
                   of => { const r = of.getBoundingClientRect();
                           return [r.left, r.top, r.right, r.bottom, of.textContent]; }))"""
        for width, page in itertools.product((390, 1280), self.pages):
            self.browser.show("file://" + page, width, False)
            for figure, *labels in self.browser.value(boxes):
                for i, (left, top, right, bottom, text) in enumerate(labels):
                    with self.subTest(width=width, label=text):
                        self.assertTrue(figure[0] - 1 <= left and figure[1] - 1 <= top and right <= figure[2] + 1 and
                                        bottom <= figure[3] + 1, "it is cut off")
                        on = [other[4] for other in labels[:i] if left < other[2] and other[0] < right and
                              top < other[3] - 2 and other[1] < bottom - 2]
                        self.assertEqual(on, [])

    def test_print_is_light_and_keeps_the_colours_of_keys(self):
        colours = """(style => ['--bg', '--fg', '--dim', '--line', '--ink', '--spike', '--s0', '--s1', '--s2', '--s3',
                      '--s4', '--s5', '--s6', '--s7'].map(name => style.getPropertyValue(name)))
                     (getComputedStyle(document.documentElement))"""
        swatch = "getComputedStyle(document.querySelector('.key span')).printColorAdjust"
        self.browser.show("file://" + self.page, 1280, False, "print")
        light = self.browser.value(colours)
        self.browser.show("file://" + self.page, 1280, True, "print")
        self.assertEqual(self.browser.value(colours), light)
        self.assertEqual(self.browser.value(swatch), "exact")
        self.assertTrue(self.browser.pdf().startswith(b"%PDF"))


def recorded_trace():
    """One with a consumer that is slow at every sixteenth token, its weights streamed."""
    if "trace" not in recorded:
        path = os.path.join(sp.SCRATCH, "out.sltrace")
        smallest = sp.smallest_budget(sp.talking(), "--context", "512")
        done = sp.sluice("run", sp.talking(), "-p", "Hello", "-n", 260, "--ignore-eos", "--context", 512, "-q",
                         "--temp", 0.8, "--top-k", 40, "--seed", 7, "--device-memory", smallest, "--trace", path,
                         "--inject", "callback:period=16,ms=8")
        assert done.returncode == 0, done.stderr
        recorded["trace"] = path
    return recorded["trace"]


recorded = {}


if __name__ == "__main__":
    unittest.main(verbosity=2)
