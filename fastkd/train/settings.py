"""Settings of a training run: frozen dataclasses, defaults for two kinds of data, options a resume may change."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any


@dataclass(frozen=True)
class Stage:
    """A stage of a run: a number of epochs of one task. None stands for the run's value."""

    task: str  # a name in tasks.TASKS
    epochs: int
    options: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments of the task
    lr: float | None = None
    weight_decay: float | None = None
    opt: str | None = None
    sched: str | None = None
    warmup_epochs: int | None = None
    min_lr: float | None = None
    layer_decay: float | None = None
    opt_args: Mapping[str, Any] | None = None
    batch_size: int | None = None
    augment_args: Mapping[str, Any] | None = None


STAGE_FIELDS = tuple(item.name for item in dataclasses.fields(Stage))[3:]  # None stands for the run's value
STAGE_KINDS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("lr", "weight_decay", "min_lr", "layer_decay"), (Real, "a number")),
    "warmup_epochs": (int, "a whole number"),
    **dict.fromkeys(("opt", "sched"), (str, "a name")),
    **dict.fromkeys(("opt_args", "augment_args"), (Mapping, "a mapping")),
}


@dataclass(frozen=True)
class Settings:
    """All options of `fastkd train`, with the defaults for a folder of images; the optimiser's defaults are DeiT's."""

    data: str = "digits"
    data_root: str | None = None  # root folder of a timm dataset such as wds/NAME
    train_split: str = "train"
    val_split: str = "validation"
    num_classes: int | None = None  # None: as the data defines
    val_fraction: float = 0.2
    train_fraction: float = 1.0  # share of the training images, equal for each class
    check: bool = True
    skip_images: int = 0  # maximum number of unreadable images to skip
    img_size: int | None = None  # None: the student's own
    student: str = "deit_tiny_patch16_224"
    student_args: dict[str, Any] = field(default_factory=dict)
    student_layers: tuple[str, ...] | None = None  # None: the task's own choice
    teacher: str | None = None
    teacher_args: dict[str, Any] = field(default_factory=dict)
    teacher_layers: tuple[str, ...] | None = None
    teacher_checkpoint: str | None = None
    teacher_pretrained: bool = False
    teacher_epochs: int = 30  # epochs to train a teacher without weights
    teacher_lr: float = 1e-3
    teacher_cache: str | None = None  # folder that caches the teacher's logits
    recipe: str | None = None  # name of the source of the values; has no effect itself
    task: str = "manifold"
    task_args: dict[str, Any] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()  # empty: one of `task` for `epochs`
    baseline: bool = True
    epochs: int = 300
    warmup_epochs: int = 5
    warmup_lr: float | None = None  # None: a hundredth of lr
    min_lr: float = 0.0
    batch_size: int = 64  # images per forward pass and process
    accumulate: int = 1  # forward passes per step
    lr: float = 5e-4
    weight_decay: float = 0.05
    layer_decay: float | None = None
    opt: str = "adamw"
    opt_args: dict[str, Any] = field(default_factory=dict)
    sched: str = "cosine"
    clip_grad: float | None = None
    ema: float | None = None  # decay
    augment: bool = True
    augment_args: dict[str, Any] = field(default_factory=dict)  # arguments of timm's create_transform
    aug_repeats: int = 1  # copies of an image in a student's epoch, each with its own augmentation
    erase: float = 0.0  # probability of random erasing
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0
    device: str = "auto"
    amp: str = "none"
    channels_last: bool = False
    compile: bool = False
    shard: bool = False  # FSDP2 instead of DDP
    workers: int = 2
    seed: int = 0
    checkpoint_every: int = 0  # steps; 0: at the end of each epoch only
    tensorboard: bool = False
    out: str | None = None
    overwrite: bool = False


# These do not change the results of a run, so a resume may change them.
FREE = frozenset({"out", "overwrite", "workers", "checkpoint_every", "tensorboard", "check", "recipe"})

# At 64 px, a digit's pixel is one patch of the student and one cell of the teacher's map at stride 8.
DIGITS = Settings(
    img_size=64,
    student="vit_tiny_patch16_224",
    student_args={"patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2},
    teacher="resnet18",
    teacher_args={"output_stride": 8, "channels": (16, 32, 64, 64), "stem_width": 16},
    teacher_layers=("layer2.1", "layer3.0", "layer3.1", "layer4.0"),
    teacher_epochs=4,
    teacher_lr=3e-3,
    epochs=20,
    warmup_epochs=2,
    batch_size=16,
    lr=1e-3,
    workers=0,
)
FOLDER = Settings()


def stages(settings: Settings) -> tuple[Stage, ...]:
    """Return the run's stages with None replaced by the run's values."""
    given = settings.stages or (Stage(settings.task, settings.epochs, settings.task_args),)
    return tuple(
        dataclasses.replace(
            stage, **{name: getattr(settings, name) for name in STAGE_FIELDS if getattr(stage, name) is None}
        )
        for stage in given
    )


def anchored(settings: Settings) -> Settings:
    """Return the settings with absolute paths, so that a resume works from any folder. Other values are kept."""
    names = ("data", "data_root", "teacher_checkpoint", "teacher_cache")
    given = {name: value for name in names if (value := getattr(settings, name)) is not None and value != "digits"}
    whole = {name: os.path.abspath(value) for name, value in given.items()}
    return dataclasses.replace(
        settings, **{name: path for name, path in whole.items() if name == "teacher_cache" or os.path.exists(path)}
    )


def as_json(settings: Settings) -> dict[str, Any]:
    return dataclasses.asdict(settings)


def from_json(values: Mapping[str, Any]) -> Settings:
    """Return settings from JSON, the inverse of as_json; lists become tuples, and unknown names are ignored."""
    names = {item.name for item in dataclasses.fields(Settings)}
    own = {name: _tuples(value) for name, value in values.items() if name in names}
    return Settings(**own | {"stages": tuple(Stage(**stage) for stage in own.get("stages", ()))})


def differences(now: Settings, before: Settings) -> list[str]:
    """Return the options that a resume would change, such as "lr: 0.1 (the run has 0.001)"."""
    new, old = vars(now), vars(before)
    changed = (name for name in new if name not in FREE and new[name] != old[name])
    return [f"{name}: {new[name]} (the run has {old[name]})" for name in changed]


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_tuples(x) for x in value)
    return {key: _tuples(x) for key, x in value.items()} if isinstance(value, dict) else value
