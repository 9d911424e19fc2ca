"""One timm.task.TrainingTask per distillation method; each works in timm's loop or any other."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastkd import distributed
from fastkd.train import InputError
from fastkd.train.clock import LossClock
from fastkd.train.options import Size

from .base import Criterion, DistillationTask, FeatureLoss, Layers, Trainable, renormalisation
from .cikd import CIKDTask
from .dearkd import DearKDTask
from .gram import GramTask
from .logits import LOGIT_LOSSES, HardTargetLoss, LogitLoss
from .manifold import ManifoldTask
from .plain import DKDTask, HardTargetTask, NKDTask, PlainTask, SoftTargetTask
from .vitkd import ViTKDTask

__all__ = [
    "LOGIT_LOSSES",
    "TASKS",
    "CIKDTask",
    "DKDTask",
    "DearKDTask",
    "DistillationTask",
    "FeatureLoss",
    "GramTask",
    "HardTargetLoss",
    "HardTargetTask",
    "LogitLoss",
    "ManifoldTask",
    "NKDTask",
    "PlainTask",
    "SoftTargetTask",
    "Trainable",
    "ViTKDTask",
    "create_task",
    "renormalisation",
    "task_options",
]

TASKS: dict[str, type[DistillationTask]] = {
    "none": PlainTask,
    "manifold": ManifoldTask,
    "vitkd": ViTKDTask,
    "dearkd": DearKDTask,
    "cikd": CIKDTask,
    "gram": GramTask,
    "soft": SoftTargetTask,
    "hard": HardTargetTask,
    "dkd": DKDTask,
    "nkd": NKDTask,
}
_OWN = {
    "self",
    "student",
    "teacher",
    "features",
    "common",
    "device",
    "dtype",
    "verbose",
    "process_group",
    "clock",
    "img_size",
}
_OWN |= {"criterion", "student_layers", "teacher_layers"}


def create_task(
    name: str,
    student: nn.Module,
    teacher: nn.Module | None,
    *,
    img_size: Size | None = None,
    criterion: Criterion | None = None,
    student_layers: Layers | None = None,
    teacher_layers: Layers | None = None,
    clock: LossClock | None = None,
    device: torch.device | None = None,
    process_group: distributed.Group = None,
    options: Mapping[str, Any] | None = None,
) -> DistillationTask:
    """Create a task by name for these networks; `options` are the task's own arguments.

    Raises:
        InputError: no such task, options that it does not have, or networks or layers that do not suit it.
    """
    if name not in TASKS:
        raise InputError(f"--task: needs one of {', '.join(TASKS)}, got {name!r}")
    options = {} if options is None else options
    unknown = sorted(set(options) - set(task_options(name)))
    if unknown:
        raise InputError(f"--task: {name} has no option {', '.join(unknown)}; it has {', '.join(task_options(name))}")
    task = TASKS[name]
    arguments: dict[str, Any] = {
        "criterion": criterion,
        "clock": clock,
        "device": device,
        "process_group": process_group,
    }
    arguments |= {"verbose": False, **options}
    if not issubclass(task, PlainTask):
        arguments |= {"student_layers": student_layers, "teacher_layers": teacher_layers, "img_size": img_size}
    try:
        return task(student, teacher, **arguments)
    except InputError:
        raise
    except (TypeError, ValueError) as error:  # type of an option's value
        raise InputError(f"--task: {name}: {error}") from error


def task_options(name: str) -> dict[str, Any]:
    """Return the options of a task and their defaults."""
    task = TASKS[name]
    parameters = dict(inspect.signature(DistillationTask.__init__).parameters)
    parameters |= inspect.signature(task.__init__).parameters
    options = {key: parameter.default for key, parameter in parameters.items() if key not in _OWN}
    return options | (task.defaults if issubclass(task, PlainTask) else {})
