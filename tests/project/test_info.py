"""The report of what exists, what does not, and why."""

import json
import subprocess
import sys

import pytest
import torch

from fastkd import _extension, info
from fastkd.ops import _schemas


def test_json_names_every_backend_and_operator(capsys):
    assert info.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == str(torch.__version__)
    assert set(report["operators"]) == set(_schemas.STEMS)
    assert all(set(row) == set(report["backends"]) for row in report["operators"].values())
    assert all(row["eager"] for row in report["operators"].values())
    assert (report["build"] is not None) == _extension.HAS_NATIVE


@pytest.mark.parametrize("backend", ["native cpu", "native cuda", "triton"])
def test_what_is_missing_comes_with_its_reason(backend, monkeypatch, capsys):
    monkeypatch.setattr(_extension, "HAS_NATIVE", False)
    monkeypatch.setattr(_extension, "WHY_NOT", "no torch (install it)")
    monkeypatch.setattr(_extension, "WHY_NOT_CUDA", "no nvcc (install it)")
    monkeypatch.setattr(info._dispatch, "HAS_TRITON", False)
    assert info.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"{backend:<12} no: ") and "install" in line for line in lines)


def test_runs_as_a_module():
    run = subprocess.run([sys.executable, "-m", "fastkd.info"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("fastkd ")
    assert not run.stderr


@pytest.mark.skipif(not _extension.HAS_NATIVE, reason=f"no compiled extension: {_extension.WHY_NOT}")
def test_the_library_knows_what_it_was_built_with():
    build = info.collect()["build"]
    assert (build["torch"] == str(torch.__version__)) == (not build["why_not_recorder"])
    assert build["isa_in_use"] in build["isa_compiled"]
    assert (build["cuda"] is not None) == _extension.HAS_CUDA
