"""The steps that look at kernels through NVIDIA's profiler and sanitizer."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import torch

from benchmarks import sanitize
from benchmarks.case import Step
from benchmarks.gpu.call import STEMS
from benchmarks.gpu.headline import HEADLINE, cases_of
from benchmarks.gpu.smoke import touched
from benchmarks.gpu.work import MARGIN, Row, Work
from fastkd.ops import _dispatch

# PyTorch's kernels have other names.
KERNELS = "(relation|attention|moments|bn_distance|prior|softmax_kl|nkd|competition)"
METRICS = (
    "gpu__time_duration.sum",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "smsp__inst_executed_op_local_ld.sum",
)


def touch(work: Work) -> None:
    """Run small calls of every kernel once, or the headline cases for the profiler."""
    if work.part == "profiled":
        for case in map(work.device.sized, cases_of(HEADLINE.values())):
            step = Step.of(case.providers["fastkd"], case.inputs(case.device, case.dtype), case.backward)
            work.device.profiled(step)
        return
    reason = _dispatch.why_not("moments_fwd", "native", work.device.name, torch.float32)
    stems: dict[_dispatch.Backend, tuple[str, ...]] = {
        "native": () if reason else ("moments", "prior"),
        "triton": STEMS,
    }
    for backend, all_stems in stems.items():
        for case in touched(backend, all_stems[-1:] if work.small else all_stems):
            case = replace(case, device=work.device.name)
            Step.of(case.providers[backend], case.inputs(case.device, case.dtype), case.backward)()


def _touching(part: str) -> list[str]:
    """Return a command that runs `touch`, with this process's other arguments."""
    return [sys.executable, "-m", "benchmarks.gpu.steps", "touch", *sys.argv[2:], f"--part={part}"]


def counters(work: Work) -> None:
    """Read the profiler's counters of the kernels that the headline cases launch."""

    def counted() -> Row:
        ncu = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
        if ncu is None:
            return {"state": "skipped", "why": "no ncu on this machine"}
        options = [
            "--csv",
            "--page",
            "raw",
            "--profile-from-start",
            "off",
            "--clock-control",
            "none",
            "--target-processes",
            "all",
        ]
        chosen = ["--kernel-name", f"regex:{KERNELS}", "--launch-count", "50", "--metrics", ",".join(METRICS)]
        path = work.out / "ncu.csv"
        with path.open("w") as file:
            run = subprocess.run(
                [ncu, *options, *chosen, *_touching("profiled")], stdout=file, stderr=subprocess.STDOUT
            )
        lines = path.read_text(errors="replace").splitlines()
        begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
        kernels = [
            {"kernel": row["Kernel Name"], **{k: row[k] for k in METRICS if row.get(k)}}
            for row in csv.DictReader(lines[begin:])
            if row.get("ID")
        ]
        if kernels:
            return {"kernels": kernels}
        why = next((line for line in lines if "ERR" in line), lines[-1] if lines else "it said nothing")
        return {"state": "failed", "why": f"status {run.returncode}: {why[:200]}"}

    work.items({"ncu": counted}, 1000)


def sanitizer(work: Work) -> None:
    """Run a tool of compute-sanitizer on small calls of every kernel."""

    def checked() -> Row:
        seconds = max(1.0, work.until - time.monotonic() - 3 * MARGIN)
        verdict = sanitize.check(work.part, _touching("all"), seconds, work.out / f"sanitizer-{work.part}.txt")
        state = {None: "skipped", 0: "passed"}.get(verdict.errors, "failed")
        return {"state": state, "verdict": str(verdict), "why": verdict.why}

    work.items({work.part: checked}, 1000)
