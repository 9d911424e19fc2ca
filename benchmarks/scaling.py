"""Measure how time and memory grow with tokens, images, width, layers and ranks: python -m benchmarks scaling.

Each sweep is one of the cases at several sizes. The exponent is the slope of the last three sizes on log-log axes,
where the work outweighs the fixed cost of a call; the theoretical exponent of the algorithm is reported beside it.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks import memory, report
from benchmarks.case import Case, Step
from benchmarks.cases import attention, relation
from benchmarks.measure import interleave
from fastkd.losses import RelationLoss
from fastkd.ops.relation import Scope

SECONDS = 1.5  # of timed rounds per size
FITTED = 3  # the largest sizes
RANKED = (8, 196, 192, 384)  # images per rank, tokens, widths


class Theory(NamedTuple):
    """Exponents of time and extra memory."""

    time: float
    memory: float


class Sweep(NamedTuple):
    """A case at several sizes; `most` is the largest size for providers other than fastkd."""

    name: str
    variable: str
    sizes: tuple[int, ...]
    case: Callable[[int], Case]
    theory: dict[str, Theory]
    most: int


def _relation(scope: Scope, size: int, *, along: str) -> Case:
    B, N, Ds, Dt = {
        "tokens": (1, size, 192, 384),
        "images": (size, 196, 192, 384),
        "width": (4, 196, size, size),
    }[along]
    return relation.case(f"{scope}-{along}-{size}", scope, (B, N, Ds, Dt))


def _attention(size: int, *, along: str) -> Case:
    return attention.case(f"{along}-{size}", {"tokens": (1, 3, size), "images": (size, 3, 197)}[along])


def _manifold(size: int) -> Case:
    return relation.manifold_case(f"layers-{size}", size, (8, 196, 192, 384))


LINEAR, SQUARE = Theory(1, 1), Theory(2, 2)
N = (64, 256, 1024, 4096, 16384)
SWEEPS = (
    Sweep(
        "relation, scope intra", "tokens", N, partial(_relation, "intra", along="tokens"),
        {"fastkd": LINEAR, "eager": SQUARE}, 4096,
    ),
    Sweep(
        "attention, KL", "tokens", N, partial(_attention, along="tokens"),
        {"fastkd": Theory(2, 1), "eager": SQUARE}, 4096,
    ),
    Sweep(
        "relation, scope batch", "images", (1, 4, 16, 64, 256, 512), partial(_relation, "batch", along="images"),
        {"fastkd": LINEAR, "eager": SQUARE}, 64,
    ),
    Sweep(
        "attention, KL", "images", (1, 8, 32, 128, 512), partial(_attention, along="images"),
        {"fastkd": LINEAR, "eager": LINEAR}, 32,
    ),
    Sweep(
        "relation, scope intra", "width", (64, 256, 1024, 2048, 4096), partial(_relation, "intra", along="width"),
        {"fastkd": LINEAR, "eager": LINEAR}, 4096,
    ),
    Sweep("manifold", "layers", (1, 3, 6, 12, 24), _manifold, {"fastkd": LINEAR, "eager": LINEAR}, 24),
)  # fmt: skip


def slope(sizes: Sequence[float], values: Sequence[float | None]) -> float | None:
    """Return the slope of log value against log size over the last sizes; None if fewer than two were measured."""
    points = [(math.log(x), math.log(y)) for x, y in zip(sizes, values, strict=True) if y is not None and y > 0]
    points = points[-FITTED:]
    if len(points) < 2:
        return None
    fit = statistics.linear_regression(*zip(*points, strict=True))
    return fit.slope


def _point(case: Case, names: list[str], seconds: float) -> dict[str, tuple[float, int | None]]:
    """Return the seconds and bytes of each provider."""
    inputs = case.inputs(case.device, case.dtype)
    steps = {name: Step.of(case.providers[name], inputs, case.backward) for name in names}
    times = interleave(steps, case.device, None, seconds)
    return {n: (statistics.median(times[n]), memory.peak(case, case.providers[n], steps[n])) for n in names}


def measure(sweep: Sweep, seconds: float = SECONDS) -> list[dict[str, Any]]:
    """Return a row for each provider: sizes, seconds, bytes, fitted and theoretical exponents."""
    found: dict[str, list[tuple[float | None, int | None]]] = {name: [] for name in sweep.theory}
    for size in sweep.sizes:
        case = sweep.case(size)
        names = [name for name in sweep.theory if name == "fastkd" or size <= sweep.most]
        point = _point(case, names, seconds)
        for name in sweep.theory:
            found[name].append(point.get(name, (None, None)))
    rows = []
    for name, theory in sweep.theory.items():
        times, sizes = [t for t, _ in found[name]], sweep.sizes
        weights = [m for _, m in found[name]]
        row: dict[str, Any] = {"sweep": sweep.name, "variable": sweep.variable, "provider": name, "sizes": list(sizes)}
        row |= {"seconds": times, "bytes": weights, "time": slope(sizes, times), "memory": slope(sizes, weights)}
        rows.append({**row, "time_theory": theory.time, "memory_theory": theory.memory})
    return rows


def _rank(rank: int, world: int, folder: str, rounds: int) -> None:
    """Return the median processor seconds of one rank for the batch-scope loss over all ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    B, tokens, Ds, Dt = RANKED
    g = torch.Generator().manual_seed(rank)
    student = torch.randn(B, tokens, Ds, generator=g, requires_grad=True)
    teacher = torch.randn(B, tokens, Dt, generator=g)
    loss, times = RelationLoss(scope="batch", process_group=dist.group.WORLD), []
    for _ in range(rounds + 1):
        dist.barrier()
        begin = time.process_time()
        torch.autograd.grad(loss(student, teacher), student)
        times.append(time.process_time() - begin)
    if rank == 0:
        Path(folder, f"seconds{world}").write_text(str(statistics.median(times[1:])))
    dist.destroy_process_group()


def ranks(worlds: Sequence[int] = (1, 2, 3, 4), rounds: int = 15) -> dict[str, Any]:
    """Measure a rank's processor time with a fixed number of images per rank: other ranks should cost it nothing."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for world in worlds:
            spawn(_rank, (world, folder, rounds), nprocs=world)
            seconds.append(float(Path(folder, f"seconds{world}").read_text()))
    row: dict[str, Any] = {"sweep": "relation, scope batch, over ranks", "variable": "ranks", "provider": "fastkd"}
    row |= {"sizes": list(worlds), "seconds": seconds, "bytes": [None] * len(worlds)}
    return {**row, "time": slope(worlds, seconds), "memory": None, "time_theory": 0.0, "memory_theory": None}


def line(row: dict[str, Any]) -> str:
    def exponent(key: str) -> str:
        fitted, promised = row[key], row[f"{key}_theory"]
        return "-" if fitted is None else f"{fitted:.2f} ({promised:g})"

    sizes = f"{row['variable']} {row['sizes'][0]}-{row['sizes'][-1]}"
    return f"{row['sweep']:<34}{sizes:<20}{row['provider']:<10}{exponent('time'):<14}{exponent('memory')}"


def main(argv: list[str]) -> int:
    """Print each exponent as soon as it is measured, with the theoretical one in brackets."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks scaling", description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="timed seconds per size; default: %(default)s")
    where = "file for the results, or folder for scaling-<machine>.json; the docs show benchmarks/results/"
    parser.add_argument("--json", type=Path, metavar="PATH", help=where)
    args = parser.parse_args(argv)
    head = report.header("cpu")
    print(report.title(head), f"{'':<54}{'provider':<10}{'time':<14}memory", sep="\n", flush=True)
    begin, rows = time.monotonic(), []
    for sweep in SWEEPS:
        for row in measure(sweep, args.seconds):
            rows.append(row)
            print(line(row), flush=True)
    rows.append(ranks())
    print(line(rows[-1]))
    print(f"{len(SWEEPS) + 1} sweeps in {time.monotonic() - begin:.0f} s")
    if args.json:
        print(f"written to {report.write(args.json, head, {'sweeps': rows}, 'scaling-')}")
    return 0
