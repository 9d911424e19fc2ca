"""The whole of `fastkd train`: check everything, train the teacher where needed, then the students side by side."""

import copy
import dataclasses
import datetime as dt
import platform
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data import Mixup
from timm.task import ClassificationTask
from timm.utils import random_seed
from torch import nn
from tqdm import tqdm

from fastkd._version import __version__
from fastkd.info import cpu_name
from fastkd.losses import ManifoldLoss

from . import InputError, report
from .clock import LossClock
from .data import Data, check_images, create_loaders, open_data
from .loop import AMP_DTYPES, Trainee, criterion
from .models import create_model, load_weights, match_layers, pretrained_cfg
from .report import Row
from .settings import Settings
from .tasks import ManifoldTask

FILES = (
    "config.json", "log.csv", "curve.png", "teacher.safetensors", "student.safetensors", "student_alone.safetensors",
    "summary.json",
)  # fmt: skip


class Networks(NamedTuple):
    """Teacher and student on their device, the arguments that make them again, and the layers that are matched."""

    teacher: nn.Module
    teacher_args: dict[str, Any]
    student: nn.Module
    student_args: dict[str, Any]
    student_layers: list[str]
    teacher_layers: list[str]


def train(settings: Settings) -> dict[str, Any]:
    """Distil as told and write the results into the output folder; returns what summary.json holds.

    Raises:
        InputError: before anything is written or trained.
        DivergedError: a loss that is not finite; the files of the last whole epoch stay.
    """
    began = time.perf_counter()
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    data = open_data(settings.data, settings.val_fraction)
    check_settings(settings)
    device = choose_device(settings)
    out = choose_folder(settings)
    nets, img_size = create_networks(settings, len(data.classes), device)
    teacher, students = create_trainees(settings, data, nets, img_size, device)
    if settings.check:
        check_images(data)

    clear_folder(out)
    config = dataclasses.asdict(settings) | {
        "img_size": img_size, "device": str(device), "classes": data.classes, "student_args": nets.student_args,
        "teacher_args": nets.teacher_args, "student_layers": nets.student_layers, "teacher_layers": nets.teacher_layers,
    }  # fmt: skip
    report.write_json(out / "config.json", config)

    rows: list[Row] = []
    steps = sum(trainee.epochs * len(trainee.loader) for trainee in (teacher, *students))
    with tqdm(total=steps, unit="step", disable=None, smoothing=0.05) as bar:
        teacher_top1 = train_teacher(settings, teacher, nets, out, rows, bar)
        train_students(settings, students, nets, teacher_top1, out, rows, bar)
    summary = {
        "results": [result(teacher, rows, teacher_top1), *(result(student, rows) for student in students)],
        "seconds": time.perf_counter() - began,
        "images": {"train": len(data.train), "validation": len(data.val)},  # type: ignore[arg-type]
        "versions": {
            "fastkd": __version__, "torch": torch.__version__, "timm": timm.__version__,
            "python": platform.python_version(),
        },
        "machine": f"{device_name(device)}, {torch.get_num_threads()} threads",
        "date": dt.date.today().isoformat(),
        "config": config,
    }  # fmt: skip
    report.write_json(out / "summary.json", summary)
    return summary | {"out": str(out)}


def check_settings(settings: Settings) -> None:
    """What can be told without models."""
    if settings.teacher is None:
        raise InputError("--teacher: a folder of images needs the name of a timm model to learn from")
    if settings.teacher_epochs < 1 and not settings.teacher_pretrained and settings.teacher_checkpoint is None:
        raise InputError(
            "--teacher-epochs: 0 leaves the teacher untrained; give some, --teacher-checkpoint or --teacher-pretrained"
        )
    if settings.amp not in AMP_DTYPES:
        raise InputError(f"--amp: {settings.amp} is not one of {', '.join(AMP_DTYPES)}")
    if settings.mixup > 0 and settings.batch_size % 2:
        raise InputError(f"--mixup: needs an even --batch-size, got {settings.batch_size}")


def choose_device(settings: Settings) -> torch.device:
    name = settings.device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device: {name} cannot be used: {' '.join(str(error).split())[:200]}") from error
    return device


def choose_folder(settings: Settings) -> Path:
    """The folder for the results: the one asked for, or the first free of runs/NAME, runs/NAME-2, ..."""
    if settings.out is None:
        name = Path(settings.data).resolve().name
        number = 1
        while (out := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
            number += 1
        return out
    out = Path(settings.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file, not a folder")
    if (out / "summary.json").exists() and not settings.overwrite:
        raise InputError(f"--out: {out} holds a finished run; name another folder or give --overwrite")
    if settings.teacher_checkpoint and Path(settings.teacher_checkpoint).resolve().parent == out.resolve():
        raise InputError(f"--out: {out} holds the --teacher-checkpoint, which the run would replace; name another")
    return out


def clear_folder(out: Path) -> None:
    """Makes the folder, and takes an earlier run's files out of it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"--out: {out} cannot be written: {error.strerror}") from error


def create_networks(settings: Settings, num_classes: int, device: torch.device) -> tuple[Networks, int]:
    """Both models, checked against each other, and the image size."""
    assert settings.teacher is not None
    random_seed(settings.seed)
    student, student_args = create_model(
        "student", settings.student, settings.student_args, num_classes=num_classes, img_size=settings.img_size
    )
    img_size = settings.img_size or pretrained_cfg(student)["input_size"][-1]
    teacher, teacher_args = create_model(
        "teacher", settings.teacher, settings.teacher_args, num_classes=num_classes, img_size=img_size,
        pretrained=settings.teacher_pretrained,
    )  # fmt: skip
    if settings.teacher_checkpoint is not None:
        load_weights("teacher", teacher, settings.teacher, settings.teacher_checkpoint)
    layers = match_layers(student, teacher, settings.student_layers, settings.teacher_layers, img_size)
    return Networks(teacher.to(device), teacher_args, student.to(device), student_args, *layers), img_size


def create_trainees(
    settings: Settings, data: Data, nets: Networks, img_size: int, device: torch.device
) -> tuple[Trainee, list[Trainee]]:
    """The teacher and one or two copies of the student, each with what trains it."""
    loading: dict[str, Any] = {
        "img_size": img_size, "batch_size": settings.batch_size, "augment": settings.augment,
        "workers": settings.workers, "device": device,
    }  # fmt: skip
    mixup = None
    if settings.mixup > 0:
        mixup = Mixup(settings.mixup, label_smoothing=settings.smoothing, num_classes=len(data.classes))
    loss = criterion(mixup is not None, settings.smoothing)
    common = {key: getattr(settings, key) for key in ("weight_decay", "clip_grad", "amp", "seed")}
    common |= {"mixup": mixup, "device": device}
    first: dict[str, Any] = {"epochs": settings.teacher_epochs, "warmup_epochs": 1, "lr": settings.teacher_lr}
    then = {key: getattr(settings, key) for key in ("epochs", "warmup_epochs", "lr", "opt", "sched")}

    task = ClassificationTask(nets.teacher, loss, device=device, verbose=False)
    loaders = create_loaders(data, nets.teacher, **loading)
    teacher = Trainee("teacher", nets.teacher, task, loaders, opt="adamw", sched="cosine", **first, **common)

    loaders = create_loaders(data, nets.student, **loading)
    alone = copy.deepcopy(nets.student)
    clock = LossClock()
    distilling = ManifoldTask(
        nets.student,
        nets.teacher,
        student_layers=nets.student_layers,
        teacher_layers=nets.teacher_layers,
        criterion=loss,
        loss=ManifoldLoss(
            intra=settings.intra, inter=settings.inter, random=settings.random, num_samples=settings.num_samples
        ),
        manifold_weight=settings.weight,
        clock=clock,
        device=device,
        verbose=False,
    )
    students = []
    try:
        if settings.baseline:
            task = ClassificationTask(alone, loss, device=device, verbose=False)
            students.append(Trainee("student alone", alone, task, loaders, **then, **common))
        students.append(Trainee("student distilled", nets.student, distilling, loaders, clock=clock, **then, **common))
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:  # timm's factories use them all
        raise InputError(f"--opt {settings.opt} or --sched {settings.sched}: {error}") from error
    return teacher, students


def train_teacher(
    settings: Settings, teacher: Trainee, nets: Networks, out: Path, rows: list[Row], bar: tqdm
) -> float | None:
    """Trains the teacher for its epochs, if any. Returns its top-1, None where its head is new and untrained."""
    nets.teacher.requires_grad_(True)
    for epoch in range(teacher.epochs):
        run_epoch(teacher, epoch, out, rows, bar)
    nets.teacher.requires_grad_(False)
    if teacher.epochs:
        report.write_weights(out / "teacher.safetensors", nets.teacher, str(settings.teacher), nets.teacher_args)
        return rows[-1]["top1"]
    if settings.teacher_pretrained and pretrained_cfg(nets.teacher)["num_classes"] != nets.teacher_args["num_classes"]:
        return None
    return teacher.evaluate()


def train_students(
    settings: Settings,
    students: list[Trainee],
    nets: Networks,
    teacher_top1: float | None,
    out: Path,
    rows: list[Row],
    bar: tqdm,
) -> None:
    """An epoch of each in turn; weights, log and picture are written after every one."""
    for epoch in range(settings.epochs):
        for student in students:
            run_epoch(student, epoch, out, rows, bar)
            file = "student.safetensors" if student.clock else "student_alone.safetensors"
            report.write_weights(out / file, student.network, settings.student, nets.student_args)
        title = f"{settings.student} learns from {settings.teacher} on {Path(settings.data).name}"
        report.write_curve(out / "curve.png", rows, teacher_top1, title)


def run_epoch(trainee: Trainee, epoch: int, out: Path, rows: list[Row], bar: tqdm) -> None:
    bar.set_description(f"{trainee.label} {epoch + 1}/{trainee.epochs}")
    row = trainee.train_epoch(epoch, bar)
    row["top1"] = trainee.evaluate()
    rows.append(row)
    report.write_log(out / "log.csv", rows)
    progress = f"{trainee.label:<17} epoch {epoch + 1:>3}/{trainee.epochs}"
    bar.write(f"{progress}  loss {row['loss']:.4f}  top-1 {row['top1']:6.2f}%  {row['seconds']:.1f} s")
    sys.stdout.flush()


def result(trainee: Trainee, rows: list[Row], top1: float | None = None) -> Row:
    """A line of the table: top-1 after the last epoch, and means over all steps, data loading included."""
    own = [row for row in rows if row["network"] == trainee.label]
    seconds = sum(row["seconds"] for row in own)
    return {
        "network": trainee.label,
        "top1": own[-1]["top1"] if own else top1,
        "seconds_per_step": seconds / sum(row["steps"] for row in own) if own else None,
        "loss_share": sum(row["loss_seconds"] for row in own) / seconds if trainee.clock else None,
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
