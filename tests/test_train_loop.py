"""Whole runs of the trainer against a loop in timm's own order, written from timm's parts: every step, to the bit."""

import dataclasses
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task")
pytest.importorskip("PIL.Image")

from pairs import in_pairs  # noqa: E402
from timm.data import Mixup  # noqa: E402
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.scheduler import create_scheduler_v2  # noqa: E402
from timm.utils import ModelEmaV3  # noqa: E402

from fastkd.functional import soft_target_loss  # noqa: E402
from fastkd.train import checkpoint, job, prepare, report  # noqa: E402
from fastkd.train.data import Loader, seed_all  # noqa: E402
from fastkd.train.loop import Trainee  # noqa: E402
from fastkd.train.settings import Settings, Stage, stages  # noqa: E402

TEACHER = "vit_tiny_patch16_224"  # normalised by other means than both students
TEACHER_ARGS = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "drop_path_rate": 0.5}
STUDENTS = {
    "vit": ("deit_tiny_patch16_224", {"patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}),
    "cnn": ("resnet18", {"channels": (8, 8, 8, 8), "stem_width": 8}),
}
DROP = {"drop_path_rate": 0.3}
FIRST = Stage("soft", 2, {"logit_options": {"temperature": 2.0}})
SECOND = Stage("none", 1, lr=2e-2, opt="sgd", sched="poly", warmup_epochs=0, min_lr=1e-3, batch_size=12)


class Step(NamedTuple):
    """What a step leaves: learning rates of the groups, weights, their average."""

    rates: list[float]
    weights: dict[str, Tensor]
    average: dict[str, Tensor]


def copied(network: nn.Module | None) -> dict[str, Tensor]:
    return {} if network is None else {name: x.clone() for name, x in network.state_dict().items()}


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


@torch.no_grad()
def top1(network: nn.Module, loader: Loader, context: Any) -> float:
    right = count = 0
    for images, targets in loader:
        with context:
            right += int((network.eval()(images).argmax(1) == targets).sum())
        count += len(targets)
    return 100 * right / count


def renormalised(images: Tensor, student: nn.Module, teacher: nn.Module) -> Tensor:
    """The images as the teacher takes them: x std_s + mean_s is the pixel, (pixel - mean_t) / std_t its input."""
    (mean_s, std_s), (mean_t, std_t) = (
        [torch.tensor(network.pretrained_cfg[key], dtype=torch.float64).view(3, 1, 1) for key in ("mean", "std")]
        for network in (student, teacher)
    )
    return images * (std_s / std_t).float() + ((mean_s - mean_t) / std_t).float()


def plain_run(settings: Settings, teacher: nn.Module, loaders: tuple[Loader, ...], val_loader: Loader):
    """The steps and the log's rows of timm's training loop."""
    size = {"img_size": 32} if "embed_dim" in settings.student_args else {}
    seed_all(settings.seed)
    student = timm.create_model(settings.student, num_classes=3, **size, **settings.student_args)
    teacher.eval()
    autocast = torch.autocast("cpu", torch.float16, enabled=settings.amp == "fp16")
    ema = None if settings.ema is None else ModelEmaV3(student, decay=settings.ema, use_warmup=True)
    mixing = settings.mixup > 0 or settings.cutmix > 0
    mix = Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=3) if mixing else None
    criterion = SoftTargetCrossEntropy() if mixing else LabelSmoothingCrossEntropy(settings.smoothing)
    if not mixing and not settings.smoothing:
        criterion = nn.CrossEntropyLoss()
    table = None
    if settings.teacher_cache is not None:
        with torch.no_grad():
            table = torch.cat([teacher(renormalised(x, student, teacher)) for x, _ in loaders[0].in_order()])

    steps: list[Step] = []
    rows: list[dict[str, float]] = []
    updates = epoch = 0
    for stage, loader in zip(stages(settings), loaders, strict=True):
        options = {"layer_decay": stage.layer_decay, **stage.opt_args}
        optimizer = create_optimizer_v2(student, opt=stage.opt, lr=stage.lr, weight_decay=stage.weight_decay, **options)
        in_epoch = math.ceil(len(loader) / settings.accumulate)
        scheduler, _ = create_scheduler_v2(
            optimizer, sched=stage.sched, num_epochs=stage.epochs, warmup_epochs=stage.warmup_epochs,
            warmup_lr=settings.warmup_lr, min_lr=stage.min_lr, step_on_epochs=False, updates_per_epoch=in_epoch,
        )  # fmt: skip
        scaler = torch.amp.GradScaler("cpu", enabled=settings.amp == "fp16")
        in_stage = 0
        for _ in range(stage.epochs):
            sums = {"loss": 0.0, "task_loss": 0.0, "soft_loss": 0.0}
            batches, number, done = loader.epoch(epoch), 0, 0
            while group := list(islice(batches, settings.accumulate)):
                used = rates(optimizer)
                seed_all(settings.seed, epoch, done, 0)
                group = [(x, y) if mix is None else mix(x, y) for x, y in group]
                student.train()
                for images, targets in group:
                    known = None if table is None else table[loader.batches.indices(epoch, number)]
                    with autocast:
                        logits = student(images)
                        parts = {"task_loss": criterion(logits, targets)}
                        if stage.task == "soft":
                            if known is None:
                                with torch.no_grad():
                                    known = teacher(renormalised(images, student, teacher))
                            parts["soft_loss"] = soft_target_loss(logits, known, temperature=2.0)
                        parts["loss"] = sum(parts.values())
                    for name, value in parts.items():
                        sums[name] += value.item() / len(group)
                    scaler.scale(parts["loss"] / len(group)).backward()
                    number += 1
                if settings.clip_grad is not None:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(student.parameters(), settings.clip_grad)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                done, in_stage, updates = done + 1, in_stage + 1, updates + 1
                if ema is not None:
                    ema.update(student, step=updates)
                scheduler.step_update(in_stage)
                steps.append(Step(used, copied(student), copied(ema and ema.module)))
            assert done == in_epoch
            row = {name: value / done for name, value in sums.items() if value}
            row |= {"lr": rates(optimizer)[0], "steps": done, "top1": top1(student, val_loader, autocast)}
            if ema is not None:
                row["top1_ema"] = top1(ema.module, val_loader, autocast)
            rows.append(row)
            epoch += 1
    return steps, rows


class StoppedError(Exception):
    pass


@pytest.fixture
def recorded(monkeypatch) -> Iterator[dict[str, Any]]:
    """The steps of the student that learns from the teacher; "stop" is the number before which the run ends once."""
    found: dict[str, Any] = {"steps": [], "stop": -1}
    step = Trainee._step

    def recording(trainee: Trainee, *arguments: Any) -> None:
        if trainee.label == "student distilled":
            if len(found["steps"]) == found["stop"]:
                found["stop"] = -1
                raise StoppedError
            used = rates(trainee.optimizer)
            step(trainee, *arguments)
            found["steps"].append(Step(used, copied(trainee.network), copied(trainee.ema and trainee.ema.module)))
        else:
            step(trainee, *arguments)

    monkeypatch.setattr(Trainee, "_step", recording)
    monkeypatch.setattr(report, "write_curve", lambda *_: None)
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(found[name], x), f"{what}: {name} is off by {(found[name] - x).abs().max():.3g}"


OPTIONS = {
    "student": ["vit", "cnn"],
    "mixing": ["", "mixup", "cutmix"],
    "smoothing": [0.0, 0.1],
    "accumulate": [1, 3],  # of 4 batches in an epoch: the last group is a single one
    "ema": [None, 0.55],  # reached after three steps of its warm-up
    "warmup": [0, 1],
    "clip": [None, 0.5],
    "opt": ["adamw", "sgd"],
    "layer_decay": [None, 0.7],
    "stop": [-1, 1, 5],  # within the first epoch, or with steps of 4 a second one
    "cache": [False, True],
    "amp": ["none", "fp16"],
    "second": [False, True],
}


def allowed(call: dict[str, Any]) -> bool:
    return not (call.get("cache") and call.get("mixing"))


@in_pairs(OPTIONS, allowed=allowed)
def test_run_is_timms_loop(
    folder, tmp_path, recorded, student, mixing, smoothing, accumulate, ema, warmup, clip, opt, layer_decay, stop,
    cache, amp, second,
):  # fmt: skip
    name, arguments = STUDENTS[student]
    torch.manual_seed(3)
    teacher = timm.create_model(TEACHER, num_classes=3, img_size=32, **TEACHER_ARGS)
    nn.init.normal_(teacher.head.weight)  # decisions that differ by image
    checkpoint.write_weights(tmp_path / "teacher.safetensors", teacher, TEACHER, {})
    settings = Settings(
        data=str(folder), out=str(tmp_path / "run"), img_size=32, batch_size=8, workers=0, device="cpu", check=False,
        student=name, student_args=arguments | DROP, teacher=TEACHER, teacher_args=TEACHER_ARGS, teacher_epochs=0,
        teacher_checkpoint=str(tmp_path / "teacher.safetensors"), baseline=False, augment=not cache, seed=7,
        stages=(FIRST, *((SECOND,) if second else ())), accumulate=accumulate, ema=ema,
        teacher_cache=str(tmp_path / "cache") if cache else None, warmup_epochs=warmup, warmup_lr=1e-4, min_lr=1e-5,
        lr=5e-3 if opt == "adamw" else 5e-2, weight_decay=0.3, layer_decay=layer_decay, opt=opt, clip_grad=clip,
        mixup=0.8 if mixing == "mixup" else 0.0, cutmix=1.0 if mixing == "cutmix" else 0.0, smoothing=smoothing,
        amp=amp, checkpoint_every=1,
    )  # fmt: skip
    setup = prepare.prepare(dataclasses.replace(settings, out=None))
    expected, rows = plain_run(settings, teacher, setup.students[0].loaders, setup.students[0].val_loader)

    recorded["stop"] = stop
    if 0 <= stop < len(expected):
        with pytest.raises(StoppedError):
            job.train(settings)
        job.train(settings, resume=True)
    else:
        job.train(settings)
    assert len(recorded["steps"]) == len(expected)
    for number, (own, theirs) in enumerate(zip(recorded["steps"], expected, strict=True)):
        assert own.rates == theirs.rates, f"learning rates of step {number}"
        assert_equal(own.weights, theirs.weights, f"weights after step {number}")
        assert_equal(own.average, theirs.average, f"average after step {number}")
    for own, theirs in zip(report_rows(tmp_path / "run"), rows, strict=True):
        own = {key: float(value) for key, value in own.items() if key in theirs}
        assert own == pytest.approx(theirs, rel=1e-5)


def report_rows(out: Path) -> list[dict[str, str]]:
    import csv

    with (out / "log.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["network"] == "student distilled"]
