"""`fastkd invert` on typer; options left out take the preset's values."""

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
    teacher: Annotated[str | None, _option("timm model to invert. [what its checkpoint was saved as]")] = None,
    teacher_arg: Annotated[list[str] | None, _option("KEY=VALUE for timm.create_model; repeat for more.")] = None,
    teacher_checkpoint: Annotated[str | None, _option("Its weights.")] = None,
    teacher_pretrained: Annotated[bool, _option("Or timm's pretrained ones.", "--teacher-pretrained")] = False,
    num_classes: Annotated[int | None, _option("Classes of the teacher. [as its weights have]", min=1)] = None,
    img_size: Annotated[int | None, _option("Pixels of a side. [the teacher's own]", min=1)] = None,
    preset: Annotated[str, _option(f"{', '.join(PRESETS)}. [imagenet-0]")] = "imagenet-0",
    images: Annotated[int, _option("Images to make. [1000]", min=1)] = 1000,
    labels: Annotated[str | None, _option("Classes to make them of, by commas. [all, in turn]")] = None,
    out: Annotated[str, _option("Folder for them. [synthetic]")] = "synthetic",
    resume: Annotated[bool, _option("Go on with the images that are in --out.", "--resume")] = False,
    batch_size: Annotated[int | None, _option("Images at a time.", min=1)] = None,
    phases: Annotated[str | None, _option("STEPS[/POOL[/JITTER]], by commas: 2000/2/15,1000/1/30.")] = None,
    lr: Annotated[float | None, _option("Adam's learning rate.", min=0)] = None,
    cross_entropy: Annotated[float | None, _option("Weight of the classes.", min=0)] = None,
    bn: Annotated[float | None, _option("Of the batch norm statistics.", min=0)] = None,
    first_bn: Annotated[float | None, _option("Of their first layer, beside the others' 1.", min=0)] = None,
    tv_l1: Annotated[float | None, _option("Of the total variation.", min=0)] = None,
    tv_l2: Annotated[float | None, _option("Of its root of squares.", min=0)] = None,
    l2: Annotated[float | None, _option("Of the images' norm.", min=0)] = None,
    intra: Annotated[float | None, _option("Of the intra-divergence.", min=0)] = None,
    spread_margin: Annotated[float | None, _option("Distance to the nearest image of the class.", min=0)] = None,
    boundary_margin: Annotated[float | None, _option("From a class's radius to the next class.", min=0)] = None,
    competition: Annotated[float | None, _option("Of the competition with --student.", min=0)] = None,
    flip: Annotated[bool | None, _option("Mirror the batch at random.")] = None,
    grey: Annotated[bool | None, _option("One value for the three channels.")] = None,
    cell: Annotated[int | None, _option("Pixels of a side that are one.", min=1)] = None,
    noise: Annotated[float | None, _option("Standard deviation of the noise it starts from.", min=0)] = None,
    student: Annotated[str | None, _option("timm model that competes, trained on the images so far.")] = None,
    student_arg: Annotated[list[str] | None, _option("KEY=VALUE for timm.create_model; repeat for more.")] = None,
    student_checkpoint: Annotated[str | None, _option("Weights it starts from.")] = None,
    student_steps: Annotated[int, _option("Steps of training after each batch. [100]", min=0)] = 100,
    student_lr: Annotated[float, _option("Learning rate then. [0.001]", min=0)] = 1e-3,
    device: Annotated[str, _option("auto, cpu, cuda, cuda:1, ... [auto]")] = "auto",
    amp: Annotated[str, _option("none, bf16 or fp16. [none]")] = "none",
    seed: Annotated[int, _option("The same seed gives the same images. [0]", min=0)] = 0,
) -> None:
    """Synthesise labelled images from a CNN alone, by its batch norm statistics (DeepInversion).

    The images stand in class folders below train/, as `fastkd train --data` reads them, beside a manifest and a grid
    of the first of them. A run that was stopped goes on with --resume.
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
    """The preset's values with the given ones in place, as an Inversion."""
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
