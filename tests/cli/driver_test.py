# SPDX-License-Identifier: Apache-2.0
"""A binary with CUDA on machines without a usable GPU. The driver's library is a fake that answers as such a machine's
would: too old, or without a device. Environment: that of sluice_process; CC (default cc).
"""
import os
import shlex
import shutil
import subprocess
import sys
import unittest

import sluice_process as sp
from sluice_process import CliTest

CC = shlex.split(os.environ.get("CC", "cc"))
if shutil.which(CC[0]) is None:
    print("skipped: no C compiler to make a driver with")
    sys.exit(77)

# The CUDA runtime opens libcuda.so.1 and asks it for everything by name. 100 is CUDA_ERROR_NO_DEVICE.
OLD = "int cuDriverGetVersion(int* version) { *version = 11040; return 0; }\n"
NO_DEVICE = """
#include <string.h>
int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
int cuInit(unsigned flags) { (void)flags; return 100; }
static int nothing(void) { return 100; }
int cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long long flags, int* status) {
  (void)version, (void)flags;
  if (status != 0) *status = 0;
  *function = strcmp(name, "cuDriverGetVersion") == 0 ? (void*)cuDriverGetVersion
              : strcmp(name, "cuGetProcAddress") == 0 ? (void*)cuGetProcAddress_v2
                                                      : (void*)nothing;
  return 0;
}
"""
SENTENCES = {
    "old": "the NVIDIA driver is too old: it supports CUDA 11.4, and this build needs ",
    "no device": "the NVIDIA driver finds no device; see nvidia-smi and CUDA_VISIBLE_DEVICES",
}
RUN = ["--ids", "1,2,3", "-n", "8", "--temp", "0", "--json"]


def make_driver(name, code):
    folder = os.path.join(sp.SCRATCH, name)
    os.mkdir(folder)
    subprocess.run([*CC, "-shared", "-fPIC", "-x", "c", "-", "-o", os.path.join(folder, "libcuda.so.1")], input=code,
                   text=True, check=True, timeout=60)
    return folder


class Driver(CliTest):
    @classmethod
    def setUpClass(cls):
        cls.folders = {"old": make_driver("old", OLD), "no device": make_driver("no device", NO_DEVICE)}

    def sluice(self, driver, *arguments):
        return subprocess.run([sp.BINARY, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=sp.TIMEOUT,
                              env={**os.environ, "LD_LIBRARY_PATH": self.folders[driver],
                                   "VK_DRIVER_FILES": "/dev/null"})   # no GPU by that way either

    def test_cuda_asked_for_by_name_is_refused_with_the_reason(self):
        for driver, sentence in SENTENCES.items():
            with self.subTest(driver):
                done = self.sluice(driver, "run", sp.golden(), *RUN, "--backend", "cuda")
                self.assert_refused(done, sp.NOT_FOUND, sentence, "--backend cpu runs without a GPU")
                done = self.sluice(driver, "bench", sp.golden(), "--kernels")
                self.assert_refused(done, sp.NOT_FOUND, sentence)

    def test_auto_falls_back_to_the_cpu_with_one_line_and_the_same_tokens(self):
        expected = self.prints_json("run", sp.golden(), *RUN, "--backend", "cpu")["ids"]
        for driver, sentence in SENTENCES.items():
            with self.subTest(driver):
                done = self.sluice(driver, "run", sp.golden(), *RUN)
                self.assert_no_crash(done)
                self.assertEqual(done.returncode, 0, done.stderr)
                self.assertEqual(sp.json.loads(done.stdout)["ids"], expected)
                self.assertEqual(done.stderr.decode().count(f"running on the CPU: {sentence}"), 1)

    def test_doctor_says_it_and_finds_nothing_wrong_with_a_machine_without_gpu(self):
        for driver, sentence in SENTENCES.items():
            with self.subTest(driver):
                done = self.sluice(driver, "doctor", "--folder", sp.SCRATCH, "--json")
                findings = [finding for finding in sp.json.loads(done.stdout) if finding["name"] == "CUDA"]
                self.assertEqual(len(findings), 1)
                self.assertIn(sentence, findings[0]["value"])
                self.assertTrue(findings[0]["ok"])


if __name__ == "__main__":
    unittest.main()
