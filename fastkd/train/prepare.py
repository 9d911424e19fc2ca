"""Preparation of a run: create and check data, device, networks and tasks. Nothing is written."""

import copy
import dataclasses
import hashlib
import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from timm.task import TrainingTask
from torch import nn

from . import InputError, ranks, tell
from .clock import LossClock
from .data import (
    Data,
    Loader,
    create_loaders,
    find_unreadable,
    leave_out,
    listed,
    open_data,
    seed_all,
    shards,
    size_of,
    take_share,
)
from .loop import Trainee
from .models import check_one_image, create_model, layers_of, load_weights, pretrained_cfg, uncovered
from .options import Size, as_size, pixels
from .ranks import ALONE, Ranks
from .settings import STAGE_KINDS, Settings, Stage, stages
from .sharding import shard
from .targets import criterion
from .tasks import FeatureLoss, create_task, methods
from .teacher_cache import TeacherCache


class Networks(NamedTuple):
    """Teacher and student on their device, and the arguments that recreate them."""

    teacher: nn.Module | None
    teacher_args: dict[str, Any]
    student: nn.Module
    student_args: dict[str, Any]
    img_size: Size


class Setup(NamedTuple):
    """Everything that a run needs."""

    settings: Settings
    data: Data
    device: torch.device
    ranks: Ranks
    nets: Networks
    teacher: Trainee | None
    students: list[Trainee]
    tasks: list[TrainingTask]  # one per stage, on copies of the networks
    cache: TeacherCache | None
    skipped: list[str]  # images that cannot be read


def prepare(settings: Settings) -> Setup:
    """Open the data, create networks and tasks, and check them all.

    Raises:
        InputError: a setting that cannot work.
    """
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    own, device = ranks.join(choose_device(settings), settings.workers)
    data, nets = own.together(lambda: open_inputs(settings, device, own))
    for note in data.notes:
        tell(f"--data: {note}")
    if own.world > 1:
        prints = own.each(fingerprint(data))
        own.together(lambda: check_alike(prints))
    skipped = own.first(lambda: find_unreadable(data)) if settings.check else []
    setup = own.together(lambda: build(settings, data, nets, device, own, skipped))
    if settings.shard:
        for trainee in setup.students:
            shard(trainee.network, own, device)
    return setup


def open_inputs(settings: Settings, device: torch.device, own: Ranks) -> tuple[Data, Networks]:
    data = open_data(
        settings.data,
        settings.val_fraction,
        root=settings.data_root,
        splits=(settings.train_split, settings.val_split),
        num_classes=settings.num_classes,
        class_map=settings.class_map,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    check_settings(settings)
    if settings.shard and own.world == 1:
        raise InputError("--shard: spreads the student over processes; start several with torchrun")
    return data, create_networks(settings, len(data.classes), device)


def build(
    settings: Settings, data: Data, nets: Networks, device: torch.device, own: Ranks, skipped: list[str]
) -> Setup:
    leave_out(data, skipped, settings.skip_images)
    take_share(data, settings.train_fraction, settings.seed)
    cache = open_cache(settings, data, nets, device, own)
    teacher, students = create_trainees(settings, data, nets, device, own, cache)
    for trainee in (teacher, students[-1]):
        if trainee is not None and any(stage.epochs > 0 and stage.batch_size == 1 for stage in trainee.stages):
            check_one_image(trainee.label, trainee.network, nets.img_size)
    tasks = check_stages(students[-1])
    if cache is not None:
        plan_cache(settings, cache, nets, tasks)
        tell(cache.described())
    return Setup(settings, data, device, own, nets, teacher, students, tasks, cache, skipped)


def check_settings(settings: Settings) -> None:
    """Check everything that needs no models."""
    for stage in stages(settings):
        check_stage(stage)
        if (settings.mixup > 0 or settings.cutmix > 0) and cast(int, stage.batch_size) % 2:
            raise InputError(f"--mixup: needs an even --batch-size, got {stage.batch_size}")
    if wants_teacher(settings):
        if settings.teacher is None:
            raise InputError("--teacher: a folder of images needs the name of a timm model to learn from")
        if settings.teacher == "self":
            check_self(settings)
        elif settings.teacher_epochs < 1 and not settings.teacher_pretrained and settings.teacher_checkpoint is None:
            raise InputError(
                f"--teacher: {settings.teacher} is untrained; give --teacher-checkpoint FILE, --teacher-pretrained, or "
                "--teacher-epochs N to train it here first"
            )
    for package in ("tensorboard", "wandb"):
        if getattr(settings, package) and find_spec(package) is None:
            raise InputError(f"--{package}: needs the package {package}; install it with: pip install {package}")
    if settings.shard and (settings.ema is not None or settings.compile):
        raise InputError("--shard: works neither with --ema nor with --compile")
    own_images = any(stage.augment_args is not None for stage in settings.stages)
    repeated = settings.aug_repeats > 1 or (settings.epoch_repeats > 1 and settings.augment)
    changing = settings.mixup or settings.cutmix or settings.erase or own_images or repeated
    if settings.teacher_cache is not None and changing:
        raise InputError(
            "--teacher-cache: needs images that depend on epoch and index alone, without --mixup, --cutmix, --erase, "
            "--aug-repeats, --epoch-repeats and a stage's own augment_args"
        )


def check_self(settings: Settings) -> None:
    if settings.teacher_epochs or settings.teacher_checkpoint or settings.teacher_pretrained or settings.teacher_args:
        raise InputError("--teacher: self is a copy of the student, without weights, arguments or epochs of its own")
    if not settings.student_pretrained and settings.student_checkpoint is None:
        raise InputError("--teacher: self needs a trained student; give --student-pretrained or --student-checkpoint")
    if settings.shard and any(stage.options.get("refresh") for stage in stages(settings)):
        raise InputError("--shard: does not work with refresh of gram, which copies whole weights")


def check_stage(stage: Stage) -> None:
    methods(stage.task)
    if stage.epochs < 1:
        raise InputError(f"--stage: {stage.task} needs an epoch at least, got {stage.epochs}")
    if not isinstance(stage.batch_size, int) or stage.batch_size < 1:
        raise InputError(f"--stage: {stage.task} needs a batch_size of 1 at least, got {stage.batch_size!r}")
    for name, (kind, words) in STAGE_KINDS.items():
        value = getattr(stage, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            raise InputError(f"--stage: {stage.task} needs {words} as {name}, got {value!r}")


def check_alike(prints: list[dict[str, Any]]) -> None:
    """Check that all processes have the same data; otherwise they would wait for each other's batches."""
    if any(one != prints[0] for one in prints):
        raise InputError(f"--data: the processes see different images: {prints}")


def wants_teacher(settings: Settings) -> bool:
    return settings.teacher is not None or any(stage.task != "none" for stage in stages(settings))


def choose_device(settings: Settings) -> torch.device:
    name = settings.device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # tensors on meta have no values
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device: {name} cannot be used: {' '.join(str(error).split())[:200]}") from error
    return device


def create_networks(settings: Settings, num_classes: int, device: torch.device) -> Networks:
    """Return both models, checked against each other, and the image size."""
    seed_all(settings.seed)
    student, student_args = create_model(
        "student", settings.student, settings.student_args, num_classes=num_classes, img_size=settings.img_size,
        pretrained=settings.student_pretrained,
    )  # fmt: skip
    if settings.student_checkpoint is not None:
        load_weights("student", student, settings.student, settings.student_checkpoint, new_head=True)
    img_size = settings.img_size or as_size(pretrained_cfg(student)["input_size"][1:])
    teacher, teacher_args = None, dict[str, Any]()
    if settings.teacher == "self":
        teacher, teacher_args = copy.deepcopy(student).to(device), student_args
    elif settings.teacher is not None:
        teacher, teacher_args = create_model(
            "teacher", settings.teacher, settings.teacher_args, num_classes=num_classes, img_size=img_size,
            pretrained=settings.teacher_pretrained,
        )  # fmt: skip
        check_teacher(settings, teacher, num_classes, img_size)
        if settings.teacher_checkpoint is not None:
            load_weights("teacher", teacher, settings.teacher, settings.teacher_checkpoint)
        teacher = teacher.to(device)
    for role, model in (("student", student), ("teacher", teacher)):
        if (lost := uncovered(model, img_size)) is not None:
            tell(f"--img-size: {lost} of the {role}")
    if settings.channels_last:
        student = student.to(memory_format=torch.channels_last)
        if teacher is not None:
            teacher = teacher.to(memory_format=torch.channels_last)
    return Networks(teacher, teacher_args, student.to(device), student_args, img_size)


def check_teacher(settings: Settings, teacher: nn.Module, num_classes: int, img_size: Size) -> None:
    """Check that the teacher's size and classes are those of the run, or that the user chose others for its weights."""
    cfg, own = pretrained_cfg(teacher), cast(int, teacher.num_classes)
    size, classes = as_size(cfg["input_size"][1:]), cfg["num_classes"]
    if settings.teacher_epochs > 0 and own != num_classes:
        raise InputError(
            f"--teacher-arg: num_classes={own} cannot be trained on the {num_classes} classes of the data; "
            "give other classes with --teacher-epochs 0 and --teacher-checkpoint or --teacher-pretrained"
        )
    trained = settings.teacher_pretrained or settings.teacher_checkpoint is not None
    if trained and settings.img_size is None and size != img_size:
        theirs, ours = pixels(size), pixels(img_size)
        raise InputError(
            f"--img-size: the teacher {settings.teacher} was made for {theirs} px, the student for {ours}; both see "
            f"the same images: give --img-size {theirs}, or --img-size {ours} to have the teacher there too"
        )
    new_head = settings.teacher_pretrained and settings.teacher_checkpoint is None and classes != own
    if new_head and settings.teacher_epochs < 1 and any(uses_logits(stage) for stage in stages(settings)):
        raise InputError(
            f"--teacher-pretrained: its {classes} classes are not the {num_classes} of the data, so its head is new, "
            "and the task learns from its logits; give --teacher-epochs, or a --teacher-checkpoint with those classes"
        )


def uses_logits(stage: Stage) -> bool:
    """Return whether the task learns from the teacher's logits, by its options or its defaults."""
    from .tasks import task_options

    return {**task_options(stage.task), **stage.options}.get("logits") is not None


def open_cache(settings: Settings, data: Data, nets: Networks, device: torch.device, own: Ranks) -> TeacherCache | None:
    if settings.teacher_cache is None:
        return None
    if data.in_order:
        raise InputError("--teacher-cache: needs data with random access, such as a folder or hfds/")
    if nets.teacher is None:
        raise InputError("--teacher-cache: needs a --teacher")
    folder = Path(settings.teacher_cache)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if settings.teacher_epochs > 0 and not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise InputError(f"--teacher-cache: {folder} needs a folder that can be written, got {nearest}")
    epochs = sum(stage.epochs for stage in stages(settings)) if settings.augment else 1
    classes = nets.teacher_args["num_classes"]
    return TeacherCache(folder, own, (epochs, size_of(data.train)), classes, settings.teacher_cache_top)


def plan_cache(settings: Settings, cache: TeacherCache, nets: Networks, tasks: list[TrainingTask]) -> None:
    """Give the cache the layers that the tasks compare, and check that it can hold them.

    Raises:
        InputError: what the tasks need cannot be cached, or the disk has no room for it.
    """
    compared: list[Any] = [task.trainable.features for task in tasks if getattr(task, "matched", [])]
    for features in compared:
        if settings.augment:
            raise InputError("--teacher-cache: the tokens of layers are cached for equal images only: --no-augment")
        if type(features).watch is not FeatureLoss.watch or features.name == "gram":
            raise InputError(f"--teacher-cache: holds logits and tokens; {features.name} needs the teacher itself")
    names = dict.fromkeys(name for features in compared for name in features.teacher_layers)
    if names and nets.teacher is not None:
        cache.layers = layers_of("teacher", nets.teacher, list(names), nets.img_size)
    cache.check_room()


def create_trainees(
    settings: Settings, data: Data, nets: Networks, device: torch.device, own: Ranks, cache: TeacherCache | None
) -> tuple[Trainee | None, list[Trainee]]:
    """Return the trainee of the teacher and those of one or two copies of the student."""
    loading: dict[str, Any] = {
        "img_size": nets.img_size, "augment": settings.augment, "workers": settings.workers, "device": device,
        "ranks": own, "seed": settings.seed, "upright": settings.exif, "passes": settings.epoch_repeats,
    }  # fmt: skip
    loss = criterion(settings.mixup > 0 or settings.cutmix > 0, settings.smoothing)

    def task_for(teacher: nn.Module | None, clock: LossClock | None) -> Callable[[nn.Module, Stage], TrainingTask]:
        def create(network: nn.Module, stage: Stage) -> TrainingTask:
            return create_task(
                stage.task,
                network,
                teacher,
                img_size=nets.img_size,
                criterion=loss,
                student_layers=settings.student_layers,
                teacher_layers=settings.teacher_layers,
                clock=clock,
                device=device,
                process_group=own.group,
                options=stage.options,
            )

        return create

    common: dict[str, Any] = {"num_classes": len(data.classes), "device": device, "ranks": own, "told": {}}
    plain = task_for(None, None)
    teacher = None
    if nets.teacher is not None:
        stage = Stage(
            "none",
            settings.teacher_epochs,
            {},
            settings.teacher_lr,
            settings.weight_decay,
            "adamw",
            "cosine",
            1,
            settings.min_lr,
            batch_size=settings.batch_size,
            augment_args=settings.augment_args,
        )
        loaders = stage_loaders(data, nets.teacher, (stage,), **loading)
        unsharded = dataclasses.replace(settings, shard=False)
        teacher = Trainee("teacher", nets.teacher, (stage,), plain, *loaders, unsharded, **common)

    if settings.shard:
        loading["val_ranks"] = ALONE  # a sharded forward pass needs all ranks
    plan = stages(settings)
    loaders = stage_loaders(data, nets.student, plan, repeats=settings.aug_repeats, **loading)
    students = []
    if settings.baseline and any(stage.task != "none" for stage in plan):
        # The baseline has the same schedule without the teacher.
        alone = tuple(dataclasses.replace(stage, task="none", options={}) for stage in plan)
        copied = copy.deepcopy(nets.student)
        students.append(Trainee("student alone", copied, alone, plain, *loaders, settings, ema=settings.ema, **common))
    cached = None if cache is None else partial(cache.known, device=device)
    clock = LossClock()
    students.append(
        Trainee(
            "student distilled", nets.student, plan, task_for(nets.teacher, clock), *loaders, settings,
            ema=settings.ema, clock=clock, cached=cached, **common,
        )
    )  # fmt: skip
    return teacher, students


def stage_loaders(
    data: Data, network: nn.Module, plan: tuple[Stage, ...], **loading: Any
) -> tuple[tuple[Loader, ...], Loader]:
    """Return the loaders of the stages, shared by stages with equal settings, and the validation loader."""
    made: list[tuple[Loader, Loader]] = []
    for number, stage in enumerate(plan):
        wanted = stage.batch_size, stage.augment_args
        same = (i for i in range(number) if (plan[i].batch_size, plan[i].augment_args) == wanted)
        if (i := next(same, None)) is not None:
            made.append(made[i])
        else:
            own: dict[str, Any] = {"batch_size": stage.batch_size, "augmentation": stage.augment_args}
            made.append(create_loaders(data, network, **own, **loading))
    return tuple(training for training, _ in made), made[0][1]


def check_stages(trainee: Trainee) -> list[TrainingTask]:
    """Create the task, optimiser and schedule of each stage on a copy of the network."""
    network, tasks = trainee.network, []
    for number, stage in enumerate(trainee.stages):
        trainee.network = copy.deepcopy(network)
        try:
            trainee.begin(number, distribute=False)
        except InputError:
            raise
        except (ValueError, TypeError, AssertionError, RuntimeError) as error:  # timm's factories use all of these
            raise InputError(f"--opt {stage.opt} or --sched {stage.sched}: {error}") from error
        tasks.append(trainee.task)
    trainee.network, trainee.stage = network, -1
    del trainee.task, trainee.optimizer, trainee.scheduler
    return tasks


def class_order_note(setup: Setup, top1: float) -> str | None:
    """Return a warning if a given teacher, whose logits teach, is less than a tenth of the way from chance to 100%."""
    classes = setup.data.classes
    chance = 100 / len(classes)
    if not any(uses_logits(stage) for stage in stages(setup.settings)) or top1 > chance + (100 - chance) / 10:
        return None
    return (
        f"--teacher: top-1 is {top1:.1f}%, near chance ({chance:.1f}%): its classes are probably in another order than "
        f"the data's, which is {listed(classes, 12)}; give the teacher's with --class-map"
    )


def new_head(setup: Setup) -> bool:
    """Return whether top-1 of the teacher is meaningless: it has other classes, or a new, untrained head."""
    teacher = setup.nets.teacher
    if setup.settings.teacher == "self":  # as the student, whose head may be new
        return True
    if teacher is not None and setup.nets.teacher_args["num_classes"] != len(setup.data.classes):
        return True
    return (
        teacher is not None
        and setup.settings.teacher_pretrained
        and setup.settings.teacher_checkpoint is None
        and pretrained_cfg(teacher)["num_classes"] != setup.nets.teacher_args["num_classes"]
    )


def fingerprint(data: Data) -> dict[str, Any]:
    """Return the number of images and a digest of their names and classes; equal data has equal fingerprints."""
    digest = hashlib.sha256()
    for part in (data.train, data.val):
        samples = getattr(getattr(part, "reader", None), "samples", None) or getattr(part, "targets", [])
        digest.update(repr([(Path(x[0]).name, x[1]) if isinstance(x, tuple) else x for x in samples]).encode())
        digest.update("".join(Path(path).name for path in shards(part)).encode())
    return {"train": size_of(data.train), "validation": size_of(data.val), "digest": digest.hexdigest()[:16]}
