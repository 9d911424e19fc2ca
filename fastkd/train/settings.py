"""Settings of a run: every option with its help, the defaults for two kinds of data, options a resume may change."""

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_type_hints

from . import InputError
from .options import BadValueError, Size, as_yaml, key_values, kind_of, mapping, names, near, option, read_size, tuples
from .recipes import RECIPES, recipe


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


STAGE_FIELDS = tuple(item.name for item in dataclasses.fields(Stage) if item.default is None)
_KINDS: dict[Any, tuple[Any, str]] = {
    float: (Real, "a number"),
    int: (int, "a whole number"),
    str: (str, "a name"),
    Mapping[str, Any]: (Mapping, "a mapping"),
}
STAGE_KINDS = {name: _KINDS[kind_of(get_type_hints(Stage)[name])[0]] for name in STAGE_FIELDS if name != "batch_size"}


def read_stages(value: Any) -> tuple[Stage, ...]:
    """Return the stages of a list of mappings, or of texts TASK:EPOCHS[:KEY=VALUE,...]."""
    return tuple(_stage(part) for part in (value if isinstance(value, list | tuple) else [value]))


def _stage(value: Any) -> Stage:
    """Return one stage; in a text, keys that a stage does not have are options of the task."""
    if isinstance(value, str):
        name, _, rest = value.partition(":")
        epochs, _, pairs = rest.partition(":")
        if not epochs.isdecimal():
            raise BadValueError(f"needs TASK:EPOCHS[:KEY=VALUE,...], got {value!r}")
        values = mapping([pair for pair in re.split(r",(?=\w+=)", pairs) if pair])
        own = {key: values.pop(key) for key in STAGE_FIELDS if key in values}
        return Stage(name, int(epochs), values, **own)
    if isinstance(value, Stage):
        return value
    if not isinstance(value, Mapping) or not {"task", "epochs"} <= value.keys():
        raise BadValueError(f"needs a task and epochs, got {value!r}")
    known = [item.name for item in dataclasses.fields(Stage)]
    for key in value.keys() - set(known):
        raise BadValueError(f"{key} is no key of a stage{near(key, known)}; options of the task are keys of `options`")
    if not isinstance(value["epochs"], int):
        raise BadValueError(f"needs a whole number of epochs, got {value['epochs']!r}")
    return Stage(**tuples(value))


@dataclass(frozen=True, kw_only=True)
class Data:
    data: str = option(
        "Images: digits, a folder, or a timm dataset such as hfds/NAME or wds/NAME.", "digits", metavar="DATA"
    )
    data_root: str | None = option("Root folder of a timm dataset.", None, metavar="FOLDER")
    train_split: str = option("Split to train on.", "train")
    val_split: str = option("Split to validate on.", "validation")
    num_classes: int | None = option("Number of classes.", None, least=2, shown="as the dataset defines")
    class_map: str | None = option(
        "File with the classes of a folder, one per line, in the order of their numbers.", None, metavar="FILE",
        shown='natural order: "2" before "10"',
    )  # fmt: skip
    exif: bool = option("Turn images as their EXIF orientation says.", True)
    val_fraction: float = option("Share of the images used for validation if there is no val/.", 0.2)
    train_fraction: float = option("Share of the training images to use, equal for each class.", 1.0, least=0, most=1)
    check: bool = option("Decode all images of a folder before the run.", True)
    skip_images: int = option("Maximum number of unreadable images to skip.", 0, least=0)
    img_size: Size | None = option(
        "Image side in pixels, or height and width.", None, metavar="PIXELS|HxW", read=read_size,
        shown="digits 64, folder the network's own",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Teacher:
    teacher: str | None = option(
        "timm model, hf-hub:OWNER/NAME or local-dir:FOLDER of the teacher; self: the student as it starts.",
        None,
        metavar="MODEL",
    )
    teacher_args: dict[str, Any] = key_values("Argument of the teacher's model; repeatable.", "teacher-arg")
    teacher_checkpoint: str | None = option("Checkpoint of the teacher.", None, metavar="FILE", shown="none")
    teacher_pretrained: bool = option("Use timm's pretrained weights for the teacher.", False)
    teacher_epochs: int = option("Number of epochs to train a teacher without weights.", 0, least=0)
    teacher_lr: float = option("Learning rate for training the teacher.", 1e-3, least=0)
    teacher_layers: tuple[str, ...] | None = option(
        "Names of the teacher layers to match, comma-separated.", None, metavar="NAMES", read=names,
        shown="the task's choice",
    )  # fmt: skip
    teacher_cache: str | None = option(
        "Folder that caches the teacher's logits, and with --no-augment its tokens.", None, metavar="FOLDER",
        shown="no cache",
    )  # fmt: skip
    teacher_cache_top: int | None = option("Number of largest logits per image to cache.", None, least=1, shown="all")


@dataclass(frozen=True, kw_only=True)
class Student:
    student: str = option(
        "timm model, hf-hub:OWNER/NAME or local-dir:FOLDER of the student.", "deit_tiny_patch16_224", metavar="MODEL"
    )
    student_args: dict[str, Any] = key_values("Argument of the student's model; repeatable.", "student-arg")
    student_checkpoint: str | None = option("Checkpoint of the student to start from.", None, metavar="FILE")
    student_pretrained: bool = option("Start from timm's pretrained weights.", False)
    student_layers: tuple[str, ...] | None = option(
        "Names of the student layers to match, as many as --teacher-layers.", None, metavar="NAMES", read=names,
        shown="the task's choice",
    )  # fmt: skip
    baseline: bool = option("Also train the student without the teacher.", False)


@dataclass(frozen=True, kw_only=True)
class Method:
    recipe: str | None = option(
        "Name of a paper's settings; without --data, print them and stop.", None, shown="no recipe"
    )
    task: str = option(
        "Method, or several such as manifold=2+dkd=1: none, manifold, vitkd, dearkd, cikd, gram, soft, hard, dkd, nkd.",
        "manifold",
        metavar="TASK",
    )
    task_args: dict[str, Any] = key_values("Option of the method; repeatable.", "task-arg")
    stages: tuple[Stage, ...] = option(
        "Stage of the run, in place of --task; repeat for later stages.", (), flag="stage",
        metavar="TASK:EPOCHS[:KEY=VALUE,...]", read=read_stages, shown="one stage of --task",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    epochs: int = option("Number of epochs to train the student.", 300, least=1)
    epoch_repeats: int = option("Passes over the training images in an epoch; more for few images.", 1, least=1)
    batch_size: int = option("Images per forward pass and process.", 64, least=1, metavar="IMAGES")
    accumulate: int = option("Forward passes per step.", 1, least=1)
    opt: str = option("timm optimiser.", "adamw")
    opt_args: dict[str, Any] = key_values("Argument of the optimiser; repeatable.", "opt-arg")
    sched: str = option("timm schedule.", "cosine")
    lr: float = option("Learning rate.", 5e-4, least=0)
    warmup_epochs: int = option("Number of warmup epochs.", 5, least=0)
    warmup_lr: float | None = option(
        "Learning rate at the start of warmup.", None, least=0, shown="a hundredth of --lr"
    )
    min_lr: float = option("Learning rate at the end of the schedule.", 0.0, least=0)
    weight_decay: float = option("Weight decay.", 0.05, least=0)
    layer_decay: float | None = option(
        "Factor of the learning rate from one layer to the layer before it.", None, least=0, most=1, shown="1"
    )
    clip_grad: float | None = option("Maximum norm of the gradient.", None, least=0, shown="no limit")
    ema: float | None = option(
        "Decay of a moving average of the weights, which is kept too.", None, least=0, most=1, shown="no average"
    )
    seed: int = option("Random seed; the same seed gives the same run.", 0, least=0)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    augment: bool = option("Augment images by timm's crops, flips and colours (digits: crops only).", True)
    augment_args: dict[str, Any] = key_values("Argument of timm's create_transform; repeatable.", "augment-arg")
    aug_repeats: int = option("Differently cropped copies of each image in an epoch.", 1, least=1)
    erase: float = option("Probability of random erasing.", 0.0, least=0, most=1)
    mixup: float = option("Mixup's alpha.", 0.0, least=0)
    cutmix: float = option("CutMix's alpha.", 0.0, least=0)
    smoothing: float = option("Label smoothing.", 0.0, least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class Hardware:
    device: str = option("Device: auto, cpu, cuda, cuda:1, ...", "auto", metavar="DEVICE")
    amp: Literal["none", "bf16", "fp16"] = option("Mixed precision: none, bf16 or fp16.", "none")
    channels_last: bool = option("Store images and weights channels-last.", False)
    compile: bool = option("Compile both networks with torch.compile.", False)
    shard: bool = option("Use FSDP2 instead of DDP for the student under torchrun.", False)
    workers: int = option("Number of processes that load images.", 2, least=0)


@dataclass(frozen=True, kw_only=True)
class Output:
    out: str | None = option(
        "Folder for the results.", None, metavar="FOLDER", shown="the first free of runs/NAME, runs/NAME-2, ..."
    )
    overwrite: bool = option("Replace an existing run in --out.", False)
    checkpoint_every: int = option(
        "Steps between checkpoints.", 0, least=0, metavar="STEPS", shown="0: only at the end of each epoch"
    )
    keep: int = option(
        "Number of best epochs whose weights are kept beside those of the best and the last.", 0, least=0
    )
    log_every: float = option("Seconds between lines of progress where the output is no terminal.", 30.0, least=0)
    tensorboard: bool = option("Also write TensorBoard events.", False)
    wandb: str | None = option(
        "Project of Weights & Biases that receives the log; WANDB_MODE=offline keeps it here.", None, metavar="PROJECT",
        shown="none",
    )  # fmt: skip


GROUPS = (Data, Teacher, Student, Method, Optimisation, Augmentation, Hardware, Output)


@dataclass(frozen=True, kw_only=True)
class Settings(Output, Hardware, Augmentation, Optimisation, Method, Student, Teacher, Data):
    """All options of `fastkd train`, with the defaults for a folder of images; the optimiser's defaults are DeiT's."""


# These do not change the results of a run, so a resume may change them.
FREE = frozenset(
    {"out", "overwrite", "workers", "checkpoint_every", "keep", "log_every", "tensorboard", "wandb", "check", "recipe"}
)

# At 64 px, a digit's pixel is one patch of the student and one cell of the teacher's map at stride 8.
DIGITS = Settings(
    img_size=64,
    student="vit_tiny_patch16_224",
    student_args={"patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2},
    teacher="resnet18",
    teacher_args={"output_stride": 8, "channels": (16, 32, 64, 64), "stem_width": 16},
    teacher_layers=("layer2.1", "layer3.0", "layer3.1", "layer4.0"),
    baseline=True,
    teacher_epochs=4,
    teacher_lr=3e-3,
    epochs=20,
    warmup_epochs=2,
    batch_size=16,
    lr=1e-3,
    workers=0,
)
FOLDER = Settings()
# method -> the task of its second stage, and that stage's share of the epochs
SECOND_STAGES = {"cikd": ("dkd", 1 / 2), "dearkd": ("none", 1 / 6)}


def stages(settings: Settings) -> tuple[Stage, ...]:
    """Return the run's stages with None replaced by the run's values.

    Raises:
        InputError: too few epochs for the stages of a method.
    """
    given = settings.stages or _stages_of(settings)
    return tuple(
        dataclasses.replace(
            stage, **{name: getattr(settings, name) for name in STAGE_FIELDS if getattr(stage, name) is None}
        )
        for stage in given
    )


def _stages_of(settings: Settings) -> tuple[Stage, ...]:
    """Return the stages of a method; those after the first have their own task's options."""
    second, share = SECOND_STAGES.get(settings.task, ("", 0.0))
    epochs = round(share * settings.epochs) or int(share > 0)
    if epochs == settings.epochs:
        raise InputError(
            f"--epochs: {settings.task} has two stages, the second is {second}; give 2 at least, or --stage "
            f"{settings.task}:1 for the first alone"
        )
    first = Stage(settings.task, settings.epochs - epochs, settings.task_args)
    return (first, Stage(second, epochs)) if second else (first,)


def anchored(settings: Settings) -> Settings:
    """Return the settings with absolute paths, so that a resume works from any folder. Other values are kept."""
    names = ("data", "data_root", "class_map", "teacher_checkpoint", "student_checkpoint", "teacher_cache")
    given = {name: value for name in names if (value := getattr(settings, name)) is not None and value != "digits"}
    for name in ("teacher", "student"):
        source, _, folder = (getattr(settings, name) or "").partition(":")
        if source == "local-dir":
            place: dict[str, Any] = {name: f"{source}:{os.path.abspath(folder)}"}
            settings = dataclasses.replace(settings, **place)
    whole = {name: os.path.abspath(value) for name, value in given.items()}
    return dataclasses.replace(
        settings, **{name: path for name, path in whole.items() if name == "teacher_cache" or os.path.exists(path)}
    )


def plain(settings: Settings) -> dict[str, Any]:
    """Return the settings as a dictionary for JSON or YAML."""
    return dataclasses.asdict(settings)


def from_plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of settings from JSON or YAML; lists become tuples."""
    return tuples(values) | ({"stages": read_stages(values["stages"])} if "stages" in values else {})


def differences(now: Settings, before: Settings) -> list[str]:
    """Return the options that a resume would change, such as "lr: 0.1 (the run has 0.001)"."""
    new, old = vars(now), vars(before)
    changed = (name for name in new if name not in FREE and new[name] != old[name])
    return [f"{name}: {new[name]} (the run has {old[name]})" for name in changed]


def settings_from(
    given: dict[str, Any], base: Settings | None = None, config: dict[str, Any] | None = None
) -> Settings:
    """Return the base's settings, updated by the values of a file, then by the given ones.

    Without a base, the settings of the recipe or of the kind of data are the base. Naming a network drops the options
    of the base's network. A file's mapping replaces the base's, a given one is added to it.
    """
    config = config or {}
    if base is None:
        base = _base(config | given)
    replaced: dict[str, Any] = {name: {} for name in config if name.endswith("_args")}
    return _updated(_updated(dataclasses.replace(base, **replaced), config), given)


def _updated(base: Settings, given: dict[str, Any]) -> Settings:
    given = dict(given)
    for role in ("student", "teacher"):
        if role in given:
            own: dict[str, Any] = {f"{role}_args": {}, f"{role}_layers": None}
            base = dataclasses.replace(base, **own)
    if "task" in given and ("task_args" in given or given["task"] != base.task):
        base = dataclasses.replace(base, task_args={})
    if {"task", "task_args", "epochs"} & given.keys():
        given.setdefault("stages", ())
    for name in given:
        if name.endswith("_args"):
            given[name] = getattr(base, name) | given[name]
    if given.get("teacher_checkpoint") or given.get("teacher_pretrained") or given.get("teacher") == "self":
        given.setdefault("teacher_epochs", 0)
    if given.get("teacher_checkpoint") is not None:
        given.setdefault("teacher_pretrained", False)  # the recipe's pretrained weights would be downloaded in vain
    return dataclasses.replace(base, **given)


def _base(given: dict[str, Any]) -> Settings:
    name = given.get("recipe")
    if name is None:
        return DIGITS if given.get("data", "digits") == "digits" else FOLDER
    if name not in RECIPES:
        raise InputError(f"--recipe: needs one of {', '.join(RECIPES)}, got {name!r}{near(name, RECIPES)}")
    return dataclasses.replace(settings_from({}, FOLDER, read_recipe(name)), recipe=name)


def read_recipe(name: str) -> dict[str, Any]:
    """Return the values of a recipe's file."""
    return _read(recipe(name))


def read_settings(path: Path) -> Settings:
    """Return the settings of a file that write_settings has written."""
    return Settings(**_read(path))


def _read(path: Path) -> dict[str, Any]:
    import yaml

    return from_plain(yaml.safe_load(path.read_text(encoding="utf-8")))


def write_settings(path: Path, settings: Settings) -> None:
    """Write all settings but the output folder as a YAML file, which starts the same run again."""
    values = plain(settings)
    del values["out"], values["overwrite"]
    path.write_text(as_yaml(values), encoding="utf-8")
