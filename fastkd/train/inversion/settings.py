"""Settings of `fastkd invert`: every option with its help."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .. import InputError
from ..options import BadValueError, Size, key_values, near, option, read_size
from .presets import PRESETS, Loss, Preset, Schedule


def labels(value: Any) -> tuple[int, ...] | None:
    """Return the classes of a list, or of a text with commas."""
    try:
        return None if value is None else tuple(map(int, value.split(",") if isinstance(value, str) else value))
    except (ValueError, TypeError) as error:
        raise BadValueError(f"needs numbers by commas, got {value!r}") from error


@dataclass(frozen=True, kw_only=True)
class Start:
    preset: str = option(f"Values to start from: {', '.join(PRESETS)}.", "imagenet-0", shown="imagenet-0")


@dataclass(frozen=True, kw_only=True)
class Teacher:
    teacher: str | None = option(
        "timm model to invert.", None, metavar="MODEL", shown="the model named in the checkpoint"
    )
    teacher_args: dict[str, Any] = key_values("Argument of the teacher's model; repeatable.", "teacher-arg")
    teacher_checkpoint: str | None = option("Checkpoint of the teacher.", None, metavar="FILE")
    teacher_pretrained: bool = option("Use timm's pretrained weights for the teacher.", False)
    num_classes: int | None = option("Number of classes of the teacher.", None, least=1, shown="that of its weights")


@dataclass(frozen=True, kw_only=True)
class Images:
    images: int = option("Number of images to make.", 1000, least=1, metavar="IMAGES")
    labels: tuple[int, ...] | None = option(
        "Classes of the images, comma-separated numbers.", None, metavar="N,...", read=labels, shown="all, in turn"
    )
    img_size: Size | None = option(
        "Image side in pixels, or height and width.",
        None,
        metavar="PIXELS|HxW",
        read=read_size,
        shown="the teacher's own",
    )


@dataclass(frozen=True, kw_only=True)
class Student:
    student: str | None = option(
        "timm model of the competing student, trained on the images made so far.", None, metavar="MODEL",
        shown="no competition",
    )  # fmt: skip
    student_args: dict[str, Any] = key_values("Argument of the student's model; repeatable.", "student-arg")
    student_checkpoint: str | None = option("Initial weights of the student.", None, metavar="FILE", shown="random")
    student_steps: int = option("Training steps of the student after each batch.", 100, least=0, metavar="STEPS")
    student_lr: float = option("Learning rate of the student.", 1e-3, least=0)


@dataclass(frozen=True, kw_only=True)
class Hardware:
    device: str = option("Device: auto, cpu, cuda, cuda:1, ...", "auto", metavar="DEVICE")
    amp: Literal["none", "bf16", "fp16"] = option("Mixed precision: none, bf16 or fp16.", "none")
    seed: int = option("Random seed; the same seed gives the same images.", 0, least=0)


@dataclass(frozen=True, kw_only=True)
class Output:
    out: str = option("Folder for the images.", "synthetic", metavar="FOLDER")
    resume: bool = option("Continue the unfinished set of images in --out.", False)


GROUPS = (Start, Teacher, Images, Schedule, Loss, Student, Hardware, Output)


@dataclass(frozen=True, kw_only=True)
class Inversion(Output, Hardware, Student, Images, Teacher):
    """All options of `fastkd invert`."""

    preset: Preset = PRESETS["imagenet-0"]


def settings_from(given: Mapping[str, Any]) -> Inversion:
    """Return the preset's values, updated by the given ones."""
    given = dict(given)
    name = given.pop("preset", Start.preset)
    if name not in PRESETS:
        raise InputError(f"--preset: {name} is not one of {', '.join(PRESETS)}{near(name, list(PRESETS))}")
    own = {item.name for item in dataclasses.fields(Preset)} & given.keys()
    preset = dataclasses.replace(PRESETS[name], **{key: given[key] for key in own})
    return Inversion(preset=preset, **{key: value for key, value in given.items() if key not in own})
