"""Data-free distillation end to end on handwritten digits: `make demo-datafree`.

Per seed a teacher is trained as in `make demo`. From then on there are no real images: from the teacher alone come
four sets of as many images, each teaches a ViT in the same way, and the real validation images test it.
"""

import argparse
import dataclasses
import datetime as dt
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
from tqdm import tqdm

from fastkd._version import __version__
from fastkd.info import cpu_name

from .. import report
from ..checkpoint import write_weights
from ..data import Digits
from ..job import choose_folder
from ..loop import Trainee
from ..prepare import prepare
from ..settings import DIGITS, Settings
from .job import Inversion, invert
from .presets import PRESETS, Preset

TEACHER = "(the teacher, on real images)"
FULL = PRESETS["digits"]
RUNGS: dict[str, Preset] = {
    "noise": dataclasses.replace(FULL, phases=()),  # where the others start
    "cross-entropy": dataclasses.replace(FULL, bn=0.0),
    "DeepInversion": FULL,
    "DeepInversion + intra-divergence": dataclasses.replace(FULL, intra=1.0),
}
IMAGES = 100  # of each set
# The teacher's soft targets and the manifold loss; labels of synthetic images are not used.
STUDENT = dataclasses.replace(
    DIGITS,
    student_args=DIGITS.student_args | {"pretrained_cfg_overlay": {"crop_pct": 1.0}},  # validation as in `make demo`
    teacher_epochs=0,
    baseline=False,
    check=False,
    task_args={"task_weight": 0.0, "logits": "soft"},
    augment_args={"scale": (0.7, 1.0), "ratio": (0.9, 1.1), "hflip": 0.0, "color_jitter": None},  # as of the digits
    batch_size=10,
    epochs=100,
    warmup_epochs=5,
    lr=2e-3,
)


def main(out: Path, seeds: int, images: int, workers: int) -> dict[str, Any]:
    """Runs everything below `out`, several seeds and sets at a time; returns and writes what was measured."""
    began, cpu_began = time.perf_counter(), sum(os.times()[:4])
    write_validation_images(out / "digits" / "val")
    teachers: dict[int, float] = {}
    students: dict[tuple[str, int], float] = {}
    with ProcessPoolExecutor(max(1, workers), get_context("spawn"), _alone) as pool:
        submit = pool.submit if workers else _now
        running: dict[Future[float], tuple[str | None, int]] = {}
        for seed in range(seeds):
            running[submit(train_teacher, seed, out)] = None, seed
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, seed = running.pop(future)
                print(f"seed {seed}  {name or TEACHER:<34}  top-1 {future.result():6.2f}%", flush=True)
                if name is not None:
                    students[name, seed] = future.result()
                    continue
                teachers[seed] = future.result()
                for rung in RUNGS:
                    running[submit(climb, rung, seed, out, images)] = rung, seed
    summary = {
        "results": [
            {"images": name, **spread([students[name, seed] for seed in range(seeds)])} for name in RUNGS
        ],
        "teacher": spread([teachers[seed] for seed in range(seeds)]),
        "images": images,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": sum(os.times()[:4]) - cpu_began,
        "versions": {
            "fastkd": __version__, "torch": torch.__version__, "timm": timm.__version__,
            "python": platform.python_version(),
        },
        "machine": f"{cpu_name()}, {max(1, workers)} processes of 1 thread",
        "date": dt.date.today().isoformat(),
        "presets": {name: dataclasses.asdict(preset) for name, preset in RUNGS.items()},
        "student": dataclasses.asdict(STUDENT),
    }  # fmt: skip
    summary = json.loads(json.dumps(summary))
    report.write_json(out / "demo-datafree.json", summary)
    return summary


def _alone() -> None:
    """In a worker: one thread, and no progress bars that several would draw over one another."""
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  until the process ends


def _now(function: Callable[..., float], *arguments: Any) -> "Future[float]":
    """In this process, at once."""
    future: Future[float] = Future()
    future.set_result(function(*arguments))
    return future


def write_validation_images(folder: Path) -> None:
    """The validation half of the digits as PNGs in class folders."""
    digits = Digits(train=False)
    for i in range(len(digits)):
        image, target = digits[i]
        path = folder / str(target) / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def train_teacher(seed: int, out: Path) -> float:
    """Top-1 of a new teacher, trained on the real training images; its weights go into the seed's folder."""
    setup = prepare(dataclasses.replace(DIGITS, seed=seed, baseline=False))
    assert setup.teacher is not None
    top1 = fit(setup.teacher)
    folder = out / f"seed{seed}"
    folder.mkdir()
    write_weights(folder / "teacher.safetensors", setup.teacher.network, str(DIGITS.teacher), setup.nets.teacher_args)
    return top1


def climb(rung: str, seed: int, out: Path, images: int) -> float:
    """Images of that rung from the seed's teacher, and the top-1 of a new student that saw no others."""
    teacher = str(out / f"seed{seed}" / "teacher.safetensors")
    folder = out / f"seed{seed}" / rung.replace(" ", "")
    invert(Inversion(
        teacher_checkpoint=teacher, img_size=DIGITS.img_size, preset=RUNGS[rung], images=images, seed=seed,
        out=str(folder),
    ))  # fmt: skip
    (folder / "val").symlink_to((out / "digits" / "val").absolute())
    settings: Settings = dataclasses.replace(STUDENT, data=str(folder), teacher_checkpoint=teacher, seed=seed)
    setup = prepare(settings)
    top1 = fit(setup.students[-1])
    write_weights(folder / "vit.safetensors", setup.nets.student, settings.student, setup.nets.student_args)
    return top1


def fit(trainee: Trainee) -> float:
    """All epochs, then top-1 on the validation images, which are looked at once."""
    trainee.begin(0)
    with tqdm(total=trainee.epochs * len(trainee.loader), desc=trainee.label, unit="step", disable=None) as bar:
        for epoch in range(trainee.epochs):
            for _ in trainee.train_epoch(epoch, bar):
                bar.update()
    return trainee.evaluate()


def spread(top1: list[float]) -> dict[str, Any]:
    """The values of the seeds, their mean and their sample standard deviation."""
    return {"top1": top1, "mean": statistics.mean(top1), "spread": statistics.stdev(top1) if len(top1) > 1 else 0.0}


def table(summary: dict[str, Any]) -> str:
    """The rungs in Markdown: mean and sample standard deviation over the seeds, then each seed."""
    head = ["the student learns from", "top-1 (%)", *(f"seed {i}" for i in range(len(summary["teacher"]["top1"])))]
    lines = [head, ["---"] * len(head)]
    lines += [
        [row["images"], f"{row['mean']:.1f} ± {row['spread']:.1f}", *(f"{x:.1f}" for x in row["top1"])]
        for row in [*summary["results"], {"images": TEACHER, **summary["teacher"]}]
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines[1] = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the first free of runs/datafree, runs/datafree-2, ... by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes of one thread")
    given = parser.parse_args()
    folder = choose_folder(dataclasses.replace(DIGITS, data="datafree", out=given.out and str(given.out)))
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} exists and is not empty; remove it, or name another --out")
    measured = main(folder, given.seeds, given.images, given.workers)
    print(f"\n{table(measured)}\n\n{measured['seconds']:.0f} s, results in {folder / 'demo-datafree.json'}")
