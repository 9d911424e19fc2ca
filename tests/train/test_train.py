"""The trainer's parts: task, clock, layers, data, loop; and short whole runs on real digits."""

import csv
import dataclasses
import errno
import itertools
import json
import os
import shutil
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task")
Image = pytest.importorskip("PIL.Image")

from safetensors.torch import load_file  # noqa: E402

from fastkd.train import DataError, DivergedError, InputError, checkpoint, job, models, prepare, report  # noqa: E402
from fastkd.train.clock import LossClock  # noqa: E402
from fastkd.train.data import Batches, create_loaders, find_unreadable, leave_out, open_data  # noqa: E402
from fastkd.train.evaluate import evaluate  # noqa: E402
from fastkd.train.loop import Trainee  # noqa: E402
from fastkd.train.plan import plan  # noqa: E402
from fastkd.train.ranks import Ranks, keep_to_own_cores  # noqa: E402
from fastkd.train.settings import Settings, Stage, from_plain, plain, stages  # noqa: E402
from fastkd.train.tasks import ManifoldTask  # noqa: E402

VIT = "vit_tiny_patch16_224"
CNN_ARGS = {"output_stride": 8, "channels": (8, 8, 8, 8), "stem_width": 8}


def vit_args(embed_dim: int, depth: int = 2, patch_size: int = 8) -> dict:
    return {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": 2}


def vit(embed_dim: int, depth: int = 2, **kwargs) -> torch.nn.Module:
    return timm.create_model(VIT, num_classes=3, img_size=32, **vit_args(embed_dim, depth), **kwargs)


def small(folder: Path, out: Path, **changes) -> Settings:
    """Two ViTs of different widths, one epoch each."""
    settings = {
        "data": str(folder), "out": str(out), "img_size": 32, "batch_size": 8, "workers": 0, "device": "cpu",
        "student": VIT, "student_args": vit_args(16), "teacher": VIT, "teacher_args": vit_args(24, 3),
        "epochs": 1, "teacher_epochs": 1, "warmup_epochs": 0, "baseline": True,
    }  # fmt: skip
    return Settings(**(settings | changes))


def read_log(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open() as file:
        return list(csv.DictReader(file))


def test_task_loss_is_the_papers_formula():
    student, teacher = vit(16), vit(24)
    task = ManifoldTask(student, teacher, student_layers=[-1], teacher_layers=["blocks.1"], verbose=False)
    result = task(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))
    expected = 4 * result["intra"] + 0.1 * result["inter"] + 0.2 * result["random"]
    torch.testing.assert_close(result["manifold_loss"], expected)


def test_teacher_sees_its_own_normalisation():
    student, teacher = vit(16), vit(24)
    student.pretrained_cfg = student.pretrained_cfg | {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 0.2)}
    teacher.pretrained_cfg = teacher.pretrained_cfg | {"mean": (0.1, 0.2, 0.3), "std": (0.3, 0.2, 0.1)}
    task = ManifoldTask(student, teacher, student_layers=[0], teacher_layers=[0], verbose=False)
    seen = []
    teacher.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    raw = torch.rand(2, 3, 32, 32)

    def normalised(cfg: dict) -> torch.Tensor:
        return (raw - torch.tensor(cfg["mean"]).view(3, 1, 1)) / torch.tensor(cfg["std"]).view(3, 1, 1)

    task(normalised(student.pretrained_cfg), torch.tensor([0, 1]))
    torch.testing.assert_close(seen[0], normalised(teacher.pretrained_cfg))


def test_task_refuses_unpaired_layers():
    with pytest.raises(ValueError, match="must pair up, got 2 and 1"):
        ManifoldTask(vit(16), vit(24), student_layers=[0, 1], teacher_layers=[0])


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.seconds)
        return grad, None, None


def test_clock_counts_the_loss_and_nothing_else():
    clock = LossClock()
    tokens = [Sleep.apply(torch.randn(2, 4, 3, requires_grad=True), 0.2, 0.2) for _ in range(2)]  # the network
    task_loss = Sleep.apply(sum(x.sum() for x in tokens), 0.2, 0.2)
    views = clock.start(tokens)
    loss = sum(Sleep.apply(x, 0.02, 0.03).square().mean() for x in views)
    clock.stop(loss)
    (task_loss + loss).backward()
    assert 0.1 <= clock.total() < 0.19
    assert clock.total() == 0


def test_default_layers_are_the_first_and_last_four():
    student, teacher = vit(16, 12), timm.create_model("cait_xxs24_224", img_size=32, patch_size=8)
    own, theirs = ([layer.name for layer in x] for x in models.match_layers(student, teacher, None, None, 32))
    assert own == [f"blocks.{i}" for i in (0, 1, 2, 3, 8, 9, 10, 11)]
    assert theirs == [f"blocks.{i}" for i in (0, 1, 2, 3, 20, 21, 22, 23)]


def test_default_layers_of_a_cnn_share_the_students_grid():
    teacher = timm.create_model("resnet18", num_classes=3, **CNN_ARGS)
    teacher.train()
    own, theirs = ([layer.name for layer in x] for x in models.match_layers(vit(16, 4), teacher, None, None, 32))
    assert theirs == ["layer2", "layer3", "layer4"]
    assert own == ["blocks.0", "blocks.2", "blocks.3"]
    assert teacher.training


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((None, ("blocks.9",)), "--teacher-layers: .*blocks.0, blocks.1"),
        ((("nothing",), None), "--student-layers: .*'nothing'.*blocks.0, blocks.1"),
        ((("blocks.0",), ("blocks.0", "blocks.1")), "must pair up, got 1 and 2"),
        ((("blocks.0",), ("patch_embed.proj", "blocks.1")), "must pair up"),
    ],
)
def test_wrong_layers(layers, words):
    with pytest.raises(InputError, match=words):
        models.match_layers(vit(16), vit(24), *layers, 32)


def test_token_grids_that_differ():
    other = timm.create_model(VIT, img_size=32, **vit_args(16, patch_size=4))
    with pytest.raises(InputError, match=r"student has blocks.0 \(16 tokens\).*teacher blocks.0 \(64 tokens\)"):
        models.match_layers(vit(16), other, None, None, 32)
    with pytest.raises(InputError, match=r"student layer blocks.1 has 16 tokens, teacher layer blocks.0 has 64"):
        models.match_layers(vit(16), other, ("blocks.1",), ("blocks.0",), 32)
    with pytest.raises(InputError, match="--img-size: the student refuses 40 px"):
        models.match_layers(vit(16), other, None, None, 40)


def test_weights_load_in_plain_timm(tmp_path):
    model, args = models.create_model("student", VIT, vit_args(16), num_classes=3, img_size=32)
    checkpoint.write_weights(tmp_path / "student.safetensors", model, VIT, args)
    loaded = timm.create_model(VIT, checkpoint_path=str(tmp_path / "student.safetensors"), **args)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), loaded.eval()(images))


def test_files_are_whole_or_absent(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), checkpoint.replacing(path) as partial:
        partial.write_text("half \ud800", encoding="utf-8")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_digits_are_real_and_apart():
    data = open_data("digits", 0.2)
    assert (len(data.train), len(data.val)) == (898, 899)
    model = timm.create_model("resnet18", num_classes=10, **CNN_ARGS)
    options = {"batch_size": 32, "augment": False, "workers": 0, "device": torch.device("cpu")}
    train, val = create_loaders(data, model, img_size=64, **options)
    images, targets = next(iter(val))
    assert images.shape == (32, 3, 64, 64)
    assert targets[0] == data.val.targets[0]
    assert len(train) == 898 // 32


def test_folder_is_split_by_class_and_always_alike(folder):
    data, again = open_data(str(folder), 0.25), open_data(str(folder), 0.25)
    assert data.classes == ["class0", "class1", "class2"]
    own, held_out = data.train.reader.samples, data.val.reader.samples
    assert [target for _, target in held_out].count(0) == 4
    assert not {path for path, _ in own} & {path for path, _ in held_out}
    assert held_out == again.val.reader.samples


def test_folder_with_its_own_validation_images(folder, tmp_path):
    (tmp_path / "train").symlink_to(folder)
    (tmp_path / "val").symlink_to(folder)
    data = open_data(str(tmp_path), 0.25)
    assert len(data.train) == len(data.val) == 48
    (tmp_path / "val").unlink()
    (tmp_path / "val" / "class1").mkdir(parents=True)
    (tmp_path / "val" / "class1" / "0.png").symlink_to(folder / "class1" / "0.png")
    with pytest.raises(InputError, match=r"same classes, one lacks \['class0', 'class2'\]"):
        open_data(str(tmp_path), 0.25)


def test_run_on_a_folder(folder, tmp_path):
    out = tmp_path / "run"
    settings = small(
        folder, out, epochs=2, amp="bf16", mixup=0.2, clip_grad=1.0, workers=1, accumulate=2, ema=0.9,
        channels_last=True, erase=0.2, checkpoint_every=2,
    )  # fmt: skip
    summary = job.train(settings)
    assert {path.name for path in out.iterdir()} == set(job.FILES)
    assert json.loads((out / "summary.json").read_text())["results"] == summary["results"]
    assert [row["network"] for row in summary["results"]] == ["teacher", "student alone", "student distilled"]
    assert 0 < summary["results"][2]["loss_share"] < 1
    rows = read_log(out)
    assert [row["network"] for row in rows] == ["teacher"] + 2 * ["student alone", "student distilled"]
    assert {row["steps"] for row in rows} == {"2"}  # 38 images, 4 batches, 2 in a step
    assert sum(float(row["seconds"]) for row in rows) < summary["seconds"]
    assert list(rows[0])[:8] == ["network", "epoch", "lr", "loss", "task_loss", "manifold_loss", "intra", "inter"]
    assert Image.open(out / "curve.png").size == (1500, 630)

    # The average loads as well, and is another network.
    student = timm.create_model(
        VIT, checkpoint_path=str(out / "student_ema.safetensors"), **summary["config"]["student_args"]
    )
    last = load_file(out / "student.safetensors")
    assert any(not torch.equal(x, last[key]) for key, x in student.state_dict().items())


def test_same_seed_same_run(folder, tmp_path):
    """Whoever loads the images, with the other student or without it."""
    for name, seed, changes in (("a", 0, {}), ("b", 0, {"baseline": False, "workers": 1}), ("c", 1, {})):
        job.train(small(folder, tmp_path / name, epochs=2, seed=seed, **changes))
    logs = {}
    for name in "abc":
        rows = [row for row in read_log(tmp_path / name) if row["network"] != "student alone"]
        logs[name] = [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]
    assert logs["a"] == logs["b"]
    assert logs["a"] != logs["c"]
    a, b = (load_file(tmp_path / name / "student.safetensors") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_students_start_alike_and_checkpoints_go_on(folder, tmp_path):
    job.train(small(folder, tmp_path / "a"))
    settings = small(
        folder, tmp_path / "b", teacher_epochs=0, teacher_checkpoint=str(tmp_path / "a" / "teacher.safetensors")
    )
    job.train(settings)
    first, second = (read_log(tmp_path / name) for name in "ab")
    assert [row["loss"] for row in first[1:]] == [row["loss"] for row in second]
    assert not (tmp_path / "b" / "teacher.safetensors").exists()

    # The table's accuracy is that of the weights on disk.
    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    args = summary["config"]["student_args"]
    student = timm.create_model(VIT, checkpoint_path=str(tmp_path / "b" / "student.safetensors"), **args)
    data = open_data(str(folder), settings.val_fraction)
    options = {"img_size": 32, "batch_size": 8, "augment": True, "workers": 0, "device": torch.device("cpu")}
    _, loader = create_loaders(data, student, **options)
    assert evaluate(student, loader, torch.no_grad())["top1"] == summary["results"][2]["top1"]


def test_stages_follow_each_other(folder, tmp_path):
    """Each stage has its own task, optimiser, schedule and batches; the student alone has the same schedule."""
    two = (
        Stage("vitkd", 1, {"logits": "hard"}, lr=1e-3),
        Stage("dkd", 2, lr=2e-3, opt="sgd", warmup_epochs=0, layer_decay=0.5, batch_size=12),
    )
    settings = small(folder, tmp_path / "run", stages=two, min_lr=1e-5)
    assert [(s.lr, s.opt, s.warmup_epochs, s.min_lr, s.layer_decay) for s in stages(settings)] == [
        (1e-3, "adamw", 0, 1e-5, None), (2e-3, "sgd", 0, 1e-5, 0.5),
    ]  # fmt: skip
    assert Settings(**from_plain(json.loads(json.dumps(plain(settings))))) == settings
    job.train(settings)
    rows = [row for row in read_log(tmp_path / "run") if row["network"] == "student distilled"]
    assert [bool(row["vitkd_loss"]) for row in rows] == [True, False, False]
    assert [bool(row["dkd_loss"]) for row in rows] == [False, True, True]
    assert [row["steps"] for row in rows] == ["4", "3", "3"]  # of 38 images in batches of 8, then of 12
    alone = [row for row in read_log(tmp_path / "run") if row["network"] == "student alone"]
    assert [row["lr"] for row in alone] == [row["lr"] for row in rows]
    assert not any(row["vitkd_loss"] or row["dkd_loss"] for row in alone)
    exported = load_file(tmp_path / "run" / "student.safetensors")
    assert exported.keys() == timm.create_model(VIT, num_classes=3, img_size=32, **vit_args(16)).state_dict().keys()


def test_step_accumulates_the_gradient_of_its_batches(folder, tmp_path):
    """Two batches of 8 in a step against one of 16, with a loss that is a mean over images."""
    options = {"task": "none", "teacher": None, "augment": False, "lr": 0.1, "opt": "sgd", "weight_decay": 0.0}
    job.train(small(folder, tmp_path / "a", accumulate=2, **options))
    job.train(small(folder, tmp_path / "b", batch_size=16, **options))
    a, b = (load_file(tmp_path / name / "student.safetensors") for name in "ab")
    for key in a:  # whole runs in float32: only the order of sums differs
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-6)


def test_sample_depends_on_seed_epoch_and_index_alone(folder):
    data = open_data(str(folder), 0.25)
    options = {"img_size": 32, "batch_size": 8, "augment": True, "device": torch.device("cpu")}
    (first, _), (second, _) = (create_loaders(data, vit(16), workers=n, **options) for n in (0, 2))
    whole = [images for images, _ in first.epoch(3)]
    rest = [images for images, _ in second.epoch(3, start=2)]
    assert len(whole) == 4 and all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))
    assert not any(torch.equal(a, b) for a, (b, _) in zip(whole, first.epoch(4), strict=True))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind threads to cores")
@pytest.mark.parametrize(
    ("local_world", "threads", "allowed", "kept"),
    [
        (2, 1, 5, {2, 3}),
        (2, 2, 5, {2, 3}),
        (2, 3, 5, None),
        (5, 1, 5, {1}),
        (6, 1, 5, None),
        (2, 1, 4, None),
        (1, 1, 5, None),
    ],
)
def test_processes_keep_to_their_share_of_the_cores(monkeypatch, local_world, threads, allowed, kept):
    """Not with more threads than that, nor where the user has chosen the cores."""
    found = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_world))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: found.append(set(cores)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    keep_to_own_cores(0)
    assert found == ([] if kept is None else [kept])


def test_ranks_share_each_batch():
    one = Batches(50, 8, Ranks(), seed=5)
    both = [Batches(50, 4, Ranks(rank, 2), seed=5) for rank in range(2)]
    assert len(one) == len(both[0]) == 6
    for number in range(6):
        assert one.indices(7, number) == both[0].indices(7, number) + both[1].indices(7, number)
    assert one.indices(7, 0) != one.indices(8, 0)
    seen = [index for rank in range(3) for batch in Batches(50, 4, Ranks(rank, 3), None) for _, index, _ in batch]
    assert sorted(seen) == list(range(50))


def test_repeated_augmentation(folder):
    """Three copies of an image on three ranks, one after the other on one; as many steps as without, other crops."""
    ranks = [list(Batches(50, 4, Ranks(rank, 3), 5, repeats=3)) for rank in range(3)]
    assert [len(batches) for batches in ranks] == [4, 4, 4]
    for one, two, three in zip(*(itertools.chain.from_iterable(batches) for batches in ranks), strict=True):
        assert [one, two, three] == [(*one[:2], copy) for copy in range(3)]
    assert len({index for _, index, _ in itertools.chain.from_iterable(ranks[0])}) == 16

    data = open_data(str(folder), 0.25)
    options = {"img_size": 32, "batch_size": 6, "augment": True, "workers": 0, "device": torch.device("cpu")}
    loader, _ = create_loaders(data, vit(16), repeats=3, **options)
    batches = list(loader)
    assert len(batches) == 36 // 6
    images, targets = batches[0]
    assert targets[0] == targets[1] == targets[2] and targets[3] == targets[4] == targets[5]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(images, 2))


def test_epochs_of_several_passes():
    """Each pass has every image once, in its own order and with its own crops, on one process and on two."""
    one = Batches(10, 4, Ranks(), 5, passes=3)
    both = [Batches(10, 2, Ranks(rank, 2), 5, passes=3) for rank in range(2)]
    keys = [key for batch in one for key in batch]
    assert len(one) == len(both[0]) == 7 and len(set(keys)) == 28
    for number in range(2):
        own = keys[10 * number : 10 * number + 10]
        assert sorted(index for _, index, _ in own) == list(range(10)) and {copy for *_, copy in own} == {number}
    assert [index for _, index, _ in keys[:10]] != [index for _, index, _ in keys[10:20]]
    pairs = [a + b for a, b in zip(*both, strict=True)]
    assert pairs == list(one)
    repeated = [key for batch in Batches(10, 4, Ranks(), 5, repeats=2, passes=2) for key in batch]
    assert len(set(repeated)) == len(repeated) == 20


def test_unreadable_images_are_named_counted_and_left_out(folder, tmp_path, capfd):
    broken = tmp_path / "images"
    shutil.copytree(folder, broken)
    for name in ("class0/3.png", "class1/5.png"):
        path = broken / name
        path.write_bytes(path.read_bytes()[:60])
    data = open_data(str(broken), 0.25)
    faults = find_unreadable(data)
    assert sorted(Path(fault.split(" cannot")[0]).name for fault in faults) == ["3.png", "5.png"]
    with pytest.raises(InputError, match=r"cannot be read .*and 1 more; --skip-images 2"):
        leave_out(data, faults, 1)
    leave_out(data, faults, 2)
    assert len(data.train) + len(data.val) == 46

    # Those that nobody looked for are found on the way, and told once, whoever else reads them.
    two = (Stage("soft", 1), Stage("none", 1, batch_size=6))
    job.train(small(broken, tmp_path / "skipped", check=False, skip_images=2, workers=1, stages=two))
    told = "".join(capfd.readouterr())
    assert told.count("3.png, which cannot be read") == told.count("5.png, which cannot be read") == 1
    with pytest.raises(DataError, match=r"2 images cannot be read, more than --skip-images 1: .*3.png"):
        job.train(small(broken, tmp_path / "refused", check=False, skip_images=1))


def test_pixels_of_16_bits_become_8(folder, tmp_path):
    """16-bit grey PNGs give what the same digits in 8 bits give; 32 bits have no white, and are refused by name."""
    for path in folder.rglob("*.png"):
        deep = tmp_path / "16" / path.relative_to(folder)
        deep.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 257).save(deep)
    assert Image.open(deep).mode == "I;16"
    options = {"img_size": 32, "batch_size": 8, "augment": True, "workers": 0, "device": torch.device("cpu")}
    both = [open_data(str(root), 0.25) for root in (folder, tmp_path / "16")]
    for own, others in zip(*(create_loaders(data, vit(16), **options) for data in both), strict=True):
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(own, others, strict=True))
    assert not find_unreadable(open_data(str(tmp_path / "16"), 0.25))

    odd = tmp_path / "16" / "class1" / "5.png"
    for mode in ("F", "I"):
        Image.new(mode, (32, 32), 70_000).save(odd, format="tiff")
        (fault,) = find_unreadable(open_data(str(tmp_path / "16"), 0.25))
        assert fault.startswith(f"{odd} cannot be read as an image (its pixels are 32-bit numbers, mode {mode};")
    with pytest.raises(DataError, match=r"1 images cannot be read, more than --skip-images 0: .*5.png"):
        job.train(small(tmp_path / "16", tmp_path / "run", check=False))


def test_curve_of_a_folder_with_any_name(tmp_path):
    row = {"network": "student distilled", "epoch": 1, "loss": 1.0, "top1": 50.0}
    pictures = set()
    for name in ("plain", "図形 🐱", r"a$\nothing$b", "caf\udce9"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report.write_curve(tmp_path / "curve.png", [row], None, f"student learns from teacher on {name}")
        pictures.add((tmp_path / "curve.png").read_bytes())
    assert len(pictures) == 4


def test_empty_class_folder_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "images")
    (tmp_path / "images" / "class9").mkdir()
    with pytest.raises(InputError, match="without images: class9"):
        open_data(str(tmp_path / "images"), 0.25)


def test_plan_shows_what_a_run_would_do(folder, tmp_path):
    text = plan(small(folder, tmp_path / "run", stages=(Stage("vitkd", 1, {"alpha": 1e-4}), Stage("none", 2, lr=1e-5))))
    assert "38 training, 10 validation images, 3 classes" in text
    assert "(3, 32, 32)" in text and "4 steps an epoch of 1 x 8 x 1 images" in text
    assert "vitkd(alpha=0.0001), 1 epochs, adamw, lr 0.0005" in text and "none(), 2 epochs, adamw, lr 1e-05" in text
    assert "blocks.0 (1, 17, 16)     blocks.0 (1, 17, 24)" in text
    assert "parameters beside the student, not exported" in text
    assert text.count("MB per process: student") == 2
    assert not (tmp_path / "run").exists()


def test_memory_estimate_grows_with_the_batch_as_what_autograd_keeps(folder, tmp_path):
    from fastkd.train import plan as plans

    setup = prepare.prepare(small(folder, tmp_path / "run", task="none", augment=False))
    student = setup.students[-1]
    estimated = plans.estimate(setup, student, 0)["activations"]
    assert estimated == pytest.approx(plans._saved_bytes(setup, student, setup.tasks[0], 8), rel=0.02)


def test_memory_estimate_is_each_stages(folder, tmp_path):
    """Twice the images are twice the activations; SGD keeps half of AdamW's numbers; a task with layers has more."""
    from fastkd.train import plan as plans

    three = (Stage("none", 1), Stage("none", 1, opt="sgd", batch_size=16), Stage("vitkd", 1))
    setup = prepare.prepare(small(folder, tmp_path / "run", stages=three, augment=False))
    first, second, third = (plans.estimate(setup, setup.students[-1], number) for number in range(3))
    assert second["activations"] == pytest.approx(2 * first["activations"], rel=0.02)
    assert second["optimiser"] == first["optimiser"] / 2
    assert third["student"] > first["student"] and third["activations"] > first["activations"]


def test_teacher_cache_gives_the_same_run(folder, tmp_path):
    options = {"task": "soft", "augment": False, "epochs": 2}
    job.train(small(folder, tmp_path / "without", **options))
    calls = []
    cached = small(folder, tmp_path / "with", teacher_cache=str(tmp_path / "cache"), **options)
    job.train(cached)
    (file,) = (tmp_path / "cache").iterdir()
    one, two = (read_log(tmp_path / name) for name in ("without", "with"))
    for a, b in zip(one, two, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)

    # The second run reads it, and does not run the teacher over the training images at all.
    setup = prepare.prepare(dataclasses.replace(cached, out=str(tmp_path / "again"), baseline=False))
    setup.nets.teacher.load_state_dict(load_file(tmp_path / "with" / "teacher.safetensors"))
    setup.nets.teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    loader = setup.students[-1].loaders[0]
    key = job.cache_key(setup)
    assert setup.cache.fill(setup.nets.teacher, setup.nets.student, loader, key) == file
    assert not calls
    shutil.copytree(folder, tmp_path / "others")  # of the same names: its images may be others
    others = dataclasses.replace(cached, data=str(tmp_path / "others"), out=None)
    assert job.cache_key(prepare.prepare(others)) != key
    own = (Stage("soft", 1, augment_args={"interpolation": "bicubic"}),)
    with pytest.raises(InputError, match="a stage's own augment_args"):
        prepare.check_settings(dataclasses.replace(cached, stages=own))


def test_cache_that_cannot_be_written_is_refused_before_the_teacher_trains(folder, tmp_path, monkeypatch):
    cache = str(tmp_path / "none" / "cache")
    settings = small(folder, tmp_path / "run", teacher_cache=cache, task="soft", augment=False)
    setup, access = prepare.prepare(settings), os.access
    monkeypatch.setattr(os, "access", lambda path, *mode: path != tmp_path and access(path, *mode))
    with pytest.raises(InputError, match=f"--teacher-cache: .* needs a folder that can be written, got {tmp_path}"):
        job.train(settings)
    assert not (tmp_path / "run").exists() and not (tmp_path / "none").exists()
    # What was written once is read from where nobody may write.
    ready = dataclasses.replace(settings, teacher_epochs=0)
    assert prepare.open_cache(ready, setup.data, setup.nets, setup.device, setup.ranks)


def test_teacher_of_another_size_or_with_other_classes_is_refused(folder, tmp_path):
    teacher = timm.create_model(VIT, num_classes=3, img_size=32, **vit_args(24))
    checkpoint.write_weights(tmp_path / "teacher.safetensors", teacher, VIT, {})
    settings = small(
        folder, tmp_path / "run", teacher_epochs=0, teacher_checkpoint=str(tmp_path / "teacher.safetensors")
    )
    teacher.pretrained_cfg = teacher.pretrained_cfg | {"input_size": (3, 384, 384)}
    prepare.check_teacher(settings, teacher, 3, 32)  # the user has said 32
    with pytest.raises(InputError, match=r"made for 384 px, the student for 224; .*--img-size 384"):
        prepare.check_teacher(dataclasses.replace(settings, img_size=None), teacher, 3, 224)
    other = dataclasses.replace(settings, teacher_checkpoint=None, teacher_pretrained=True)
    prepare.check_teacher(other, teacher, 3, 32)  # tokens do not ask for classes
    with pytest.raises(InputError, match="its 1000 classes are not the 3 of the data"):
        prepare.check_teacher(dataclasses.replace(other, task="soft"), teacher, 3, 32)


def test_teacher_with_other_classes_is_not_trained_here_and_has_no_top1(folder, tmp_path, monkeypatch):
    """Its tokens still teach; of 7 classes none is one of the data's."""
    other = vit_args(24, 3) | {"num_classes": 7}
    for classes in (2, 7):
        with pytest.raises(InputError, match=rf"--teacher-arg: num_classes={classes} .* the 3 classes of the data"):
            job.train(small(folder, tmp_path / "refused", teacher_args=other | {"num_classes": classes}))
    assert not (tmp_path / "refused").exists()
    weights = tmp_path / "teacher.safetensors"
    checkpoint.write_weights(weights, timm.create_model(VIT, img_size=32, **other), VIT, other)
    drawn, curve = [], report.write_curve
    monkeypatch.setattr(report, "write_curve", lambda *args: drawn.append(args[2]) or curve(*args))
    summary = job.train(
        small(folder, tmp_path / "run", teacher_args=other, teacher_epochs=0, teacher_checkpoint=str(weights))
    )
    assert summary["results"][0] == {"network": "teacher", "top1": None, "seconds_per_step": None, "loss_share": None}
    assert drawn == [None]
    assert report.table(summary["results"]).splitlines()[2].split("|")[2].strip() == "-"


def test_one_image_at_a_time(folder, tmp_path):
    """Batch norm has no variance of one number; the last image of an epoch is left out, not trained on alone."""
    bare = {"student": "resnet18", "student_args": {"channels": (8, 8, 8, 8), "stem_width": 8}, "task": "none"}
    cases = {
        "the student distilled": {"teacher": None, "batch_size": 1, **bare},
        "the student": {"teacher": None, "stages": (Stage("none", 1), Stage("none", 1, batch_size=1)), **bare},
        "the teacher": {"teacher": "resnet18", "teacher_args": bare["student_args"], "batch_size": 1, "task": "soft"},
    }
    for name, changes in cases.items():
        with pytest.raises(InputError, match=f"--batch-size: {name}.* cannot be trained on 1 image at a time"):
            job.train(small(folder, tmp_path / "refused", **changes))
    assert not (tmp_path / "refused").exists()
    one = {"batch_size": 1, "train_fraction": 0.2, "task": "soft", "baseline": False}
    job.train(small(folder, tmp_path / "one", **one))  # layer norm has no need of others
    job.train(small(folder, tmp_path / "rest", **bare | {"teacher": None, "batch_size": 37, "workers": 1}))
    assert [row["steps"] for row in read_log(tmp_path / "rest")] == ["1"]  # of 38 images


def test_diverged_loss_names_step_parts_and_layer(folder, tmp_path, monkeypatch):
    step, count = Trainee._step, 0

    def poisoned(self, epoch, number, group):
        nonlocal count
        count += self.label == "student distilled"
        if count == 6:  # the second of the second epoch
            with torch.no_grad():
                for layer in (self.network.blocks[1].mlp.fc1.bias, self.network.blocks[1].mlp.fc2.weight):
                    layer.fill_(1e30)
        return step(self, epoch, number, group)

    monkeypatch.setattr(Trainee, "_step", poisoned)
    out = tmp_path / "run"
    with pytest.raises(DivergedError) as caught:
        job.train(small(folder, out, epochs=3, checkpoint_every=1))
    words = str(caught.value)
    assert "student distilled is not finite in epoch 2, step 2: loss nan" in words and "manifold_loss nan" in words
    assert "first not finite: the output of blocks.1.mlp" in words
    # The checkpoint before the step is there and whole.
    assert checkpoint.latest(out / job.CHECKPOINTS).name.endswith("-000000001")
    weights, _ = checkpoint.read(checkpoint.latest(out / job.CHECKPOINTS))
    assert all(torch.isfinite(x).all() for tensors in weights.values() for x in tensors.values())
    assert not (out / "summary.json").exists()


def test_full_disk(folder, tmp_path, monkeypatch):
    settings = small(folder, tmp_path / "run", epochs=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**4))
    with pytest.raises(InputError, match="two checkpoints need"):
        job.train(settings)
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()

    # From the third checkpoint on there is no room.
    write, count = Path.write_bytes, 0

    def full(path, content):
        nonlocal count
        count += path.parent.name.startswith(".000003")
        if count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match="cannot be written: No space left on device"):
        job.train(settings)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run" / job.CHECKPOINTS).iterdir()] == ["000002-000000000"]
    job.train(settings, resume=True)
    assert len(read_log(tmp_path / "run")) == 5


def test_mixed_precision_follows_float32(folder, tmp_path):
    losses = {}
    for amp in ("none", "bf16", "fp16"):
        job.train(small(folder, tmp_path / amp, amp=amp, epochs=2, baseline=False))
        losses[amp] = [float(row["loss"]) for row in read_log(tmp_path / amp) if row["network"] == "student distilled"]
    assert losses["none"][1] < losses["none"][0]
    for amp in ("bf16", "fp16"):
        assert losses[amp] == pytest.approx(losses["none"], rel=0.01)
        assert losses[amp] != losses["none"]


def test_hugging_face_data(folder, tmp_path):
    """With random access the same run as from the folder; in order it trains as well; refusals are one line."""
    pytest.importorskip("datasets")
    images = tmp_path / "images"
    for part, path in itertools.product(("train", "validation"), folder.rglob("*.png")):
        copy = images / part / path.parent.name / f"{int(path.stem):02}.png"  # one order by name and by number
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    options = {"data_root": str(tmp_path / "cache"), "batch_size": 4, "baseline": False}

    weights = {}
    for data in (str(images), f"hfds/{images}"):
        out = tmp_path / data.partition("/")[0]
        job.train(small(folder, out, data=data, **options))
        weights[data] = load_file(out / "student.safetensors")
    expected, found = weights.values()
    assert all(torch.equal(expected[key], found[key]) for key in expected)

    in_order = {"data": f"hfids/{images}", "num_classes": 3} | options
    correct = job.train(small(folder, tmp_path / "in_order", workers=1, **in_order))["results"][-1]["top1"] * 48 / 100
    assert correct == pytest.approx(round(correct))  # of 48 images
    with pytest.raises(InputError, match="--workers: 2 need a shard each to train on, a process gets 1"):
        job.train(small(folder, tmp_path / "more", workers=2, **in_order))
    assert not (tmp_path / "more").exists()


def test_tensorboard(folder, tmp_path, monkeypatch):
    for package, value in (("tensorboard", True), ("wandb", "project")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(InputError, match=f"--{package}: needs the package {package}"):
            job.train(small(folder, tmp_path / "without", baseline=False, **{package: value}))
    assert not (tmp_path / "without").exists()
    monkeypatch.undo()
    pytest.importorskip("tensorboard")
    job.train(small(folder, tmp_path / "run", tensorboard=True, baseline=False))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / job.EVENTS / "student_distilled")).Reload()
    (row,) = (row for row in read_log(tmp_path / "run") if row["network"] == "student distilled")
    for name in ("loss", "intra", "top1"):
        assert events.Scalars(name)[0].value == pytest.approx(float(row[name]), rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_run_on_a_gpu(folder, tmp_path, amp):
    summary = job.train(small(folder, tmp_path, device="cuda", amp=amp, epochs=2))
    assert 0 < summary["results"][2]["loss_share"] < 1
    assert summary["machine"].startswith(torch.cuda.get_device_name())
