"""The table of counted work: of each GPU case on each target, beside its lower bound and its official form."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from benchmarks import aot, official
from benchmarks.case import Case
from benchmarks.cases import CASES, moments
from benchmarks.dry_driver import MULTIPROCESSORS, Launch, host_seconds
from benchmarks.work import Work, count

TARGETS = ("sm_80", "sm_90", "sm_100")
Row = dict[str, Any]


class Counted(NamedTuple):
    """A case, and the precision of float32 products that torch.set_float32_matmul_precision is given."""

    case: Case
    precision: str = "highest"

    @property
    def name(self) -> str:
        return self.case.name.replace("gpu-", "") + ("" if self.precision == "highest" else f", {self.precision}")


def _cases() -> list[Counted]:
    found = [Counted(case) for case in CASES if case.device == "cuda"]
    # Under autocast, timm's residual stream stays in float32.
    (manifold,) = (case for case in CASES if case.name == "relation/gpu-manifold-deit_ti-8_layers-b256")
    wide = replace(manifold, name=f"{manifold.name}-float32", dtype=torch.float32)
    return [found[0], Counted(wide), Counted(wide, "high"), *found[1:], *map(Counted, moments.COUNTED)]


COUNTED = _cases()


def _numbers(work: Work) -> Row:
    return {**asdict(work), "flops": dict(work.flops), "launches": work.launches, "bytes": work.bytes}


def kernels(launches: list[Launch], target: str) -> list[Row]:
    """Return, of each kernel that a case launches, its programs and the resources of one."""
    by_name: dict[str, list[Launch]] = {}
    host: dict[str, float] = {}
    for launch, seconds in zip(launches, host_seconds(launches), strict=True):
        name = launch.kernel.name
        by_name.setdefault(name, []).append(launch)
        host[name] = host.get(name, 0.0) + seconds
    rows = []
    for name, several in by_name.items():
        # The launch with most programs stands for all, which differ in the sizes of layers.
        programs, most = max(((_programs(launch), launch) for launch in several), key=lambda pair: pair[0])
        one = aot.inspect(most.kernel, is_brief=True)
        rows.append({
            "kernel": name.strip("_").removesuffix("_kernel"),
            "launches": len(several),
            "programs": programs,
            "per_sm": programs / MULTIPROCESSORS[target],
            "registers": one.registers,
            "launch_us": 1e6 * host[name] / len(several),
            "blocks": aot.blocks(target, one.registers, one.shared, one.threads),
        })  # fmt: skip
    return rows


def _programs(launch: Launch) -> int:
    x, y, z = (*launch.grid, 1, 1)[:3]
    return x * y * z


def row(counted: Counted, target: str) -> Row:
    """Return the counts of a case on a target: its own, and the bytes and operations that it cannot avoid."""
    work, launches = count(counted.case, target, precision=counted.precision)
    with FakeTensorMode():
        floor = counted.case.bytes(counted.case.inputs("cpu", counted.case.dtype))
    about = {"case": counted.name, "dtype": str(counted.case.dtype).removeprefix("torch."), "target": target}
    return about | {
        "work": _numbers(work),
        "kernels": kernels(launches, target),
        "floor": {"bytes": floor, "flops": counted.case.flops},
    }


def form(counted: Counted) -> Row:
    """Return the counts of the official form under torch.compile, or none if its shapes depend on values."""
    about = {"case": counted.name, "dtype": str(counted.case.dtype).removeprefix("torch.")}
    try:
        return about | {"compile": _numbers(official.compiled(counted.case))}
    except DynamicOutputShapeException:
        return about | {"compile": None}


def _row(at: int, target: str) -> Row:
    return row(COUNTED[at], target) if target else form(COUNTED[at])


def _text(work: Row | None) -> str:
    if work is None:
        return "shapes that depend on values"
    flops = " + ".join(f"{n / 1e9:.4g} {unit}" for unit, n in work["flops"].items()) or "0"
    moved = f"{work['launches']} launches, {work['bytes'] / 1e9:.3f} GB, {flops} GFLOP"
    return f"{moved}, {work['exponentials'] / 1e6:.4g} M exponentials"


def line(row: Row) -> str:
    """Return a row as text."""
    if "compile" in row:
        return f"  compile: {_text(row['compile'])}"
    floor = f"floor {row['floor']['bytes'] / 1e9:.3f} GB, {row['floor']['flops'] / 1e9:.4g} GFLOP"
    return f"{row['target']} {row['case']} {row['dtype']}: {_text(row['work'])} ({floor})"


def rows(jobs: int) -> Iterator[Row]:
    """Yield and print all rows, the official form after the rows of its case."""
    todo = [(at, target) for at in range(len(COUNTED)) for target in (*TARGETS, "")]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for found in pool.map(_row, *zip(*todo, strict=True)):
            print(line(found), flush=True)
            yield found
