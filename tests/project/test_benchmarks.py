"""The benchmarks' machinery on a case small enough for a test."""

import copy
import json
import shutil
import subprocess
import time
from functools import partial

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import aot, report, sanitize, scaling
from benchmarks.case import ALLOWANCE, COPY, Bar, Case, Provider
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
    monkeypatch.setattr(command, "measure", lambda case, rounds, seconds: tiny)
    path = tmp_path / "out" / "results.json"
    assert command.main(["--device", "cpu", "--rounds", "2", "--json", str(path)]) == 0
    out = json.loads(path.read_text())
    assert out["header"].keys() >= {"machine", "cpu", "gpu", "versions", "commit", "date"}
    (row,) = out["cases"]
    assert row["case"] == "relation/tiny" and row["providers"]["fastkd"]["median"] > 0
    assert "MISS" in capsys.readouterr().out


def test_a_run_cut_short_leaves_what_it_has(tiny: Measured, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    measured = iter([tiny])

    def interrupted(case: Case, rounds: int, seconds: float) -> Measured:
        try:
            return next(measured)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(command, "CASES", (tiny.case, tiny.case))
    monkeypatch.setattr(command, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.main(["--device", "cpu", "--json", str(tmp_path / "cases.json")])
    assert len(json.loads((tmp_path / "cases.json").read_text())["cases"]) == 1


def slower(results: dict, factor: float) -> dict:
    """The same run with fastkd's times scaled."""
    after = copy.deepcopy(results)
    ours = after["cases"][0]["providers"]["fastkd"]
    ours |= {key: factor * ours[key] for key in ("median", "p20", "p80")}
    return after


def compared(tmp_path, before: dict, after: dict, *options: str) -> int:
    for name, results in (("before", before), ("after", after)):
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    return command.main(["compare", str(tmp_path / "before.json"), str(tmp_path / "after.json"), *options])


def test_compare_finds_regressions(tiny: Measured, tmp_path, capsys) -> None:
    before = {"header": report.header("cpu"), **report.rows([tiny])}
    assert compared(tmp_path, before, before) == 0
    assert compared(tmp_path, before, slower(before, 10)) == 1
    assert "REGRESSION" in capsys.readouterr().out
    assert compared(tmp_path, before, slower(before, 10), "--threshold", "20") == 0
    assert compared(tmp_path, slower(before, 10), before) == 0


def test_compare_finds_failures_and_lost_bars(tiny: Measured, tmp_path, capsys) -> None:
    before = {"header": report.header("cpu"), **report.rows([tiny])}
    failed, lost, scattered = (copy.deepcopy(before) for _ in range(3))
    failed["cases"][0]["providers"]["fastkd"] = {"failure": "wrong"}
    assert compared(tmp_path, before, failed) == 1
    lost["cases"][0]["bars"][0]["passed"] = False
    assert compared(tmp_path, before, lost) == 1
    assert "reached before, missed after" in capsys.readouterr().out
    scattered["cases"][0]["providers"]["fastkd"] |= {"median": 1e3, "p20": 0.0}  # overlaps with what was
    assert compared(tmp_path, before, scattered) == 0


def test_thorough_providers_are_left_out_unless_asked_for() -> None:
    (case,) = command.select(CASES, "cpu", None, "relation/intra-deit_ti-b32")
    assert case.providers["compile tuned"].thorough
    assert command.quick(case).providers.keys() == {"eager", "compile", "gram identity", "fastkd"}
    assert all(
        not case.providers[bar.rival].thorough for case in CASES for bar in case.bars if bar.rival in case.providers
    )


def test_a_wrong_yardstick_vouches_for_nobody() -> None:
    providers = {"eager": PROVIDERS["wrong"], "wrong": PROVIDERS["wrong"]}
    m = measure(case("tiny", "intra", (2, 12, 8, 16), providers=providers), rounds=1, with_memory=False)
    assert all(f.failure and not f.times for f in m.figures.values())


def test_rounds_are_interleaved() -> None:
    order: list[str] = []

    def call(name: str) -> None:
        order.append(name)
        time.sleep(6e-3)

    times = interleave({name: partial(call, name) for name in "abc"}, "cpu", 3, 1.0)
    first = "abc"
    assert "".join(order) == first + "aabbcc" + "aaccbb" + "ccaabb"  # each once uncounted, once timed
    assert all(len(t) == 3 and min(t) >= 6e-3 for t in times.values())


def test_cases_are_well_formed() -> None:
    names = [c.name for c in CASES]
    assert len(set(names)) == len(names)
    for c in CASES:
        assert (
            c.name.startswith(("relation/", "moments/", "attention/", "prior/", "logits/", "dropins/"))
            and "fastkd" in c.providers
        )
        assert all(b.rival in {*c.providers, "others", "copy", "matmul", "allowance"} for b in c.bars), c.name
        assert c.flops > 0 and (c.allowance is not None or all(b.rival != ALLOWANCE for b in c.bars))


def test_scaling_fits_the_exponent_of_the_largest_sizes() -> None:
    sizes = (1, 2, 4, 8, 16)
    assert scaling.slope(sizes, [9.0, 9.0, *(x**2 for x in (4, 8, 16))]) == pytest.approx(2)
    assert scaling.slope(sizes, [1.0, None, None, None, None]) is None
    assert scaling.slope(sizes, [1.0, 2.0, None, None, 16.0]) == pytest.approx(1)


def test_a_sweep_gives_a_row_a_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling.memory, "peak", lambda *_: None)
    theory = {"fastkd": scaling.LINEAR, "eager": scaling.SQUARE}
    sweep = scaling.Sweep(
        "tiny", "tokens", (8, 16, 32), partial(scaling._relation, "intra", along="tokens"), theory, 16
    )
    ours, eager = scaling.measure(sweep, seconds=0.01)
    assert all(t > 0 for t in ours["seconds"]) and eager["seconds"][2] is None and eager["time"] is not None
    assert "tokens 8-32" in scaling.line(ours) and "(1)" in scaling.line(ours)


def test_every_sweep_has_its_cases() -> None:
    for sweep in scaling.SWEEPS:
        assert {sweep.case(size).name for size in (sweep.sizes[0], sweep.sizes[-1])}
        assert sweep.theory.keys() <= sweep.case(sweep.sizes[0]).providers.keys()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("========= ERROR SUMMARY: 0 errors", "memcheck: 0 errors"),
        ("========= ERROR SUMMARY: 3 errors", "memcheck: 3 errors"),
        ("========= Error: Device not supported", "memcheck: not run, Error: Device not supported"),
    ],
)
def test_a_sanitizer_that_refuses_is_no_failure(said, expected, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '{said}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert str(sanitize.check("memcheck", ["true"])) == expected


def test_a_late_sanitizer_takes_its_program_along(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool, alive = tmp_path / "compute-sanitizer", tmp_path / "alive"
    tool.write_text(f"#!/bin/sh\n(sleep 2; touch {alive}) &\nwait\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert str(sanitize.check("memcheck", ["true"], seconds=0.2)) == "memcheck: not run, longer than 0.2 s"
    time.sleep(2.5)
    assert not alive.exists()


def test_a_failed_program_is_no_clean_bill(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho '========= ERROR SUMMARY: 0 errors'\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert str(sanitize.check("memcheck", ["true"])) == "memcheck: not run, its program ended with status 1"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_results_do_not_make_a_commit_dirty(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*args: str) -> None:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *args], check=True, capture_output=True)

    measured, result = tmp_path / "fastkd.py", tmp_path / "benchmarks" / "results" / "x.json"
    result.parent.mkdir(parents=True)
    monkeypatch.setattr(report, "ROOT", tmp_path / "benchmarks")
    assert report.header("cpu")["commit"] == "unknown"
    for path in (measured, result):
        path.write_text("1")
    git("init")
    git("add", ".")
    git("commit", "--message", "x")
    commit = report.header("cpu")["commit"]
    result.write_text("2")
    assert report.header("cpu")["commit"] == commit
    measured.write_text("2")
    assert report.header("cpu")["commit"] == f"{commit}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert report.header("cpu")["commit"] == "unknown"


def test_cuda_kernels_are_judged() -> None:
    """Occupancy by hand, and each kind of problem."""
    good = {
        "stem": "x", "kernel": "x", "target": "sm_90", "types": "bf16", "options": "", "threads": 256, "registers": 128,
        "stack": 0, "spills": 0, "looped": 0, "shared": 65_536, "occupancy": 0.25, "matrix": "wgmma", "products": 8,
        "loads": 4, "wide": 4, "multiplies16": True,
    }  # fmt: skip
    assert aot.occupancy("sm_90", 128, 65_536, 256) == 0.25  # two blocks of 8 warps by registers, three by memory
    assert aot.occupancy("sm_90", 32, 200_000, 128) == 4 / 64
    assert aot.occupancy("gfx942", 128, 0, 256) == 0.5  # four waves a SIMD of 512 registers
    assert not aot.Kernel(**good).problems()
    assert not aot.Kernel(**{**good, "types": "double, double", "looped": 1}).problems()
    for change in ({"looped": 1}, {"spills": 40, "stack": 100}, {"shared": 300_000}, {"matrix": ""}):
        assert len(aot.Kernel(**{**good, **change}).problems()) == 1


def test_machine_code_is_read() -> None:
    code = """
        /*0010*/                   STL [R1], R2 ;            /* 0x0 */
        /*0020*/                   LDG.E.128 R4, [R2.64] ;   /* 0x0 */
        /*0030*/                   HGMMA.64x64x16.F32 R8 ;   /* 0x0 */
        /*0040*/              @!P0 BRA 0x20 ;                /* 0x0 */
        /*0050*/                   LDL R2, [R1] ;            /* 0x0 */
        /*0060*/                   LDG.E R4, [R2.64] ;       /* 0x0 */
    """
    found = aot._nvidia(code)
    assert found == {"spills": 2, "looped": 0, "matrix": "wgmma", "products": 1, "loads": 2, "wide": 1}
    assert aot._nvidia(code.replace("BRA 0x20", "BRA 0x10"))["looped"] == 1


def test_rooflines_take_the_longer_of_moving_and_computing() -> None:
    rows = {row["case"]: row for row in aot.rooflines()}
    moved, computed = rows["moments/gpu-resnet50_layer1-b256"], rows["relation/gpu-intra-deit_s_1024-b16"]
    h200 = next(card for card in aot.CARDS if card.name == "H200 SXM")
    assert moved["H200 SXM"] == pytest.approx(moved["bytes"] / h200.bandwidth)
    assert computed["H200 SXM"] == pytest.approx(computed["flops"] / h200.matrix16)
