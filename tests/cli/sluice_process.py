# SPDX-License-Identifier: Apache-2.0
"""Runs the built binary, and makes the checkpoints and containers that the CLI tests feed it. Standard library only.

Environment: SLUICE_BINARY, SLUICE_GOLDEN (tests/golden), SLUICE_CONFIGS (configs/models).
"""
import atexit
import ctypes
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import tempfile
import unittest

BINARY = os.environ["SLUICE_BINARY"]
GOLDEN = os.environ["SLUICE_GOLDEN"]
CONFIGS = os.environ.get("SLUICE_CONFIGS", "")
# Sanitized builds are slow; a hang is far beyond this.
TIMEOUT = 120

# Seconds. What the drive and the kernel are made to do to a token lasts about so long, whatever the build.
SHORT_FAULT = 0.009

# The exit codes of src/include/sluice/result.hpp.
USAGE, NOT_FOUND, IO, CORRUPT, UNSUPPORTED, BUDGET, CANCELLED = 2, 3, 4, 5, 6, 7, 11

SCRATCH = tempfile.mkdtemp(prefix="sluice-cli-")
atexit.register(shutil.rmtree, SCRATCH, True)


def limit_file_size(size):
    """A preexec function: files cannot grow beyond `size` bytes, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def sluice(*args, stdin=b"", preexec=None, cwd=None):
    """Runs to the end; raises subprocess.TimeoutExpired if it hangs."""
    return subprocess.run([BINARY, *map(str, args)], input=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=TIMEOUT, preexec_fn=preexec, cwd=cwd)


def start(*args, before=None):
    """`before`: called in the process before it becomes Sluice."""
    return subprocess.Popen([BINARY, *map(str, args)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, preexec_fn=before)


class CliTest(unittest.TestCase):
    """Assertions about one finished process."""

    def assert_no_crash(self, done):
        told = f"exit {done.returncode}, stderr: {done.stderr.decode(errors='replace')[-2000:]}"
        self.assertGreaterEqual(done.returncode, 0, f"killed by a signal: {told}")
        self.assertNotIn(b"Sanitizer", done.stderr, told)
        self.assertNotIn(b"runtime error", done.stderr, told)
        self.assertNotEqual(done.returncode, 12, f"a bug in Sluice: {told}")

    def succeeds(self, *args, **keywords):
        done = sluice(*args, **keywords)
        self.assert_no_crash(done)
        self.assertEqual(done.returncode, 0, f"{args}: {done.stderr.decode(errors='replace')[-2000:]}")
        return done

    def prints_json(self, *args, **keywords):
        done = self.succeeds(*args, **keywords)
        return json.loads(done.stdout)

    def assert_refused(self, done, code, *named, log_lines=False):
        """One sentence on stderr that holds every text of `named`, nothing on stdout, and the exit code.
        `log_lines`: others may stand before it, as where a model was opened first."""
        self.assert_no_crash(done)
        lines = done.stderr.decode().splitlines()
        told = f"exit {done.returncode}, stderr: {lines}"
        codes = code if isinstance(code, tuple) else (code,)
        self.assertIn(done.returncode, codes, told)
        self.assertEqual(done.stdout, b"", told)
        sentences = [line for line in lines if line.startswith("sluice: ")]
        self.assertEqual(len(sentences), 1, told)
        if not log_lines:
            self.assertEqual(len(lines), 1, told)
        for text in named:
            self.assertIn(str(text), sentences[0])

    def refuses(self, code, named, *args, log_lines=False, **keywords):
        named = named if isinstance(named, (list, tuple)) else [named]
        self.assert_refused(sluice(*args, **keywords), code, *named, log_lines=log_lines)

    def skip_where_faults_drown(self, model):
        """Where a usual token takes longer than a fault of the drive or the kernel, as it does under sanitizers: no
        analysis can tell that the fault was there."""
        trace = os.path.join(SCRATCH, "usual.sltrace")
        self.succeeds("run", model, "-p", "Hello", "-n", 100, "--ignore-eos", "--context", 512, "-q", "--trace", trace)
        usual = self.prints_json("trace", trace, "--json")["itl"]["p50"]
        if usual > SHORT_FAULT:
            self.skipTest(f"a token takes {usual * 1e3:.0f} ms here, longer than a fault: use a quicker build")


# ---- Checkpoints -----------------------------------------------------------------------------------------------

def byte_alphabet():
    """The GPT-2 mapping of bytes to printable characters."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    extra = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(extra)) for byte in range(256)]


TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def write_tokenizer(folder):
    """One token a byte (ids 0 to 255), two special ones, and a chat template."""
    specials = ["<|im_start|>", "<|im_end|>"]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": 256 + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i, text in enumerate(specials)],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "vocab": {text: i for i, text in enumerate(byte_alphabet())}, "merges": []},
    }
    with open(os.path.join(folder, "tokenizer.json"), "w") as file:
        json.dump(tokenizer, file)
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as file:
        json.dump({"eos_token": "<|im_end|>", "chat_template": TEMPLATE}, file)


def f16_noise(elements):
    """Reproducible small values; a block of 64 Ki of them, repeated."""
    state, values = 1, []
    for _ in range(min(elements, 65536)):
        state = (state * 1103515245 + 12345) % 2**31
        values.append((state / 2**31 - 0.5) * 0.1)
    block = struct.pack(f"<{len(values)}e", *values)
    return (block * (2 * elements // len(block) + 1))[:2 * elements]


def tensor_shapes(config):
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = hidden // config["num_attention_heads"]
    kv = config["num_key_value_heads"] * head_dim
    shapes = {"model.embed_tokens.weight": [vocab, hidden]}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes.update({
            prefix + "input_layernorm.weight": [hidden],
            prefix + "self_attn.q_proj.weight": [hidden, hidden],
            prefix + "self_attn.k_proj.weight": [kv, hidden],
            prefix + "self_attn.v_proj.weight": [kv, hidden],
            prefix + "self_attn.o_proj.weight": [hidden, hidden],
            prefix + "post_attention_layernorm.weight": [hidden],
            prefix + "mlp.gate_proj.weight": [ffn, hidden],
            prefix + "mlp.up_proj.weight": [ffn, hidden],
            prefix + "mlp.down_proj.weight": [hidden, ffn],
        })
    shapes.update({"model.norm.weight": [hidden], "lm_head.weight": [vocab, hidden]})
    return shapes


def product(shape):
    elements = 1
    for extent in shape:
        elements *= extent
    return elements


def write_safetensors(path, shapes, dtype="F16", change_header=None):
    """F16 noise of these shapes; `change_header` may edit the header before it is written."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * product(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    if change_header:
        change_header(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            file.write(f16_noise(product(shape)))


def write_checkpoint(folder, layers=2, hidden=128, ffn=256, vocab=512):
    """A small Llama with random weights and the tokenizer above."""
    os.makedirs(folder)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
              "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": hidden // 32,
              "num_key_value_heads": hidden // 64, "vocab_size": vocab, "max_position_embeddings": 8192,
              "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
              "torch_dtype": "float16", "eos_token_id": 257}
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(config, file)
    write_tokenizer(folder)
    write_safetensors(os.path.join(folder, "model.safetensors"), tensor_shapes(config))
    return config


def gguf_text(text):
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


# ggml's number of a type, the weights of a block, and one of random codes: weights of about 0.04.
GGUF_BLOCKS = {
    # From -0.01 to 0.065 or the other way round.
    "Q4_1": (3, 32, lambda codes: struct.pack("<2e", 0.005, codes.choice((-0.01, -0.065))) + codes.randbytes(16)),
    "Q8_0": (8, 32, lambda codes: struct.pack("<e", 0.0005) + codes.randbytes(32)),
    # Scales and minima alike, and a minimum 7.5 times its scale: means of zero.
    "Q4_K": (12, 256, lambda codes: struct.pack("<2e", 0.0002, 0.0015) + b"\xe0" * 8 + bytes(4) + codes.randbytes(128)),
    "Q6_K": (14, 256, lambda codes: codes.randbytes(208) + struct.pack("<e", 0.00003)),
}


def write_gguf(path, kind="Q8_0", finer=None, layers=1, hidden=64, heads=2, ffn=96, vocab=48, tokenizer=False):
    """A small llama of random weights. `finer`: the type of those matrices that a Q4_K_M has in Q6_K; `tokenizer`: one
    token a byte, and "er", since a GGUF must have a merge."""
    def texts(*items):
        return struct.pack("<IQ", 8, len(items)) + b"".join(map(gguf_text, items))
    keys = {"general.architecture": (8, gguf_text("llama"))}
    for name, value in {"block_count": layers, "embedding_length": hidden, "attention.head_count": heads,
                        "attention.head_count_kv": heads // 2, "feed_forward_length": ffn,
                        "context_length": 512}.items():
        keys["llama." + name] = (4, struct.pack("<I", value))
    for name, value in {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 10000.0}.items():
        keys["llama." + name] = (6, struct.pack("<f", value))
    if tokenizer:
        keys.update({"tokenizer.ggml.model": (8, gguf_text("gpt2")),
                     "tokenizer.ggml.tokens": (9, texts(*byte_alphabet(), "er")),
                     "tokenizer.ggml.merges": (9, texts("e r"))})
    shapes = {"token_embd": [hidden, vocab], "output": [hidden, vocab], "output_norm": [hidden]}
    for layer in range(layers):
        of_layer = {"attn_norm": [hidden], "ffn_norm": [hidden], "ffn_gate": [hidden, ffn], "ffn_up": [hidden, ffn],
                    "ffn_down": [ffn, hidden], "attn_q": [hidden, hidden], "attn_k": [hidden, hidden // 2],
                    "attn_v": [hidden, hidden // 2], "attn_output": [hidden, hidden]}
        shapes.update({f"blk.{layer}.{name}": shape for name, shape in of_layer.items()})
    infos, data, codes = b"", bytearray(), random.Random(1)
    for name, shape in shapes.items():
        data += bytes(-len(data) % 32)
        fine = finer and name.rpartition(".")[2] in ("output", "attn_v", "ffn_down")
        number, elements, block = GGUF_BLOCKS[finer if fine else kind]
        infos += gguf_text(name + ".weight") + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        infos += struct.pack("<IQ", number if len(shape) == 2 else 0, len(data))
        if len(shape) == 1:
            data += struct.pack(f"<{hidden}f", *[1.0] * hidden)
        else:
            data += b"".join(block(codes) for _ in range(product(shape) // elements))
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(shapes), len(keys))
    head += b"".join(gguf_text(name) + struct.pack("<I", kind) + value for name, (kind, value) in keys.items()) + infos
    with open(path, "wb") as file:
        file.write(head + bytes(-len(head) % 32) + data)


# ---- Containers ------------------------------------------------------------------------------------------------

made = {}


def container(name, make):
    """The container of that name, made on first use."""
    if name not in made:
        path = os.path.join(SCRATCH, name + ".sluice")
        done = make(path)
        if done.returncode != 0:
            raise RuntimeError(f"cannot make {name}: {done.stderr.decode(errors='replace')}")
        made[name] = path
    return made[name]


def golden(model="llama3"):
    """A golden model in INT4; it has no tokenizer."""
    return container(model, lambda path: sluice("import", os.path.join(GOLDEN, model), "--weights", "int4", "--group",
                                                "32", "-o", path))


def talking():
    """A small model with a byte tokenizer and a chat template; about 0.3 MB."""
    def make(path):
        folder = os.path.join(SCRATCH, "talking")
        write_checkpoint(folder)
        return sluice("import", folder, "--group", "32", "-o", path)
    return container("talking-model", make)


def slow():
    """One that takes seconds for a few thousand tokens; about 20 MB."""
    def make(path):
        folder = os.path.join(SCRATCH, "slow")
        write_checkpoint(folder, layers=8, hidden=512, ffn=2048)
        return sluice("import", folder, "-o", path)
    return container("slow-model", make)


def copy_of(path, name):
    copy = os.path.join(SCRATCH, name)
    shutil.copyfile(path, copy)
    return copy


def flip_bit(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def newer_version(path):
    """Writes format version 2 into a container's header, with a checksum that fits it."""
    xxhash = ctypes.CDLL("libxxhash.so.0")
    xxhash.XXH3_64bits.restype = ctypes.c_uint64
    xxhash.XXH3_64bits.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    with open(path, "r+b") as file:
        header = bytearray(file.read(4096))
        struct.pack_into("<I", header, 8, 2)
        struct.pack_into("<Q", header, 4088, xxhash.XXH3_64bits(bytes(header[:4088]), 4088))
        file.seek(0)
        file.write(header)


def interrupt(process):
    process.send_signal(signal.SIGINT)


def finished(process):
    """Waits for it and gives what subprocess.run would."""
    out, err = process.communicate(timeout=TIMEOUT)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def smallest_budget(path, *args):
    """The device budget, in bytes, below which the model cannot be opened. Any budget that is given tells it."""
    done = sluice("plan", path, "--no-measure", "--json", "--device-memory", "1G", *args)
    return json.loads(done.stdout)["smallest_device_bytes"]
