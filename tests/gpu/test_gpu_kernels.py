"""Compiled kernels that are carried to a GPU machine are found there under the names that its calls ask for."""

import json
import os
import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton here: its cache is what is tested")

if os.getenv("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)

import torch
from triton import knobs

import fastkd_kernels
from benchmarks.gpu import call, kernels, steps, tools
from benchmarks.gpu.smoke import SMOKE, on

FEW = "smoke prior*float32"


@pytest.fixture(scope="module", autouse=True)
def _pinned() -> None:
    kernels.pin()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernels")
    assert kernels.main([str(path), "--only", FEW]) == 0
    return path


def test_small_calls_launch_every_kernel() -> None:
    defined = {
        line.removeprefix("def ").split("(")[0]
        for path in Path(next(iter(fastkd_kernels.__path__))).glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def _") and line.split("(")[0].endswith("_kernel")
    }
    assert {kernel.name for kernel in kernels.needed("smoke *").values()} == defined
    assert all(re.search(tools.KERNELS, name) for name in defined)  # the counters are of those alone


def test_every_call_of_the_timed_steps_is_compiled_for() -> None:
    """The items of the steps, and the calls that the folder is filled for."""
    (smoke, timings) = (next(step for step in call.STEPS if step.name == name) for name in ("smoke", "timings"))
    wanted = set()
    for part in smoke.parts:
        stem, dtype = part.split("-")
        wanted |= {f"smoke {on('triton', case, getattr(torch, dtype)).name}" for case in SMOKE[stem]}
    for case in steps.timed_cases():
        wanted.add(f"{timings.name} {case.name}")
    assert wanted | {"training"} <= {name for name, _ in kernels.calls()}


def test_carried_kernels_are_found(folder: Path, tmp_path: Path) -> None:
    """Restored into another folder, nothing is compiled; without it, everything is."""
    needed = kernels.needed(FEW)
    assert len(needed) >= 2 and kernels.restore(folder, tmp_path / "cache") == len(needed)
    for cache, expected in ((tmp_path / "cache", True), (tmp_path / "empty", False)):
        hits: list[bool] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(knobs.cache, "dir", str(cache))
            patch.setattr(knobs.compilation, "listener", lambda *_, cache_hit, hits=hits, **__: hits.append(cache_hit))
            for kernel in needed.values():
                assert kernel.compile().asm["cubin"]
        assert hits == [expected] * len(needed)
    assert not list(folder.rglob("*.ttgir")) and not list(folder.rglob("__grp__*"))


def test_missing_kernels_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main([str(folder), "--check", "--only", FEW]) == 0
    assert kernels.main([str(folder), "--check", "--only", "smoke prior*"]) == 1
    assert "_prior_fwd_kernel" in capsys.readouterr().out


def test_the_probe_names_what_differs(folder: Path, tmp_path: Path) -> None:
    assert kernels.probe(folder) == []
    manifest = json.loads((folder / "keys.json").read_text())
    manifest["parts"] |= {"ptxas": "another", "source of _prior_fwd_kernel": "edited"}
    (tmp_path / "keys.json").write_text(json.dumps(manifest))
    assert kernels.probe(tmp_path) == ["ptxas", "source of _prior_fwd_kernel"]
