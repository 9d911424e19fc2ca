"""The benchmarks' machinery on a case small enough for a test."""

import json
import time
from functools import partial

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import report
from benchmarks.case import ALLOWANCE, COPY, Bar, Provider
from benchmarks.cases import CASES
from benchmarks.cases.relation import case
from benchmarks.measure import Measured, interleave, measure
from benchmarks.providers.relation import relation


def slightly_wrong(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return relation("intra")["eager"].call(student, teacher) * 1.005


def unable(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("out of everything")


RIGHT = {name: provider for name, provider in relation("intra").items() if not provider.compiled}
PROVIDERS = {**RIGHT, "wrong": Provider(slightly_wrong), "unable": Provider(unable)}
BARS = (Bar("eager", 1e-9), Bar("others", 1e9), Bar("wrong", 1), Bar("eager", 1e9, or_below=60.0), Bar(COPY, 1e-12))


@pytest.fixture(scope="module")
def tiny() -> Measured:
    return measure(case("tiny", "intra", (2, 12, 8, 16), *BARS, providers=PROVIDERS), rounds=2)


def test_right_providers_are_timed_and_weighed(tiny: Measured) -> None:
    for name in RIGHT:
        f = tiny.figures[name]
        assert not f.failure and len(f.times) == 2 and f.quantile(0.2) <= f.median <= f.quantile(0.8)
        assert (
            f.loss_error is not None
            and f.loss_error < 1e-5
            and f.gradient_error is not None
            and f.gradient_error < 1e-5
        )
        assert f.memory is None or 0 <= f.memory < 2**28
    assert tiny.copy > 0 and tiny.matmul > 0
    assert tiny.bytes == 4 * 24 * (2 * 8 + 16)


def test_a_wrong_provider_prints_its_error_and_no_time(tiny: Measured) -> None:
    f = tiny.figures["wrong"]
    assert not f.times and f.memory is None and "error" in f.failure and f.loss_error == pytest.approx(5e-3, rel=0.1)
    (row,) = (line for line in report.block(tiny).splitlines() if line.startswith("  wrong"))
    assert row.split()[1] == "-" and "5e-03" in row and f.failure in row
    assert "median" not in report.provider_json(f)


def test_a_provider_that_raises_is_a_row(tiny: Measured) -> None:
    assert not tiny.figures["unable"].times and "out of everything" in report.block(tiny)


def test_bars(tiny: Measured) -> None:
    passed = {(v.bar.rival, v.bar.at_least): v.passed for v in tiny.verdicts()}
    assert passed == {
        ("eager", 1e-9): True,
        ("others", 1e9): False,
        ("wrong", 1): False,
        ("eager", 1e9): True,
        (COPY, 1e-12): True,
        (ALLOWANCE, 1): True,
    }
    assert "4 of 6 bars reached" in report.bars([tiny])


def test_json_and_command(tiny: Measured, monkeypatch: pytest.MonkeyPatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(command, "CASES", (tiny.case,))
    monkeypatch.setattr(command, "measure", lambda case, rounds: tiny)
    path = tmp_path / "out" / "results.json"
    assert command.main(["--device", "cpu", "--rounds", "2", "--json", str(path)]) == 0
    out = json.loads(path.read_text())
    assert out["header"].keys() >= {"machine", "cpu", "gpu", "versions", "commit", "date"}
    (row,) = out["cases"]
    assert row["case"] == "relation/tiny" and row["providers"]["fastkd"]["median"] > 0
    assert "MISS" in capsys.readouterr().out


def test_a_wrong_yardstick_vouches_for_nobody() -> None:
    providers = {"eager": PROVIDERS["wrong"], "wrong": PROVIDERS["wrong"]}
    m = measure(case("tiny", "intra", (2, 12, 8, 16), providers=providers), rounds=1, with_memory=False)
    assert all(f.failure and not f.times for f in m.figures.values())


def test_rounds_are_interleaved() -> None:
    order: list[str] = []

    def call(name: str) -> None:
        order.append(name)
        time.sleep(3e-3)

    times = interleave({name: partial(call, name) for name in "abc"}, "cpu", 3, 1.0)
    warm_up = "abc"
    assert "".join(order) == warm_up + "abc" + "bca" + "cab"
    assert all(len(t) == 3 and min(t) >= 3e-3 for t in times.values())


def test_cases_are_well_formed() -> None:
    names = [c.name for c in CASES]
    assert len(set(names)) == len(names)
    for c in CASES:
        assert c.name.startswith(("relation/", "moments/", "attention/", "prior/")) and "fastkd" in c.providers
        assert all(b.rival in {*c.providers, "others", "copy", "matmul", "allowance"} for b in c.bars), c.name
        assert c.flops > 0 and (c.allowance is not None or all(b.rival != ALLOWANCE for b in c.bars))
