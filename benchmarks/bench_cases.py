"""Tests of pytest-benchmark, one for every case and provider."""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import report
from benchmarks.__main__ import quick
from benchmarks.case import Case
from benchmarks.cases import CASES
from benchmarks.conftest import CLOCK
from benchmarks.measure import Measured

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = [quick(case) for case in CASES if case.device == DEVICE]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("case", "provider"), [pytest.param(c, p, id=f"{c}-{p}") for c in HERE for p in c.providers])
def test_case(case: Case, provider: str, benchmark: BenchmarkFixture, measured: Callable[[Case], Measured]) -> None:
    of_case = measured(case)
    figures = of_case.figures[provider]
    if figures.failure:
        (pytest.fail if provider == "fastkd" else pytest.skip)(figures.failure)
    benchmark.group = case.name
    benchmark.extra_info |= report.provider_json(figures)
    CLOCK.load(figures.times)
    benchmark.pedantic(CLOCK.step, rounds=len(figures.times))
