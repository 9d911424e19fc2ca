"""Plan of `fastkd train --dry-run`: a description of a run from its real networks, without training."""

from typing import Any, cast

import torch
from timm.data import resolve_model_data_config
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from .data import size_of
from .data.folders import printable
from .loop import Trainee
from .options import sides
from .prepare import Setup, prepare
from .settings import Settings, stages

MB = 1e6


def plan(settings: Settings) -> str:
    """Return shapes, matched layers, parameter counts and a memory estimate as text.

    Raises:
        InputError: the settings cannot work, as in a run.
    """
    setup = prepare(settings)
    student, nets = setup.students[-1], setup.nets
    counts = f"{size_of(setup.data.train):,} training, {size_of(setup.data.val):,} validation"
    size = (3, *sides(nets.img_size))
    lines = [
        f"data        {settings.data}: {counts} images, {len(setup.data.classes)} classes",
        f"input       {size}, {_normalisation(nets.student)}",
        f"device      {setup.device}, amp {settings.amp}, {setup.ranks.world} process(es)",
        f"student     {settings.student}, {_count(nets.student)}",
    ]
    if nets.teacher is not None:
        source = "trained first" if settings.teacher_epochs else settings.teacher_checkpoint or "pretrained"
        source = "the student as it starts" if settings.teacher == "self" else source
        lines.append(f"teacher     {settings.teacher}, {_count(nets.teacher)}, {source}")
        lines.append(f"            {_normalisation(nets.teacher)}")
    lines += [f"skipped     {printable(fault)}" for fault in setup.skipped]
    epoch = 0
    for number, (stage, task) in enumerate(zip(stages(settings), setup.tasks, strict=True), 1):
        options = ", ".join(f"{key}={value!r}" for key, value in stage.options.items())
        lines.append(
            f"stage {number}     {stage.task}({options}), {stage.epochs} epochs, {stage.opt}, lr {stage.lr:g}, "
            f"weight decay {stage.weight_decay:g}, {stage.sched}, {stage.warmup_epochs} to warm up"
        )
        images = f"{settings.accumulate} x {stage.batch_size} x {setup.ranks.world}"
        lines.append(f"            {student.steps(epoch)} steps an epoch of {images} images")
        epoch += stage.epochs
        module = unwrap_model(task.get_trainable_module())
        beside = sum(p.numel() for p in module.parameters()) - sum(p.numel() for p in task.network.parameters())
        if beside:
            lines.append(f"            {beside / MB:.2f} M parameters beside the student, not exported")
        if task.matched:
            lines.append("            student layer            teacher layer")
            lines += [f"            {s:<24} {t}" for s, t in shapes(setup, task.matched)]
        memory = {name: size / MB for name, size in estimate(setup, student, number - 1).items()}
        parts = ", ".join(f"{name} {size:,.1f}" for name, size in memory.items())
        lines.append(f"            memory about {sum(memory.values()):,.0f} MB per process: {parts}")
    return "\n".join(lines)


def shapes(setup: Setup, matched: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the matched layers with the shapes of their outputs for one image."""
    return [
        (f"{s} {own}", f"{t} {theirs}")
        for (s, t), own, theirs in zip(
            matched,
            _outputs(setup.nets.student, [s for s, _ in matched], setup),
            _outputs(setup.nets.teacher, [t for _, t in matched], setup),
            strict=True,
        )
    ]


@torch.no_grad()
def _outputs(model: nn.Module | None, names: list[str], setup: Setup) -> list[tuple[int, ...] | str]:
    assert model is not None
    found: dict[str, tuple[int, ...]] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found[name] = tuple(output.shape)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in set(names)]
    was_training = model.training
    try:
        model.eval()(_blank(setup, 1))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return [found.get(name, "") for name in names]


def estimate(setup: Setup, trainee: Trainee, number: int) -> dict[str, float]:
    """Estimate the bytes that a process holds in a step of a stage: weights, gradients, optimiser, activations.

    Activations are the tensors that autograd saves in real steps of two and of four images, extrapolated to the batch.
    The allocator's cache, the loader's batches and temporaries of a single layer are not included.
    """
    settings, task, stage = setup.settings, setup.tasks[number], trainee.stages[number]
    own, theirs = _bytes(task.get_trainable_module()), _bytes(setup.nets.teacher)
    two, four = (_saved_bytes(setup, trainee, task, batch) for batch in (2, 4))
    slope = (four - two) / 2
    states = 2 if any(name in str(stage.opt) for name in ("adam", "lamb")) else 1
    shards = setup.ranks.world if settings.shard else 1
    copies = 1 + (settings.ema is not None) + settings.baseline
    return {
        "student": own * copies / shards,
        "gradients": own / shards,
        "optimiser": own * states * (1 + settings.baseline) / shards,
        "teacher": theirs,
        "activations": max(0.0, two + slope * (cast(int, stage.batch_size) - 2)),
    }


def _saved_bytes(setup: Setup, trainee: Trainee, task: TrainingTask, batch: int) -> float:
    """Return the bytes that autograd saves for backward in a step of some images, without weights."""
    weights = {p.untyped_storage().data_ptr() for p in task.parameters()}
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return x

    targets = torch.arange(batch, device=setup.device) % len(setup.data.classes)
    images, mixed = _blank(setup, batch), targets
    if trainee.mixup is not None:
        images, mixed = trainee.mixup(images, targets)
    task.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), trainee.autocast:
        loss = task(images, mixed)["loss"]
    total = float(sum(seen.values()))
    del loss
    return total


def _blank(setup: Setup, batch: int) -> Tensor:
    return torch.zeros(batch, 3, *sides(setup.nets.img_size), device=setup.device)


def _bytes(model: nn.Module | None) -> int:
    return 0 if model is None else sum(p.numel() * p.element_size() for p in model.parameters())


def _count(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / MB:.2f} M parameters"


def _normalisation(model: nn.Module) -> str:
    config = resolve_model_data_config(model)
    return f"normalised by mean {tuple(config['mean'])}, std {tuple(config['std'])}"
