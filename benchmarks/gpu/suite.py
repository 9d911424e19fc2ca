"""The suite's tests of kernels on a GPU, in shares that run side by side without a plugin."""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.gpu.call import STEMS
from benchmarks.gpu.work import Row, Work

SUITE = ("gpu/test_gpu.py", *STEMS, "operators", "modules", "diversity")
LIMIT = 60.0  # seconds of a test, which may compile many kernels


class Shard:
    """A plugin of pytest: a share of the tests, the most important first, each an item of the step."""

    def __init__(self, work: Work) -> None:
        number, _, count = work.part.split()
        self.work, self.number, self.count = work, int(number) - 1, int(count)
        self.row: Row = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        def worth(item: Any) -> tuple[bool, ...]:
            given = getattr(getattr(item, "callspec", None), "params", {}).values()
            return "test_gpu.py" not in item.nodeid, "native" not in given, "triton" not in given

        mine = sorted(items, key=worth)[self.number :: self.count]
        self.work.append({"planned": [item.nodeid for item in mine]})
        items[:] = [item for item in mine if item.nodeid not in self.work.begun]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.work.append({"item": report.nodeid, "state": "failed", "why": "the file cannot be collected"})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.row = {"state": "passed"}
        self.work.begin(nodeid, LIMIT)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.row = {"state": "failed", "why": str(report.longrepr).strip().splitlines()[-1][:300]}
        elif report.skipped:
            why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.row = {"state": "skipped", "why": why}

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.work.finish(nodeid, self.row)

    def pytest_runtest_setup(self, item: Any) -> None:
        if not self.work.has_time():
            item.session.shouldstop = "no time is left"


def suite(work: Work) -> None:
    """Run a share of the suite's tests of kernels, which compares them with float64 at odd sizes."""
    import pytest

    chosen = (
        ["tests/logits/test_logits.py", "-k", "two_classes and eager"] if work.small else [f"tests/{x}" for x in SUITE]
    )
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-p", "no:xdist", "--tb=short"]
    status = pytest.main([*options, "-m", "not install and not exhaustive", *chosen], plugins=[Shard(work)])
    if status in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR):
        sys.exit(status)
