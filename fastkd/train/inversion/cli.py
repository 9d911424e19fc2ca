"""`fastkd invert`; omitted options take the preset's values."""

from typing import Any

from .. import InterruptedRun
from ..parser import Parser, add_options, read_file
from .settings import GROUPS, Inversion, settings_from

INVERT = """Synthesise labelled images from a trained CNN and its batch-norm statistics (DeepInversion).

The images are written to class folders below train/, as `fastkd train --data` reads them, with a manifest, a grid of
the first images, and config.yaml, which makes the same images again. --resume continues a run that was stopped.
"""
DEFAULTS = vars(Inversion())


def parser() -> Parser:
    """Return the parser of `fastkd invert`, without defaults: its result holds the options that were given."""
    own = Parser(usage="fastkd invert [OPTION ...]", description=INVERT)
    own.add_argument("--config", metavar="FILE", help="YAML file of options by name; the command line overrides it.")
    add_options(own, *GROUPS, shown=lambda name: str(DEFAULTS[name]) if DEFAULTS.get(name) not in (None, {}) else "")
    return own


def run(given: dict[str, Any]) -> None:
    """Run `fastkd invert` with the options that were given."""
    from .job import invert

    given = dict(given)
    config = read_file(given.pop("config"), *GROUPS) if "config" in given else {}
    for name in ("teacher_args", "student_args"):
        if name in given:
            given[name] = config.get(name, {}) | given[name]
    try:
        summary = invert(settings_from(config | given))
    except KeyboardInterrupt as error:
        message = "interrupted; the finished batches stay, --resume goes on with them"
        raise InterruptedRun(message, 130) from error
    terms = ", ".join(f"{name} {value:.3g}" for name, value in summary["terms"].items())
    print(f"\nimages      {summary['images']} in {summary['batches']} batches, {summary['out']}/train")
    print(f"teacher     gives its label more than half in {summary['sure']:.1%}")
    print(f"last batch  {terms}")
    print(f"picture     {summary['grid']}")
    print(f"manifest    {summary['out']}/manifest.jsonl")
