"""Data-free distillation end to end on handwritten digits: `make demo-datafree`.

For each seed a teacher is trained on real digits, against an adversary. From then on no real image is used: four sets
of equal size are made from the teacher, a ViT learns from each in the same way, and the real validation images test it.
The share of images that a k-NN of real digits reads as the requested digit tells how recognisable a set is.
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
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from fastkd._version import __version__
from fastkd.info import cpu_name
from fastkd.train import report
from fastkd.train.checkpoint import write_weights
from fastkd.train.data import Digits
from fastkd.train.inversion.job import invert
from fastkd.train.inversion.presets import PRESETS, Preset
from fastkd.train.inversion.settings import Inversion
from fastkd.train.inversion.store import Store
from fastkd.train.inversion.synthesis import normalisation
from fastkd.train.job import choose_folder
from fastkd.train.loop import Trainee
from fastkd.train.options import sides
from fastkd.train.prepare import prepare
from fastkd.train.settings import DIGITS, Settings, Stage
from fastkd.train.tasks import PlainTask

TEACHER = "(the teacher, on real images)"
FULL = PRESETS["digits"]
RUNGS: dict[str, Preset] = {
    "noise": dataclasses.replace(FULL, phases=()),  # first seed
    "cross-entropy": dataclasses.replace(FULL, bn=0.0),
    "DeepInversion": FULL,
    "DeepInversion + intra-divergence": dataclasses.replace(FULL, intra=1.0),
}
IMAGES = 100  # images of each set
TEACHER_EPOCHS = 8
EPSILON = 0.2  # of the range from black to white
# The teacher's soft targets and the manifold loss; labels of synthetic images are not used.
STUDENT = dataclasses.replace(
    DIGITS,
    student_args=DIGITS.student_args | {"pretrained_cfg_overlay": {"crop_pct": 1.0}},  # validation as in `make demo`
    teacher_epochs=0,
    baseline=False,
    check=False,
    task_args={"task_weight": 0.0, "weight": 5.0, "logits": "soft"},
    # Crops are nearly whole images, as in validation, and vary more in width than the digits' own augmentation.
    augment_args={"scale": (0.85, 1.0), "ratio": (0.75, 1.33), "hflip": 0.0, "color_jitter": None},
    batch_size=10,
    epochs=100,
    warmup_epochs=5,
    lr=2e-3,
)


class Outcome(NamedTuple):
    """Results of one rung and one seed, in percent."""

    top1: float  # top-1 of the student on real images
    read: float  # images that are read as the requested digit


def main(out: Path, seeds: int, images: int, workers: int) -> dict[str, Any]:
    """Run everything below `out`, several seeds and sets in parallel; write and return the results."""
    began, cpu_began = time.perf_counter(), sum(os.times()[:4])
    real = Digits(train=False)
    write_images(real, out / "digits" / "val")
    teachers: dict[int, float] = {}
    students: dict[tuple[str, int], Outcome] = {}
    with ProcessPoolExecutor(max(1, workers), get_context("spawn"), _alone) as pool:
        submit = pool.submit if workers else _now
        running: dict[Future[Any], tuple[str | None, int]] = {}
        for seed in range(seeds):
            running[submit(train_teacher, seed, out)] = None, seed
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, seed = running.pop(future)
                if name is not None:
                    students[name, seed] = done = future.result()
                    print(f"seed {seed}  {name:<34}  top-1 {done.top1:6.2f}%, read {done.read:3.0f}%", flush=True)
                    continue
                teachers[seed] = future.result()
                print(f"seed {seed}  {TEACHER:<34}  top-1 {teachers[seed]:6.2f}%", flush=True)
                for rung in RUNGS:
                    running[submit(climb, rung, seed, out, images)] = rung, seed
    summary = {
        "results": [
            {
                "images": name,
                **spread([students[name, seed].top1 for seed in range(seeds)]),
                "read": [students[name, seed].read for seed in range(seeds)],
            }
            for name in RUNGS
        ],
        "teacher": spread([teachers[seed] for seed in range(seeds)]),
        "reader": read(real.images, real.targets),
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
    """Set up a worker: one thread and no progress bar, since several would overwrite each other."""
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  until the process ends


def _now(function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
    """Call the function at once, in this process."""
    future: Future[Any] = Future()
    future.set_result(function(*arguments))
    return future


def write_images(digits: Digits, folder: Path) -> None:
    """Write digits as PNGs in class folders."""
    for i in range(len(digits)):
        image, target = digits[i]
        path = folder / str(target) / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


class AdversarialTask(PlainTask):
    """Classification of images whose digit pixels are moved by up to EPSILON in the direction that increases the loss.

    One step from a random start (Wong et al. 2020, arXiv:2001.03994). Images that such a network
    assigns to a class look like it (Santurkar et al. 2019, arXiv:1906.09453); the inversion of a normally trained
    network finds patterns that nobody can read.
    """

    def forward(self, input: Tensor, target: Tensor, **known: Any) -> dict[str, Tensor]:  # noqa: A002
        mean, std = normalisation(self.network, input.device)
        images = input * std + mean
        side = input.shape[-1] // FULL.cell
        offset = torch.empty(len(input), 1, side, side, device=input.device).uniform_(-EPSILON, EPSILON)
        moved = (_moved(images, offset.requires_grad_()) - mean) / std
        (gradient,) = torch.autograd.grad(F.cross_entropy(self.network(moved), target), offset)
        offset = (offset + 1.25 * EPSILON * gradient.sign()).clamp(-EPSILON, EPSILON).detach()
        return super().forward((_moved(images, offset) - mean) / std, target, **known)


def _moved(images: Tensor, offset: Tensor) -> Tensor:
    """Return the images in [0, 1] plus the moves of their pixels, enlarged like the digits."""
    return (images + F.interpolate(offset, size=images.shape[-1], mode="bicubic")).clamp(0, 1)


def train_teacher(seed: int, out: Path) -> float:
    """Train a teacher on the real training images, save its weights in the seed's folder and return its top-1."""
    setup = prepare(dataclasses.replace(DIGITS, seed=seed, baseline=False, teacher_epochs=TEACHER_EPOCHS))
    trainee = setup.teacher
    assert trainee is not None

    def against_an_adversary(network: nn.Module, _: Stage) -> TrainingTask:
        return AdversarialTask(network, verbose=False)

    trainee.create_task = against_an_adversary
    fit(trainee)
    update_bn(trainee.loaders[0], trainee.network)  # running statistics come from unmoved images
    top1 = trainee.evaluate()["top1"]
    folder = out / f"seed{seed}"
    folder.mkdir()
    write_weights(folder / "teacher.safetensors", trainee.network, str(DIGITS.teacher), setup.nets.teacher_args)
    return top1


def climb(rung: str, seed: int, out: Path, images: int) -> Outcome:
    """Make the images of a rung, measure how many are readable, and train a new student on them. Return its top-1."""
    teacher = str(out / f"seed{seed}" / "teacher.safetensors")
    folder = out / f"seed{seed}" / rung.replace(" ", "")
    invert(Inversion(
        teacher_checkpoint=teacher, img_size=DIGITS.img_size, preset=RUNGS[rung], images=images, seed=seed,
        out=str(folder),
    ))  # fmt: skip
    (folder / "val").symlink_to((out / "digits" / "val").absolute())
    settings: Settings = dataclasses.replace(STUDENT, data=str(folder), teacher_checkpoint=teacher, seed=seed)
    setup = prepare(settings)
    student = setup.students[-1]
    fit(student)
    write_weights(folder / "vit.safetensors", setup.nets.student, settings.student, setup.nets.student_args)
    entries = Store.open(folder).entries
    made = [Image.open(folder / entry["file"]) for entry in entries]
    return Outcome(student.evaluate()["top1"], read(made, [entry["label"] for entry in entries]))


def fit(trainee: Trainee) -> None:
    """Train for all epochs."""
    trainee.begin(0)
    with tqdm(total=trainee.before[-1], desc=trainee.label, unit="step", disable=None) as bar:
        for epoch in range(trainee.epochs):
            for _ in trainee.train_epoch(epoch, bar):
                pass


def read(images: Sequence[Image.Image], labels: Sequence[int]) -> float:
    """Return the percentage of images that a k-NN of the real training images reads as their label.

    It compares the 8 x 8 pixels of a digit, which are means over an image's cells. The synthesis does not use it.
    """
    from sklearn.neighbors import KNeighborsClassifier

    real = Digits(train=True)
    reader = KNeighborsClassifier().fit([_pixels(image) for image in real.images], real.targets)
    return 100 * float(reader.score([_pixels(image) for image in images], labels))


def _pixels(image: Image.Image) -> Any:
    side = sides(DIGITS.img_size or 0)[0] // FULL.cell
    return np.asarray(image.convert("L").resize((side, side), Image.Resampling.BOX)).ravel()


def spread(top1: list[float]) -> dict[str, Any]:
    """Return the values of the seeds, their mean and their sample standard deviation."""
    return {"top1": top1, "mean": statistics.mean(top1), "spread": statistics.stdev(top1) if len(top1) > 1 else 0.0}


def table(summary: dict[str, Any]) -> str:
    """Return a Markdown table of the rungs: mean and standard deviation over seeds, each seed, readable images."""
    seeds = [f"seed {i}" for i in range(len(summary["teacher"]["top1"]))]
    head = ["the student learns from", "top-1 (%)", *seeds, "images read as asked (%)"]
    lines = [head, ["---"] * len(head)]
    lines += [
        [
            row["images"],
            f"{row['mean']:.1f} ± {row['spread']:.1f}",
            *(f"{x:.1f}" for x in row["top1"]),
            f"{statistics.mean(row['read']):.0f}",
        ]
        for row in [*summary["results"], {"images": TEACHER, "read": [summary["reader"]], **summary["teacher"]}]
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines[1] = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the results; default: the first free one of runs/datafree, runs/datafree-2, ...",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument(
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        help="number of parallel processes, with one thread each",
    )
    given = parser.parse_args()
    folder = choose_folder(dataclasses.replace(DIGITS, data="datafree", out=given.out and str(given.out)))
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} exists and is not empty; remove it, or name another --out")
    measured = main(folder, given.seeds, given.images, given.workers)
    print(f"\n{table(measured)}\n\n{measured['seconds']:.0f} s, results in {folder / 'demo-datafree.json'}")
