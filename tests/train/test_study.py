"""The study's command on a small folder: runs, table, equal steps for all shares; its sets of images."""

import io
import json
import re
import shlex
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest

pytest.importorskip("timm.task")
Image = pytest.importorskip("PIL.Image")

from experiments import sets  # noqa: E402
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
    number = r"\d+\.\d"
    assert re.search(rf"^\| none \| {number} \| {number} \| {number} \|", output, re.MULTILINE)
    assert re.search(rf"^\| manifold \|.*\| {number}% \|$", output, re.MULTILINE)
    found = json.loads((tmp_path / "study.json").read_text())
    assert [(line["method"], line["fraction"]) for line in found["lines"]] == [
        (method, fraction) for fraction in (0.5, 1) for method in ("none", "manifold")
    ]
    # as many steps with half of the images
    assert {len(line["curve"]) for line in found["lines"]} == {1}
    assert len({line["curve"][-1]["step"] for line in found["lines"]}) == 1
    assert Image.open(tmp_path / "study.png").size == (900, 400)
    log = tmp_path / "manifold-1-0" / "log.csv"
    before = log.stat().st_mtime_ns
    for path in (tmp_path / "manifold-0.5-0", *tmp_path.glob("cost-*")):
        shutil.rmtree(path)
    output = study(folder, tmp_path, "--finished")
    assert log.stat().st_mtime_ns == before and not (tmp_path / "manifold-0.5-0").exists()
    assert re.search(rf"^\| manifold \|  \| {number} \|  \| {number} \|  \|  \|$", output, re.MULTILINE)


@pytest.mark.parametrize("name", sets.SETS)
def test_sets_share_no_image(name: str, tmp_path: Path) -> None:
    """Training and test images have the same classes, none without contrast, and no image in common."""
    if name == "patches":
        pytest.importorskip("skimage")
    root = sets.write(name, tmp_path / name)
    parts = []
    for part in ("train", "val"):
        paths = sorted((root / part).rglob("*.png"))
        pixels = {path: Image.open(path).tobytes() for path in paths}
        assert all(len(set(image)) > 1 for image in pixels.values())
        parts.append(({path.parent.name for path in paths}, set(pixels.values())))
    assert parts[0][0] == parts[1][0] and len(parts[0][0]) == {"digits": 10, "patches": 20}[name]
    assert not parts[0][1] & parts[1][1]
