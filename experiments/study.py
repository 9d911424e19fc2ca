"""Compare every method with training without a teacher, on shares of the training images, over several seeds.

python -m experiments.study                         handwritten digits, as `make study`
python -m experiments.study patches                 patches of 20 pictures
python -m experiments.study FOLDER --teacher NAME   any folder of images; options of `fastkd train` may follow

python -m experiments.study digits --times 2        twice the steps

All runs of a study take the same number of steps, so that shares differ only in the images. The two sets of images are
those of experiments/sets.py. Their teacher is a transformer that has learnt from a CNN, both from all training images.
The student's learning rate, augmentation and weight decay are tuned without a teacher, on a fifth of the training
images, for each share; all methods use them. Finished runs are read and not repeated.
"""

import argparse
import csv
import dataclasses
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from fastkd.train import InputError, cli, evaluation, job, networks, report
from fastkd.train.checkpoint import replacing
from fastkd.train.options import read_size
from fastkd.train.parser import values_of
from fastkd.train.settings import Settings, settings_from

from . import sets

ALONE = "none"
METHODS = (ALONE, "soft", "dkd", "manifold", "manifold+dkd", "vitkd", "cikd", "dearkd")
TWICE = (ALONE, "dkd", "manifold+dkd")  # methods that are also trained for twice as long
EPOCHS = 8  # of the sets' students, and of the runs that their settings are chosen by
ROUNDS = 3  # short runs of each method that measure its cost
VIT, CNN = "vit_tiny_patch16_224", "resnet18"


class Set(NamedTuple):
    """A set of images: size and patch in pixels, passes over the images in an epoch, shares, probability of a flip."""

    size: int
    patch: int
    epoch_repeats: int
    shares: tuple[float, ...]
    hflip: float

    def settings(self, data: Path) -> Settings:
        return Settings(
            data=str(data), img_size=self.size, epochs=EPOCHS, epoch_repeats=self.epoch_repeats, warmup_epochs=1,
            batch_size=16, lr=1e-3, opt_args={"fused": True}, augment_args=self.crops(0.7), workers=0, device="cpu",
            check=False, log_every=0, overwrite=True, student=VIT, student_args=self.vit(48, 3, 3),
        )  # fmt: skip

    def vit(self, width: int, depth: int, heads: int) -> dict[str, int]:
        return {"patch_size": self.patch, "embed_dim": width, "depth": depth, "num_heads": heads}

    def crops(self, least: float) -> dict[str, Any]:
        return {"scale": (least, 1.0), "ratio": (0.9, 1.1), "hflip": self.hflip, "color_jitter": None}

    def grid(self) -> tuple[tuple[dict[str, Any], ...], ...]:
        """Return the tuned settings, one after the other, each with its values; the first value is the default."""
        augmentation = ({"augment_args": self.crops(0.7)}, {"augment_args": self.crops(0.4)}, {"augment": False})
        return (
            ({"lr": 1e-3}, {"lr": 2e-3}, {"lr": 4e-3}),
            augmentation,
            ({"weight_decay": 0.05}, {"weight_decay": 0.3}),
        )


SETS = {
    "digits": Set(16, 4, 4, (0.1, 0.25, 1.0), hflip=0.0),
    "patches": Set(32, 8, 3, (0.25, 1.0), hflip=0.5),
}


def trained(settings: Settings, out: Path) -> float:
    """Train a student, unless its folder is finished, and return its top-1."""
    if not (out / "summary.json").exists():
        job.train(dataclasses.replace(settings, out=str(out)))
    return float(json.loads((out / "summary.json").read_text())["results"][-1]["top1"])


def teach(base: Settings, own: Set | None, out: Path) -> Settings:
    """Return the settings with a teacher that has weights; it is trained on all images if it has none yet."""
    if base.teacher_checkpoint is not None or base.teacher_pretrained:
        return base
    if own is None:
        plain = dataclasses.replace(base, task=ALONE, task_args={}, stages=(), epochs=1, warmup_epochs=0)
        trained(dataclasses.replace(plain, baseline=False, overwrite=True), out / "teacher")
        return dataclasses.replace(base, teacher_checkpoint=str(out / "teacher/teacher.safetensors"), teacher_epochs=0)
    cnn = {"output_stride": 8, "channels": (16, 32, 64, 64), "stem_width": 16}
    first = dataclasses.replace(base, task=ALONE, student=CNN, student_args=cnn, lr=3e-3, epochs=10)
    trained(first, out / "cnn")
    second = dataclasses.replace(
        base, task="dkd", student_args=own.vit(96, 4, 6), epochs=12, teacher=CNN, teacher_args=cnn,
        teacher_checkpoint=str(out / "cnn/student.safetensors"),
    )  # fmt: skip
    trained(second, out / "teacher")
    return dataclasses.replace(
        base, teacher=VIT, teacher_args=own.vit(96, 4, 6), teacher_checkpoint=str(out / "teacher/student.safetensors")
    )


def of_share(base: Settings, fraction: float) -> Settings:
    """Return the settings for a share of the images, with as many steps in an epoch as all images have."""
    return dataclasses.replace(
        base, train_fraction=fraction, epoch_repeats=max(1, round(base.epoch_repeats / fraction)), baseline=False
    )


def tune(base: Settings, own: Set, fraction: float, out: Path) -> tuple[Settings, list[dict[str, Any]]]:
    """Return the settings that are best without a teacher on a fifth of the training images, and all that were tried.

    Each setting is tuned in turn, with runs of the same length.
    """
    alone = dataclasses.replace(
        of_share(base, fraction), task=ALONE, teacher=None, teacher_args={}, teacher_checkpoint=None,
        data=str(Path(base.data) / "train"), val_fraction=0.2,
    )  # fmt: skip
    best, tried = dict[str, Any](), list[dict[str, Any]]()
    for choices in own.grid():
        scores = []
        for choice in choices:
            values = best | choice
            name = "-".join(["tune", f"{fraction:g}", *(f"{k}={v}" for k, v in values.items())])
            clean = "".join(c if c.isalnum() or c in "-=." else "_" for c in name)
            scores.append(trained(dataclasses.replace(alone, **values), out / clean))
            tried.append({"fraction": fraction, "values": values, "top1": scores[-1]})
        best |= choices[scores.index(max(scores))]
    return dataclasses.replace(base, **best), tried


def run(base: Settings, method: str, fraction: float, seed: int, out: Path) -> dict[str, Any]:
    """Train a student, or read its finished folder. Return top-1, agreement with the teacher, cost and curve."""
    settings = dataclasses.replace(
        of_share(base, fraction),
        task=method,
        task_args=base.task_args if method == base.task else {},
        stages=(),
        seed=seed,
        overwrite=True,
        check=base.check and seed == 0 and fraction == 1,
    )
    if (out / "result.json").exists():
        return dict(json.loads((out / "result.json").read_text()))
    trained(settings, out)
    teacher, *_, student = networks.sources(str(out))
    scores, _ = evaluation.measure(
        student.load(settings),
        teacher.load(settings),
        student.data(settings),
        dataclasses.replace(settings, img_size=read_size(student.config["img_size"])),
    )
    summary = json.loads((out / "summary.json").read_text())
    own = summary["results"][-1]
    found = {
        "method": method, "fraction": fraction, "seed": seed, "images": summary["images"]["train"],
        "seconds_per_step": own["seconds_per_step"], "loss_share": own["loss_share"] or 0.0,
        **{name: scores[name] for name in ("top1", "agreement", "kl", "teacher_top1")},
        "curve": curve(out / "log.csv"),
    }  # fmt: skip
    report.write_json(out / "result.json", found)
    return found


def curve(log: Path) -> list[dict[str, float]]:
    """Return the number of steps, the loss on labels and top-1 after each epoch."""
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps = itertools.accumulate(int(row["steps"]) for row in rows)
    return [
        # a single loss has no parts
        {"step": step, "top1": float(row["top1"]), "cross_entropy": float(row.get("task_loss") or row["loss"])}
        for step, row in zip(steps, rows, strict=True)
    ]


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and spread over seeds, one line per method and share of the images."""
    lines = []
    for method, fraction in dict.fromkeys((r["method"], r["fraction"]) for r in runs):
        own = [r for r in runs if (r["method"], r["fraction"]) == (method, fraction)]
        line = {"method": method, "fraction": fraction, "images": own[0]["images"], "seeds": len(own)}
        for name in ("top1", "agreement"):
            values = [r[name] for r in own]
            line |= {name: statistics.mean(values), f"{name}_spread": statistics.stdev(values) if own[1:] else 0.0}
        line["curve"] = [
            {"step": points[0]["step"]} | {k: statistics.mean(p[k] for p in points) for k in ("top1", "cross_entropy")}
            for points in zip(*(r["curve"] for r in own), strict=True)
        ]
        lines.append(line)
    return lines


def table(lines: list[dict[str, Any]], costs: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table with a row per method: top-1 by share of the images, agreement, cost."""
    fractions = sorted({line["fraction"] for line in lines})
    tops = [f"top-1 with {fraction:.0%}" for fraction in fractions]
    agreements = [f"agreement with {fraction:.0%}" for fraction in fractions]
    head = ["method", *tops, *agreements, "ms a step", "in the loss"]
    rows = []
    for method in dict.fromkeys(line["method"] for line in lines):
        own = {line["fraction"]: line for line in lines if line["method"] == method}
        rows.append(
            [
                method,
                *(spread(own[f]) if f in own else "" for f in fractions),
                *(f"{own[f]['agreement']:.1f}" if f in own else "" for f in fractions),
                f"{costs[method]['seconds_per_step'] * 1e3:.1f}" if costs else "",
                f"{costs[method]['loss_share']:.1%}" if costs and method != ALONE else "",
            ]
        )
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def spread(line: dict[str, Any]) -> str:
    return f"{line['top1']:.1f}" + (f" ± {line['top1_spread']:.1f}" if line["seeds"] > 1 else "")


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Draw top-1 against the training images with bars of one standard deviation, and during training on all images."""
    left, right = figure.subplots(1, 2)
    lines = content["lines"]
    whole = max(line["fraction"] for line in lines)
    for method in dict.fromkeys(line["method"] for line in lines):
        own = sorted((line for line in lines if line["method"] == method), key=lambda line: line["images"])
        style: dict[str, Any] = {"color": "black", "linestyle": "--"} if method == ALONE else {}
        left.errorbar(
            [line["images"] for line in own],
            [line["top1"] for line in own],
            [line["top1_spread"] for line in own],
            label=method,
            marker="o",
            capsize=2,
            **style,
        )
        points: list[Any] = next((line["curve"] for line in own if line["fraction"] == whole), [])
        right.plot([p["step"] for p in points], [p["top1"] for p in points], **style)
    for axes in (left, right):
        axes.axhline(content["teacher_top1"], color="gray", linestyle=":", label="teacher")
    left.set(xlabel="training images", ylabel="top-1 on test images (%)", xscale="log")
    right.set(xlabel=f"steps, with {whole:.0%} of the images")
    left.legend(fontsize="small")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train students with each method and without a teacher, and print top-1, spread, agreement and cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "data", nargs="?", default="digits", help="images: digits, patches, or a folder as for `fastkd train --data`"
    )
    parser.add_argument("--out", type=Path, default=None, help="folder for the results; an unfinished study goes on")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"methods by commas: {', '.join(METHODS)}")
    parser.add_argument("--fractions", default=None, help="shares of the training images by commas")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument(
        "--times",
        type=int,
        default=1,
        help=f"length of the students' runs on digits and patches, in units of {EPOCHS} epochs",
    )
    parser.add_argument("--finished", action="store_true", help="report the finished runs, and do no other")
    given, options = parser.parse_known_args(arguments)
    try:
        shares = SETS[given.data].shares if given.data in SETS else (0.1, 0.25, 1.0)
        fractions = [float(x) for x in given.fractions.split(",")] if given.fractions else [*shares]
        name = f"study-{Path(given.data).resolve().name}" + (f"-{given.times}-times" if given.times > 1 else "")
        out = given.out or Path("runs") / name
        study(given.data, out, given.methods.split(","), fractions, given.seeds, options, given.finished, given.times)
    except (InputError, ValueError) as error:
        parser.error(str(error))


def study(
    data: str,
    out: Path,
    methods: list[str],
    fractions: list[float],
    seeds: int,
    options: list[str],
    finished: bool = False,
    times: int = 1,
) -> None:
    """Do all runs that are not finished, then write study.json and study.png and print the table.

    `finished`: report the finished runs alone, without costs. `times`: multiple of EPOCHS that students of a set train
    for; their teacher and their settings are those of one time.
    """

    def wanted(folder: Path) -> bool:
        return not finished or (folder / "result.json").exists()

    own = None if options else SETS.get(data)
    if own is None:
        found = cli.parser().parse_args(["train", "--data", data, *options], defaults=False)
        base = settings_from(values_of(found.train))
    else:
        base = own.settings(sets.write(data, out / "images"))
    base = teach(base, own, out)
    bases, tried = dict.fromkeys(fractions, base), list[dict[str, Any]]()
    for fraction in fractions if own is not None else ():
        assert own is not None
        bases[fraction], trials = tune(base, own, fraction, out)
        tried += trials
        bases[fraction] = dataclasses.replace(bases[fraction], epochs=times * base.epochs)
    runs = [
        run(bases[fraction], method, fraction, seed, folder)
        for seed, fraction, method in itertools.product(range(seeds), fractions, methods)
        if wanted(folder := out / f"{method}-{fraction:g}-{seed}")
    ]
    longer = [
        run(dataclasses.replace(bases[f], epochs=2 * bases[f].epochs), method, f, 0, folder)
        for method, f in itertools.product([x for x in TWICE if x in methods], (min(fractions), max(fractions)))
        if own is not None and times == 1 and wanted(folder := out / f"{method}-{f:g}-twice")
    ]
    content: dict[str, Any] = {
        "data": data,
        "lines": (lines := summarise(runs)),
        "longer": longer,
        "tried": tried,
        "epochs": bases[max(fractions)].epochs,
        "tuned_epochs": EPOCHS,
        "costs": {} if finished else costs(bases[max(fractions)], methods, max(fractions), out),
        "teacher_top1": runs[0]["teacher_top1"],
        "seeds": min(line["seeds"] for line in lines),
        "steps": runs[0]["curve"][-1]["step"],
    }
    last = json.loads((out / f"{methods[0]}-{fractions[0]:g}-0" / "summary.json").read_text())
    content |= {key: last[key] for key in ("machine", "versions", "date")}
    report.write_json(out / "study.json", content)
    figure = Figure(figsize=(9, 4), layout="constrained")
    draw(figure, content)
    with replacing(out / "study.png") as file:
        figure.savefig(file, format="png")
    print(f"\n{table(content['lines'], content['costs'])}\n\npicture  {out / 'study.png'}")
    print(f"numbers  {out / 'study.json'}")


def costs(base: Settings, methods: list[str], fraction: float, out: Path) -> dict[str, dict[str, float]]:
    """Return median seconds per step and share of the loss by method, of short runs in turn, which share the load."""
    short = dataclasses.replace(base, epochs=2, epoch_repeats=1, warmup_epochs=0)
    found = {
        (method, number): run(short, method, fraction, 0, out / f"cost-{method}-{number}")
        for number, method in itertools.product(range(ROUNDS), methods)
    }
    names = ("seconds_per_step", "loss_share")
    return {
        method: {name: statistics.median(found[method, i][name] for i in range(ROUNDS)) for name in names}
        for method in methods
    }


if __name__ == "__main__":
    main()
