"""The study's command on a small folder: runs, table, curves that agree, continued without repeating."""

import io
import json
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path

import pytest

pytest.importorskip("timm.task")
Image = pytest.importorskip("PIL.Image")

from experiments.study import main  # noqa: E402

VIT = "patch_size=8,depth=2,num_heads=2"


def study(folder: Path, out: Path, *options: str) -> str:
    size = " ".join(f"--{who}-arg {arg}" for who in ("student", "teacher") for arg in VIT.split(","))
    line = f"""{shlex.quote(str(folder))} --out {out} --methods none,manifold --fractions 0.5,1 --seeds 1
        --student vit_tiny_patch16_224 --student-arg embed_dim=16 --teacher vit_tiny_patch16_224
        --teacher-arg embed_dim=24 {size} --img-size 32 --batch-size 8 --epochs 1 --teacher-epochs 1
        --warmup-epochs 0 --workers 0 --device cpu"""
    text = io.StringIO()
    with redirect_stdout(text):
        main([*shlex.split(line), *options])
    return text.getvalue()


@pytest.mark.slow
def test_study_of_a_folder(folder: Path, tmp_path: Path) -> None:
    output = study(folder, tmp_path)
    assert re.search(r"^\| none \| \d+\.\d ± 0\.0 \| \d+\.\d ± 0\.0 \|", output, re.MULTILINE)
    assert re.search(r"^\| manifold \|.*\| \d+\.\d% \|$", output, re.MULTILINE)
    found = json.loads((tmp_path / "study.json").read_text())
    assert [(line["method"], line["fraction"]) for line in found["lines"]] == [
        (method, fraction) for fraction in (0.5, 1) for method in ("none", "manifold")
    ]
    assert Image.open(tmp_path / "study.png").size == (600, 400)
    # Too few steps for rounding to grow: the losses of all three runs are the same.
    same = found["same"]
    assert len(same["eager"]) == len(same["threads"]) == 2
    assert all(point["loss"] < 1e-4 for name in ("eager", "threads") for point in same[name])

    before = (tmp_path / "manifold-1-0" / "log.csv").stat().st_mtime_ns
    study(folder, tmp_path)
    assert (tmp_path / "manifold-1-0" / "log.csv").stat().st_mtime_ns == before
