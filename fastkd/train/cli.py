"""`fastkd train` and `fastkd info` on typer; omitted options take their values from settings.py."""

import ast
import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from . import InputError, RunError
from .inversion.cli import invert
from .settings import DIGITS, FOLDER, STAGE_FIELDS, Settings, Stage

app = typer.Typer(
    help="Distil vision transformers with fused losses.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
MAPPINGS = ("student", "teacher", "task", "opt", "augment")  # --NAME-arg KEY=VALUE


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
    data: Annotated[
        Text, _option("Training data: digits, a folder, or a timm dataset such as hfds/NAME or wds/NAME. [digits]")
    ] = None,
    data_root: Annotated[Text, _option("Root folder of a timm dataset.")] = None,
    train_split: Annotated[Text, _option("Split to train on.", shown="train_split")] = None,
    val_split: Annotated[Text, _option("Split to validate on.", shown="val_split")] = None,
    num_classes: Annotated[Whole, _option("Number of classes, if the dataset does not define it.", min=2)] = None,
    out: Annotated[Text, _option("Folder for the results. [the first free of runs/NAME, runs/NAME-2, ...]")] = None,
    overwrite: Annotated[bool, _option("Replace an existing run in --out.", "--overwrite")] = False,
    resume: Annotated[Text, _option("Folder of a run to continue, with the options stored there.")] = None,
    recipe: Annotated[Text, _option("Name of a paper's settings; without --data, print them and stop.")] = None,
    dry_run: Annotated[bool, _option("Print shapes, layers, parameters and memory, and stop.", "--dry-run")] = False,
    teacher: Annotated[Text, _option("Teacher's timm model.", shown="teacher")] = None,
    teacher_arg: Annotated[Many, _option("KEY=VALUE argument of the teacher's model; repeatable.")] = None,
    teacher_checkpoint: Annotated[
        Text, _option("Checkpoint of the teacher; without one, the teacher is trained first.")
    ] = None,
    teacher_pretrained: Annotated[
        Flag, _option("Use timm's pretrained weights for the teacher.", "--teacher-pretrained")
    ] = None,
    teacher_epochs: Annotated[
        Whole, _option("Number of epochs to train the teacher.", shown="teacher_epochs", min=0)
    ] = None,
    teacher_lr: Annotated[Number, _option("Learning rate for training the teacher.", shown="teacher_lr", min=0)] = None,
    teacher_layers: Annotated[
        Text, _option("Names of the teacher layers to match, comma-separated. [see below]")
    ] = None,
    teacher_cache: Annotated[Text, _option("Folder that caches the teacher's logits (requires --no-augment).")] = None,
    student: Annotated[Text, _option("Student's timm model.", shown="student")] = None,
    student_arg: Annotated[Many, _option("KEY=VALUE argument of the student's model; repeatable.")] = None,
    student_layers: Annotated[
        Text, _option("Names of the student layers to match, as many as --teacher-layers. [see below]")
    ] = None,
    task: Annotated[
        Text, _option("Method: none, manifold, vitkd, dearkd, cikd, soft, hard, dkd, nkd.", shown="task")
    ] = None,
    task_arg: Annotated[Many, _option("KEY=VALUE option of the method; repeatable.")] = None,
    stage: Annotated[Many, _option("TASK:EPOCHS[:KEY=VALUE,...] of a stage; repeat for later stages.")] = None,
    baseline: Annotated[Flag, _option("Also train the student without the teacher.", shown="baseline")] = None,
    img_size: Annotated[Whole, _option("Image side in pixels. [digits 64, folder the student's own]", min=1)] = None,
    epochs: Annotated[Whole, _option("Number of epochs to train the student.", shown="epochs", min=1)] = None,
    warmup_epochs: Annotated[Whole, _option("Number of warmup epochs.", shown="warmup_epochs", min=0)] = None,
    warmup_lr: Annotated[Number, _option("Learning rate at the start of warmup. [a hundredth of --lr]", min=0)] = None,
    min_lr: Annotated[Number, _option("Learning rate at the end of the schedule.", shown="min_lr", min=0)] = None,
    batch_size: Annotated[Whole, _option("Images per forward pass and process.", shown="batch_size", min=1)] = None,
    accumulate: Annotated[Whole, _option("Forward passes per step.", shown="accumulate", min=1)] = None,
    opt: Annotated[Text, _option("timm optimiser.", shown="opt")] = None,
    opt_arg: Annotated[Many, _option("KEY=VALUE argument of the optimiser; repeatable.")] = None,
    sched: Annotated[Text, _option("timm schedule.", shown="sched")] = None,
    lr: Annotated[Number, _option("Learning rate.", shown="lr", min=0)] = None,
    weight_decay: Annotated[Number, _option("Weight decay.", shown="weight_decay", min=0)] = None,
    layer_decay: Annotated[
        Number, _option("Factor of the learning rate from one layer to the layer before it.", min=0, max=1)
    ] = None,
    clip_grad: Annotated[Number, _option("Maximum norm of the gradient.", shown="clip_grad", min=0)] = None,
    ema: Annotated[
        Number, _option("Decay of a moving average of the weights, which is kept too.", min=0, max=1)
    ] = None,
    augment: Annotated[
        Flag, _option("Augment images by timm's crops, flips and colours (digits: crops only).", shown="augment")
    ] = None,
    augment_arg: Annotated[Many, _option("KEY=VALUE argument of timm's create_transform; repeatable.")] = None,
    aug_repeats: Annotated[
        Whole, _option("Differently cropped copies of each image in an epoch.", shown="aug_repeats", min=1)
    ] = None,
    erase: Annotated[Number, _option("Probability of random erasing.", shown="erase", min=0, max=1)] = None,
    mixup: Annotated[Number, _option("Mixup's alpha.", shown="mixup", min=0)] = None,
    cutmix: Annotated[Number, _option("CutMix's alpha.", shown="cutmix", min=0)] = None,
    smoothing: Annotated[Number, _option("Label smoothing.", shown="smoothing", min=0, max=1)] = None,
    val_fraction: Annotated[
        Number, _option("Share of the images used for validation if there is no val/.", shown="val_fraction")
    ] = None,
    train_fraction: Annotated[
        Number, _option("Share of the training images to use.", shown="train_fraction", min=0, max=1)
    ] = None,
    check: Annotated[Flag, _option("Decode all images of a folder before the run.", shown="check")] = None,
    skip_images: Annotated[
        Whole, _option("Maximum number of unreadable images to skip.", shown="skip_images", min=0)
    ] = None,
    device: Annotated[Text, _option("Device: auto, cpu, cuda, cuda:1, ...", shown="device")] = None,
    amp: Annotated[Text, _option("Mixed precision: none, bf16 or fp16.", shown="amp")] = None,
    channels_last: Annotated[Flag, _option("Store images and weights channels-last.", "--channels-last")] = None,
    compile_: Annotated[Flag, _option("Compile both networks with torch.compile.", "--compile")] = None,
    shard: Annotated[Flag, _option("Use FSDP2 instead of DDP for the student under torchrun.", "--shard")] = None,
    workers: Annotated[Whole, _option("Number of processes that load images.", shown="workers", min=0)] = None,
    checkpoint_every: Annotated[
        Whole, _option("Steps between checkpoints. [only at the end of each epoch]", min=0)
    ] = None,
    tensorboard: Annotated[Flag, _option("Also write TensorBoard events.", "--tensorboard")] = None,
    seed: Annotated[Whole, _option("Random seed; the same seed gives the same run.", shown="seed", min=0)] = None,
) -> None:
    """Distil a timm student from a timm teacher.

    Without arguments, a small CNN teacher is trained on scikit-learn's digits, then a tiny ViT student with and without
    that teacher. One folder receives a log (CSV), a picture of the curves, the weights and a summary.

    If no layers are named, the task chooses them. The manifold task takes the blocks (stages of a CNN) that have as
    many tokens as blocks of the other network, and of these the first four and the last four, or fewer if fewer exist.

    Ctrl-C finishes the step and writes a checkpoint. On several GPUs: torchrun --nproc-per-node 8 -m fastkd train ...
    """
    given = {name.rstrip("_"): value for name, value in locals().items() if value is not None}
    dry_run, resume, overwrite = given.pop("dry_run"), given.pop("resume", None), given.pop("overwrite")
    show_only = given.get("recipe") is not None and "data" not in given
    code, teller = 0, None
    try:
        if show_only:
            print(_recipe(given))
        elif dry_run:
            _plan(settings_from(given))
        else:
            _print_results(_run(given, resume, overwrite))
    except RunError as error:
        code, teller = _say(str(error), error.code, error.teller), error.teller
    except KeyboardInterrupt:
        code = _say("interrupted before the first step", 130)
    finally:
        _leave(together=teller is not None)
    if code:
        raise typer.Exit(code)


@app.command()
def info() -> None:
    """Print the versions, the backends and the extension of this installation."""
    from fastkd.info import main

    raise typer.Exit(main([]))


app.command()(invert)


def settings_from(given: dict[str, Any], base: Settings | None = None) -> Settings:
    """Return the base's settings, updated by the given ones; naming a network drops the options of the default one.

    Without a base, the settings of the recipe or of the kind of data are the base.
    """
    given = dict(given)
    if base is None:
        base = _base(given)
    for role in ("student", "teacher"):
        layers = f"{role}_layers"
        if role in given:
            own: dict[str, Any] = {f"{role}_args": {}, layers: None}
            base = dataclasses.replace(base, **own)
        if layers in given:
            given[layers] = tuple(name.strip() for name in given[layers].split(",") if name.strip())
    for name in MAPPINGS:
        if f"{name}_arg" in given:
            before = {} if name == "task" and "task" in given else getattr(base, f"{name}_args")
            given[f"{name}_args"] = before | _parsed(f"--{name}-arg", given.pop(f"{name}_arg"))
    if "stage" in given:
        given["stages"] = tuple(map(_stage, given.pop("stage")))
    elif {"task", "task_args", "epochs"} & given.keys():
        given.setdefault("stages", ())
    if ("teacher_checkpoint" in given or "teacher_pretrained" in given) and "teacher_epochs" not in given:
        given["teacher_epochs"] = 0
    if "teacher_checkpoint" in given:
        given.setdefault("teacher_pretrained", False)  # the recipe's pretrained weights would be downloaded in vain
    return dataclasses.replace(base, **given)


def _recipe(given: dict[str, Any]) -> str:
    """Return the text of a recipe: its values and sources, the other settings, and the options that were given."""
    from .recipes import RECIPES

    settings, plain = settings_from(given), settings_from({"recipe": given["recipe"]})
    recipe = RECIPES[given["recipe"]]
    told = {name for name, _, source in recipe.rows() if source}
    told |= {"data", "recipe", "task", "task_args", "stages", "epochs"}  # the table shows them as stages
    rest = [f"{name}: {value}" for name, value in vars(plain).items() if name not in told]
    changed = [f"{name}: {value}" for name, value in vars(settings).items() if value != getattr(plain, name)]
    lines = [recipe.table(), "", "The rest, as for any folder:", *rest]
    return "\n".join([*lines, *(["", "Options given:", *changed] if changed else [])])


def _base(given: dict[str, Any]) -> Settings:
    if "recipe" not in given:
        return DIGITS if given.get("data", "digits") == "digits" else FOLDER
    from .recipes import RECIPES

    if given["recipe"] not in RECIPES:
        raise InputError(f"--recipe: needs one of {', '.join(RECIPES)}, got {given['recipe']!r}")
    recipe = RECIPES[given["recipe"]]
    return dataclasses.replace(FOLDER, recipe=given["recipe"], **recipe.overrides())


def _stage(text: str) -> Stage:
    """Parse TASK:EPOCHS[:KEY=VALUE,...]; keys that a stage does not have are options of the task."""
    name, _, rest = text.partition(":")
    epochs, _, pairs = rest.partition(":")
    if not epochs.isdecimal():
        raise InputError(f"--stage: needs TASK:EPOCHS[:KEY=VALUE,...], got {text!r}")
    values = _parsed("--stage", [pair for pair in re.split(r",(?=\w+=)", pairs) if pair])
    own = {key: values.pop(key) for key in STAGE_FIELDS if key in values}
    return Stage(name, int(epochs), values, **own)


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


def _run(given: dict[str, Any], resume: str | None, overwrite: bool) -> dict[str, Any]:
    from .job import check_resume, saved_settings, train

    if resume is None:
        return train(settings_from(given | {"overwrite": overwrite}))
    before = saved_settings(resume)
    given = {name: value for name, value in given.items() if name != "out"}
    now = settings_from(given, before)
    check_resume(now, before)
    return train(now, resume=True)


def _plan(settings: Settings) -> None:
    from .plan import plan

    text = plan(settings)
    if _rank() == 0:
        print(text)


def _say(message: str, code: int, teller: int | None = None) -> int:
    if teller in (None, _rank()):
        print(f"fastkd train: {message}", file=sys.stderr)
    return code


def _rank() -> int:
    """Return the rank of this process; only the first one prints."""
    return int(os.environ.get("RANK", "0"))


def _leave(together: bool) -> None:
    """End the process group, if torch was imported and may have started one."""
    if "torch" in sys.modules:
        from .ranks import leave

        leave(together)


def _print_results(summary: dict[str, Any]) -> None:
    from .report import table

    if _rank() != 0:
        return
    out, config = Path(summary["out"]), summary["config"]
    args = "".join(f", {key}={value!r}" for key, value in config["student_args"].items())
    print(f"\n{table(summary['results'])}\n")
    print(f"picture     {out / 'curve.png'}")
    print(f"log         {out / 'log.csv'}")
    print("\n".join(f"checkpoint  {path}" for path in sorted(out.glob("*.safetensors"))))
    path = str(out / "student.safetensors")
    print(f"load it     timm.create_model({config['student']!r}, checkpoint_path={path!r}{args})")
