"""Compile here the Triton kernels that a call on a GPU launches: python -m benchmarks gpu-kernels DIR.

The stand-in driver (`benchmarks.dry_driver`) lets the steps' own calls run on tensors without values, and every launch
is compiled into a cache that `gpu-call --kernels DIR` carries along. Use the Triton version of the GPU machine.

Triton names a compiled kernel by a hash of five parts:

1. Its own version, sources and libtriton.so. Wheels of one version for two Pythons differ in the last, so that both
   sides replace this part by the version (`pin`).
2. The kernel: source, line number, functions and constants that it uses; types, divisibility and constants of the call.
3. The architecture and the version of ptxas.
4. The options, and the contents of libdevice.
5. Environment variables that change compilation.

Where a part differs, so does the name, and the GPU machine compiles the kernel itself. `probe` says which part it was.
"""

from __future__ import annotations

import argparse
import base64
import fnmatch
import hashlib
import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastkd
from benchmarks import profile
from benchmarks.case import Case, Inputs, Step
from benchmarks.cases import CASES
from benchmarks.gpu.call import commit
from benchmarks.gpu.smoke import SMOKE, on, touched

ROOT = Path(__file__).parents[2]
TARGET = "sm_90"  # of both the H100 and the H200
MULTIPROCESSORS = 132
LIMIT = 60 * 2**20  # bytes of the tree and the compiled kernels
Row = dict[str, Any]


def pin() -> None:
    """Replace the part of a kernel's name that differs between wheels of one Triton version."""
    import triton
    from triton.runtime import cache

    cache.triton_key = lambda: f"triton {triton.__version__}"


def parts(target: str = TARGET) -> Row:
    """Return the parts of a kernel's name that do not depend on a call, each by its own name."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import JITFunction

    import fastkd_kernels
    from benchmarks.dry_driver import TARGETS

    backend = make_backend(TARGETS[target])
    found = {"triton": triton.__version__, "ptxas": backend.hash(), "options": backend.parse_options({}).hash()}
    found["environment"] = str(sorted(get_cache_invalidating_env_vars().items()))
    for part in pkgutil.iter_modules(fastkd_kernels.__path__):
        for name, value in vars(importlib.import_module(f"fastkd_kernels.{part.name}")).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                found[f"source of {name}"] = value.cache_key
    return found


def name(kernel: Any) -> str:
    """Return the name of a specialisation's folder in Triton's cache."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler import ASTSource
    from triton.compiler.compiler import get_cache_key, make_backend

    from benchmarks.dry_driver import TARGETS

    source = ASTSource(kernel.function, kernel.signature, kernel.constants, kernel.attrs)
    backend = make_backend(TARGETS[kernel.target])
    options = backend.parse_options(dict(kernel.options.__dict__))
    key = get_cache_key(source, backend, options, get_cache_invalidating_env_vars())
    return base64.b32encode(hashlib.sha256(key.encode()).digest()).decode().rstrip("=")


def hollow(case: Case) -> Inputs:
    """Return inputs of a case's shapes and strides on the CPU: floating-point ones without values, the others zero."""
    with FakeTensorMode():
        inputs = case.inputs("cpu", case.dtype)

    def real(x: Tensor) -> Tensor:
        allocate = torch.empty_strided if x.is_floating_point() else torch.zeros
        return allocate(*((x.shape, x.stride()) if x.is_floating_point() else (x.shape,)), dtype=x.dtype)

    return Inputs(tuple(map(real, inputs.leaves)), tuple(map(real, inputs.constants)))


def _step(case: Case, provider: str) -> None:
    Step.of(case.providers[provider], hollow(case), case.backward)()


def _training() -> None:
    """Run the losses of `benchmarks.profile` on what timm gives under autocast: float32 tokens, bfloat16 q and k."""
    B, N, widths = 128, 197, (192, 384)
    s, t = ([torch.empty(B, N, D, requires_grad=D == 192)[:, 1:] for _ in profile.LAYERS] for D in widths)
    qk: list[Tensor] = []
    for D in widths:
        qkv = torch.empty(B, N, 3 * D, dtype=torch.bfloat16, requires_grad=D == 192)
        qk += qkv.view(B, N, 3, D // 64, 64).permute(2, 0, 3, 1, 4).unbind(0)[:2]
    profile.fused(s, t, qk).backward()


def calls() -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the calls of all steps but the tests, which are too many, by name."""
    for cases in SMOKE.values():
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            for case in (on("triton", case, dtype) for case in cases):
                yield f"smoke {case.name}", partial(_step, case, "triton")
    for case in CASES:
        if case.device == "cuda":
            yield f"timings {case.name}", partial(_step, on("triton", case, case.dtype), "triton")
    yield "training", _training
    for case in touched("triton", SMOKE):
        yield f"sanitizer {case.name}", partial(_step, case, "triton")


def needed(only: str = "*") -> dict[str, Any]:
    """Return the kernels that the calls launch, by the name of their folder in the cache."""
    from benchmarks.dry_driver import recorded

    found: dict[str, Any] = {}
    for call_name, call in calls():
        if fnmatch.fnmatch(call_name, only):
            with fastkd.backend("triton"), recorded(TARGET, MULTIPROCESSORS) as launches:
                call()
            found |= {name(launch.kernel): launch.kernel for launch in launches}
    return found


def fill(folder: Path, only: str = "*") -> int:
    """Compile what the calls launch into the folder, and return the number of kernels."""
    from triton import knobs

    kernels = needed(only)
    with (
        mock.patch.object(knobs.cache, "dir", str(folder)),
        mock.patch.object(knobs.compilation, "store_binary_only", True),
    ):
        for at, (key, kernel) in enumerate(kernels.items()):
            begin = time.monotonic()
            kernel.compile()
            print(f"{at + 1} of {len(kernels)}: {kernel.name}, {time.monotonic() - begin:.1f} s", flush=True)
            for path in (folder / key).iterdir():
                if path.suffix not in (".json", ".cubin") or path.name.startswith("__grp__"):
                    path.unlink()  # IR that nothing loads, and paths of this machine
    for path in folder.iterdir():
        if path.is_dir() and path.name not in kernels:
            shutil.rmtree(path)  # of an older source
    manifest = {"commit": commit(None), "parts": parts(), "kernels": {key: k.name for key, k in kernels.items()}}
    (folder / "keys.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return len(kernels)


def probe(folder: Path) -> list[str]:
    """Return the parts of the kernels' names that differ here from where the folder was filled."""
    there, here = json.loads((folder / "keys.json").read_text())["parts"], parts()
    return [key for key in here | there if there.get(key) != here.get(key)]


def restore(folder: Path, cache: Path) -> int:
    """Copy compiled kernels into Triton's cache, with the index of each, which holds absolute paths."""
    found = [path for path in folder.iterdir() if path.is_dir()]
    for path in found:
        to = cache / path.name
        shutil.copytree(path, to)
        for metadata in path.glob("*.json"):
            group = {file.name: str(to / file.name) for file in path.iterdir()}
            (to / f"__grp__{metadata.name}").write_text(json.dumps({"child_paths": group}))
    return len(found)


def tree_bytes() -> int:
    """Return the bytes of the files that git tracks or does not ignore."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "-co", "--exclude-standard"], capture_output=True, check=True
    )
    return sum(
        path.stat().st_size for x in set(listed.stdout.split(b"\0")) if x and (path := ROOT / os.fsdecode(x)).is_file()
    )


def main(argv: list[str]) -> int:
    """Fill the folder, or check it. Return status 1 if a kernel is missing or the whole is too large to be carried."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu-kernels", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument(
        "--only", default="*", metavar="GLOB", help="names of calls to compile for, such as 'timings *'"
    )
    parser.add_argument("--check", action="store_true", help="only compare the folder with what the calls need")
    args = parser.parse_args(argv)
    pin()
    if args.check:
        missing = [
            f"{kernel.name} ({key})" for key, kernel in needed(args.only).items() if not (args.folder / key).is_dir()
        ]
        print(*missing, f"{len(missing)} kernels are missing", sep="\n")
        return int(bool(missing))
    args.folder.mkdir(parents=True, exist_ok=True)
    n = fill(args.folder, args.only)
    carried = sum(path.stat().st_size for path in args.folder.rglob("*") if path.is_file())
    total = carried + tree_bytes()
    print(f"{n} kernels, {carried / 2**20:.1f} MB; {total / 2**20:.1f} MB with the tree, of {LIMIT / 2**20:.0f} MB")
    return int(total > LIMIT)
