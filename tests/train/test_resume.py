"""Exact resume: runs killed at random moments, alone and in pairs, end with the bits of one that was not."""

import dataclasses
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task")

from safetensors.torch import load_file  # noqa: E402

from fastkd.train import InputError, InterruptedRun, checkpoint, job  # noqa: E402
from fastkd.train.loop import Trainee  # noqa: E402
from fastkd.train.settings import Settings, Stage  # noqa: E402
from tests._support.runs import finish, places, run_with_kills, same, signal_at  # noqa: E402

VIT = "vit_tiny_patch16_224"
SIZES = {"patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Two classes of 16 noisy 32 px images."""
    image = pytest.importorskip("PIL.Image")
    root, generator = tmp_path_factory.mktemp("noise"), torch.Generator().manual_seed(0)
    for target in range(2):
        (root / f"class{target}").mkdir()
        for number in range(16):
            pixels = torch.randint(0, 128, (32, 32, 3), generator=generator, dtype=torch.uint8) + 100 * target
            image.fromarray(pixels.numpy()).save(root / f"class{target}" / f"{number}.png")
    return root


SECOND = {"lr": 1e-3, "opt": "sgd", "batch_size": 6, "augment_args": {"scale": (0.3, 1.0)}}


def small(folder: Path, out: Path, **changes) -> Settings:
    """Two stages, the second with parameters beside the student; everything that keeps a state is on."""
    settings = {
        "data": str(folder), "out": str(out), "img_size": 32, "batch_size": 4, "workers": 0, "device": "cpu",
        "student": VIT, "student_args": SIZES | {"drop_path_rate": 0.2}, "teacher": VIT, "teacher_args": SIZES,
        "teacher_epochs": 1, "baseline": True, "keep": 1, "warmup_epochs": 0,
        "lr": 3e-3, "check": False, "checkpoint_every": 1, "ema": 0.9,
        "augment_args": {"auto_augment": "rand-m5"}, "erase": 0.3, "mixup": 0.2, "clip_grad": 1.0,
        "stages": (Stage("manifold", 1), Stage("vitkd", 1, {"logits": "soft"}, **SECOND)),
    }  # fmt: skip
    return Settings(**(settings | changes))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    """The run that nothing happened to, with other checkpoints."""
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(small(folder, out, checkpoint_every=0))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, pytest.param(6, marks=pytest.mark.exhaustive)])
def test_killed_at_random_moments(folder, whole, tmp_path, kills):
    where = run_with_kills(small(folder, tmp_path / "run"), 1, kills, random.Random(time.time_ns()))
    assert any(where), "no run was killed after a checkpoint"
    same(whole, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_pair_killed_at_random_moments(folder, tmp_path, kills):
    finish(small(folder, tmp_path / "whole"), world=2)
    where = run_with_kills(small(folder, tmp_path / "run"), 2, kills, random.Random(time.time_ns()))
    assert any(where), "no run was killed after a checkpoint"
    same(tmp_path / "whole", tmp_path / "run")


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("stop_after", [1, 11, 18, 24])
def test_stopped_at_each_part_of_the_plan(folder, whole, tmp_path, monkeypatch, stop_after):
    """6 steps of the teacher, then in turn alone and distilled, 6 steps of the first stage and 4 of the second."""
    step, count = Trainee._step, 0

    def counted(*args):
        nonlocal count
        if count == stop_after:
            raise StoppedError
        count += 1
        step(*args)

    monkeypatch.setattr(Trainee, "_step", counted)
    settings = small(folder, tmp_path / "stopped", checkpoint_every=4)
    with pytest.raises(StoppedError):
        job.train(settings)
    monkeypatch.setattr(Trainee, "_step", step)
    job.train(settings, resume=(tmp_path / "stopped" / "config.json").exists())
    same(whole, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / job.CHECKPOINTS).exists()


def test_interrupt_finishes_the_step_and_resumes(folder, whole, tmp_path, monkeypatch):
    count = signal_at(monkeypatch, 9, signal.SIGINT)
    settings = small(folder, tmp_path / "run", checkpoint_every=0)
    with pytest.raises(InterruptedRun, match="--resume") as caught:
        job.train(settings)
    assert caught.value.code == 130
    assert count == [9]
    assert places(tmp_path / "run") == "000001-000000003"  # of the six steps after the teacher's
    job.train(settings, resume=True)
    same(whole, tmp_path / "run")


def test_checkpoint_is_whole_or_absent(tmp_path, monkeypatch):
    root, weights = tmp_path / "checkpoints", {"a": {"x": torch.arange(4.0)}}
    checkpoint.write(root, "000001", weights, {"step": 1})
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        checkpoint.write(root, "000002", weights, {"step": 2})
    monkeypatch.undo()
    assert [path.name for path in root.iterdir()] == ["000001"]
    (root / ".000003").mkdir()  # what a kill while writing leaves
    (root / ".000003" / "state.pt").write_text("half")
    assert checkpoint.latest(root) == root / "000001"
    checkpoint.write(root, "000004", weights, {"step": 4})
    assert [path.name for path in root.iterdir()] == ["000004"]
    tensors, state = checkpoint.read(checkpoint.latest(root))
    assert state == {"step": 4} and torch.equal(tensors["a"]["x"], torch.arange(4.0))


def test_resume_from_another_folder(folder, whole, tmp_path, monkeypatch):
    """Paths that were given relative to where the run was started."""
    monkeypatch.chdir(folder.parent)
    settings = small(Path(folder.name), tmp_path / "run")
    save, count = job.Run._save, 0

    def stopping(*args):
        nonlocal count
        save(*args)
        count += 1
        if count == 9:
            raise StoppedError

    monkeypatch.setattr(job.Run, "_save", stopping)
    with pytest.raises(StoppedError):
        job.train(settings)
    monkeypatch.setattr(job.Run, "_save", save)
    monkeypatch.chdir(tmp_path)
    before = job.saved_settings("run")
    assert before.data == str(folder)
    job.check_resume(dataclasses.replace(before, data=os.path.relpath(folder)), before)
    job.train(before, resume=True)
    same(whole, tmp_path / "run")


def test_resume_refuses_what_would_change_the_run(folder, tmp_path):
    settings = small(folder, tmp_path / "run", teacher_epochs=1)
    before = job.saved_settings
    with pytest.raises(InputError, match=r"--resume: .*holds no run"):
        before(str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    for text in ("", "lr: [", "ler: 3", "stages: 3"):
        (tmp_path / "run" / job.CONFIG).write_text(text)
        with pytest.raises(InputError, match=r"--resume: .*config.yaml cannot be read as the settings of a run"):
            before(str(tmp_path / "run"))
    (tmp_path / "run" / job.CONFIG).unlink()
    with pytest.raises(InputError, match=r"--resume: .*config.yaml cannot be read"):
        before(str(tmp_path / "run"))
    with pytest.raises(InputError, match=r"lr: 0.1 \(the run has 0.003\); seed: 1 \(the run has 0\)"):
        job.check_resume(small(folder, tmp_path / "run", lr=0.1, seed=1), settings)
    job.check_resume(small(folder, tmp_path / "elsewhere", workers=3, checkpoint_every=7), settings)


def test_pair_of_processes_is_one_with_the_batches_of_both(folder, tmp_path):
    """The losses span the ranks, so two with half the batch each learn what one learns; drawn noise is off."""
    plain = {
        "augment": False, "erase": 0.0, "mixup": 0.0, "student_args": SIZES, "baseline": False, "ema": None,
        "stages": (Stage("manifold", 1),), "teacher_args": SIZES | {"depth": 3}, "checkpoint_every": 0,
    }  # fmt: skip
    finish(small(folder, tmp_path / "two", batch_size=4, **plain), world=2)
    finish(small(folder, tmp_path / "one", batch_size=8, **plain))
    one, two = (load_file(tmp_path / name / "student.safetensors") for name in ("one", "two"))
    for key in one:  # whole runs in float32: only the order of sums differs, and each step carries it on
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=2e-4)
    start = timm.create_model(VIT, num_classes=2, img_size=32, **SIZES).state_dict()
    assert any((one[key] - start[key]).abs().max() > 1e-2 for key in one)


@pytest.mark.slow
def test_sharded_run(folder, tmp_path):
    """FSDP2 spreads what DDP copies; the numbers are the same up to the order of sums."""
    plain = {"baseline": False, "ema": None, "checkpoint_every": 0, "erase": 0.0}
    finish(small(folder, tmp_path / "copied", **plain), world=2)
    finish(small(folder, tmp_path / "spread", shard=True, **plain), world=2)
    copied, spread = (load_file(tmp_path / name / "student.safetensors") for name in ("copied", "spread"))
    assert copied.keys() == spread.keys()
    for key in copied:  # as above
        torch.testing.assert_close(copied[key], spread[key], rtol=1e-3, atol=2e-4)
