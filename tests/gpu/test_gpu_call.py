"""The one call on a GPU: its clock and its files survive whatever happens to its processes, or to itself."""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import call, rehearsal, smoke, steps, summary
from benchmarks.gpu.call import Step
from tests._support import staged_call

ROOT = Path(__file__).parents[2]
SECONDS = 12.0  # of a staged call: enough to start four processes in turn on a busy machine


def states(found: dict, step: str) -> dict[str, str]:
    return {row["item"]: row["state"] for row in found["items"] if row["step"] == step}


def test_a_part_that_dies_or_hangs_costs_only_an_item(tmp_path: Path) -> None:
    """A dead process is started again behind the item at which it died; a hanging one ends with its step."""
    table = [Step("first", 200, ("well", "dies", "hangs", "dies at once")), Step("second", 200, ("well",))]
    staged_call.staged(tmp_path, SECONDS).run_all(table)
    found = json.loads((tmp_path / "gpu.json").read_text())
    first, second = states(found, "first"), states(found, "second")
    assert [first[f"well {i}"] for i in range(4)] == ["passed"] * 4 == [second[f"well {i}"] for i in range(4)]
    assert [first[f"dies {i}"] for i in range(4)] == ["passed", "died", "passed", "passed"]
    assert (first["hangs 0"], first["hangs 1"]) == ("passed", "late") and "hangs 2" not in first
    assert [first[f"dies at once {i}"] for i in range(4)] == ["died"] * 4
    assert found["steps"]["first"]["state"] == "late" and found["steps"]["second"]["state"] == "done"
    assert found["steps"]["first"]["died"]["dies"] == [-signal.SIGSEGV]
    budget = 200 / call.SECONDS * SECONDS
    assert budget <= found["steps"]["first"]["ended"] < budget + 1
    assert not summary.is_good(found)


def assert_holds(out: Path, printed: str) -> int:
    """Assert that gpu.json is whole and holds every step whose end was printed; return the number of those."""
    found = json.loads((out / "gpu.json").read_text())
    ended = re.findall(r"^(\w+): (done|late|given up), [\d.-]+ s; ([^;\n]*)", printed, re.MULTILINE)
    for name, state, counts in ended:
        assert found["steps"][name]["state"] == state
        passed = re.search(r"(\d+) passed", counts)
        assert sum(x == "passed" for x in states(found, name).values()) >= int(passed[1] if passed else 0)
    assert len(list(out.iterdir())) <= 8
    return len(ended)


def killed(command: list[str], after: float, number: signal.Signals, out: Path) -> str:
    """Send a call a signal some seconds after its first file, and return what it has printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as run:
        limit = time.monotonic() + 120
        while not (out / "gpu.json").exists() and time.monotonic() < limit:
            time.sleep(0.005)
        time.sleep(after)
        run.send_signal(number)
        return run.communicate(timeout=120)[0]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("seed", range(2))
def test_a_call_cut_at_any_moment_leaves_what_it_has(seed: int, number: signal.Signals, tmp_path: Path) -> None:
    after = random.Random(f"{seed} {number}").uniform(0, 2)
    command = [sys.executable, str(ROOT / "tests/_support/staged_call.py"), str(tmp_path)]
    assert_holds(tmp_path, killed(command, after, number, tmp_path))


def test_a_line_cut_short_hides_no_other(tmp_path: Path) -> None:
    """A process killed within a line leaves its beginning in the file, where the next one appends."""
    the_call = staged_call.staged(tmp_path, 3.0)
    whole = '{"step": "a", "part": "", "item": "1", "state": "passed"}\n'
    the_call.rows.write_text(whole + '{"step": "a", "pa' + whole.replace('"1"', '"2"') + whole.replace('"1"', '"3"'))
    the_call.gather()
    assert [row["item"] for row in the_call.results()["items"]] == ["1", "3"]
    with the_call.rows.open("a") as file:
        file.write(whole.replace('"1"', '"4"').rstrip("\n"))  # may be half of a line
    the_call.gather()
    assert len(the_call.items) == 2


def test_a_call_is_good_if_every_step_has_a_result_and_none_is_bad() -> None:
    steps_of_call = {name: {"state": "done"} for name in summary.ORDER}
    items = [{"step": name, "state": "passed"} for name in summary.ORDER]
    good = {"header": {}, "steps": steps_of_call, "items": items}
    assert summary.is_good(good)
    assert summary.is_good(good | {"items": [*items, {"step": "suite", "state": "late"}]})
    assert not summary.is_good(good | {"header": {"cut": 1.0}})
    assert not summary.is_good(good | {"items": items[1:]})
    assert not summary.is_good(good | {"steps": steps_of_call | {"smoke": {"state": "given up"}}})
    for state in ("failed", "died"):
        assert not summary.is_good(good | {"items": [*items, {"step": "suite", "state": state}]})


def test_the_summary_fits() -> None:
    """However much there is to say."""
    items = [
        {"step": step, "part": "", "item": f"tests/relation/test_relation.py::{i}", "state": "failed", "why": "x" * 300}
        for step in summary.ORDER
        for i in range(40)
    ]
    ended = {name: {"state": "done", "began": 0.0, "ended": 1.0} for name in (*summary.ORDER, "build")}
    text = summary.text({"header": {}, "steps": ended, "items": items})
    assert len(text.splitlines()) <= 100 and len(text) <= 12_000
    assert all(f"{name}: done" in text for name in ended)


def test_the_timetable_fits_into_a_call() -> None:
    assert sum(step.budget for step in call.STEPS) <= call.SECONDS - 2 * call.GRACE
    assert call.SECONDS <= 600 - 60
    assert tuple(step.name for step in call.STEPS) == summary.ORDER
    for step in call.STEPS:
        assert set(rehearsal.parts(step.name, step.parts)) <= {*step.parts, "1 of 2", "2 of 2"}


def steps_work(out: Path) -> steps.Work:
    given = {"step": "smoke", "part": "", "out": out, "work": out, "kernels": "", "small": True}
    return steps.Work(argparse.Namespace(**given, zero=time.monotonic(), until=time.monotonic() + 60))


def test_the_page_has_the_timetable_and_names_tests_that_exist() -> None:
    page = (ROOT / "docs/kernels/gpu.md").read_text()
    table = page.split("<!-- timetable")[1].split("<!-- /timetable")[0]
    steps_of_page = re.findall(r"^\| (\w+) \| (\d+) \|", table, re.MULTILINE)
    assert steps_of_page == [(step.name, str(step.budget)) for step in call.STEPS]
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", page))
    assert len(named) > 5 and all((ROOT / path).exists() for path in named), named


@pytest.fixture
def work(tmp_path: Path) -> steps.Work:
    return steps_work(tmp_path)


def test_an_item_gives_a_row_whatever_happens(work: steps.Work) -> None:
    def fails() -> dict:
        raise ValueError("wrong\nsecond line")

    work.items({"good": lambda: {"value": 1}, "bad": fails})
    work.until = 0.0
    work.item("late", dict)
    rows = [json.loads(line) for line in work.rows.read_text().splitlines()]
    ended = {row["item"]: row for row in rows if row.get("state") not in (None, "began")}
    assert ended.keys() == {"good", "bad"} and ended["good"]["value"] == 1
    assert ended["bad"]["state"] == "failed" and ended["bad"]["why"] == "ValueError: wrong"
    assert steps_work(work.out).begun == {"good", "bad"}  # what the process that follows a dead one skips


def test_small_calls_agree_with_float64(work: steps.Work) -> None:
    """The table of small calls compares like with like, whichever backend is held to it."""
    work.items(steps._held(work, "eager", call.STEMS, [torch.float32]))
    rows = [json.loads(line) for line in work.rows.read_text().splitlines()]
    wrong = [row for row in rows if row.get("state") not in (None, "began", "passed")]
    assert not wrong and sum(row.get("state") == "passed" for row in rows) == sum(map(len, smoke.SMOKE.values()))


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.skipif(os.getenv("TRITON_INTERPRET") == "1", reason="the rehearsal sets it itself")
@pytest.mark.parametrize("after", [None, random.Random(0).uniform(5, 200)], ids=["whole", "killed"])
def test_rehearsal(after: float | None, tmp_path: Path) -> None:
    """The real steps on this machine's CPU, which other tests may share, hence at twice the length."""
    command = [sys.executable, "-m", "benchmarks", "gpu-call", "--rehearse", "--seconds", "240", "--out", str(tmp_path)]
    if after is not None:
        assert_holds(tmp_path, killed(command, after, signal.SIGKILL, tmp_path))
        return
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert assert_holds(tmp_path, run.stdout) == len(call.STEPS)
    found = json.loads((tmp_path / "gpu.json").read_text())
    for step in call.STEPS:
        items = states(found, step.name)
        assert "passed" in items.values() and not set(items.values()) & {"failed", "died"}, (step.name, items)
    assert len(run.stdout.splitlines()) <= 100 + len(call.STEPS)
