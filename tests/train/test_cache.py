"""The teacher's answers on disk: the same run as with the teacher, for augmented images and for tokens of layers."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task")

from safetensors.torch import load_file  # noqa: E402

from fastkd.train import InputError, job, prepare  # noqa: E402
from fastkd.train.settings import Settings, Stage  # noqa: E402

VIT = "vit_tiny_patch16_224"
SMALL = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}


@pytest.fixture(scope="module")
def teacher(folder, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("teacher") / "run"
    job.train(small(folder, out, task="none", teacher=None, epochs=3))
    return str(out / "student.safetensors")


def small(folder: Path, out: Path, **changes) -> Settings:
    settings = {
        "data": str(folder), "out": str(out), "img_size": 32, "batch_size": 8, "workers": 0, "device": "cpu",
        "student": VIT, "student_args": SMALL, "teacher": VIT, "teacher_args": SMALL, "teacher_epochs": 0,
        "epochs": 3, "warmup_epochs": 0, "baseline": False,
    }  # fmt: skip
    return Settings(**(settings | changes))


def losses(out: Path) -> list[float]:
    with (out / "log.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def without_teacher(monkeypatch, settings: Settings) -> None:
    """Run it with a teacher that cannot answer."""
    opened = prepare.open_inputs

    def refuse(_, args):
        assert not args[0].any(), "the teacher runs"  # blank images show the shapes of layers

    def broken(*args):
        data, nets = opened(*args)
        nets.teacher.register_forward_pre_hook(refuse)
        return data, nets

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "open_inputs", broken)
        patch.setattr(job, "new_head", lambda _: True)  # top-1 of the teacher is not needed
        job.train(settings)


def test_augmented_views_are_those_of_the_run(folder, teacher, tmp_path, monkeypatch, capsys):
    """Crops and colours of every epoch; a second student with other batches and loaders does not need the teacher."""
    options = {"teacher_checkpoint": teacher, "task": "soft"}
    cache = {"teacher_cache": str(tmp_path / "cache")}
    job.train(small(folder, tmp_path / "without", **options))
    job.train(small(folder, tmp_path / "with", **options, **cache))
    told = f"--teacher-cache: 0.0 MB in {tmp_path / 'cache'}: 3 epochs of 38 images, 3 of 3 logits"
    assert told in capsys.readouterr().err
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), rel=1e-4)
    assert losses(tmp_path / "with")[0] != losses(tmp_path / "with")[2]
    (file,) = (tmp_path / "cache").iterdir()
    table = np.load(file)
    assert table.shape == (3, 38) and not np.array_equal(table[0]["logits"], table[1]["logits"])
    two = (Stage("dkd", 1, batch_size=12), Stage("soft", 1))  # fewer epochs than the file has
    other = {"student_args": SMALL | {"depth": 2}, "workers": 1, "stages": two}
    without_teacher(monkeypatch, small(folder, tmp_path / "other", **options, **cache, **other))
    job.train(small(folder, tmp_path / "check", **options, **other))
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "check"), rel=1e-4)
    assert [*(tmp_path / "cache").iterdir()] == [file]
    with pytest.raises(InputError, match=r"has 3 epochs of \(38,\) images, the run needs 5 of 38"):
        job.train(small(folder, tmp_path / "more", **options, **cache, epochs=5))
    job.train(small(folder, tmp_path / "seed", **options, **cache, seed=1))  # other views, another file
    assert len([*(tmp_path / "cache").iterdir()]) == 2


def test_largest_logits_and_the_rest(folder, teacher, tmp_path):
    """The kept classes have their own probabilities, the others equal shares of the rest."""
    settings = small(
        folder, tmp_path / "run", teacher_checkpoint=teacher, task="soft", teacher_cache=str(tmp_path / "cache"),
        teacher_cache_top=1, epochs=1,
    )  # fmt: skip
    job.train(settings)
    job.train(dataclasses.replace(settings, out=str(tmp_path / "all"), teacher_cache_top=None))
    kept, whole = sorted((np.load(path) for path in (tmp_path / "cache").iterdir()), key=lambda x: x.itemsize)
    assert kept.itemsize == 4 + 1 + 4 and whole.itemsize == 12
    setup = prepare.prepare(dataclasses.replace(settings, out=None))
    setup.cache._table = kept
    found = setup.cache.known(0, [5, 2, 11], torch.device("cpu"))["teacher_logits"].softmax(1)
    full = torch.from_numpy(whole["logits"][0][[5, 2, 11]]).softmax(1)
    top, index = full.max(1, keepdim=True)
    expected = ((1 - top) / 2).repeat(1, 3).scatter(1, index, top)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("task", ["manifold", "vitkd"])
def test_tokens_of_equal_images(folder, teacher, tmp_path, monkeypatch, task):
    options = {"teacher_checkpoint": teacher, "task": task, "task_args": {"logits": "soft"}, "augment": False}
    cached = small(folder, tmp_path / "with", **options, teacher_cache=str(tmp_path / "cache"))
    job.train(small(folder, tmp_path / "without", **options))
    job.train(cached)
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), rel=1e-3)  # float16 tokens
    without_teacher(monkeypatch, dataclasses.replace(cached, out=str(tmp_path / "again")))
    one, two = (load_file(tmp_path / name / "student.safetensors") for name in ("with", "again"))
    assert all(torch.equal(x, two[key]) for key, x in one.items())


def test_caches_that_cannot_work(folder, teacher, tmp_path, monkeypatch):
    cache = {"teacher_checkpoint": teacher, "teacher_cache": str(tmp_path / "cache")}
    plain = {"augment": False, **cache}
    for changes, words in (
        (cache | {"task": "manifold"}, "tokens of layers are cached for equal images only: --no-augment"),
        (plain | {"task": "cikd"}, "holds logits and tokens; cikd needs the teacher itself"),
        (cache | {"task": "soft", "mixup": 0.2}, "images that depend on epoch and index alone"),
        (cache | {"task": "soft", "aug_repeats": 2}, "images that depend on epoch and index alone"),
        (cache | {"task": "soft", "epoch_repeats": 2}, "images that depend on epoch and index alone"),
    ):
        with pytest.raises(InputError, match=f"--teacher-cache: .*{words}"):
            job.train(small(folder, tmp_path / "no", **changes))
    settings = small(folder, tmp_path / "run", task="soft", **cache)
    job.train(settings)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(InputError, match="is damaged"):
        job.train(dataclasses.replace(settings, out=str(tmp_path / "damaged")))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(InputError, match=r"3 epochs of 38 images, .* MB are left"):
        job.train(dataclasses.replace(settings, out=str(tmp_path / "full")))
    assert not (tmp_path / "no").exists() and not (tmp_path / "full").exists()
