"""Gram anchoring: the loss, relations of a pretrained network that it keeps, refresh, resume and other sizes."""

import csv

import numpy as np
import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task")

from safetensors.torch import load_file  # noqa: E402

from fastkd import capture, reference  # noqa: E402
from fastkd.functional import relation_loss  # noqa: E402
from fastkd.train import InputError, checkpoint, job  # noqa: E402
from fastkd.train.data import Digits  # noqa: E402
from fastkd.train.models import copy_at  # noqa: E402
from fastkd.train.settings import settings_from  # noqa: E402
from fastkd.train.tasks import create_task  # noqa: E402
from tests._support.runs import invoke  # noqa: E402

VIT = "vit_tiny_patch16_224"
SMALL = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
IMAGES, TARGETS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])


def vit(seed: int = 0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(VIT, **({"img_size": 32, "num_classes": 3} | SMALL | changes))


def tokens(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), capture.tokens(model.eval(), ["norm"]) as captured:
        model(images)
    return captured[0]


def test_gram_is_dinov3s_loss():
    student, teacher = vit(), vit(1)
    task = create_task("gram", student, teacher, options={"weight": 3.0}).train()
    result = task(IMAGES, TARGETS)
    expected = reference.relation_loss(tokens(student, IMAGES).double(), tokens(teacher, IMAGES).double())
    torch.testing.assert_close(result["gram_loss"].double(), expected)
    torch.testing.assert_close(result["loss"].detach(), result["task_loss"] + 3 * result["gram_loss"])
    assert task.matched == [("norm", "norm")]
    assert (
        create_task("gram", timm.create_model("resnet18", num_classes=3), vit(), img_size=32).matched[0][0] == "layer4"
    )


def test_teacher_sees_larger_images():
    """Twice the side: 8 x 8 tokens, averaged to the student's 4 x 4."""
    student, teacher = vit(), vit(1)
    task = create_task("gram", student, teacher, options={"teacher_size": 64}).train()
    large = nn.functional.interpolate(IMAGES, (64, 64), mode="bicubic", antialias=True)
    t = tokens(copy_at(teacher, 64), large)
    assert t.shape == (4, 64, 24)
    maps = nn.functional.avg_pool2d(t.mT.unflatten(2, (8, 8)), 2).flatten(2).mT
    expected = relation_loss(tokens(student, IMAGES), maps)
    torch.testing.assert_close(task(IMAGES, TARGETS)["gram_loss"], expected)


def test_refresh_copies_the_student_once_an_epoch():
    student = vit()
    task = create_task("gram", student, copy_at(student, 32), options={"refresh": 2}).train()
    copies = []
    for epoch in range(5):
        task.set_epoch(epoch)
        copies.append(task.teacher.head.bias.clone())
        with torch.no_grad():
            student.head.bias += 1
        task.set_epoch(epoch)  # as a resume within the epoch
        assert torch.equal(copies[-1], task.teacher.head.bias)
    assert [float(bias[0]) for bias in copies] == [0, 0, 2, 2, 4]
    assert not any(p.requires_grad for p in task.teacher.parameters()) and not task.teacher.training
    with pytest.raises(InputError, match="refresh: needs a teacher of the student's architecture"):
        create_task("gram", vit(), vit(depth=4), options={"refresh": 1})


def pretrained(path) -> nn.Module:
    """A network that knows of each patch of a digit how much ink it has."""
    model, images = vit(7), digits()
    head = nn.Linear(24, 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], 3e-3)
    ink = nn.functional.avg_pool2d(images[:, :1], 8).flatten(1)[..., None]
    for step in range(40):
        rows = torch.arange(step * 32, step * 32 + 32) % len(images)
        loss = (head(model.forward_features(images[rows])[:, 1:]) - ink[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    checkpoint.write_weights(path, model, VIT, SMALL)
    return model


def digits() -> torch.Tensor:
    """(256, 3, 32, 32), normalised for the network."""
    images = [np.asarray(image.resize((32, 32))) for image, _ in Digits(train=False)][:256]
    return torch.from_numpy(np.stack(images)).float().permute(0, 3, 1, 2) / 127.5 - 1


def test_relations_are_kept(folder, tmp_path):
    """Fine-tuning on three digits, without and with the anchor; and a resume with a refreshed teacher."""
    start = pretrained(tmp_path / "start.safetensors")
    common = {
        "data": str(folder), "img_size": 32, "batch_size": 8, "workers": 0, "device": "cpu", "student": VIT,
        "student_args": SMALL, "student_checkpoint": str(tmp_path / "start.safetensors"), "teacher": "self",
        "epochs": 10, "warmup_epochs": 0, "lr": 1e-3, "baseline": False, "augment": False,
    }  # fmt: skip
    images = digits()[:64]
    drift = {}
    for task in ("none", "gram"):
        job.train(settings_from(common | {"task": task, "out": str(tmp_path / task)}))
        with (tmp_path / task / "log.csv").open() as file:
            losses = [float(row["task_loss"] or row["loss"]) for row in csv.DictReader(file)]
        assert losses[-1] < losses[0]
        trained = vit()
        trained.load_state_dict(load_file(tmp_path / task / "student.safetensors"))
        drift[task] = float(relation_loss(tokens(trained, images), tokens(start, images)))
    assert drift["gram"] < drift["none"] / 5


def test_resume_with_a_refreshed_teacher(folder, tmp_path, monkeypatch):
    checkpoint.write_weights(tmp_path / "start.safetensors", vit(7), VIT, SMALL)
    common = {
        "data": str(folder), "img_size": 32, "batch_size": 8, "workers": 0, "device": "cpu", "student": VIT,
        "student_args": SMALL, "student_checkpoint": str(tmp_path / "start.safetensors"), "teacher": "self",
        "task": "gram", "task_args": {"refresh": 1}, "epochs": 3, "warmup_epochs": 0, "lr": 2e-3, "baseline": False,
        "checkpoint_every": 1,
    }  # fmt: skip
    job.train(settings_from(common | {"out": str(tmp_path / "whole")}))
    settings, save, count = settings_from(common | {"out": str(tmp_path / "cut")}), job.Run._save, 0

    def cut(self, place):
        nonlocal count
        save(self, place)
        count += 1
        if count == 7:  # in the midst of the second epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(job.Run, "_save", cut)
    with pytest.raises(KeyboardInterrupt):
        job.train(settings)
    monkeypatch.undo()
    job.train(settings, resume=True)
    one, two = ((tmp_path / name / "student.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == two


def test_self_needs_a_trained_student(folder, tmp_path):
    for given, words in (
        ({"teacher": "self"}, "--teacher: self needs a trained student"),
        (
            {"teacher": "self", "student_pretrained": True, "teacher_epochs": 2},
            "--teacher: self is a copy of the student",
        ),
        (
            {"teacher": "self", "student_pretrained": True, "shard": True, "task_args": {"refresh": 1}},
            "--shard: does not",
        ),
    ):
        with pytest.raises(InputError, match=words):
            job.train(settings_from({"data": str(folder), "out": str(tmp_path / "no"), "task": "gram"} | given))
    result = invoke("train", f"--data={folder}", "--task=gram", "--teacher=self", "--device=cpu")
    assert result.exit_code == 2 and "--student-pretrained or --student-checkpoint" in result.stderr
