#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs a test program under Vulkan's validation layer with synchronization validation, and fails on any message.

validated.py [--needs-layer] PROGRAM [ARGUMENT ...]
Exit status: the program's, or 1 if the layer said anything. Where the layer is not installed the program runs without it,
with one line that says so; or not at all, with exit status 77 (--needs-layer). Its package: vulkan-validationlayers.
"""
import os
import re
import subprocess
import sys

LAYER = "VK_LAYER_KHRONOS_validation"
FOLDERS = ("/usr/share/vulkan", "/usr/local/share/vulkan", "/etc/vulkan")
MESSAGE = re.compile(r"Validation (Error|Warning|Performance Warning)|VUID-|SYNC-HAZARD|UNASSIGNED-")


def layer_is_installed():
    paths = [f"{folder}/explicit_layer.d" for folder in FOLDERS] + os.environ.get("VK_LAYER_PATH", "").split(":")
    return any(os.path.exists(os.path.join(path, "VkLayer_khronos_validation.json")) for path in paths if path)


def main(command):
    environment = dict(os.environ)
    needs_layer = command[:1] == ["--needs-layer"]
    command = command[1:] if needs_layer else command
    if needs_layer and not layer_is_installed():
        print("skipped: the validation layer is not installed")
        return 77
    if layer_is_installed():
        environment["VK_INSTANCE_LAYERS"] = LAYER
        environment["VK_LAYER_ENABLES"] = "VK_VALIDATION_FEATURE_ENABLE_SYNCHRONIZATION_VALIDATION_EXT"
    else:
        print("validation layer not installed: the program runs without it", flush=True)
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    output = process.stdout.decode(errors="replace")
    sys.stdout.write(output)
    messages = [line for line in output.splitlines() if MESSAGE.search(line)]
    if messages:
        print(f"{len(messages)} lines of validation messages", flush=True)
        return 1
    if process.returncode < 0:
        print(f"ended by signal {-process.returncode}", flush=True)
        return 1
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
