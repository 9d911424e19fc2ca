"""One timm.task.TrainingTask per distillation method; each works in timm's loop or any other."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastkd import distributed
from fastkd.train import InputError
from fastkd.train.clock import LossClock
from fastkd.train.options import Size, near

from .base import Criterion, DistillationTask, FeatureLoss, Layers, Several, Trainable, renormalisation
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
    "Several",
    "SoftTargetTask",
    "Trainable",
    "ViTKDTask",
    "create_task",
    "methods",
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
_COMMON = dict(inspect.signature(DistillationTask.__init__).parameters)
# The remaining arguments are a task's options.
_SETUP = {
    *("self", "student", "teacher", "features", "common", "criterion", "clock"),
    *("process_group", "device", "dtype", "verbose"),
}
ALIASES = {"logits": "soft, hard, dkd or nkd", "kd": "soft", "kl": "soft", "hinton": "soft", "deit": "hard"}


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

    Several methods at once, such as "manifold+dkd" or "manifold=2+dkd=0.5" with their weights, are one task with the
    losses between layers, one loss between logits, and the largest task_weight of them. An option goes to each method
    that has it.

    Raises:
        InputError: no such task, options that it does not have, or networks or layers that do not suit it.
    """
    options = {} if options is None else options
    unknown = sorted(set(options) - set(task_options(name)))
    if unknown:
        raise InputError(f"--task: {name} has no option {', '.join(unknown)}; it has {', '.join(task_options(name))}")
    common: dict[str, Any] = {"criterion": criterion, "clock": clock, "device": device, "process_group": process_group}
    common["verbose"] = False
    layers: dict[str, Any] = {"student_layers": student_layers, "teacher_layers": teacher_layers, "img_size": img_size}

    def one(method: str, given: Mapping[str, Any]) -> DistillationTask:
        try:
            return TASKS[method](student, teacher, **common, **given, **({} if _plain(method) else layers))
        except InputError:
            raise
        except (TypeError, ValueError) as error:  # type of an option's value
            raise InputError(f"--task: {method}: {error}") from error

    weights, own = methods(name), task_options(name)
    if len(weights) == 1:
        ((method, weight),) = weights.items()
        factor: dict[str, Any] = {} if weight is None else {"logit_weight" if _plain(method) else "weight": weight}
        return one(method, {**factor, **options})
    if "gram" in weights and options.keys() & {"refresh", "teacher_size"}:
        raise InputError("--task: refresh and teacher_size of gram work without other methods only")
    shared = {key: own[key] for key in ("task_weight", "logits", "logit_weight")}
    parts: list[tuple[Any, float]] = []
    for method, weight in weights.items():
        if _plain(method):
            shared["logit_weight"] = own["logit_weight"] if weight is None else weight
        else:
            given = {key: options[key] for key in options.keys() & task_options(method).keys() - _COMMON.keys()}
            parts.append((one(method, given).trainable.features, 1.0 if weight is None else weight))
    shared |= {key: options[key] for key in options.keys() & _COMMON.keys()}
    return DistillationTask(student, teacher, Several(parts), **common, **shared)


def methods(name: str) -> dict[str, float | None]:
    """Return the methods of a task's name, such as "manifold=2+dkd", and their weights; None: the method's own.

    Raises:
        InputError: an unknown method or weight, or several losses between logits.
    """
    found: dict[str, float | None] = {}
    for part in name.split("+"):
        method, equals, weight = part.partition("=")
        if method not in TASKS:
            meant = ALIASES.get(method.lower())
            hint = f"; did you mean {meant}?" if meant else near(method, [*TASKS])
            raise InputError(f"--task: needs one of {', '.join(TASKS)}, or several as A+B, got {method!r}{hint}")
        try:
            found[method] = float(weight) if equals else None
        except ValueError as error:
            raise InputError(f"--task: needs a number as the weight of {method}, got {weight!r}") from error
    if sum(map(_plain, found)) > 1 or (len(found) > 1 and "none" in found):
        raise InputError(f"--task: at most one of {', '.join(filter(_plain, TASKS))} beside other methods, got {name}")
    return dict(sorted(found.items(), key=lambda item: _plain(item[0])))  # the loss between logits last


def task_options(name: str) -> dict[str, Any]:
    """Return the options of a task and their defaults."""
    options: dict[str, Any] = {}
    for method in methods(name):
        task, before = TASKS[method], options
        parameters = _COMMON | inspect.signature(task.__init__).parameters
        options = before | {key: parameter.default for key, parameter in parameters.items() if key not in _SETUP}
        options |= task.defaults
        if before:
            options["task_weight"] = max(before["task_weight"], options["task_weight"])
            options |= {key: before[key] for key in ("logits", "logit_weight") if options["logits"] is None}
    return options


def _plain(name: str) -> bool:
    return issubclass(TASKS[name], PlainTask)
