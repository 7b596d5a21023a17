# SPDX-License-Identifier: Apache-2.0
"""Quantization from the command line: killed and resumed, a full disk, GGUF sources, zero points, and the table of
eval."""
import json
import os
import random
import time
import unittest

import sluice_process as sp
from sluice_process import CliTest, start

RECIPES = os.environ["SLUICE_RECIPES"]
LAYERS = 6


def source(vocab=512):
    """A model of six layers."""
    folder = os.path.join(sp.SCRATCH, f"quantize-source-{vocab}")
    if not os.path.exists(folder):
        sp.write_checkpoint(folder, layers=LAYERS, hidden=256, ffn=512, vocab=vocab)
    return folder


def gguf(kind, finer=None):
    """Two layers, a token for every byte."""
    path = os.path.join(sp.SCRATCH, f"quantize-{kind}.gguf")
    if not os.path.exists(path):
        sp.write_gguf(path, kind, finer, layers=2, hidden=256, heads=8, ffn=512, vocab=320, tokenizer=True)
    return path


def text():
    """To calibrate a model and to score it."""
    path = os.path.join(sp.SCRATCH, "calibration.txt")
    if not os.path.exists(path):
        letters = random.Random(1)
        with open(path, "w") as file:
            file.write("".join(chr(letters.randrange(32, 127)) for _ in range(8000)))
    return path


def arguments(out, vocab=512, windows=16, model=None, recipe=os.path.join(RECIPES, "int4.toml")):
    return ["quantize", model or source(vocab), "-o", out, "--recipe", recipe, "--calibration", text(), "--windows",
            windows, "--window", "256", "--threads", "1"]


def contents(path):
    """Everything behind the header, which holds a new uuid each time."""
    with open(path, "rb") as file:
        return file.read()[4096:]


def undisturbed():
    return contents(sp.container("quantize-undisturbed", lambda path: sp.sluice(*arguments(path))))


def work_file(out, name):
    return os.path.join(out + ".work", name)


def layers_kept(out):
    return sum(os.path.exists(work_file(out, f"layer-{layer}")) for layer in range(LAYERS))


def temporaries(out):
    """What is left of containers that were being written."""
    return [name for name in os.listdir(sp.SCRATCH) if name.startswith(os.path.basename(out) + ".tmp-")]


class Quantize(CliTest):
    def started(self, *args):
        process = start(*map(str, args))
        self.addCleanup(process.kill)
        return process

    def wait_for(self, path, process):
        until = time.monotonic() + sp.TIMEOUT
        while not os.path.exists(path):
            if process.poll() is not None:
                self.fail(f"it ended before there was {path}: {process.communicate()[1]}")
            self.assertLess(time.monotonic(), until, f"{path} does not come")
            time.sleep(0.001)

    def killed_at(self, path_of, *args):
        """A run that gets SIGKILL as soon as a file is there; `path_of` takes its process id."""
        process = self.started(*args)
        self.wait_for(path_of(process.pid), process)
        process.kill()
        process.communicate()

    def resumes(self, out, kept, *args):
        """The run goes on behind `kept` layers and leaves nothing but the container."""
        done = self.succeeds(*args)
        self.assertIn(f"{kept} of {LAYERS} layers are done already".encode(), done.stderr)
        self.assertFalse(os.path.exists(out + ".work"))
        self.assertEqual(temporaries(out), [])

    def test_killed_at_five_moments_it_resumes_to_the_same_bytes(self):
        vocab = 16384  # two matrices to round while the container is written: 0.2 s, to be killed in
        whole = os.path.join(sp.SCRATCH, "whole.sluice")
        begun = time.monotonic()
        self.succeeds(*arguments(whole, vocab))
        seconds = time.monotonic() - begun
        seed = random.randrange(2**32)
        print(f"seed {seed}, {seconds:.1f} s undisturbed")
        moments = random.Random(seed)
        out = os.path.join(sp.SCRATCH, "killed.sluice")

        self.killed_at(lambda _: work_file(out, "layer-0"), *arguments(out, vocab))
        kept = layers_kept(out)
        self.assertGreater(kept, 0)
        for _ in range(3):
            process = self.started(*arguments(out, vocab))
            time.sleep(moments.uniform(0.05, 0.25 * seconds))
            process.kill()
            process.communicate()
            if os.path.exists(out):  # it had so little left to do that it was done; the next one begins anew
                kept = 0
                os.remove(out)
            print(f"{layers_kept(out)} layers were kept")
            self.assertGreaterEqual(layers_kept(out), kept)
            kept = layers_kept(out)
        self.killed_at(lambda pid: f"{out}.tmp-{pid}", *arguments(out, vocab))
        self.assertFalse(os.path.exists(out))
        self.assertNotEqual(temporaries(out), [])
        self.assertEqual(layers_kept(out), LAYERS)

        self.resumes(out, LAYERS, *arguments(out, vocab))
        self.assertEqual(contents(out), contents(whole))

    def test_a_second_run_on_one_output_is_refused(self):
        out = os.path.join(sp.SCRATCH, "twice.sluice")
        first = self.started(*arguments(out))
        self.wait_for(work_file(out, "job.json"), first)
        for flags in ([], ["--restart"]):
            self.refuses(sp.USAGE, [out + ".work", "another run is at work in it; wait until it ends"], *arguments(out),
                         *flags, log_lines=True)
        done = sp.finished(first)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(contents(out), undisturbed())

    def test_a_full_disk_before_the_first_layer_is_one_sentence_and_the_next_run_goes_on(self):
        out = os.path.join(sp.SCRATCH, "full.sluice")
        self.refuses(sp.IO, ["states-0: cannot be written: File too large; mend that and run the command again"],
                     *arguments(out), preexec=sp.limit_file_size(3 << 20), log_lines=True)
        self.assertFalse(os.path.exists(out))
        self.succeeds(*arguments(out))
        self.assertFalse(os.path.exists(out + ".work"))
        self.assertEqual(contents(out), undisturbed())

    def test_a_full_disk_between_layers_keeps_the_finished_ones(self):
        out = os.path.join(sp.SCRATCH, "full-layers.sluice")
        self.killed_at(lambda _: work_file(out, "layer-0"), *arguments(out))
        kept = layers_kept(out)
        for name in (f"states-{kept + 1}", f"layer-{kept}"):
            with self.subTest(name):
                partial = work_file(out, name + ".part")
                if os.path.exists(partial):
                    os.remove(partial)
                os.symlink("/dev/full", partial)
                self.refuses(sp.IO, [f"{name}: cannot be written: No space left on device", "finished layers are kept"],
                             *arguments(out), log_lines=True)
                os.remove(partial)
                self.assertEqual(layers_kept(out), kept)
        self.assertFalse(os.path.exists(out))
        self.resumes(out, kept, *arguments(out))
        self.assertEqual(contents(out), undisturbed())

    def test_a_full_disk_under_the_container_keeps_every_layer(self):
        # Of one window: states and layers stay below 1 MiB, the container has 2.
        whole = os.path.join(sp.SCRATCH, "one-window.sluice")
        self.succeeds(*arguments(whole, windows=1))
        self.assertGreater(os.path.getsize(whole), 2 << 20)
        out = os.path.join(sp.SCRATCH, "full-container.sluice")
        self.refuses(sp.IO, [out + ": write failed: the file may not grow beyond 1.0 MiB here"],
                     *arguments(out, windows=1), preexec=sp.limit_file_size(1 << 20), log_lines=True)
        self.assertFalse(os.path.exists(out))
        self.assertEqual(temporaries(out), [])
        self.assertEqual(layers_kept(out), LAYERS)
        self.resumes(out, LAYERS, *arguments(out, windows=1))
        self.assertEqual(contents(out), contents(whole))

    def test_damage_of_a_layer_and_of_states_is_found(self):
        for name in ("layer-0", "states-1"):
            with self.subTest(name):
                out = os.path.join(sp.SCRATCH, f"damaged-{name}.sluice")
                self.killed_at(lambda _: work_file(out, "layer-0"), *arguments(out))
                path = work_file(out, name)
                sp.flip_bit(path, os.path.getsize(path) // 2)
                self.refuses(sp.CORRUPT, [f"{path}: is missing, damaged", "give --restart"], *arguments(out),
                             log_lines=True)
                self.assertFalse(os.path.exists(out))
                self.succeeds(*arguments(out), "--restart")
                self.assertEqual(contents(out), undisturbed())

    def test_one_file_with_residuals_runs_in_both_precisions(self):
        paths = {}
        for name, flags in (("plain", []), ("residual", ["--residual"])):
            paths[name] = os.path.join(sp.SCRATCH, f"precision-{name}.sluice")
            self.succeeds("quantize", source(), "-o", paths[name], "--method", "rtn", "--recipe",
                          os.path.join(RECIPES, "int4.toml"), *flags)

        def score(path, *flags):
            done = self.succeeds("score", path, "--text", "The quick brown fox", *flags)
            return json.loads(done.stdout)["sum_logprob"], done.stderr

        self.assertEqual(score(paths["residual"])[0], score(paths["plain"])[0])
        self.assertNotEqual(score(paths["residual"], "--precision", "fine")[0], score(paths["plain"])[0])
        same, told = score(paths["plain"], "--precision", "fine")
        self.assertEqual(same, score(paths["plain"])[0])
        self.assertIn(b"has no residual planes", told)
        self.succeeds("verify", paths["residual"])

    def divergences(self, reference, *paths):
        files = self.prints_json("eval", *paths, "--reference", reference, "--text", text(), "--window", "128",
                                 "--tokens", "2048", "--json")["files"]
        return [one["kl_mean"] for one in files[1:]]

    def test_a_gguf_is_quantized_and_computes_nearly_what_its_import_does(self):
        # Of Q8_0 `keep` is exact; K formats have no scheme that is, and F16 comes next to them.
        for kind, finer, weights in (("Q8_0", None, "keep"), ("Q4_K", "Q6_K", "f16")):
            with self.subTest(kind):
                model = gguf(kind, finer)
                reference, gptq, rtn = (f"{model}-{name}.sluice" for name in ("reference", "gptq", "rtn"))
                self.succeeds("import", model, "--weights", weights, "-o", reference)
                told = self.succeeds(*arguments(gptq, model=model)).stderr.decode()
                self.assertIn(f"16 matrices are quantized already ({kind}) and are rounded once more", told)
                self.succeeds(*arguments(rtn, model=model), "--method", "rtn")
                by_gptq, by_rtn = self.divergences(reference, gptq, rtn)
                print(f"{kind}: KL {by_gptq:.3g}, rounded to nearest {by_rtn:.3g}")
                self.assertGreater(by_gptq, 0)
                self.assertLess(by_gptq, by_rtn)
                self.assertLess(by_gptq, 0.01)  # with q and k in the converter's order of rows: 0.015
                self.assertTrue(self.succeeds("run", gptq, "-p", "Hello", "-n", "8", "-q").stdout)

    def test_zero_points_spare_lopsided_groups_most_of_the_loss(self):
        model = gguf("Q4_1")
        reference, zeros, symmetric, rtn = (f"{model}-{name}.sluice" for name in
                                            ("reference", "zeros", "symmetric", "rtn"))
        recipe = os.path.join(sp.SCRATCH, "lopsided-{}.toml").format
        for flag in ("true", "false"):
            with open(recipe(flag), "w") as file:
                file.write('[[rule]]\ntensors = ["model.embed_tokens.weight", "lm_head.weight"]\nscheme = "f16"\n'
                           '[[rule]]\ntensors = "*"\nscheme = "int4"\ngroup = 32\nmethod = "gptq"\n'
                           f'symmetric = {flag}\n')
        report = self.prints_json(*arguments(zeros, model=model, recipe=recipe("false")), "--json")
        layers = [one for one in report["matrices"] if one["scheme"] == "int4"]
        self.assertEqual(len(layers), 2 * 7)
        for one in layers:
            self.assertEqual((one["method"], one["symmetric"]), ("gptq", False))
            self.assertEqual(one["bits_per_weight"], 4 + (16 + 8) / 32)  # a scale and a zero point
        for tensor in self.prints_json("inspect", zeros, "--json")["tensors"]:
            kinds = [plane["kind"] for plane in tensor["planes"]]
            self.assertEqual("zeros" in kinds, tensor["scheme"] == "int4", tensor["name"])
        self.succeeds("import", model, "--weights", "keep", "-o", reference)
        self.succeeds(*arguments(symmetric, model=model, recipe=recipe("true")))
        self.succeeds(*arguments(rtn, model=model, recipe=recipe("false")), "--method", "rtn")
        by_zeros, by_symmetric, by_rtn = self.divergences(reference, zeros, symmetric, rtn)
        print(f"with zero points: KL {by_zeros:.3g}, without {by_symmetric:.3g}, rounded to nearest {by_rtn:.3g}")
        self.assertGreater(by_zeros, 0)
        self.assertLess(by_symmetric, by_rtn)
        self.assertLess(2 * by_zeros, by_symmetric)
        self.assertTrue(self.succeeds("run", zeros, "-p", "Hello", "-n", "8", "-q").stdout)

    def test_eval_compares_files_with_a_reference(self):
        paths = {}
        for recipe in ("fp16", "int8", "int4"):
            paths[recipe] = os.path.join(sp.SCRATCH, f"eval-{recipe}.sluice")
            self.succeeds("quantize", source(), "-o", paths[recipe], "--method", "rtn", "--recipe",
                          os.path.join(RECIPES, recipe + ".toml"))
        html = os.path.join(sp.SCRATCH, "eval.html")
        common = [paths["fp16"], paths["int8"], paths["int4"], "--reference", paths["fp16"], "--text", text(),
                  "--window", "128", "--tokens", "1024"]
        done = self.succeeds("eval", *common, "--json", "--html", html)
        report = json.loads(done.stdout)
        reference, same, int8, int4 = report["files"]
        self.assertTrue(reference["reference"])
        self.assertNotIn("kl_mean", reference)
        self.assertEqual(same["kl_mean"], 0)
        self.assertEqual(same["top1_agreement"], 1)
        self.assertEqual(same["perplexity"], reference["perplexity"])
        self.assertLess(0, int8["kl_mean"])
        self.assertLess(int8["kl_mean"], int4["kl_mean"])
        self.assertGreaterEqual(int4["kl_p99"], int4["kl_mean"])
        self.assertLess(int4["bytes_per_weight"], int8["bytes_per_weight"])
        with open(html) as file:
            page = file.read()
        self.assertIn("<svg", page)
        self.assertNotIn("http", page.replace("http://www.w3.org", ""))
        table = self.succeeds("eval", *common).stdout.decode()
        self.assertEqual(len(table.splitlines()), 2 + 4)
        self.assertIn("| file | perplexity | KL mean |", table)

    def test_eval_refuses_a_text_shorter_than_a_window_and_another_vocabulary(self):
        done = sp.sluice("eval", sp.talking(), "--text", "-", stdin=b"short")
        self.assertEqual(done.returncode, sp.USAGE, done.stderr)
        self.assertIn(b"one window takes 512", done.stderr)
        other = os.path.join(sp.SCRATCH, "other-vocabulary")
        sp.write_checkpoint(other, vocab=300)
        self.succeeds("import", other, "-o", other + ".sluice")
        done = sp.sluice("eval", sp.talking(), other + ".sluice", "--text", "-", stdin=b"short")
        self.assertEqual(done.returncode, sp.USAGE, done.stderr)
        self.assertIn(b"only models of one tokenizer compare", done.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=2)
