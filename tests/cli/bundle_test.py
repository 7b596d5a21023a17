# SPDX-License-Identifier: Apache-2.0
"""tools/bundle: what it makes runs without any library of this machine but glibc. Environment: that of sluice_process,
SLUICE_SOURCE (the source folder)."""
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import unittest

import sluice_process as sp
from sluice_process import CliTest

BUNDLE = os.path.join(os.environ["SLUICE_SOURCE"], "tools", "bundle")
BUILD = os.path.dirname(sp.BINARY)
GLIBC = re.compile(r"^(linux-vdso|.*ld-linux.*|libc|libm|libdl|libpthread|librt)\.so")

# Meson's "skipped": nothing of this can be tried without it.
if shutil.which("patchelf") is None:
    print("skipped: patchelf is not installed")
    sys.exit(77)


def bundle(*arguments):
    return subprocess.run([BUNDLE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=120)


class Bundle(CliTest):
    @classmethod
    def setUpClass(cls):
        tarball = os.path.join(sp.SCRATCH, "bundle.tar.gz")
        cls.done = bundle(BUILD, "-o", tarball)
        if cls.done.returncode != 0:
            raise AssertionError(cls.done.stderr)
        # Nobody unpacks it where it was built.
        root = os.path.join(sp.SCRATCH, "a folder with spaces")
        shutil.unpack_archive(tarball, root)
        cls.folder = os.path.join(root, os.listdir(root)[0])
        cls.binary = os.path.join(cls.folder, "bin", "sluice")

    def libraries(self, file):
        done = subprocess.run(["ldd", file], stdout=subprocess.PIPE, text=True, env={"PATH": os.environ["PATH"]},
                              check=True)
        for line in done.stdout.splitlines():
            name, _, path = line.strip().partition(" => ")
            yield name.split(" (")[0], path.split(" (")[0]

    def test_only_glibc_comes_from_the_machine(self):
        files = [self.binary] + [os.path.join(self.folder, "lib", name) for name in os.listdir(f"{self.folder}/lib")]
        for file in files:
            for name, path in self.libraries(file):
                with self.subTest(file=os.path.basename(file), name=name):
                    self.assertNotIn("not found", path)
                    if not GLIBC.match(os.path.basename(name)):
                        self.assertEqual(os.path.dirname(os.path.realpath(path)),
                                         os.path.realpath(f"{self.folder}/lib"))

    def test_it_says_which_glibc_it_needs(self):
        self.assertRegex(self.done.stdout, r"needs glibc 2\.\d+ or newer")

    def test_it_runs_with_an_empty_environment(self):
        done = subprocess.run([self.binary, "--version"], stdout=subprocess.PIPE, text=True, env={}, timeout=60,
                              check=True)
        self.assertRegex(done.stdout, r"^sluice \d+\.\d+\.\d+\n$")

    def test_it_runs_where_there_is_nothing_but_glibc(self):
        """In a root of its own: the bundle, glibc, a checkpoint. What it computes is what the build computes."""
        if os.geteuid() != 0:
            self.skipTest("chroot needs root")
        root = os.path.join(sp.SCRATCH, "root")
        shutil.copytree(self.folder, f"{root}/opt/sluice")
        for name, path in self.libraries(self.binary):
            path = path or name
            if GLIBC.match(os.path.basename(name)) and os.path.isabs(path):
                os.makedirs(root + os.path.dirname(path), exist_ok=True)
                shutil.copy(os.path.realpath(path), root + path)
        os.makedirs(f"{root}/tmp")
        # The loader asks the kernel where $ORIGIN is; no /proc is mounted here.
        os.makedirs(f"{root}/proc/self")
        os.symlink("/opt/sluice/bin/sluice", f"{root}/proc/self/exe")
        # A sanitizer looks there for its options, and for leaks in what is not there.
        with open(f"{root}/proc/self/environ", "w") as environ:
            environ.write("ASAN_OPTIONS=detect_leaks=0\0")
        shutil.copy(sp.golden(), f"{root}/tmp/model.sluice")
        arguments = ["--ids", "1,2,3", "-n", "8", "--backend", "cpu", "--json", "--temp", "0"]
        there = subprocess.run(["/opt/sluice/bin/sluice", "run", "/tmp/model.sluice", *arguments],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={}, timeout=60,
                               preexec_fn=lambda: os.chroot(root), cwd="/")
        self.assertEqual(there.returncode, 0, there.stderr)
        here = self.prints_json("run", sp.golden(), *arguments)
        self.assertEqual(sp.json.loads(there.stdout)["ids"], here["ids"])


class Tests(CliTest):
    """A bundle with a test that computes, and one in Python."""

    @classmethod
    def setUpClass(cls):
        tarball = os.path.join(sp.SCRATCH, "tests.tar.gz")
        done = bundle(BUILD, "-o", tarball, "--tests", "golden", "--tests", "cli_verbs")
        if done.returncode != 0:
            raise AssertionError(done.stderr)
        root = os.path.join(sp.SCRATCH, "with tests")
        shutil.unpack_archive(tarball, root)
        cls.folder = os.path.join(root, os.listdir(root)[0])

    def run_tests(self, *arguments):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")}
        return subprocess.run([os.path.join(self.folder, "run-tests"), *arguments], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, env=environment, timeout=300)

    def set_entry(self, **entry):
        """Puts a test into the list, until the test that calls this has ended."""
        tests = pathlib.Path(self.folder, "tests.json")
        self.addCleanup(tests.write_text, tests.read_text())
        tests.write_text(json.dumps([{"env": {}, "timeout": 30, **entry}]))

    def test_they_pass_where_nothing_of_the_build_is_named(self):
        log = os.path.join(sp.SCRATCH, "tests.log")
        done = self.run_tests("--log", log)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertRegex(done.stdout, r"(?m)^golden +passed in ")
        self.assertRegex(done.stdout, r"(?m)^cli_verbs +passed in ")
        self.assertEqual(done.stdout.splitlines()[-1], "2 passed, 0 failed, 0 skipped")
        with open(log) as file:
            self.assertIn("All tests passed", file.read())

    def test_one_that_fails_is_shown(self):
        self.set_entry(name="wrong", command=["sh", "-c", "echo what went wrong; exit 3"])
        done = self.run_tests()
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stdout, r"wrong +failed in .* \(3\)\nwhat went wrong\n0 passed, 1 failed, 0 skipped\n")

    def test_one_that_does_not_end_is_ended(self):
        self.set_entry(name="endless", command=["sh", "-c", "echo begun; exec sleep 60"], timeout=1)
        done = self.run_tests()
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stdout, r"endless +failed in .* \(no end after 1 s\)\nbegun\n")

    def test_where_all_are_skipped_so_are_they(self):
        self.set_entry(name="elsewhere", command=["sh", "-c", "exit 77"])
        done = self.run_tests()
        self.assertEqual(done.returncode, 77)
        self.assertIn("0 passed, 0 failed, 1 skipped", done.stdout)

    def test_a_name_that_is_not_there_is_refused(self):
        done = self.run_tests("godlen")
        self.assertEqual(done.returncode, 1)
        self.assertEqual(done.stderr, "run-tests: no test here is called godlen; there are golden, cli_verbs\n")


class Refusals(CliTest):
    def test_tests_that_are_not_there_are_named(self):
        done = bundle(BUILD, "--tests", "cude")
        self.assertEqual(done.returncode, 1)
        self.assertIn("has no test or suite cude; meson test -C", done.stderr)

    def test_a_build_that_is_not_there_is_named(self):
        done = bundle(os.path.join(sp.SCRATCH, "no such build"))
        self.assertEqual(done.returncode, 1)
        self.assertIn("no such build/sluice is not there; build it with: ninja -C", done.stderr)

    def test_a_missing_tool_is_named(self):
        done = subprocess.run([sys.executable, BUNDLE, BUILD], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True, env={"PATH": sp.SCRATCH}, timeout=60)
        self.assertEqual(done.returncode, 1)
        self.assertIn("patchelf was not found; tools/install-packages", done.stderr)


if __name__ == "__main__":
    unittest.main()
