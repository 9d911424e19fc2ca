"""Report of the available backends and the reasons for missing ones: `python -m fastkd.info`, `fastkd info`."""

import argparse
import importlib
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastkd import _extension
from fastkd._version import __version__
from fastkd.ops import _dispatch, _schemas

PACKAGES = ("triton", "timm", "torchvision")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def _devices() -> list[str]:
    devices = [f"cpu: {cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        devices.append(f"cuda:{i}: {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
    return devices


def _backends() -> dict[str, str]:
    """Return, for each backend, why it is missing and how to install it; "" if it runs."""
    no_gpu = "" if torch.cuda.is_available() else "torch sees no GPU"
    triton = no_gpu and f"{no_gpu} (the tests run its kernels on CPU under TRITON_INTERPRET=1)"
    if _dispatch.INTERPRETED:
        triton = ""
    return {
        "eager": "",
        "native cpu": _extension.WHY_NOT,
        "native cuda": _extension.WHY_NOT_CUDA or no_gpu,
        "triton": triton if _dispatch.HAS_TRITON else "triton is not installed (pip install triton)",
    }


def _has_triton_kernel(op: str) -> bool:
    stem = f"fastkd_kernels.{_schemas.STEMS[op]}"
    return find_spec("fastkd_kernels") is not None and find_spec(stem) is not None


def _operators() -> dict[str, dict[str, bool]]:
    """Return the installed implementations of each operator, whether or not this machine can run them."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return {
        op: {
            "eager": has_kernel(f"fastkd::{op}_eager", "CompositeExplicitAutograd"),
            "native cpu": has_kernel(f"fastkd::{op}", "CPU"),
            "native cuda": has_kernel(f"fastkd::{op}", "CUDA"),
            "triton": _has_triton_kernel(op),
        }
        for op in sorted(_schemas.STEMS)
    }


def collect() -> dict[str, Any]:
    """Return the whole report, ready for JSON."""
    build: dict[str, Any] | None = None
    if _extension.HAS_NATIVE:
        build = importlib.import_module("fastkd._C").build_info()
        build |= {name: build[name].split(",") if build[name] else [] for name in ("cuda_archs", "isa_compiled")}
        build["why_not_recorder"] = _extension.WHY_NOT_RECORDER
    versions = {"fastkd": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    return {
        "versions": versions | {package: _version(package) for package in PACKAGES},
        "devices": _devices(),
        "backends": _backends(),
        "operators": _operators(),
        "build": build,
    }


def _report(info: dict[str, Any]) -> str:
    lines = ["  ".join(f"{name} {found or '-'}" for name, found in info["versions"].items()), "", *info["devices"], ""]
    for name, why_not in info["backends"].items():
        lines.append(f"{name:<12} {'no: ' + why_not if why_not else 'yes'}")
    width = max(map(len, info["operators"]), default=8)
    lines += ["", f"{'operator':<{width}}  " + "  ".join(info["backends"])]
    for op, found in info["operators"].items():
        cells = (f"{'yes' if found[name] else '-':<{len(name)}}" for name in info["backends"])
        lines.append(f"{op:<{width}}  " + "  ".join(cells))
    if build := info["build"]:
        cuda = f"CUDA {build['cuda']} for {', '.join(build['cuda_archs'])}" if build["cuda"] else "no CUDA"
        built_with = f"built with torch {build['torch']}, for 2.10 and later"
        recorded = f"Python: fastkd._recorder is {build['why_not_recorder']}" if build["why_not_recorder"] else "C++"
        lines += ["", f"extension    {build['compiler']}, C++ {build['cxx_standard']}, {built_with}, {cuda}"]
        lines += [f"gradients    of moments recorded in {recorded}"]
        lines += [f"instructions {build['isa_in_use']} in use, compiled for {', '.join(build['isa_compiled'])}"]
    return "\n".join(line.rstrip() for line in lines)


def main(argv: list[str] | None = None) -> int:
    """Print the report; --json for machines. The exit status is 0 whatever is missing."""
    parser = argparse.ArgumentParser(prog="fastkd info", description="What exists here, what does not, and why.")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    if argv is None:
        # `fastkd info --json` passes the command's name as the first argument.
        argv = sys.argv[2:] if sys.argv[1:2] == ["info"] else sys.argv[1:]
    as_json = parser.parse_args(argv).json
    info = collect()
    print(json.dumps(info, indent=2) if as_json else _report(info))
    return 0


if __name__ == "__main__":
    sys.exit(main())
