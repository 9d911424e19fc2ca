"""Fixtures of pytest benchmarks: the providers of a case are measured together, and each test gets its own times."""

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks import report
from benchmarks.case import Case
from benchmarks.measure import Measured, measure

MEASURED = pytest.StashKey[dict[str, Measured]]()


class Replay:
    """A clock that replays recorded times, so that pytest-benchmark stores times that were measured together."""

    def __init__(self) -> None:
        self.now = 0.0
        self.left: Iterator[float] = iter(())

    def __call__(self) -> float:
        return self.now

    def load(self, times: list[float]) -> None:
        self.left = iter(times)

    def step(self) -> None:
        self.now += next(self.left, 0.0)


CLOCK = Replay()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = {}


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[Case], Measured]:
    """Return the figures of all providers of a case, measured once per session."""
    done = request.config.stash[MEASURED]

    def get(case: Case) -> Measured:
        if case.device == "cuda" and not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        if case.name not in done:
            done[case.name] = measure(case, 1 if request.config.getoption("benchmark_disable") else None)
        return done[case.name]

    return get


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    cases = list(config.stash[MEASURED].values())
    if cases:
        terminalreporter.write_line(report.title(report.header(cases[0].case.device)))
        for m in cases:
            terminalreporter.write_line(report.block(m))
        terminalreporter.write_line(report.bars(cases))
