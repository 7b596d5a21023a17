# SPDX-License-Identifier: Apache-2.0
"""The program of docs/embedding.md, compiled against an installed tree with pkg-config and run on a golden model.

Arguments: source folder, build folder, meson, sluice binary. Environment: CXX (default g++).
"""
import os
import re
import shlex
import subprocess
import sys
import tempfile

SOURCE, BUILD, MESON, BINARY = sys.argv[1:5]
SKIP = 77


def run(*command, **keywords):
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=300, **keywords)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def program_of(document):
    with open(document) as file:
        text = re.search(r"<!-- program: begin -->\n```cpp\n(.*?)```\n<!-- program: end -->", file.read(), re.S).group(1)
    lines = text.count("\n")
    assert lines <= 40, f"the program has {lines} lines; 40 are promised"
    return text


def find(folder, name):
    found = [os.path.join(at, name) for at, _, files in os.walk(folder) if name in files]
    assert len(found) == 1, f"{name} is installed {len(found)} times under {folder}"
    return found[0]


def sanitizers():
    """A sanitized library needs a program that brings the sanitizer's runtime."""
    options = run(*shlex.split(MESON), "introspect", "--buildoptions", BUILD)
    value = re.search(r'"name": "b_sanitize", "value": "([^"]*)"', options)
    return [f"-fsanitize={value.group(1)}"] if value and value.group(1) != "none" else []


def main():
    if subprocess.run(["pkg-config", "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode != 0:
        print("pkg-config is not installed")
        return SKIP
    with tempfile.TemporaryDirectory(prefix="sluice-embedding-") as folder:
        root = os.path.join(folder, "root")
        run(*shlex.split(MESON), "install", "-C", BUILD, "--no-rebuild", env={**os.environ, "DESTDIR": root})
        description = find(root, "sluice.pc")
        library = os.path.dirname(find(root, "libsluice.so"))
        # The description speaks of the final prefix; the sysroot puts the staging folder before it.
        environment = {**os.environ, "PKG_CONFIG_PATH": os.path.dirname(description), "PKG_CONFIG_SYSROOT_DIR": root,
                       "LD_LIBRARY_PATH": library}
        flags = shlex.split(run("pkg-config", "--cflags", "--libs", "sluice", env=environment))
        assert not any(SOURCE in flag for flag in flags), flags

        with open(os.path.join(folder, "program.cpp"), "w") as file:
            file.write(program_of(os.path.join(SOURCE, "docs", "embedding.md")))
        program = os.path.join(folder, "program")
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        run(*compiler, "-std=c++20", "-Wall", "-Wextra", "-Werror", file.name, *flags, *sanitizers(), "-o", program,
            env=environment)

        model = os.path.join(folder, "model.sluice")
        run(BINARY, "import", os.path.join(SOURCE, "tests", "golden", "llama3"), "--weights", "int4", "--group", "32",
            "-o", model)
        ids = run(program, model, 1, 2, 3, env=environment).split()
        assert 1 <= len(ids) <= 32 and all(0 <= int(id) < 512 for id in ids), ids
        expected = run(BINARY, "run", model, "--ids", "1,2,3", "-n", 32, "--context", 256, "--json", "-q")
        assert f'"ids": [{",".join(ids)}]' in re.sub(r"\[\s+|\s+\]|,\s+", lambda m: m.group().strip(), expected), expected

        missing = subprocess.run([program, os.path.join(folder, "none.sluice"), "1"], env=environment, text=True,
                                 stderr=subprocess.PIPE, timeout=60)
        assert missing.returncode == 3 and missing.stderr.count("\n") == 1, missing
        print(f"the program made the {len(ids)} tokens that the command makes: {' '.join(ids)}")
    return 0


sys.exit(main())
