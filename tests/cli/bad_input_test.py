# SPDX-License-Identifier: Apache-2.0
"""Bad input: one clear sentence that names the file, the right exit code, no partial output, no crash, no hang."""
import json
import os
import struct
import unittest

import sluice_process as sp
from sluice_process import CliTest, sluice

READERS = [["inspect"], ["verify"], ["plan", "--no-measure"], ["run", "--ids", "1"], ["score", "--ids", "1,2"],
           ["bench", "-p", "4", "-n", "2", "-r", "1"], ["tokenize", "--text", "x"], ["detokenize", "--ids", "1"]]


def reading(verb, path):
    return [verb[0], path, *verb[1:]]


class Containers(CliTest):
    def every_reader_refuses(self, code, path, *named):
        for verb in READERS:
            with self.subTest(verb[0]):
                self.refuses(code, [path, *named], *reading(verb, path))

    def test_a_missing_file(self):
        self.every_reader_refuses(sp.NOT_FOUND, os.path.join(sp.SCRATCH, "missing.sluice"))

    def test_an_empty_file(self):
        path = os.path.join(sp.SCRATCH, "empty.sluice")
        open(path, "wb").close()
        self.every_reader_refuses(sp.CORRUPT, path)

    def test_a_foreign_file(self):
        path = os.path.join(sp.SCRATCH, "foreign.sluice")
        with open(path, "wb") as file:
            file.write(b"\x7fELF" + bytes(9000))
        self.every_reader_refuses(sp.CORRUPT, path, "not a Sluice container")

    def test_a_folder(self):
        path = os.path.join(sp.SCRATCH, "folder.sluice")
        os.makedirs(path)
        self.every_reader_refuses((sp.IO, sp.NOT_FOUND), path)

    def test_truncated_anywhere(self):
        whole = os.path.getsize(sp.talking())
        path = sp.copy_of(sp.talking(), "truncated.sluice")
        for size in (whole - 1, whole // 2, 4096, 4095, 9):
            os.truncate(path, size)
            self.every_reader_refuses(sp.CORRUPT, path)

    def test_a_flipped_bit_in_header_or_manifest(self):
        for place, offset in (("header", 20), ("manifest", os.path.getsize(sp.talking()) - 4096)):
            path = sp.copy_of(sp.talking(), f"flipped-{place}.sluice")
            sp.flip_bit(path, offset)
            self.every_reader_refuses(sp.CORRUPT, path)

    def test_a_newer_version_says_so(self):
        path = sp.copy_of(sp.talking(), "newer.sluice")
        sp.newer_version(path)
        self.every_reader_refuses(sp.UNSUPPORTED, path, "update Sluice")

    def test_a_flipped_bit_in_a_weight_is_never_computed_with(self):
        path = sp.copy_of(sp.talking(), "flipped-weight.sluice")
        tensors = json.loads(sluice("inspect", path, "--json").stdout)["tensors"]
        victim = next(tensor for tensor in tensors if tensor["name"].endswith("1.mlp.down_proj.weight"))
        sp.flip_bit(path, victim["planes"][0]["offset"] + 100)
        smallest = sp.smallest_budget(path, "--context", "64")
        self.refuses(sp.CORRUPT, [path, victim["name"]], "verify", path)
        for memory in ([], ["--device-memory", smallest], ["--device-memory", smallest, "--host-memory", "1G"]):
            for io in ("auto", "pread", "mmap"):
                with self.subTest(memory=memory, io=io):
                    done = sluice("run", path, "--ids", "1,2", "-n", 8, "--context", 64, "--io", io, *memory)
                    self.assert_refused(done, sp.CORRUPT, path, victim["name"], log_lines=True)

    def test_a_flipped_bit_in_an_embedding_row_is_found_when_it_is_fetched(self):
        path = sp.copy_of(sp.talking(), "flipped-row.sluice")
        tensors = json.loads(sluice("inspect", path, "--json").stdout)["tensors"]
        embedding = next(tensor for tensor in tensors if tensor["role"] == "token_embedding")
        sp.flip_bit(path, embedding["planes"][0]["offset"] + 5 * embedding["cols"])  # int8: row 5
        done = sluice("run", path, "--ids", "5", "-n", 1, "--context", 64)
        self.assert_refused(done, sp.CORRUPT, path, embedding["name"], log_lines=True)


class Budgets(CliTest):
    def test_a_budget_too_small_for_one_tensor_names_one_that_would_do(self):
        path = sp.talking()
        smallest = sp.smallest_budget(path, "--context", "64")
        for verb in (["run", "--ids", "1", "-n", "2"], ["plan", "--no-measure"], ["score", "--ids", "1,2"]):
            with self.subTest(verb[0]):
                done = sluice(*reading(verb, path), "--device-memory", "4K", "--context", "64")
                self.assert_refused(done, sp.BUDGET, path, "iB", log_lines=True)
        self.succeeds("run", path, "--ids", "1", "-n", 2, "--device-memory", smallest, "--context", 64)
        done = sluice("run", path, "--ids", "1", "-n", 2, "--device-memory", smallest - 1, "--context", 64)
        self.assert_refused(done, sp.BUDGET, path, "iB", log_lines=True)

    def test_a_prompt_longer_than_the_context(self):
        done = sluice("run", sp.talking(), "-p", "x" * 100, "--context", 32)
        self.assert_refused(done, (sp.USAGE, sp.BUDGET), "32", log_lines=True)

    def test_an_id_outside_the_vocabulary(self):
        for verb in (["run", "-n", "1", "--ids", "1,512"], ["score", "--ids", "1,512"]):
            done = sluice(*reading(verb, sp.talking()))
            self.assert_refused(done, sp.USAGE, "512", log_lines=True)


class Usage(CliTest):
    def test_unknown_flags_verbs_and_values(self):
        path = sp.golden()
        for words in (["run", path, "--bogus"], ["frobnicate"], ["run", path, "--io", "floppy"], ["inspect"],
                      ["run", path, "--device-memory", "12X"], ["run", path, "--temp", "-3"], ["run", path, "-n", "0"],
                      ["run", path, "--ids", "1,two"], ["import", "x", "--group", "48", "-o", "y"],
                      ["run", path, "-p", "a", "--ids", "1"], ["doctor", "--folder", "/nonexistent"],
                      ["score", path, "--ids", "1"]):
            with self.subTest(words):
                self.refuses(sp.USAGE, "", *words)

    def test_text_for_a_model_without_a_tokenizer(self):
        done = sluice("run", sp.golden(), "-p", "Hello", "-n", 1)
        self.assert_refused(done, sp.UNSUPPORTED, sp.golden(), "--ids", log_lines=True)
        self.refuses(sp.UNSUPPORTED, sp.golden(), "tokenize", sp.golden(), "--text", "Hello")

    def test_chat_with_a_model_without_a_template(self):
        done = sluice("chat", sp.golden(), stdin=b"Hi\n")
        self.assert_refused(done, sp.UNSUPPORTED, sp.golden(), log_lines=True)

    def test_an_empty_prompt(self):
        done = sluice("run", sp.talking(), "-p", "", "-n", 1)
        self.assert_refused(done, sp.USAGE, "prompt", log_lines=True)

    def test_a_prompt_file_that_is_not_there(self):
        self.refuses(sp.NOT_FOUND, "/nonexistent/prompt", "run", sp.talking(), "--prompt-file", "/nonexistent/prompt")


class Imports(CliTest):
    """Every refusal leaves the output's folder as it was."""

    def setUp(self):
        self.folder = os.path.join(sp.SCRATCH, self.id().rsplit(".", 1)[-1])
        os.makedirs(self.folder)
        self.source = os.path.join(self.folder, "source")
        self.out = os.path.join(self.folder, "out")
        os.makedirs(self.out)
        self.output = os.path.join(self.out, "model.sluice")

    def import_refuses(self, code, *named, source=None, preexec=None):
        self.refuses(code, named, "import", source or self.source, "-o", self.output, preexec=preexec, log_lines=True)
        self.assertEqual(os.listdir(self.out), [])

    def weights(self):
        return os.path.join(self.source, "model.safetensors")

    def rewrite(self, change):
        config = sp.write_checkpoint(self.source)
        shapes = sp.tensor_shapes(config)
        sp.write_safetensors(self.weights(), shapes, change_header=change)
        return shapes

    def change_config(self, **changes):
        sp.write_checkpoint(self.source)
        path = os.path.join(self.source, "config.json")
        with open(path) as file:
            config = json.load(file)
        config.update(changes)
        with open(path, "w") as file:
            json.dump(config, file)

    def test_a_source_that_is_not_there(self):
        self.import_refuses(sp.NOT_FOUND, self.source)

    def test_an_output_folder_that_is_not_there(self):
        sp.write_checkpoint(self.source)
        output = os.path.join(self.folder, "nowhere", "model.sluice")
        self.refuses(sp.NOT_FOUND, output, "import", self.source, "-o", output)

    def test_a_file_of_another_kind(self):
        path = os.path.join(self.folder, "model.gguf")
        with open(path, "wb") as file:
            file.write(b"PK\x03\x04" * 4000)
        self.import_refuses(sp.CORRUPT, path, source=path)

    def test_gguf_files_with_lying_counts(self):
        path = os.path.join(self.folder, "model.gguf")
        key = struct.pack("<Q", 4) + b"name"
        for name, data in {
                "tensors": struct.pack("<4sIQQ", b"GGUF", 3, 2**60, 0),
                "pairs": struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**60),
                "string": struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", 2**62) + b"x",
                "array": struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + key + struct.pack("<IIQ", 9, 8, 2**61),
                "header": b"GGUF\x03"}.items():
            with self.subTest(name):
                with open(path, "wb") as file:
                    file.write(data)
                self.import_refuses(sp.CORRUPT, path, source=path)

    def test_a_safetensors_header_of_10_gb(self):
        sp.write_checkpoint(self.source)
        with open(self.weights(), "r+b") as file:
            file.write(struct.pack("<Q", 10 * 10**9))
        self.import_refuses(sp.CORRUPT, "model.safetensors")

    def test_a_truncated_safetensors_file(self):
        sp.write_checkpoint(self.source)
        os.truncate(self.weights(), os.path.getsize(self.weights()) - 1000)
        self.import_refuses(sp.CORRUPT, "model.safetensors")

    def test_tensors_that_overlap(self):
        def overlap(header):
            other = header["model.layers.0.input_layernorm.weight"]
            header["model.norm.weight"]["data_offsets"] = other["data_offsets"]
        self.rewrite(overlap)
        self.import_refuses(sp.CORRUPT, "model.safetensors")

    def test_a_tensor_outside_the_file(self):
        def outside(header):
            begin, end = header["lm_head.weight"]["data_offsets"]
            header["lm_head.weight"]["data_offsets"] = [begin + 2**40, end + 2**40]
        self.rewrite(outside)
        self.import_refuses(sp.CORRUPT, "lm_head.weight")

    def test_a_missing_tensor(self):
        config = sp.write_checkpoint(self.source)
        shapes = sp.tensor_shapes(config)
        del shapes["model.layers.1.mlp.up_proj.weight"]
        sp.write_safetensors(self.weights(), shapes)
        self.import_refuses((sp.CORRUPT, sp.NOT_FOUND), "model.layers.1.mlp.up_proj.weight")

    def test_a_missing_shard(self):
        config = sp.write_checkpoint(self.source)
        names = list(sp.tensor_shapes(config))
        os.rename(self.weights(), os.path.join(self.source, "model-00001-of-00002.safetensors"))
        index = {name: "model-00001-of-00002.safetensors" for name in names}
        index["lm_head.weight"] = "model-00002-of-00002.safetensors"
        with open(os.path.join(self.source, "model.safetensors.index.json"), "w") as file:
            json.dump({"metadata": {}, "weight_map": index}, file)
        self.import_refuses(sp.NOT_FOUND, "model-00002-of-00002.safetensors")

    def test_a_weight_that_is_not_a_number(self):
        sp.write_checkpoint(self.source)
        with open(self.weights(), "r+b") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length))
            begin = header["model.layers.0.mlp.gate_proj.weight"]["data_offsets"][0]
            file.seek(8 + length + begin + 2 * 77)
            file.write(struct.pack("<e", float("nan")))
        self.import_refuses(9, "model.layers.0.mlp.gate_proj.weight", "77")

    def test_an_unknown_architecture(self):
        self.change_config(architectures=["MambaForCausalLM"], model_type="mamba")
        self.import_refuses(sp.UNSUPPORTED, "amba")

    def test_a_config_that_contradicts_the_weights(self):
        self.change_config(hidden_size=256)
        self.import_refuses(sp.CORRUPT, self.source)

    def test_a_full_disk(self):
        sp.write_checkpoint(self.source)
        for size in (200_000, 5000, 0):
            with self.subTest(size):
                self.import_refuses(sp.IO, self.output, preexec=sp.limit_file_size(size))

    def test_a_full_disk_leaves_the_old_container(self):
        sp.write_checkpoint(self.source)
        self.succeeds("import", self.source, "-o", self.output)
        with open(self.output, "rb") as file:
            before = file.read()
        self.refuses(sp.IO, self.output, "import", self.source, "-o", self.output, preexec=sp.limit_file_size(100_000))
        with open(self.output, "rb") as file:
            self.assertEqual(file.read(), before)
        self.assertEqual(os.listdir(self.out), ["model.sluice"])

    def test_a_full_disk_under_the_logits_of_score(self):
        output = os.path.join(self.out, "logits.npy")
        done = sluice("score", sp.golden(), "--ids", "1,2,3", "--logits", output, preexec=sp.limit_file_size(1000))
        self.assert_refused(done, sp.IO, output, log_lines=True)
        self.assertEqual(os.listdir(self.out), [])

    def test_synth_with_shapes_that_are_not_there_or_not_shapes(self):
        self.refuses(sp.NOT_FOUND, "missing.toml", "synth", "--model", "missing.toml", "-o", self.output)
        path = os.path.join(self.folder, "bad.toml")
        for text in ("layers = ", "layers = -3\n", ""):
            with open(path, "w") as file:
                file.write(text)
            self.refuses((sp.USAGE, sp.CORRUPT, sp.UNSUPPORTED), path, "synth", "--model", path, "-o", self.output)
        self.assertEqual(os.listdir(self.out), [])


if __name__ == "__main__":
    unittest.main(verbosity=2)
