"""Measure a case: first the accuracy gate, then all providers round by round. A failed provider is never timed."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import memory
from benchmarks.case import ALLOWANCE, COPY, MATMUL, MB, Bar, Case, Inputs, Step, oracle
from fastkd.testing import assert_matches_oracle

SECONDS = 6.0  # of timed rounds per case, without its oracle, compilation and memory
MIN_ROUNDS, MAX_ROUNDS = 5, 200
SAMPLE = 2e-3  # seconds; shorter calls are repeated within a sample
SETTLE = 1e-2  # seconds of calls before a sample, at least one call


@dataclass
class Figures:
    """The figures of one provider in one case.

    times: seconds of each round; empty if the provider failed.
    memory: peak extra bytes.
    loss_error, gradient_error: relative L2 error against float64, the largest of several; None if not gated.
    failure: the reason why the provider was not timed.
    """

    times: list[float] = field(default_factory=list)
    memory: int | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    failure: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    def quantile(self, q: float) -> float:
        return torch.tensor(self.times, dtype=torch.float64).quantile(q).item()


@dataclass(frozen=True)
class Verdict:
    """A bar and its result: `ratio` is the rival's figure over fastkd's, or None if one of them is missing."""

    bar: Bar
    ratio: float | None
    passed: bool


@dataclass(frozen=True)
class Measured:
    """A case with its figures. copy: bytes/s of a clone; matmul: FLOP/s of a product, both timed in the same rounds."""

    case: Case
    bytes: int
    gradient_bytes: int
    figures: Mapping[str, Figures]
    copy: float
    matmul: float

    def _rival(self, bar: Bar) -> float | None:
        if bar.rival == COPY:
            return self.bytes / self.copy
        if bar.rival == MATMUL:
            return self.case.flops / self.matmul
        if bar.rival == ALLOWANCE:
            return None if self.case.allowance is None else self.case.allowance(self.gradient_bytes)
        if bar.rival != "others":
            return self._figure(bar.rival, bar.what)
        names = [name for name, p in self.case.providers.items() if p.gated and name != "fastkd"]
        return min((x for name in names if (x := self._figure(name, bar.what)) is not None), default=None)

    def _figure(self, name: str, what: str) -> float | None:
        figures = self.figures.get(name)
        if figures is None:
            return None
        if what == "error":
            return figures.gradient_error
        if not figures.times:
            return None
        return figures.median if what == "time" else figures.memory

    def verdicts(self) -> list[Verdict]:
        verdicts = []
        for bar in self.case.bars:
            ours, rival = self._figure("fastkd", bar.what), self._rival(bar)
            ratio = None if ours is None or rival is None else rival / max(ours, 1e-12)
            enough = ours is not None and ours <= bar.or_below
            verdicts.append(Verdict(bar, ratio, enough or (ratio is not None and ratio >= bar.at_least)))
        return verdicts


def _relative(actual: Tensor, expected: Tensor) -> float:
    scale = expected.norm().item()
    return (actual.double() - expected).norm().item() / (scale or 1.0)


def _gate(case: Case, values: list[Tensor], eager: list[Tensor], exact: list[Tensor], results: int) -> None:
    """Raise AssertionError if values are less accurate than the yardstick's, or those less than their dtype allows."""
    bound = case.reduced**0.5 * torch.finfo(case.dtype).eps
    for i, (v, e, o) in enumerate(zip(values, eager, exact, strict=True)):
        what = f"loss {i}" if i < results else f"gradient {i - results}"
        error = _relative(e, o)
        assert error <= bound, f"{what}: the yardstick is off by {error:.1e}, its dtype allows {bound:.1e}"
        v = v.to(torch.promote_types(v.dtype, torch.float32))
        assert_matches_oracle(v, e.to(v.dtype), o, case.reduced, what)


def accuracy(case: Case, steps: Mapping[str, Step], inputs: Inputs) -> dict[str, Figures]:
    """Run every provider once and record its errors, or a failure if it cannot run or is wrong."""
    results, gradients = oracle(case, inputs)
    n, exact = len(results), [*results, *gradients]
    yardstick: list[Tensor] | None = None
    figures = {}
    for name, step in steps.items():
        figures[name] = f = Figures()
        try:
            outputs, grads = step()
            if not case.providers[name].gated:
                continue
            values = [*outputs, *grads]
            errors = [_relative(v, o) for v, o in zip(values, exact, strict=True)]
            f.loss_error, f.gradient_error = max(errors[:n]), max(errors[n:], default=None)
            yardstick = values if yardstick is None else yardstick
            _gate(case, values, yardstick, exact, n)
        except Exception as error:
            # A provider that cannot run is a row of the table, not the end of it.
            f.failure = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
    return figures


def _sample(call: Callable[[], object], repeats: int, device: str) -> float:
    """Return the seconds of one call."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def interleave(
    calls: Mapping[str, Callable[[], object]], device: str, rounds: int | None, seconds: float
) -> dict[str, list[float]]:
    """Time every call once per round, in alternating order, for as many rounds as the seconds allow.

    Each call runs untimed before its sample, so that it finds caches and allocator as it left them itself, not as the
    previous call did. A first round, which is not counted, estimates how long each call takes.
    """
    names = list(calls)
    estimate = {name: _sample(calls[name], 1, device) for name in names}
    repeats = {name: max(1, min(100, int(SAMPLE / max(t, 1e-9)))) for name, t in estimate.items()}
    before = {name: max(1, min(100, int(SETTLE / max(t, 1e-9)))) for name, t in estimate.items()}
    if rounds is None:
        a_round = sum(estimate[name] * (before[name] + repeats[name]) for name in names)
        fewest = MIN_ROUNDS if MIN_ROUNDS * a_round < 3 * seconds else 3
        rounds = max(fewest, min(MAX_ROUNDS, int(seconds / a_round)))
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for r in range(rounds):
            # The order alternates, so that no provider always follows the same one.
            for name in (names[r % len(names) :] + names[: r % len(names)])[:: -1 if r % 2 else 1]:
                _sample(calls[name], before[name], device)
                times[name].append(_sample(calls[name], repeats[name], device))
    finally:
        gc.enable()
    return times


def measure(
    case: Case,
    rounds: int | None = None,
    seconds: float = SECONDS,
    with_memory: bool = True,
    ready: Callable[[], object] = lambda: None,
) -> Measured:
    """Check, time and measure the memory of every provider of a case; `ready` is called before the first is timed."""
    torch._dynamo.reset()
    gc.collect()  # frees the memory of earlier cases
    on_gpu = case.device == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
    inputs = case.inputs(case.device, case.dtype)
    steps = {name: Step.of(provider, inputs, case.backward) for name, provider in case.providers.items()}
    figures = accuracy(case, steps, inputs)
    ready()

    x = torch.ones((256 if on_gpu else 64) * MB // 4, device=case.device)
    a = torch.randn(side := 8192 if on_gpu else 2048, side, device=case.device).to(case.dtype)
    calls: dict[str, Callable[[], object]] = {name: step for name, step in steps.items() if not figures[name].failure}
    times = interleave({**calls, COPY: x.clone, MATMUL: lambda: a @ a}, case.device, rounds, seconds)

    for name in calls:
        figures[name].times = times[name]
        if with_memory:
            figures[name].memory = memory.peak(case, case.providers[name], steps[name])
    rates = 2 * x.nbytes / statistics.median(times[COPY]), 2 * side**3 / statistics.median(times[MATMUL])
    return Measured(case, case.bytes(inputs), case.gradient_bytes(inputs), figures, *rates)
