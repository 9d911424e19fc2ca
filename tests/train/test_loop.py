"""Whole runs of the trainer against a loop in timm's own order, written from timm's parts: every step, to the bit."""

import csv
import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task")
pytest.importorskip("PIL.Image")

from timm.data import Mixup  # noqa: E402
from timm.data.random_erasing import RandomErasing  # noqa: E402
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.scheduler import create_scheduler_v2  # noqa: E402
from timm.utils import ModelEmaV3  # noqa: E402

from fastkd.functional import soft_target_loss  # noqa: E402
from fastkd.train import checkpoint, job, prepare, report  # noqa: E402
from fastkd.train.data import Loader, seed_all  # noqa: E402
from fastkd.train.loop import Trainee  # noqa: E402
from fastkd.train.settings import Settings, Stage  # noqa: E402
from tests._support.pairs import in_pairs  # noqa: E402

TEACHER = "vit_tiny_patch16_224"  # normalised by other means than both students
TEACHER_ARGS = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "drop_path_rate": 0.5}
STUDENTS = {
    "vit": ("deit_tiny_patch16_224", {"patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}),
    "cnn": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8), "stem_width": 8}),
}
DROP = {"drop_path_rate": 0.3}
SOFT = {"logit_options": {"temperature": 2.0}}
FIRST = Stage("soft", 2, SOFT)
SECOND = Stage(
    "soft", 2, SOFT | {"logit_ramp_epochs": 2}, lr=2e-2, opt="sgd", sched="poly", warmup_epochs=0, min_lr=1e-3,
    weight_decay=0.0, layer_decay=0.5, batch_size=12,
)  # fmt: skip


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
def scores(network: nn.Module, loader: Loader, context: Any) -> dict[str, float]:
    right, loss, count = 0, 0.0, 0
    for images, targets in loader:
        with context:
            logits = network.eval()(images).float()
        right += int((logits.argmax(1) == targets).sum())
        loss += nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        count += len(targets)
    return {"top1": 100 * right / count, "val_loss": loss / count}


def renormalised(images: Tensor, student: nn.Module, teacher: nn.Module) -> Tensor:
    """The images as the teacher takes them: x std_s + mean_s is the pixel, (pixel - mean_t) / std_t its input."""
    (mean_s, std_s), (mean_t, std_t) = (
        [torch.tensor(network.pretrained_cfg[key], dtype=torch.float64).view(3, 1, 1) for key in ("mean", "std")]
        for network in (student, teacher)
    )
    return images * (std_s / std_t).float() + ((mean_s - mean_t) / std_t).float()


def criterion_of(settings: Settings) -> nn.Module:
    if settings.mixup > 0 or settings.cutmix > 0:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(settings.smoothing) if settings.smoothing else nn.CrossEntropyLoss()


class PlainLoop:
    """timm's training loop for a student that learns from soft targets beside labels."""

    def __init__(self, settings: Settings, teacher: nn.Module, loaders: tuple[Loader, ...], val_loader: Loader) -> None:
        size = {"img_size": 32} if "embed_dim" in settings.student_args else {}
        seed_all(settings.seed)
        self.student = timm.create_model(settings.student, num_classes=3, **size, **settings.student_args)
        self.settings, self.teacher, self.loaders, self.val_loader = settings, teacher.eval(), loaders, val_loader
        self.autocast = torch.autocast("cpu", torch.float16, enabled=settings.amp == "fp16")
        self.ema = None if settings.ema is None else ModelEmaV3(self.student, decay=settings.ema, use_warmup=True)
        mixing = {"mixup_alpha": settings.mixup, "cutmix_alpha": settings.cutmix}
        mix = Mixup(**mixing, label_smoothing=settings.smoothing, num_classes=3) if any(mixing.values()) else None
        erase = RandomErasing(settings.erase, mode="pixel", device="cpu") if settings.erase else lambda x: x
        self.prepared = lambda x, y: (erase(x), y) if mix is None else mix(erase(x), y)
        self.criterion = criterion_of(settings)
        self.table: Tensor | None = None
        if settings.teacher_cache is not None:
            with torch.no_grad():
                self.table = torch.cat([self.taught(x) for x, _ in loaders[0].in_order()])
        self.steps: list[Step] = []
        self.rows: list[dict[str, float]] = []

    @torch.no_grad()
    def taught(self, images: Tensor) -> Tensor:
        return self.teacher(renormalised(images, self.student, self.teacher))

    def run(self) -> None:
        settings, epoch = self.settings, 0
        for given, loader in zip(settings.stages, self.loaders, strict=True):
            stage = SimpleNamespace(**{k: getattr(settings, k) if v is None else v for k, v in vars(given).items()})
            options = {"layer_decay": stage.layer_decay, **stage.opt_args}
            optimizer = create_optimizer_v2(
                self.student, opt=stage.opt, lr=stage.lr, weight_decay=stage.weight_decay, **options
            )
            in_epoch = math.ceil(len(loader) / settings.accumulate)
            scheduler, _ = create_scheduler_v2(
                optimizer, sched=stage.sched, num_epochs=stage.epochs, warmup_epochs=stage.warmup_epochs,
                warmup_lr=settings.warmup_lr, min_lr=stage.min_lr, step_on_epochs=False, updates_per_epoch=in_epoch,
            )  # fmt: skip
            scaler = torch.amp.GradScaler("cpu", enabled=settings.amp == "fp16")
            updates = 0
            for own_epoch in range(stage.epochs):
                ramp_epochs = stage.options.get("logit_ramp_epochs", 0)
                weight = min(own_epoch / ramp_epochs, 1.0) if ramp_epochs else 1.0
                sums: dict[str, float] = {}
                batches = loader.epoch(epoch)
                for step in range(in_epoch):
                    used = rates(optimizer)
                    self.accumulate(
                        epoch, step, list(islice(batches, settings.accumulate)), loader, weight, scaler, sums
                    )
                    if settings.clip_grad is not None:
                        scaler.unscale_(optimizer)
                        nn.utils.clip_grad_norm_(self.student.parameters(), settings.clip_grad)
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
                    updates += 1
                    scheduler.step_update(updates)
                    if self.ema is not None:
                        self.ema.update(self.student, step=len(self.steps) + 1)
                    self.steps.append(Step(used, copied(self.student), copied(self.ema and self.ema.module)))
                assert next(batches, None) is None
                self.rows.append({name: value / in_epoch for name, value in sums.items()} | self.judged())
                self.rows[-1] |= {"lr": rates(optimizer)[0], "steps": in_epoch}
                epoch += 1

    def accumulate(
        self,
        epoch: int,
        step: int,
        group: list[Any],
        loader: Loader,
        weight: float,
        scaler: Any,
        sums: dict[str, float],
    ) -> None:
        """The gradient of a step, the mean of its batches'."""
        seed_all(self.settings.seed, epoch, step, 0)
        self.student.train()
        for number, (images, targets) in enumerate([self.prepared(*batch) for batch in group]):
            with self.autocast:
                logits = self.student(images)
                if self.table is None:
                    known = self.taught(images)
                else:
                    known = self.table[loader.batches.indices(epoch, step * self.settings.accumulate + number)]
                parts = {"task_loss": self.criterion(logits, targets)}
                parts["soft_loss"] = soft_target_loss(logits, known, temperature=2.0)
                parts["loss"] = parts["task_loss"] + weight * parts["soft_loss"]
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value.item() / len(group)
            scaler.scale(parts["loss"] / len(group)).backward()

    def judged(self) -> dict[str, float]:
        found = scores(self.student, self.val_loader, self.autocast)
        if self.ema is not None:
            average = scores(self.ema.module, self.val_loader, self.autocast)
            found |= {f"{name}_ema": value for name, value in average.items()}
        return found


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


OPTIONS = {  # the first call has all that is on together
    "student": ["vit", "cnn"],
    "mixing": ["mixup", "cutmix", ""],
    "smoothing": [0.1, 0.0],
    "accumulate": [3, 1],  # of 4 batches in an epoch: the last group is a single one
    "ema": [0.55, None],  # reached after three steps of its warm-up
    "warmup": [1, 0],
    "clip": [0.5, None],
    "opt": ["sgd", "adamw"],
    "layer_decay": [0.7, None],
    "stop": [4, 1, 6, -1],  # between two epochs, or within one
    "cache": [False, True],
    "amp": ["fp16", "none"],
    "second": [True, False],
    "erase": [0.5, 0.0],
}


def allowed(call: dict[str, Any]) -> bool:
    if call.get("student") == "cnn" and call.get("amp") == "fp16":  # such convolutions are slow on CPUs
        return False
    return not (call.get("cache") and (call.get("mixing") or call.get("erase")))


@in_pairs(OPTIONS, allowed=allowed)
def test_run_is_timms_loop(
    folder, tmp_path, monkeypatch, recorded, student, mixing, smoothing, accumulate, ema, warmup, clip, opt,
    layer_decay, stop, cache, amp, second, erase,
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
        erase=erase, amp=amp, checkpoint_every=1,
    )  # fmt: skip
    setup = prepare.prepare(dataclasses.replace(settings, out=None))
    # Its scale grows until gradients overflow, and a step without one follows.
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**10, growth_interval=1))
    plain = PlainLoop(settings, teacher, setup.students[0].loaders, setup.students[0].val_loader)
    plain.run()
    expected, rows = plain.steps, plain.rows
    head = "head.weight" if student == "vit" else "fc.weight"
    changes = sum(not torch.equal(a.weights[head], b.weights[head]) for a, b in pairwise(expected))
    assert changes >= len(expected) / 2  # a step whose gradients overflow leaves them

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
    with (out / "log.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["network"] == "student distilled"]
