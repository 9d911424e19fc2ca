"""One process at a time in a run's folder: a second one is refused, a killed one stands in no way."""

import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

fcntl = pytest.importorskip("fcntl", reason="this system has no such locks")
timm = pytest.importorskip("timm")
pytest.importorskip("timm.task")

from fastkd.train import InputError, checkpoint, job  # noqa: E402
from fastkd.train.inversion import job as inversion  # noqa: E402
from fastkd.train.inversion.presets import PRESETS, Phase  # noqa: E402
from fastkd.train.inversion.store import MANIFEST, Store  # noqa: E402
from fastkd.train.settings import Settings  # noqa: E402
from tests._support.runs import places, start, together, train  # noqa: E402


def wait(until: Callable[[], object], process: multiprocessing.Process) -> None:
    deadline = time.monotonic() + 120
    while not until():
        assert process.is_alive(), "it ended by itself"
        assert time.monotonic() < deadline, "it hangs"
        time.sleep(0.01)


def refused(work: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(InputError, match=r"another process is at work in .*run; wait for its end"):
        work(*arguments)


def invert(settings: inversion.Inversion) -> None:
    inversion.invert(settings)


def test_two_runs_in_one_folder(folder, tmp_path):
    sizes = {"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
    settings = Settings(
        data=str(folder), check=False, batch_size=8, task="none", student="vit_tiny_patch16_224", student_args=sizes,
        img_size=32, epochs=100_000, warmup_epochs=0,
        checkpoint_every=1, workers=1, device="cpu", out=str(tmp_path / "run"),
    )  # fmt: skip
    out = tmp_path / "run"
    (first,) = start(1, train, settings, False)
    try:
        wait(lambda: places(out), first)
        together(2, refused, train, dataclasses.replace(settings, overwrite=True), False)
        together(1, refused, train, settings, True)
        before = places(out)
        wait(lambda: places(out) > before, first)
    finally:
        first.kill()  # its loader's worker lives on for a while
        first.join()
    before = places(out)
    (again,) = start(1, train, settings, True)
    try:
        wait(lambda: places(out) > before, again)
    finally:
        again.kill()


def test_two_inversions_in_one_folder(tmp_path):
    torch.manual_seed(0)
    args = {"num_classes": 4, "channels": (8, 8, 8, 8), "stem_width": 8}
    teacher = tmp_path / "teacher.safetensors"
    checkpoint.write_weights(teacher, timm.create_model("resnet18", **args), "resnet18", args)
    preset = dataclasses.replace(PRESETS["cifar"], batch_size=4, phases=(Phase(1),))
    out = str(tmp_path / "run")
    settings = inversion.Inversion(
        teacher_checkpoint=str(teacher), preset=preset, img_size=32, images=10**6, device="cpu", out=out
    )
    resumed = dataclasses.replace(settings, resume=True)
    manifest = tmp_path / "run" / MANIFEST

    def batches() -> int:
        return manifest.read_text().count("\n") - 1 if manifest.exists() else 0

    (first,) = start(1, invert, settings)
    try:
        wait(batches, first)
        together(1, refused, invert, resumed)
        before = batches()
        wait(lambda: batches() > before, first)
    finally:
        first.kill()
        first.join()
    done = len(Store.open(tmp_path / "run").batches)
    together(1, invert, dataclasses.replace(resumed, images=4 * done + 4))
    assert len(Store.open(tmp_path / "run").batches) == done + 1


def hold(out: Path, child: Path) -> None:
    """The folder, with a child like a loader's worker, to be killed."""
    with checkpoint.alone(out):
        process = multiprocessing.Process(target=time.sleep, args=(60,))
        process.start()
        child.write_text(str(process.pid))
        time.sleep(60)


def test_children_do_not_keep_the_folder(tmp_path):
    child = tmp_path / "child"
    (holder,) = start(1, hold, tmp_path / "run", child)
    wait(lambda: child.exists() and child.read_text(), holder)
    refused(lambda: checkpoint.alone(tmp_path / "run").__enter__())
    holder.kill()
    holder.join()
    os.kill(int(child.read_text()), 0)  # it lives
    try:
        with checkpoint.alone(tmp_path / "run"):
            assert (tmp_path / "run" / checkpoint.LOCK).exists()
    finally:
        os.kill(int(child.read_text()), 9)
    assert not any((tmp_path / "run").iterdir())


def test_lock_is_on_the_file_that_others_find(tmp_path, monkeypatch):
    """Not on one that its holder took away after this process had opened it."""
    lockf, calls = fcntl.lockf, []

    def late(file: Any, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / checkpoint.LOCK).unlink()
        lockf(file, how)

    monkeypatch.setattr(fcntl, "lockf", late)
    with checkpoint.alone(tmp_path):
        assert len(calls) == 2
        assert (tmp_path / checkpoint.LOCK).exists()


def test_file_system_without_locks(tmp_path, monkeypatch):
    def none(*_: object) -> None:
        raise OSError(checkpoint.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with checkpoint.alone(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    monkeypatch.setattr(checkpoint, "fcntl", None)  # Windows
    with checkpoint.alone(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert not any((tmp_path / "run").iterdir())


def test_finished_meanwhile(folder, tmp_path, monkeypatch):
    """What was there to resume when it looked is finished once it has the folder: it is not begun anew."""
    settings = Settings(
        data=str(folder), task="none", student="resnet18", img_size=32, batch_size=8, epochs=1,
        student_args={"channels": (8, 8, 8, 8), "stem_width": 8}, warmup_epochs=0, workers=0,
        device="cpu", out=str(tmp_path / "run"),
    )  # fmt: skip
    job.train(settings)
    summary = tmp_path / "run" / "summary.json"
    before, prepare = summary.read_text(), job.prepare
    summary.rename(tmp_path / "aside")

    def slow(settings: Settings) -> Any:
        setup = prepare(settings)
        (tmp_path / "aside").rename(summary)
        return setup

    monkeypatch.setattr(job, "prepare", slow)
    with pytest.raises(InputError, match=r"--resume: the run in .* is finished"):
        job.train(settings, resume=True)
    assert summary.read_text() == before
    summary.rename(tmp_path / "aside")
    with pytest.raises(InputError, match=r"--out: .* holds a finished run"):
        job.train(settings)
    assert summary.read_text() == before
