#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compiles one shader to SPIR-V, validates it, and writes its words for C++ to include.

compile.py GLSLC SPIRV_VAL|- INPUT.comp OUTPUT.inc DEPFILE [-DNAME=VALUE ...]
"""
import os
import struct
import subprocess
import sys

TARGET = "vulkan1.2"


def main(glslc, validator, source, output, depfile, *defines):
    binary = output + ".spv"
    subprocess.run([glslc, f"--target-env={TARGET}", "-O", "-Werror", "-MD", "-MF", depfile, "-MT", output, *defines,
                    "-o", binary, source], check=True)
    if validator != "-":
        subprocess.run([validator, "--target-env", TARGET, binary], check=True)
    with open(binary, "rb") as file:
        data = file.read()
    words = struct.unpack(f"<{len(data) // 4}I", data)
    with open(output, "w") as file:
        for start in range(0, len(words), 10):
            file.write(" ".join(f"{word:#010x}," for word in words[start:start + 10]) + "\n")
    os.remove(binary)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
