"""The command line: `fastkd train | eval | look | export | invert | info`, with options that dataclasses define."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings

from fastkd._version import __version__

from . import InterruptedRun, RunError
from .parser import Parser, add_options, read_file, values_of
from .recipes import recipe
from .settings import DIGITS, FOLDER, GROUPS, Settings, read_recipe, settings_from

TRAIN = """Distil a timm student from a timm teacher.

Without arguments, a small CNN teacher is trained on scikit-learn's digits, then a tiny ViT student with and without
that teacher. One folder receives a log (CSV), a picture of the curves, the weights, a summary, and config.yaml, which
starts the same run again.

If no layers are named, the task chooses them. The manifold task takes the blocks (stages of a CNN) that have as many
tokens as blocks of the other network, and of these the first four and the last four, or fewer if fewer exist.

Ctrl-C finishes the step and writes a checkpoint. On several GPUs: torchrun --nproc-per-node 8 -m fastkd train ...
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = arguments[0] if arguments else ""
    commands = parser("" if command.startswith("--print_completion") else command)
    if not command:
        commands.print_help()
        return 2
    code, teller = 0, None
    try:
        found = commands.parse_args(arguments, defaults=False)
        _run(found.command, values_of(found[found.command]))
    except RunError as error:
        code, teller = error.code, error.teller
        if teller in (None, _rank()):
            prog = f"fastkd {command}" if command in COMMANDS else "fastkd"
            print(f"{prog}: {error}", file=sys.stderr)
    finally:
        _leave(together=teller is not None)
    return code


COMMANDS = {
    "train": "Distil a timm student from a timm teacher.",
    "eval": "Evaluate a network: top-1, top-5, classes, agreement with a teacher.",
    "look": "Draw the relation and attention maps of networks side by side.",
    "export": "Write a student as ONNX, torch.export or a Hugging Face folder.",
    "invert": "Synthesise labelled images from a trained CNN.",
    "info": "Print the versions and the backends of this installation.",
}
MODULES = {"eval": ".evaluation", "look": ".look", "export": ".export", "invert": ".inversion.cli"}


def parser(command: str = "") -> Parser:
    """Return the parser of all commands; with a command, the others have no options, which saves time."""
    set_parsing_settings(add_print_completion_argument=True)
    top = Parser(
        prog="fastkd",
        description="Distil vision transformers with fused losses.",
        version=__version__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    chosen = top.add_subcommands(dest="command", metavar="COMMAND")
    for name, text in COMMANDS.items():
        own = Parser(description=text)
        if name == "train" and command in (name, ""):
            own = train_parser()
        elif name in MODULES and command in (name, ""):
            own = import_module(MODULES[name], __package__).parser()
        chosen.add_subcommand(name, own, help=text)
    return top


def _run(command: str, given: dict[str, Any]) -> None:
    if command == "train":
        try:
            train(given)
        except KeyboardInterrupt as error:
            raise InterruptedRun("interrupted before the first step", 130) from error
    elif command in MODULES:
        import_module(MODULES[command], __package__).run(given)
    else:
        from fastkd.info import main as info

        info([])


def train_parser() -> Parser:
    """Return the parser of `fastkd train`, without defaults: its result holds the options that were given."""
    own = Parser(usage="fastkd train [OPTION ...]", description=TRAIN)
    own.add_argument("--config", metavar="FILE", help="YAML file of options by name; the command line overrides it.")
    own.add_argument("--resume", metavar="FOLDER", help="Run to continue, with the options stored there.")
    own.add_argument("--dry-run", action="store_true", help="Print shapes, layers, parameters and memory, and stop.")
    add_options(own, *GROUPS, shown=_default)
    return own


def train(given: dict[str, Any]) -> None:
    """Run `fastkd train` with the options that were given."""
    given = dict(given)
    dry_run, resume = given.pop("dry_run", False), given.pop("resume", None)
    config = read_file(given.pop("config"), *GROUPS) if "config" in given else {}
    chosen = config | given
    if resume is None and chosen.get("recipe") is not None and "data" not in chosen:
        print(describe_recipe(chosen["recipe"], settings_from(given, config=config)))
    elif dry_run:
        _plan(settings_from(given, config=config))
    else:
        _print_results(_train(given, config, resume))


def describe_recipe(name: str, settings: Settings) -> str:
    """Return the text of a recipe: its file, the other settings, and the options that were given."""
    text, plain = recipe(name).read_text(encoding="utf-8"), settings_from({"recipe": name})
    told = {"data", "recipe", "task", "task_args", *read_recipe(name)}
    rest = [f"{key}: {value}" for key, value in vars(plain).items() if key not in told]
    changed = [f"{key}: {value}" for key, value in vars(settings).items() if value != getattr(plain, key)]
    lines = [text, "# The rest, as for any folder:", *rest]
    return "\n".join([*lines, *(["", "# Options given:", *changed] if changed else [])])


def _default(name: str) -> str:
    digits, folder = getattr(DIGITS, name), getattr(FOLDER, name)
    if isinstance(digits, dict):
        digits = " ".join(f"{key}={value}".replace(" ", "") for key, value in digits.items())
        return f"digits {digits}" if digits else ""
    return str(folder) if digits == folder else f"digits {digits}, folder {folder}"


def _train(given: dict[str, Any], config: dict[str, Any], resume: str | None) -> dict[str, Any]:
    from . import job

    if resume is None:
        return job.train(settings_from(given, config=config))
    before = job.saved_settings(resume)
    given = {name: value for name, value in given.items() if name not in ("out", "overwrite")}
    now = settings_from(given, before, config)
    job.check_resume(now, before)
    return job.train(now, resume=True)


def _plan(settings: Settings) -> None:
    from .plan import plan

    text = plan(settings)
    if _rank() == 0:
        print(text)


def _rank() -> int:
    """Return the rank of this process; only the first one prints."""
    return int(os.environ.get("RANK", "0"))


def _leave(together: bool) -> None:
    """End the process group, if a run may have joined one."""
    if f"{__package__}.ranks" in sys.modules:
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
