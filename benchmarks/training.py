"""Measure the trainer's own loop against its goals: python -m benchmarks training.

Three figures: the share of a step in the distillation loss, with fused losses and with eager maps; the extra time of a
step over a bare loop; two processes against one. The compared variants run in turn, and the median of the turns counts.
Weights are random, images are the digits. On a GPU the comparison of processes is omitted.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
from timm.optim import create_optimizer_v2
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from tqdm import tqdm

from benchmarks import report
from benchmarks.providers.relation import manifold_by_maps
from fastkd import capture
from fastkd.losses import ManifoldLoss
from fastkd.train import ranks
from fastkd.train.prepare import Setup, prepare
from fastkd.train.settings import DIGITS, FOLDER, Settings, from_plain, plain, settings_from
from fastkd.train.tasks import FeatureLoss, renormalisation

T = TypeVar("T")
SHARE, ADDED, ADDED_SHARE, AGAINST_ONE = 0.03, 5e-3, 0.05, 1.15  # the goals
THREADS = 2  # threads of one process, and of all processes together
LATE = 300.0  # seconds that processes may take for a turn, including their start


def recipe(device: str) -> Settings:
    """The manifold recipe: DeiT-Ti, CaiT-S24, eight layers, soft targets."""
    given = {"recipe": "manifold-deit-tiny", "data": "digits", "device": device, "workers": 0}
    given |= {"teacher_pretrained": False, "teacher_epochs": 1}
    given |= {"batch_size": 256, "amp": "bf16"} if device == "cuda" else {"batch_size": 16, "amp": "none"}
    return settings_from(given)


class Pair(NamedTuple):
    """The setting in which one process and two are compared; `steps` are those of a turn."""

    setting: str
    settings: Settings
    steps: int
    rounds: int


# Steps with CaiT-S24 take too long for several turns.
DEIT = dataclasses.replace(
    FOLDER, data="digits", teacher="deit_small_patch16_224", teacher_epochs=1, batch_size=16, workers=0
)
PAIRS = (
    Pair("digits, manifold loss", DIGITS, 20, 9),
    Pair("digits, soft targets", dataclasses.replace(DIGITS, task="soft"), 20, 9),
    Pair("DeiT-Ti and DeiT-S, 224 px, manifold loss", DEIT, 1, 5),
)


class Figure(NamedTuple):
    """A figure of a setting; one without a goal is given for comparison.

    value, goal: in `unit`, which is "share", "seconds" or "ratio". seconds: of a step, or of an image.
    against: seconds of the variant that it is compared with, or the seconds of the step that are in the loss.
    """

    figure: str
    setting: str
    unit: str
    value: float
    goal: float | None
    seconds: float
    against: float

    @property
    def reached(self) -> bool | None:
        return None if self.goal is None else self.value <= self.goal

    def __str__(self) -> str:
        scale, unit = {"share": (100, "%"), "seconds": (1e3, " ms"), "ratio": (1, "x")}[self.unit]
        goal = "" if self.goal is None else f"at most {self.goal * scale:.3g}{unit}"
        verdict = {True: "reached", False: "MISS", None: ""}[self.reached]
        times = f"{self.seconds * 1e3:.4g} ms, {self.against * 1e3:.4g} ms"
        what = f"{self.figure}: {self.setting}"
        return f"{what:<104}{self.value * scale:>8.2f}{unit:<4}{goal:<18}{verdict:<9}{times}"


class Taken(NamedTuple):
    """Seconds of a step, and its seconds in the distillation loss."""

    seconds: float
    in_loss: float = 0.0


def turns(calls: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Return the results of the calls, run in turn and in reverse order in every second round."""
    found: dict[str, list[T]] = {name: [] for name in calls}
    for r in range(rounds):
        for name in list(calls)[:: -1 if r % 2 else 1]:
            found[name].append(calls[name]())
    return found


class Maps(FeatureLoss):
    """The manifold loss, computed with maps."""

    name = "manifold"

    def forward(self, students: list[Tensor], teachers: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return manifold_by_maps(students, teachers), {}


def with_maps(task: Any) -> TrainingTask:
    features = task.trainable.features
    task.trainable.features = Maps(features.student_layers, features.teacher_layers)
    return task


class Kept:
    """A loader that repeats the first batches of another, so that a step contains only networks and losses."""

    def __init__(self, loader: Any, batches: int) -> None:
        self.images, self._loader = loader.images, loader
        self._kept = list(itertools.islice(loader.epoch(0), batches))

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(start, len(self)):
            images, targets = self._kept[number % len(self._kept)]
            yield images.clone(), targets  # mixup and erasing write into the images


class Trainer:
    """The loop of `fastkd train` for the distilled student, run a few steps at a time.

    maps: whether the manifold loss is computed with maps. keep: number of preloaded batches to repeat.
    """

    def __init__(self, settings: Settings, *, maps: bool = False, keep: int = 0) -> None:
        setup = prepare(dataclasses.replace(settings, baseline=False, check=False))
        self.trainee = trainee = setup.students[-1]
        self.layers = setup.tasks[0].matched
        if keep:
            kept: Any = tuple(Kept(loader, keep) for loader in trainee.loaders)
            trainee.loaders = kept
        if maps:
            create = trainee.create_task
            trainee.create_task = lambda network, stage: with_maps(create(network, stage))
        bar = tqdm(file=open(os.devnull, "w"), disable=setup.ranks.rank > 0)  # noqa: SIM115  lives as long as this object
        self._steps = (step for epoch in range(trainee.epochs) for step in trainee.train_epoch(epoch, bar))

    def take(self, steps: int) -> Taken:
        """Run some steps and return their times from the trainer's record."""
        record, device = self.trainee.record, self.trainee.device
        before = record.seconds, record.loss_seconds
        settle(device)
        record.began = time.perf_counter()
        for _ in range(steps):
            next(self._steps)
        settle(device)
        record.stop(self.trainee.clock)
        return Taken((record.seconds - before[0]) / steps, (record.loss_seconds - before[1]) / steps)

    def loss(self) -> float:
        """Return the mean loss so far."""
        record = self.trainee.record
        record.look()
        return record.sums["loss"] / record.seen


class Bare:
    """A loop that a user would write for the manifold loss: a trainer's networks, images and losses, nothing else."""

    def __init__(self, settings: Settings) -> None:
        self.setup = prepare(dataclasses.replace(settings, baseline=False, check=False))
        self._steps = self._loop(self.setup)

    def _loop(self, setup: Setup) -> Iterator[None]:
        student, teacher = setup.nets.student.train(), setup.nets.teacher
        assert teacher is not None
        teacher.eval().requires_grad_(False)
        stage, loader = setup.students[-1].stages[0], setup.students[-1].loaders[0]
        layers, teacher_layers = zip(*setup.tasks[0].matched, strict=True)
        scale, shift = (x.to(setup.device, torch.float32) for x in renormalisation(student, teacher))
        optimizer = create_optimizer_v2(student, opt=stage.opt, lr=stage.lr, weight_decay=stage.weight_decay)
        cross_entropy, loss = nn.CrossEntropyLoss(), ManifoldLoss()
        for epoch in itertools.count():
            for images, targets in loader.epoch(epoch):
                optimizer.zero_grad()
                with capture.tokens(student, layers) as s, capture.tokens(teacher, teacher_layers) as t:
                    with torch.no_grad():
                        teacher(images * scale + shift)
                    total = cross_entropy(student(images), targets) + loss(list(s), list(t))
                total.backward()
                optimizer.step()
                yield

    def take(self, steps: int) -> Taken:
        settle(self.setup.device)
        began = time.perf_counter()
        for _ in range(steps):
            next(self._steps)
        settle(self.setup.device)
        return Taken((time.perf_counter() - began) / steps)


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Processes:
    """Processes of the trainer, under torchrun if there are several, with THREADS threads in total."""

    def __init__(self, store: TCPStore, world: int) -> None:
        self.store, self.world, self._turn = store, world, 0
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
        env = os.environ | {"OMP_NUM_THREADS": str(THREADS // world)}
        command = [sys.executable, *torchrun, "-m", "benchmarks.training", str(store.port)]
        self._process = subprocess.Popen(command, env=env, cwd=report.ROOT.parent)

    def take(self, settings: Settings, steps: int) -> float:
        """Let the processes take some steps and return the seconds of a step.

        Raises:
            RuntimeError: the processes have ended, or exceed the time limit.
        """
        self._tell({"settings": plain(settings), "steps": steps})
        keys = [f"{self.world}/{self._turn}/{rank}" for rank in range(self.world)]
        late = time.monotonic() + LATE
        while not self.store.check(keys):
            if self._process.poll() is not None or time.monotonic() > late:
                raise RuntimeError(f"{self.world} process(es) of the trainer did not take the requested steps")
            time.sleep(0.02)
        return max(float(self.store.get(key)) for key in keys)

    def _tell(self, told: dict[str, Any]) -> None:
        self._turn += 1
        self.store.set(f"{self.world}/{self._turn}", json.dumps(told))

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            self._tell({})
        else:
            self._process.terminate()
        self._process.wait()


def work(port: int) -> None:
    """Run a process: take the steps that Processes requests."""
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=LATE))
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    trainer, made_of = None, None
    for turn in itertools.count(1):
        told = json.loads(store.get(f"{world}/{turn}"))
        if not told:
            break
        if trainer is None or told["settings"] != made_of:
            trainer, made_of = Trainer(Settings(**from_plain(told["settings"]))), told["settings"]
        store.set(f"{world}/{turn}/{rank}", str(trainer.take(told["steps"]).seconds))
    ranks.leave()


def share(settings: Settings, rounds: int, steps: int = 1) -> Iterator[Figure]:
    """Measure the share of a step in the distillation loss, forward and backward, with preloaded images.

    Raises:
        RuntimeError: fused losses and eager maps do not agree.
    """
    loops = {"fused losses": Trainer(settings, keep=2), "eager maps": Trainer(settings, maps=True, keep=2)}
    for loop in loops.values():
        loop.take(1)
    fused, eager = (loop.loss() for loop in loops.values())
    if abs(fused - eager) > 0.01 * abs(eager):
        raise RuntimeError(f"the loss is {fused} with fused losses and {eager} with eager maps")
    found = turns({name: partial(loop.take, steps) for name, loop in loops.items()}, rounds)
    layers = len(loops["fused losses"].layers)
    student, teacher = settings.student, str(settings.teacher).partition(".")[0]
    setting = f"{student}, {teacher}, {layers} layers, batch {settings.batch_size}"
    for (name, taken), goal in zip(found.items(), (SHARE, None), strict=True):
        value = statistics.median(x.in_loss / x.seconds for x in taken)
        times = (statistics.median(x) for x in zip(*taken, strict=True))
        yield Figure("share of a step in the loss", f"{setting}, {name}", "share", value, goal, *times)


def added(settings: Settings, rounds: int, steps: int = 10) -> Figure:
    """Measure the extra time of a step of the trainer over a step of the bare loop."""
    loops: dict[str, Trainer | Bare] = {"trainer": Trainer(settings), "bare": Bare(settings)}
    found = turns({name: partial(settled, loop, steps) for name, loop in loops.items()}, rounds)
    trainer, bare = (statistics.median(found[name]) for name in ("trainer", "bare"))
    value = statistics.median(a - b for a, b in zip(found["trainer"], found["bare"], strict=True))
    setting = f"digits, manifold loss, batch {settings.batch_size}"
    goal = max(ADDED, ADDED_SHARE * bare)
    return Figure("what the trainer adds to a bare step", setting, "seconds", value, goal, trainer, bare)


def settled(loop: Trainer | Bare, steps: int) -> float:
    """Return the seconds of a step, after one step that is not counted."""
    loop.take(1)
    return loop.take(steps).seconds


def image(processes: Processes, settings: Settings, steps: int) -> float:
    """Return the seconds of an image, after one step that is not counted."""
    processes.take(settings, 1)
    return processes.take(settings, steps) / (settings.batch_size * processes.world)


def against_one(pairs: tuple[Pair, ...], world: int = 2) -> Iterator[Figure]:
    """Measure the time per image with several processes over that with one, at equal images per step in total."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with Processes(store, 1) as one, Processes(store, world) as several:
        for pair in pairs:
            whole = pair.settings
            part = dataclasses.replace(whole, batch_size=whole.batch_size // world)
            calls = {
                name: partial(image, processes, settings, pair.steps)
                for name, processes, settings in (("one", one, whole), ("several", several, part))
            }
            turns(calls, 1)
            found = turns(calls, pair.rounds)
            value = statistics.median(a / b for a, b in zip(found["several"], found["one"], strict=True))
            times = (statistics.median(found[name]) for name in ("several", "one"))
            setting = f"{pair.setting}, {whole.batch_size} images a step"
            yield Figure(f"an image on {world} processes, over one", setting, "ratio", value, AGAINST_ONE, *times)


def figures(device: str) -> Iterator[Figure]:
    """Yield each figure as soon as it is measured."""
    on_gpu = device == "cuda"
    yield from share(recipe(device), 7, 10 if on_gpu else 1)
    yield added(dataclasses.replace(DIGITS, device=device), 30)
    if not on_gpu:
        yield from against_one(PAIRS)


def main(argv: list[str]) -> int:
    """Print the figures. Return status 1 if one misses its goal."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks training", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    where = "file for the results, or folder for training-<machine>.json; the docs show benchmarks/results/"
    parser.add_argument("--json", type=Path, metavar="PATH", help=where)
    args = parser.parse_args(argv)
    head = report.header(args.device)
    print(report.title(head), flush=True)
    begin, found = time.monotonic(), []
    for figure in figures(args.device):
        found.append(figure)
        print(figure, flush=True)
    print(f"{len(found)} figures in {time.monotonic() - begin:.0f} s")
    if args.json:
        rows = [figure._asdict() | {"reached": figure.reached} for figure in found]
        print(f"written to {report.write(args.json, head, {'training': rows}, 'training-')}")
    return int(any(figure.reached is False for figure in found))


if __name__ == "__main__":
    work(int(sys.argv[1]))
