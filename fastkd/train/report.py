"""Reports of a run: log, picture, tables. One rule: a file is complete or does not exist."""

import csv
import hashlib
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from . import InputError
from .checkpoint import replacing

Row = dict[str, Any]
FIRST = ("network", "epoch", "lr", "loss", "task_loss")
LAST = (
    "top1", "top1_ema", "top5", "top5_ema", "val_loss", "val_loss_ema", "steps", "seconds", "data_seconds",
    "loss_seconds",
)  # fmt: skip
COLOURS = {"teacher": "#7a7a7a", "student alone": "#d1783c", "student distilled": "#2563a8"}
PART_COLOURS = ("#2563a8", "#5f9e6e", "#b3558c", "#d1783c", "#7a7a7a")


def write_json(path: Path, content: Any) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


def parts_of(rows: list[Row]) -> list[str]:
    """Return the names of the parts of the loss, in order of appearance."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if name not in FIRST + LAST]


def write_log(path: Path, rows: list[Row]) -> None:
    names = {name for row in rows for name in row}
    columns = [name for name in (*FIRST, *parts_of(rows), *LAST) if name in names]
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


class TensorBoard:
    """Writer of the log's rows as TensorBoard events, with epochs as steps."""

    def __init__(self, folder: Path, rows: list[Row]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # In a resumed run, rows after its checkpoint are dropped.
        epochs = {row["network"]: row["epoch"] for row in rows}
        self._writers: dict[str, Any] = {}
        self._make = lambda name: SummaryWriter(
            str(folder / name.replace(" ", "_")), purge_step=epochs.get(name, 0) + 1, flush_secs=10
        )

    def add(self, row: Row) -> None:
        name = row["network"]
        writer = self._writers[name] = self._writers.get(name) or self._make(name)
        for key, value in row.items():
            if isinstance(value, float):
                writer.add_scalar(key, value, row["epoch"])
        writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class WeightsAndBiases:
    """Writer of the log's rows to Weights & Biases; a resumed run goes on with the same id."""

    def __init__(self, project: str, out: Path, config: Row) -> None:
        import wandb

        own = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:8]
        try:
            self._run = wandb.init(project=project, dir=out, name=out.name, id=own, resume="allow", config=config)
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise InputError(f"--wandb: {reason}; WANDB_MODE=offline needs no account") from error
        self._run.define_metric("*", step_metric="epoch")

    def add(self, row: Row) -> None:
        values = {f"{row['network']}/{key}": value for key, value in row.items() if isinstance(value, float)}
        self._run.log({"epoch": row["epoch"], **values})

    def close(self) -> None:
        self._run.finish()


def write_curve(path: Path, rows: list[Row], teacher_top1: float | None, title: str) -> None:
    """Draw the students' top-1 over epochs with the teacher's, and the terms of the loss."""
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    # The title contains a folder's name: $ must not begin a formula, and some bytes may not be valid text.
    title = title.encode(errors="replace").decode()
    figure.suptitle(title, x=0.012, ha="left", fontweight="bold", parse_math=False)
    top1, terms = figure.subplots(1, 2, width_ratios=(3, 2))
    if teacher_top1 is not None:
        top1.axhline(teacher_top1, color=COLOURS["teacher"], linestyle="--", linewidth=1.2)
        top1.annotate(
            f"teacher {teacher_top1:.1f}", (0, teacher_top1), (6, -4), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="left", va="top", color=COLOURS["teacher"], fontsize=9,
        )  # fmt: skip
    for label in ("student alone", "student distilled"):
        own = [row for row in rows if row["network"] == label]
        if own:
            epochs, values = [row["epoch"] for row in own], [row["top1"] for row in own]
            top1.plot(epochs, values, color=COLOURS[label], linewidth=2, label=f"{label} {values[-1]:.1f}")
            top1.plot(epochs[-1:], values[-1:], "o", color=COLOURS[label], markersize=5)
    top1.set(xlabel="epoch", ylabel="top-1 on validation images, %", ylim=(0, 102))
    top1.legend(loc="lower right", frameon=False)
    distilled = [row for row in rows if row["network"] == "student distilled"]
    names = parts_of(distilled)
    # A sum is not drawn if its terms are.
    names = [name for name in names if not name.endswith("_loss")] or names
    for name, colour in zip(names, itertools.cycle(PART_COLOURS)):
        own = [row for row in distilled if name in row]
        terms.plot([row["epoch"] for row in own], [row[name] for row in own], color=colour, label=name)
    terms.set(xlabel="epoch", ylabel="terms of the loss, unweighted", yscale="log")
    terms.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    terms.yaxis.set_major_formatter("{x:g}")
    terms.yaxis.set_minor_formatter(NullFormatter())
    if names:
        terms.legend(frameon=False)
    for axes in (top1, terms):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10), min_n_ticks=1))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    with replacing(path) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from", UserWarning)
        figure.savefig(partial, format="png")


def table(results: list[Row]) -> str:
    """Return the table of results with a row per network."""
    lines: list[tuple[str, ...]] = [("network", "top-1 (%)", "seconds per step", "share of the step in the loss")]
    for row in results:
        share = "-" if row["loss_share"] is None else f"{row['loss_share']:.1%}"
        seconds = "-" if row["seconds_per_step"] is None else f"{row['seconds_per_step']:.4f}"
        lines.append((row["network"], "-" if row["top1"] is None else f"{row['top1']:.2f}", seconds, share))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )
