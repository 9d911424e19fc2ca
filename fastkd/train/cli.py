"""`fastkd train` and `fastkd info` on typer; options left out take the values in settings.py."""

import ast
import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from . import DivergedError, InputError
from .settings import DIGITS, FOLDER, Settings

app = typer.Typer(
    help="Distil vision transformers with fused losses.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _both(name: str) -> str:
    digits, folder = getattr(DIGITS, name), getattr(FOLDER, name)
    return f"[{folder}]" if digits == folder else f"[digits {digits}, folder {folder}]"


def _option(help_text: str, *flags: str, shown: str = "", **rules: Any) -> Any:
    return typer.Option(
        *flags, help=f"{help_text} {_both(shown) if shown else ''}".strip(), show_default=False, **rules
    )


Number: TypeAlias = float | None
Whole: TypeAlias = int | None
Text: TypeAlias = str | None
Flag: TypeAlias = bool | None
Many: TypeAlias = list[str] | None


@app.command()
def train(
    data: Annotated[str, _option("digits, or a folder of class folders, or of train/ and val/ with those.")] = "digits",
    out: Annotated[Text, _option("Folder for the results. [the first free of runs/NAME, runs/NAME-2, ...]")] = None,
    overwrite: Annotated[bool, _option("Replace a finished run in --out.", "--overwrite")] = False,
    teacher: Annotated[Text, _option("timm model to learn from.", shown="teacher")] = None,
    teacher_arg: Annotated[Many, _option("KEY=VALUE for timm.create_model; repeat for more.")] = None,
    teacher_checkpoint: Annotated[Text, _option("Its weights; else it is trained first.")] = None,
    teacher_pretrained: Annotated[Flag, _option("Or timm's pretrained ones.", "--teacher-pretrained")] = None,
    teacher_epochs: Annotated[Whole, _option("Epochs of training it first.", shown="teacher_epochs", min=0)] = None,
    teacher_lr: Annotated[Number, _option("Learning rate then.", shown="teacher_lr", min=0)] = None,
    teacher_layers: Annotated[Text, _option("Names of layers to match, by commas. [see below]")] = None,
    student: Annotated[Text, _option("timm model that learns.", shown="student")] = None,
    student_arg: Annotated[Many, _option("KEY=VALUE for timm.create_model; repeat for more.")] = None,
    student_layers: Annotated[Text, _option("As many names of its layers. [see below]")] = None,
    baseline: Annotated[Flag, _option("Train the student without the teacher as well.", shown="baseline")] = None,
    img_size: Annotated[Whole, _option("Pixels of a side. [digits 64, folder the student's own]", min=1)] = None,
    epochs: Annotated[Whole, _option("Epochs of the student.", shown="epochs", min=1)] = None,
    warmup_epochs: Annotated[Whole, _option("With rising learning rate.", shown="warmup_epochs", min=0)] = None,
    batch_size: Annotated[Whole, _option("Images per step.", shown="batch_size", min=1)] = None,
    opt: Annotated[Text, _option("timm optimiser.", shown="opt")] = None,
    sched: Annotated[Text, _option("timm schedule.", shown="sched")] = None,
    lr: Annotated[Number, _option("Learning rate.", shown="lr", min=0)] = None,
    weight_decay: Annotated[Number, _option("Weight decay.", shown="weight_decay", min=0)] = None,
    clip_grad: Annotated[Number, _option("Largest norm of the gradient.", shown="clip_grad", min=0)] = None,
    augment: Annotated[Flag, _option("timm's crops, flips, colours (digits: crops).", shown="augment")] = None,
    mixup: Annotated[Number, _option("Mixup's alpha.", shown="mixup", min=0)] = None,
    smoothing: Annotated[Number, _option("Label smoothing.", shown="smoothing", min=0, max=1)] = None,
    weight: Annotated[Number, _option("Of the manifold loss beside the task's.", shown="weight", min=0)] = None,
    intra: Annotated[Number, _option("Weight of its term within images.", shown="intra", min=0)] = None,
    inter: Annotated[Number, _option("Of its term across images.", shown="inter", min=0)] = None,
    random: Annotated[Number, _option("Of its term over random tokens.", shown="random", min=0)] = None,
    num_samples: Annotated[Whole, _option("Random tokens.", shown="num_samples", min=1)] = None,
    val_fraction: Annotated[Number, _option("Share set apart where there is no val/.", shown="val_fraction")] = None,
    check: Annotated[Flag, _option("Decode all images of a folder first.", shown="check")] = None,
    device: Annotated[Text, _option("auto, cpu, cuda, cuda:1, ...", shown="device")] = None,
    amp: Annotated[Text, _option("none, bf16 or fp16.", shown="amp")] = None,
    workers: Annotated[Whole, _option("Processes that load images.", shown="workers", min=0)] = None,
    seed: Annotated[Whole, _option("The same seed gives the same run.", shown="seed", min=0)] = None,
) -> None:
    """Distil a timm student from a timm teacher with the manifold loss.

    Without arguments: scikit-learn's digits, a small CNN teacher trained first, a tiny ViT student with and without
    it. The results are a log (CSV), a picture of the curves, the weights and a summary in one folder.

    Layers that are not named: of the blocks (a CNN's stages) with the other network's number of tokens the first
    four and the last four, fewer where one of them has fewer.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    try:
        summary = _run(settings_from(given))
    except InputError as error:
        _stop(str(error), 2)
    except DivergedError as error:
        _stop(str(error), 1)
    except KeyboardInterrupt:
        _stop("interrupted; the files of the last whole epoch stay", 130)
    _print_results(summary)


@app.command()
def info() -> None:
    """What this installation has: versions, backends, the extension."""
    from fastkd.info import main

    raise typer.Exit(main([]))


def settings_from(given: dict[str, Any]) -> Settings:
    """The data's own settings with the given ones in place; naming a network drops what was set for the default one."""
    base = DIGITS if given["data"] == "digits" else FOLDER
    for role in ("student", "teacher"):
        layers, arg = f"{role}_layers", f"{role}_arg"
        if role in given:
            own: dict[str, Any] = {f"{role}_args": {}, layers: None}
            base = dataclasses.replace(base, **own)
        if layers in given:
            given[layers] = tuple(name.strip() for name in given[layers].split(",") if name.strip())
        if arg in given:
            given[f"{role}_args"] = getattr(base, f"{role}_args") | _parsed(f"--{role}-arg", given.pop(arg))
    if ("teacher_checkpoint" in given or "teacher_pretrained" in given) and "teacher_epochs" not in given:
        given["teacher_epochs"] = 0
    return dataclasses.replace(base, **given)


def _parsed(option: str, pairs: list[str]) -> dict[str, Any]:
    values = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"{option}: needs KEY=VALUE, got {pair!r}")
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[key] = text
    return values


def _run(settings: Settings) -> dict[str, Any]:
    from .job import train

    return train(settings)


def _stop(message: str, code: int) -> None:
    print(f"fastkd train: {message}", file=sys.stderr)
    raise typer.Exit(code)


def _print_results(summary: dict[str, Any]) -> None:
    from .report import table

    out, config = Path(summary["out"]), summary["config"]
    args = "".join(f", {key}={value!r}" for key, value in config["student_args"].items())
    print(f"\n{table(summary['results'])}\n")
    print(f"picture     {out / 'curve.png'}")
    print(f"log         {out / 'log.csv'}")
    print("\n".join(f"checkpoint  {path}" for path in sorted(out.glob("*.safetensors"))))
    path = str(out / "student.safetensors")
    print(f"load it     timm.create_model({config['student']!r}, checkpoint_path={path!r}{args})")
