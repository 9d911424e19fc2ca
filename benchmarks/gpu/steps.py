"""The steps of a call on a GPU, each part in a process of its own: what `benchmarks.gpu.call` starts."""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks import profile, report
from benchmarks.case import Case, Step
from benchmarks.cases import CASES
from benchmarks.gpu import kernels
from benchmarks.gpu.call import die_with_parent
from benchmarks.gpu.device import host_seconds
from benchmarks.gpu.headline import HEADLINE, cases_of
from benchmarks.gpu.smoke import SMOKE, on
from benchmarks.gpu.suite import suite
from benchmarks.gpu.tools import counters, sanitizer, touch
from benchmarks.gpu.work import Row, Work
from benchmarks.measure import accuracy, measure
from fastkd.ops import _dispatch


def versions(work: Work) -> None:
    """Restore the carried kernels; note versions and clocks; measure a copy and a product."""

    def carried() -> Row:
        if work.kernels is None or not (work.kernels / "keys.json").exists():
            return {"restored": 0}
        differ = kernels.probe(work.kernels)
        return {"restored": kernels.restore(work.kernels, work.work / "triton"), "differ": differ or "nothing"}

    def card() -> Row:
        query = "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit,memory.total"
        found = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
        return {"gpu": found.stdout.strip() or found.stderr.strip()}

    def packages() -> Row:
        head = report.header(work.device.name)
        return {"python": sys.version.split()[0], "cpus": os.cpu_count(), **head["versions"]}

    def ceilings() -> Row:
        megabytes, side = (16, 512) if work.small else (1024, 8192)
        x = torch.ones(megabytes * 2**18, device=work.device.name)
        a = torch.randn(side, side, device=work.device.name, dtype=torch.bfloat16)
        seconds = {"copy": timed(work, x.clone), "product": timed(work, lambda: a @ a)}
        rates = 2 * x.nbytes / seconds["copy"] / 1e9, 2 * side**3 / seconds["product"] / 1e12
        return {"copy, GB/s": round(rates[0], 1), "bfloat16 product, TFLOP/s": round(rates[1], 2)}

    work.items({"kernels": carried, "card": card, "packages": packages, "ceilings": ceilings})


def timed(work: Work, call: Callable[[], object], calls: int = 10) -> float:
    """Return the seconds of one of several calls in a row, after two that are not counted."""
    for _ in range(2):
        call()
    work.device.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    work.device.synchronize()
    return (time.perf_counter() - begin) / calls


def _accuracy(case: Case) -> Row:
    inputs = case.inputs(case.device, case.dtype)
    steps = {name: Step.of(provider, inputs, case.backward) for name, provider in case.providers.items()}
    figures = accuracy(case, steps, inputs)
    row = {name: [f.loss_error, f.gradient_error] for name, f in figures.items()}
    failures = [f"{name}: {f.failure}" for name, f in figures.items() if f.failure]
    return {**row, **({"state": "failed", "why": "; ".join(failures)} if failures else {})}


def _held(
    work: Work, backend: _dispatch.Backend, stems: Iterable[str], dtypes: Iterable[torch.dtype]
) -> dict[str, Callable[[], Row]]:
    """Return the items of a smoke table."""
    cases = (work.device.sized(on(backend, case, dtype)) for stem in stems for dtype in dtypes for case in SMOKE[stem])
    return {case.name: partial(_accuracy, case) for case in cases}


def smoke(work: Work) -> None:
    """Hold every Triton kernel to float64 on small calls: one stem in one dtype."""
    stem, dtype = work.part.split("-")
    work.items(_held(work, "triton", [stem], [getattr(torch, dtype)]))


def _timing(work: Work, case: Case) -> Row:
    """Time fastkd and eager, also as graphs, and the host's part of a call."""
    providers = {name: p for name, p in case.providers.items() if name in ("eager", "fastkd")}
    case = work.device.sized(replace(case, providers=providers, bars=()))
    measured = measure(case, None, 0.02 if work.small else 0.3, with_memory=not work.small)
    (row,) = report.rows([measured])["cases"]
    row["floor"] = max(measured.bytes / measured.copy, case.flops / measured.matmul)
    step = Step.of(case.providers["fastkd"], case.inputs(case.device, case.dtype), case.backward)
    step()
    row["host"] = host_seconds(work.device, step)
    row["graphs"] = {}
    for name in providers:
        if measured.figures[name].failure or measured.figures[name].median > 2e-3:
            continue  # a graph saves the host's time, which longer calls hide
        step = Step.of(case.providers[name], step.inputs, case.backward)
        step()
        try:
            row["graphs"][name] = timed(work, work.device.graphed(step))
        except RuntimeError as error:
            row["graphs"][f"{name} failed"], row["why"] = None, str(error).splitlines()[0][:200]
    failure = measured.figures["fastkd"].failure
    return {**row, **({"state": "failed", "why": failure} if failure else {})}


def timed_cases() -> list[Case]:
    """Return the cases of GPUs, those of the headline first."""
    first = list(HEADLINE.values())
    return cases_of([*first, *(case.name for case in CASES if case.device == "cuda" and case.name not in first)])


def timings(work: Work) -> None:
    """Time fastkd and eager."""
    work.items({case.name: partial(_timing, work, case) for case in timed_cases()})


def training(work: Work) -> None:
    """Measure the parts of a training step under autocast, with fused losses and with maps."""
    batch, steps = (1, 1) if work.small else (128, 10)

    def step(name: str) -> Row:
        loss = getattr(profile, name)
        return {"parts": profile.measure(name, loss, batch, work.device.name, steps, None)}

    work.items({name: partial(step, name) for name in ("fused", "eager")})


def native(work: Work) -> None:
    """Hold the CUDA operators of the extension to float64, and time them."""

    def built() -> Row:
        why_not = _dispatch.why_not("moments_fwd", "native", work.device.name, torch.float32)
        return {"state": "failed", "why": why_not} if why_not else {}

    work.items({"extension": built})
    dtypes = (torch.float32,) if work.small else (torch.bfloat16, torch.float32, torch.float16)
    calls = _held(work, "native", ("prior",) if work.small else ("moments", "prior"), dtypes)
    cases = [case for case in CASES if case.device == "cuda" and case.name.startswith("moments/")]
    work.items(calls | {case.name: partial(_timing, work, case) for case in (cases[:1] if work.small else cases)})


def rivals(work: Work) -> None:
    """Compile a case's rivals beside the other parts, then time them while no other part runs."""
    (case,) = cases_of([HEADLINE[work.part]])
    names = [bar.rival for bar in case.bars if bar.rival in case.providers]
    chosen = {name: case.providers[name] for name in dict.fromkeys(["eager", "compile", *names, "fastkd"])}
    case = work.device.sized(replace(case, providers=chosen))
    if work.small:
        case = replace(case, providers={name: replace(p, compiled=False) for name, p in chosen.items()})

    def compared() -> Row:
        with (work.work / "rivals.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)

            def alone() -> None:
                fcntl.flock(lock, fcntl.LOCK_EX)  # granted when all parts have compiled

            measured = measure(case, None, 0.05 if work.small else 1.0, not work.small, alone)
        (row,) = report.rows([measured])["cases"]
        return row

    limit = 0.7 * (work.until - time.monotonic())  # one that hangs leaves the others some time
    work.items({case.name: compared}, limit)


STEPS = {f.__name__: f for f in (versions, smoke, timings, training, native, suite, rivals, counters, sanitizer, touch)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.steps", description=__doc__)
    parser.add_argument("step", choices=STEPS)
    for name in ("part", "out", "work", "kernels"):
        parser.add_argument(f"--{name}", default="")
    for name in ("zero", "until"):
        parser.add_argument(f"--{name}", type=float, required=True)
    parser.add_argument("--small", action="store_true")
    work = Work(parser.parse_args(argv))
    die_with_parent()  # once more: entering a namespace has cleared it
    with suppress(ImportError):
        from triton import knobs

        kernels.pin()

        def listen(*_: Any, cache_hit: bool, **__: Any) -> None:
            work.compiled["carried" if cache_hit else "compiled"] += 1

        knobs.compilation.listener = listen
    STEPS[work.step](work)


if __name__ == "__main__":
    main()
