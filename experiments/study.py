"""Compare every method with training without distillation, on shares of the training images, over several seeds.

python -m experiments.study                         the digits of `make study`
python -m experiments.study FOLDER --teacher NAME   any folder of images; options of `fastkd train` may follow

All runs of a study take the same number of steps, so that shares differ only in the images.
"""

import argparse
import csv
import dataclasses
import itertools
import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

from fastkd import backend
from fastkd.train import InputError, cli, job, report
from fastkd.train.checkpoint import replacing
from fastkd.train.parser import values_of
from fastkd.train.settings import DIGITS, Settings, Stage, settings_from

ALONE = "none"


class Method(NamedTuple):
    """A method of the study: its stages (task, share of the epochs), and whether its teacher must be a transformer."""

    stages: tuple[tuple[str, float], ...]
    transformer: bool = False


METHODS = {
    ALONE: Method(((ALONE, 1.0),)),
    "soft": Method((("soft", 1.0),)),
    "dkd": Method((("dkd", 1.0),)),
    "manifold": Method((("manifold", 1.0),)),
    "vitkd": Method((("vitkd", 1.0),), transformer=True),
    "dearkd": Method((("dearkd", 0.5), (ALONE, 0.5))),
    "cikd": Method((("cikd", 0.5), ("dkd", 0.5)), transformer=True),
}
# The teacher is the demo's CNN. CIKD needs attention maps and ViTKD three layers of one grid: they need a transformer.
TEACHERS = {
    "cnn": DIGITS,
    "vit": dataclasses.replace(
        DIGITS,
        teacher="vit_tiny_patch16_224",
        teacher_args={"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4},
        teacher_layers=None,
        teacher_epochs=40,
        teacher_lr=1e-3,
    ),
}


def teach(base: Settings, out: Path) -> Settings:
    """Return the settings with the teacher's weights; the teacher is trained on all images if it has none yet."""
    if base.teacher_checkpoint is not None or base.teacher_pretrained:
        return base
    if not (out / "summary.json").exists():
        plain = dataclasses.replace(base, task=ALONE, task_args={}, stages=(), epochs=1, warmup_epochs=0)
        job.train(dataclasses.replace(plain, baseline=False, out=str(out), overwrite=True))
    return dataclasses.replace(base, teacher_checkpoint=str(out / "teacher.safetensors"), teacher_epochs=0)


def run(base: Settings, method: str, fraction: float, seed: int, out: Path) -> dict[str, Any]:
    """Train a student, or read its finished folder. Return top-1, curve, seconds per step and seconds in the loss."""
    epochs = max(2, round(base.epochs / fraction))
    stages = []
    for task, share in METHODS[method].stages:
        options = base.task_args if task == base.task else {}
        stages.append(Stage(task, max(1, round(epochs * share)), options))
    settings = dataclasses.replace(
        base,
        stages=tuple(stages),
        train_fraction=fraction,
        seed=seed,
        # The layers in the default settings are for the manifold loss; the other losses use their own defaults.
        student_layers=base.student_layers if method == "manifold" else None,
        teacher_layers=base.teacher_layers if method == "manifold" else None,
        baseline=False,
        check=base.check and seed == 0 and fraction == 1,
        out=str(out),
        overwrite=True,
    )
    finished = out / "summary.json"
    if not finished.exists():
        job.train(settings)
    summary = json.loads(finished.read_text())
    student = summary["results"][-1]
    return {
        "method": method,
        "fraction": fraction,
        "seed": seed,
        "images": summary["images"]["train"],
        "top1": student["top1"],
        "seconds_per_step": student["seconds_per_step"],
        "loss_share": student["loss_share"] or 0.0,
        "teacher_top1": summary["results"][0]["top1"],
        "curve": curve(out / "log.csv", student["network"]),
    }


def curve(log: Path, network: str) -> list[dict[str, float]]:
    """Return the loss, the loss on labels and top-1 of a network after each epoch."""
    with log.open(newline="") as file:
        return [
            {name: float(row[name]) for name in ("epoch", "loss", "top1")}
            | {"cross_entropy": float(row.get("task_loss") or row["loss"])}  # a single loss has no parts
            for row in csv.DictReader(file)
            if row["network"] == network
        ]


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and spread over seeds, one line per method and share of the images."""
    lines = []
    for method, fraction in dict.fromkeys((r["method"], r["fraction"]) for r in runs):
        own = [r for r in runs if (r["method"], r["fraction"]) == (method, fraction)]
        top1 = [r["top1"] for r in own]
        lines.append(
            {
                "method": method,
                "fraction": fraction,
                "images": own[0]["images"],
                "top1": statistics.mean(top1),
                "spread": statistics.stdev(top1) if len(top1) > 1 else 0.0,
                "cross_entropy": statistics.mean(r["curve"][-1]["cross_entropy"] for r in own),
                "seeds": len(top1),
            }
        )
    return lines


def table(lines: list[dict[str, Any]], costs: list[dict[str, Any]]) -> str:
    """Return a Markdown table with a row per method: top-1 by share of the images, final cross-entropy, cost."""
    cost = {run["method"]: run for run in costs}
    fractions = sorted({line["fraction"] for line in lines})
    tops = [f"top-1 with {fraction:.0%}" for fraction in fractions]
    head = ["method", *tops, f"cross-entropy in training, {fractions[-1]:.0%}", "ms a step", "in the loss"]
    rows = []
    for method in dict.fromkeys(line["method"] for line in lines):
        own = {line["fraction"]: line for line in lines if line["method"] == method}
        rows.append(
            [
                method,
                *(f"{own[f]['top1']:.1f} ± {own[f]['spread']:.1f}" if f in own else "" for f in fractions),
                f"{own[fractions[-1]]['cross_entropy']:.2f}",
                f"{cost[method]['seconds_per_step'] * 1e3:.1f}",
                "" if method == ALONE else f"{cost[method]['loss_share']:.1%}",
            ]
        )
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def apart(a: list[dict[str, float]], b: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return the distance of two curves after each epoch: relative for the loss, in points for top-1."""
    return [
        {"loss": abs(x["loss"] - y["loss"]) / y["loss"], "top1": abs(x["top1"] - y["top1"])}
        for x, y in zip(a, b, strict=True)
    ]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set the number of PyTorch's threads within the `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def draw(figure: Any, lines: list[dict[str, Any]]) -> None:
    """Draw top-1 against the number of training images, a line per method, with bars of one standard deviation."""
    axes = figure.subplots()
    for method in dict.fromkeys(line["method"] for line in lines):
        own = sorted((line for line in lines if line["method"] == method), key=lambda line: line["images"])
        style: dict[str, Any] = {"color": "black", "linestyle": "--"} if method == ALONE else {}
        axes.errorbar(
            [line["images"] for line in own],
            [line["top1"] for line in own],
            [line["spread"] for line in own],
            label=method,
            marker="o",
            capsize=2,
            **style,
        )
    axes.set(xlabel="training images", ylabel="top-1 on validation images (%)", xscale="log")
    axes.legend()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train students with each method and without distillation, and print top-1, spread and cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "data", nargs="?", default="digits", help="training data: digits, or any value of `fastkd train --data`"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/study"), help="folder for the results; an unfinished study is continued"
    )
    parser.add_argument("--methods", default=",".join(METHODS), help=f"methods by commas: {', '.join(METHODS)}")
    parser.add_argument("--fractions", default="0.1,0.25,1", help="shares of the training images by commas")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    given, options = parser.parse_known_args(arguments)
    try:
        fractions = [float(x) for x in given.fractions.split(",")]
        study(given.data, given.out, given.methods.split(","), fractions, given.seeds, options)
    except (InputError, ValueError) as error:
        parser.error(str(error))


def study(data: str, out: Path, methods: list[str], fractions: list[float], seeds: int, options: list[str]) -> None:
    """Do all runs that are not finished, then write study.json and study.png and return the table."""
    if unknown := set(methods) - METHODS.keys():
        raise InputError(f"--methods: needs some of {', '.join(METHODS)}, got {', '.join(sorted(unknown))}")
    bases = {
        kind: dataclasses.replace(teach(base, out / f"teacher-{kind}"), epochs=base.epochs)
        for kind, base in _bases(data, options).items()
    }

    def chosen(method: str) -> Settings:
        return bases.get("vit" if METHODS[method].transformer else "cnn") or bases["given"]

    runs = [
        run(chosen(method), method, fraction, seed, out / f"{method}-{fraction:g}-{seed}")
        for seed, fraction, method in itertools.product(range(seeds), fractions, methods)
    ]
    lines = summarise(runs)
    # Times are measured again each time, apart from the long runs, which may share the machine.
    costs = []
    for method in methods:
        folder = out / f"{method}-cost"
        shutil.rmtree(folder, ignore_errors=True)
        base = dataclasses.replace(chosen(method), epochs=2)
        costs.append(run(base, method, max(fractions), 0, folder))
    content: dict[str, Any] = {"lines": lines, "costs": costs, "runs": runs}
    content["teachers"] = {kind: base.teacher for kind, base in bases.items()}
    if "manifold" in methods:
        # The same run on plain PyTorch. A run that sums in another order shows the effect of rounding alone.
        fused = next(r for r in runs if (r["method"], r["fraction"], r["seed"]) == ("manifold", max(fractions), 0))
        again = partial(run, chosen("manifold"), "manifold", max(fractions), 0)
        with backend("eager"):
            eager = again(out / "manifold-eager")
        with threads(2 if torch.get_num_threads() == 1 else 1):
            rounded = again(out / "manifold-threads")
        content["same"] = {
            "top1": {"fused": fused["top1"], "eager": eager["top1"], "threads": rounded["top1"]},
            "eager": apart(eager["curve"], fused["curve"]),
            "threads": apart(rounded["curve"], fused["curve"]),
        }
    last = json.loads((out / f"{methods[0]}-{fractions[0]:g}-0" / "summary.json").read_text())
    content |= {key: last[key] for key in ("machine", "versions", "date")}
    for each in [*runs, *costs]:
        del each["curve"]  # log.csv has them
    report.write_json(out / "study.json", content)
    figure = Figure(figsize=(6, 4), layout="constrained")
    draw(figure, lines)
    with replacing(out / "study.png") as file:
        figure.savefig(file, format="png")
    print(f"\n{table(lines, costs)}\n\npicture  {out / 'study.png'}\nnumbers  {out / 'study.json'}")


def _bases(data: str, options: list[str]) -> dict[str, Settings]:
    """Return the base settings of the runs, by kind of teacher; a folder has only the teacher that is named."""
    if data == "digits" and not options:
        return {kind: dataclasses.replace(base, epochs=10, warmup_epochs=1) for kind, base in TEACHERS.items()}
    found = cli.parser().parse_args(["train", "--data", data, *options], defaults=False)
    return {"given": settings_from(values_of(found.train))}


if __name__ == "__main__":
    main()
