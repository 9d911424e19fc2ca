"""Stand-ins for a GPU's tools, parts and build in a rehearsal on a CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

SPEED = 0.1  # the ratio of its seconds to those of a call
BUILD = [sys.executable, "setup.py", "-q", "--name"]

NVIDIA_SMI = "echo 'Rehearsal, 0.0, 1980 MHz, 1980 MHz, 700.00 W, 81559 MiB'"
# Both run the program that follows their options, as the real ones do.
PROGRAM = 'until [ -f "$1" ] && [ -x "$1" ]; do shift; done; "$@" || exit'
NCU = f"""{PROGRAM}
echo '"ID","Kernel Name","gpu__time_duration.sum"'
echo '"","","us"'
echo '"0","_relation_map_kernel","1.5"'"""
SANITIZER = f"{PROGRAM}\necho '========= ERROR SUMMARY: 0 errors'"
TOOLS = {"nvidia-smi": NVIDIA_SMI, "ncu": NCU, "compute-sanitizer": SANITIZER}


@cache
def start() -> float:
    """Return the seconds that each step is given besides: at that speed, twice the time of an import of torch."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch._dynamo, fastkd"], check=True)
    return 2 * max(2.5, time.perf_counter() - began) / SPEED


def environment(work: Path, path: str) -> dict[str, str]:
    """Put the stand-ins on PATH, hide a GPU, and let Triton interpret."""
    tools = work / "tools"
    tools.mkdir()
    for name, script in TOOLS.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    return {"PATH": os.pathsep.join((str(tools), path)), "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}


def parts(step: str, real: tuple[str, ...]) -> tuple[str, ...]:
    """Return fewer parts, two of each step, for a machine of two cores."""
    chosen = {"smoke": ("prior-float32", "logits-float32"), "suite": ("1 of 2", "2 of 2"), "rivals": ("intra_512",)}
    return chosen.get(step, real)


@cache
def without_network() -> tuple[str, ...]:
    """Return the prefix of a command that runs it without a network, where the system lets a user do so."""
    prefix = ("unshare", "--map-root-user", "--net")
    allowed = shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    return prefix if allowed else ()


def prefix(step: str) -> tuple[str, ...]:
    """Return the beginning of a step's command: no network; compiled kernels are compared where Triton compiles."""
    return (*without_network(), *(("env", "-u", "TRITON_INTERPRET") if step == "versions" else ()))
