"""`fastkd invert` on typer; omitted options take the preset's values."""

import dataclasses
import sys
from typing import Annotated, Any

import typer

from .. import DataError, DivergedError, InputError
from .presets import PRESETS, Phase, Preset

OF_PRESET = {field.name for field in dataclasses.fields(Preset)}


def _option(help_text: str, *flags: str, **rules: Any) -> Any:
    return typer.Option(*flags, help=help_text, show_default=False, **rules)


def invert(
    teacher: Annotated[str | None, _option("timm model to invert. [the model named in the checkpoint]")] = None,
    teacher_arg: Annotated[list[str] | None, _option("KEY=VALUE argument of the teacher's model; repeatable.")] = None,
    teacher_checkpoint: Annotated[str | None, _option("Checkpoint of the teacher.")] = None,
    teacher_pretrained: Annotated[
        bool, _option("Use timm's pretrained weights for the teacher.", "--teacher-pretrained")
    ] = False,
    num_classes: Annotated[
        int | None, _option("Number of classes of the teacher. [that of its weights]", min=1)
    ] = None,
    img_size: Annotated[int | None, _option("Image side in pixels. [the teacher's own]", min=1)] = None,
    preset: Annotated[str, _option(f"Settings to start from: {', '.join(PRESETS)}. [imagenet-0]")] = "imagenet-0",
    images: Annotated[int, _option("Number of images to make. [1000]", min=1)] = 1000,
    labels: Annotated[str | None, _option("Classes of the images, comma-separated numbers. [all, in turn]")] = None,
    out: Annotated[str, _option("Folder for the images. [synthetic]")] = "synthetic",
    resume: Annotated[bool, _option("Continue the unfinished set of images in --out.", "--resume")] = False,
    batch_size: Annotated[int | None, _option("Images per batch.", min=1)] = None,
    phases: Annotated[
        str | None, _option("Phases STEPS[/POOL[/JITTER]], comma-separated, such as 2000/2/15,1000/1/30.")
    ] = None,
    lr: Annotated[float | None, _option("Adam's learning rate.", min=0)] = None,
    cross_entropy: Annotated[float | None, _option("Weight of the cross-entropy with the labels.", min=0)] = None,
    bn: Annotated[float | None, _option("Weight of the batch-norm statistics.", min=0)] = None,
    first_bn: Annotated[
        float | None, _option("Weight of the first batch-norm layer (the others have 1).", min=0)
    ] = None,
    tv_l1: Annotated[float | None, _option("Weight of the L1 total variation.", min=0)] = None,
    tv_l2: Annotated[float | None, _option("Weight of the L2 total variation.", min=0)] = None,
    l2: Annotated[float | None, _option("Weight of the L2 norm of the images.", min=0)] = None,
    intra: Annotated[float | None, _option("Weight of the intra-divergence.", min=0)] = None,
    spread_margin: Annotated[
        float | None, _option("Minimum distance between an image's features and the nearest ones of its class.", min=0)
    ] = None,
    boundary_margin: Annotated[
        float | None, _option("Minimum gap between a class's radius and the nearest other class.", min=0)
    ] = None,
    competition: Annotated[float | None, _option("Weight of the competition with --student.", min=0)] = None,
    flip: Annotated[bool | None, _option("Mirror the batch at random in each step.")] = None,
    grey: Annotated[bool | None, _option("Make greyscale images.")] = None,
    cell: Annotated[int | None, _option("Side in pixels of the cells that are optimised as one pixel.", min=1)] = None,
    noise: Annotated[float | None, _option("Standard deviation of the initial noise.", min=0)] = None,
    student: Annotated[
        str | None, _option("timm model of the competing student, trained on the images made so far.")
    ] = None,
    student_arg: Annotated[list[str] | None, _option("KEY=VALUE argument of the student's model; repeatable.")] = None,
    student_checkpoint: Annotated[str | None, _option("Initial weights of the student.")] = None,
    student_steps: Annotated[int, _option("Training steps of the student after each batch. [100]", min=0)] = 100,
    student_lr: Annotated[float, _option("Learning rate of the student. [0.001]", min=0)] = 1e-3,
    device: Annotated[str, _option("Device: auto, cpu, cuda, cuda:1, ... [auto]")] = "auto",
    amp: Annotated[str, _option("Mixed precision: none, bf16 or fp16. [none]")] = "none",
    seed: Annotated[int, _option("Random seed; the same seed gives the same images. [0]", min=0)] = 0,
) -> None:
    """Synthesise labelled images from a trained CNN and its batch-norm statistics (DeepInversion).

    The images are written to class folders below train/, as `fastkd train --data` reads them, with a manifest and a
    grid of the first images. --resume continues a run that was stopped.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    try:
        summary = _run(given)
    except InputError as error:
        _stop(str(error), 2)
    except (DataError, DivergedError) as error:
        _stop(str(error), 1)
    except KeyboardInterrupt:
        _stop("interrupted; the finished batches stay, --resume goes on with them", 130)
    terms = ", ".join(f"{name} {value:.3g}" for name, value in summary["terms"].items())
    print(f"\nimages      {summary['images']} in {summary['batches']} batches, {summary['out']}/train")
    print(f"teacher     gives its label more than half in {summary['sure']:.1%}")
    print(f"last batch  {terms}")
    print(f"picture     {summary['grid']}")
    print(f"manifest    {summary['out']}/manifest.jsonl")


def settings_from(given: dict[str, Any]) -> Any:
    """Return the preset's values, updated by the given ones, as an Inversion."""
    from ..cli import _parsed
    from .job import Inversion

    name = given.pop("preset")
    if name not in PRESETS:
        raise InputError(f"--preset: {name} is not one of {', '.join(PRESETS)}")
    if "phases" in given:
        given["phases"] = _phases(given["phases"])
    preset = dataclasses.replace(PRESETS[name], **{key: given.pop(key) for key in OF_PRESET & given.keys()})
    for role in ("teacher", "student"):
        given[f"{role}_args"] = _parsed(f"--{role}-arg", given.pop(f"{role}_arg", []))
    if "labels" in given:
        try:
            given["labels"] = tuple(int(label) for label in given["labels"].split(","))
        except ValueError as error:
            raise InputError(f"--labels: needs numbers by commas, got {given['labels']!r}") from error
    return Inversion(preset=preset, **given)


def _phases(text: str) -> tuple[Phase, ...]:
    try:
        return tuple(Phase(*(int(number) for number in part.split("/"))) for part in text.split(","))
    except (ValueError, TypeError) as error:
        raise InputError(f"--phases: needs STEPS[/POOL[/JITTER]] by commas, got {text!r}") from error


def _run(given: dict[str, Any]) -> dict[str, Any]:
    from .job import invert as job

    return job(settings_from(given))


def _stop(message: str, code: int) -> None:
    print(f"fastkd invert: {message}", file=sys.stderr)
    raise typer.Exit(code)
