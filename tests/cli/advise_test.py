# SPDX-License-Identifier: Apache-2.0
"""Advice: which recipe a device and a workload ask for, for every shipped device and model."""
import glob
import os
import unittest

import sluice_process as sp
from sluice_process import CliTest

RECIPES = os.environ["SLUICE_RECIPES"]
DEVICES = os.path.join(os.environ["SLUICE_SOURCE"], "configs", "devices")
LLAMA_70B = os.path.join(sp.CONFIGS, "deepseek-r1-distill-llama-70b.toml")
LLAMA_8B = os.path.join(sp.CONFIGS, "deepseek-r1-distill-llama-8b.toml")


def device(name):
    return os.path.join(DEVICES, name + ".toml")


def advise(model, *flags):
    return ["plan", model, "--advise", "--recipes", RECIPES, *flags]


def write(name, text):
    path = os.path.join(sp.SCRATCH, name)
    with open(path, "w") as file:
        file.write(text)
    return path


class Advice(CliTest):
    def advice(self, model, *flags):
        return self.prints_json(*advise(model, "--json", *flags))

    def chosen(self, model, *flags):
        return self.advice(model, *flags)["chosen"]

    def test_every_shipped_device_and_model_gets_an_answer(self):
        self.assertEqual(len(glob.glob(os.path.join(DEVICES, "*.toml"))), 6)
        for model in glob.glob(os.path.join(sp.CONFIGS, "*.toml")):
            for profile in glob.glob(os.path.join(DEVICES, "*.toml")):
                for workload in ("general", "math", "code"):
                    with self.subTest(model=model, device=profile, workload=workload):
                        report = self.advice(model, "--device", profile, "--workload", workload)
                        self.assertTrue(report["reasons"])
                        for one in report["candidates"]:
                            if not one["fits"]:
                                self.assertGreater(one["smallest_device_bytes"], report["device_bytes"])
                                continue
                            self.assertGreater(one["tokens_per_second"], 0)
                            self.assertEqual(one["residual"], one["fine_tokens_per_second"] > 0)
                            self.assertLessEqual(one["device_bytes"], report["device_bytes"])
                            self.assertLessEqual(one["host_bytes"], report["host_bytes"])
                        if report["chosen"]:
                            self.assertIn(report["chosen"], report["candidates"])

    def test_a_70b_on_24_gb_streams_int4_for_talk_and_with_a_residual_for_proofs(self):
        general = self.chosen(LLAMA_70B, "--device", device("rtx-4090"))
        self.assertEqual((general["recipe"], general["residual"]), ("int4", False))
        self.assertGreater(general["host_bytes"], 10 << 30)
        self.assertEqual(general["bound"], "bus")
        math = self.chosen(LLAMA_70B, "--device", device("rtx-4090"), "--workload", "math")
        self.assertEqual((math["recipe"], math["residual"]), ("int4", True))
        self.assertEqual(math["tokens_per_second"], general["tokens_per_second"])
        self.assertLess(math["fine_tokens_per_second"], general["tokens_per_second"])
        # Resident weights of 22 GiB, the rest over 25 GB/s.
        self.assertTrue(1 < general["tokens_per_second"] < 3, general)

    def test_where_there_is_room_loss_decides(self):
        self.assertTrue(self.chosen(LLAMA_8B, "--device", device("rtx-4090"))["recipe"].startswith("int8"))
        math = self.chosen(LLAMA_8B, "--device", device("h200"), "--workload", "math")
        self.assertEqual(math["disk_bytes"] + math["host_bytes"], 0)
        self.assertLess(math["kl"], 0.001)

    def test_a_slower_rate_that_is_enough_buys_less_loss(self):
        at_once = self.chosen(LLAMA_70B, "--device", device("a100-80g"), "--rate", "40")
        patient = self.chosen(LLAMA_70B, "--device", device("a100-80g"), "--rate", "1")
        self.assertLess(patient["kl"], at_once["kl"])
        self.assertLess(patient["tokens_per_second"], at_once["tokens_per_second"])

    def test_rates_and_budgets_on_the_command_line_count_before_the_profile(self):
        slow = self.chosen(LLAMA_70B, "--device", device("rtx-4090"), "--bus-rate", "1G")
        fast = self.chosen(LLAMA_70B, "--device", device("rtx-4090"))
        self.assertLess(slow["tokens_per_second"], fast["tokens_per_second"] / 10)
        report = self.advice(LLAMA_70B, "--device", device("rtx-4090"), "--device-memory", "20G", "--host-memory", "1G")
        self.assertEqual(report["device_bytes"], 20 << 30)
        self.assertEqual(report["host_bytes"], 1 << 30)
        self.assertGreater(report["chosen"]["disk_bytes"], 1 << 30)

    def test_this_machine_and_a_container_as_the_model(self):
        report = self.advice(sp.talking(), "--no-measure", "--backend", "cpu", "--disk-rate", "1G", "--bus-rate", "10G",
                             "--device-memory-rate", "20G")
        self.assertEqual(report["backend"], "cpu")
        self.assertEqual(report["chosen"]["disk_bytes"], 0)
        measured = self.advice(os.path.join(sp.CONFIGS, "smollm2-135m.toml"), "--backend", "cpu")
        self.assertGreater(measured["bandwidths"]["device_memory"], 1e8)

    def test_a_checkpoint_as_the_model(self):
        folder = os.path.join(sp.SCRATCH, "advise-checkpoint")
        sp.write_checkpoint(folder)
        report = self.advice(folder, "--device", device("laptop-8g"))
        self.assertTrue(report["chosen"]["fits"])

    def test_the_text_says_what_to_type_and_why(self):
        text = self.succeeds(*advise(LLAMA_70B, "--device", device("rtx-3090"), "--workload", "math")).stdout.decode()
        for words in ("NVIDIA GeForce RTX 3090", "with residuals", "--residual", "tok/s without the residual", "why",
                      "builds on thousands of its own tokens", "SmolLM2-135M"):
            self.assertIn(words, text)
        self.assertEqual(sum(line.startswith("* ") for line in text.splitlines()), 1)

    def test_a_model_that_does_not_fit_at_all(self):
        report = self.advice(LLAMA_70B, "--device", device("laptop-8g"), "--context", "131072")
        self.assertIsNone(report["chosen"])
        self.assertIn("no recipe fits", report["reasons"][0])
        text = self.succeeds(*advise(LLAMA_70B, "--device", device("laptop-8g"), "--context", "131072")).stdout.decode()
        self.assertIn("none fits", text)
        self.assertIn("takes a device budget of", text)


class BadInput(CliTest):
    GOOD = ('name = "a"\nbackend = "cpu"\nmemory_gib = 8.0\nhost_memory_gib = 0.0\nmemory_gb_s = 30.0\n'
            'bus_gb_s = 10.0\ndisk_gb_s = 1.0\n')

    def test_devices(self):
        self.succeeds(*advise(LLAMA_8B, "--device", write("good.toml", self.GOOD)))
        for name, change, code, words in (
                ("typo", ("bus_gb_s", "bus_gbs"), sp.CORRUPT, 'key "bus_gb_s" is missing'),
                ("extra", ('name = "a"', 'name = "a"\ncolour = "red"'), sp.CORRUPT, 'unknown key "colour" in line 2'),
                ("backend", ('"cpu"', '"rocm"'), sp.UNSUPPORTED, "there are cuda, vulkan and cpu"),
                ("negative", ("30.0", "-30.0"), sp.CORRUPT, 'key "memory_gb_s" is -30'),
                ("nan", ("30.0", "nan"), sp.CORRUPT, 'key "memory_gb_s" is nan'),
                ("text", ("8.0", '"8G"'), sp.CORRUPT, 'key "memory_gib" is of the wrong kind'),
                ("toml", ("8.0", "8.0.0"), sp.CORRUPT, "line 3")):
            with self.subTest(name):
                path = write(f"device-{name}.toml", self.GOOD.replace(*change))
                self.refuses(code, [path, words], *advise(LLAMA_8B, "--device", path))
        missing = os.path.join(sp.SCRATCH, "no-device.toml")
        self.refuses(sp.NOT_FOUND, missing, *advise(LLAMA_8B, "--device", missing))

    def test_recipes(self):
        missing = os.path.join(sp.SCRATCH, "no-recipes")
        self.refuses(sp.NOT_FOUND, [missing, "--recipes"], "plan", LLAMA_8B, "--advise", "--recipes", missing)
        folder = os.path.join(sp.SCRATCH, "recipes")
        os.makedirs(folder)
        rule = '[[rule]]\ntensors = "*"\nscheme = "int8"\n'
        write("recipes/a.toml", rule)
        common = ["plan", LLAMA_8B, "--advise", "--device", device("h200"), "--recipes", folder]
        self.refuses(sp.USAGE, [folder, "[measured]"], *common)
        write("recipes/b.toml", rule + '[measured]\nmodel = "x"\nkl = 0.1\n')
        self.succeeds(*common)
        write("recipes/c.toml", rule + '[measured]\nmodel = "y"\nkl = 0.1\n')
        self.refuses(sp.USAGE, "losses of different models do not compare", *common)
        write("recipes/c.toml", rule + '[measured]\nmodel = "x"\nkl = -0.1\n')
        self.refuses(sp.CORRUPT, "a KL divergence is a number from 0 on", *common)
        write("recipes/c.toml", rule + '[measured]\nmodel = "x"\n')
        self.refuses(sp.CORRUPT, 'key "kl" is missing', *common)

    def test_models_and_flags(self):
        missing = os.path.join(sp.SCRATCH, "no-model.toml")
        self.refuses(sp.NOT_FOUND, missing, *advise(missing))
        self.refuses(sp.USAGE, "--advise", "plan", LLAMA_8B, "--workload", "math")
        self.refuses(sp.USAGE, "--workload", *advise(LLAMA_8B, "--workload", "poetry"))
        self.refuses(sp.USAGE, "16777216", *advise(LLAMA_8B, "--device", device("h200"), "--context", "99999999"))


if __name__ == "__main__":
    unittest.main(verbosity=2)
