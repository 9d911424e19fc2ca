"""A run of `fastkd train`: it trains the teacher if necessary, then the students, and can resume at any step."""

import dataclasses
import datetime as dt
import json
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import load_file
from tqdm import tqdm
from yaml import YAMLError

from fastkd._version import __version__
from fastkd.info import cpu_name

from . import DataError, DivergedError, InputError, checkpoint, ranks, report
from .data import worker_errors
from .evaluate import not_finite
from .loop import Trainee
from .prepare import Setup, choose_device, class_order_note, fingerprint, new_head, prepare
from .report import Row
from .settings import Settings, anchored, differences, plain, read_settings, stages, write_settings

CHECKPOINTS = "checkpoints"
CONFIG, CLASSES = "config.yaml", "classes.txt"
EVENTS = "tensorboard"
FILES = (
    "config.json", CONFIG, CLASSES, "log.csv", "curve.png", "teacher.safetensors", "student.safetensors",
    "student_ema.safetensors", "student_alone.safetensors", "student_alone_ema.safetensors",
    "student_best.safetensors", "student_ema_best.safetensors", "student_alone_best.safetensors",
    "student_alone_ema_best.safetensors", "summary.json",
)  # fmt: skip
FOLDERS = (CHECKPOINTS, EVENTS, "eval", "wandb")
FILE_OF = {"teacher": "teacher", "student alone": "student_alone", "student distilled": "student"}


@worker_errors()
def train(settings: Settings, *, resume: bool = False) -> dict[str, Any]:
    """Distil as the settings say, write the results to the output folder and return the content of summary.json.

    Args:
        resume: whether to continue the run in settings.out.

    Raises:
        InputError: before anything is written or trained.
        DivergedError: a loss that is not finite; the last checkpoint stays.
        DataError: images that cannot be read, files that cannot be written; the last checkpoint stays.
        InterruptedRun: Ctrl-C or SIGTERM; the step is finished and a checkpoint written.
    """
    began = time.perf_counter()
    settings = anchored(settings)
    own, _ = ranks.join(choose_device(settings), settings.workers)
    own.together(lambda: check_out(settings, resume))
    if resume:
        settings = own.together(lambda: same_batches(settings, own.world))
    setup = prepare(settings)
    out = own.first(lambda: choose_folder(settings))
    if not resume:
        own.first(lambda: check_room(out, setup))
    with ExitStack() as stack:
        own.first(lambda: stack.enter_context(checkpoint.alone(out, "--resume" if resume else "--out")))
        own.together(lambda: check_out(settings, resume))  # another process may have used it until now
        own.first(lambda: checkpoint.clear(out))
        return carry_out(setup, out, resume, began)


def carry_out(setup: Setup, out: Path, resume: bool, began: float) -> dict[str, Any]:
    """Carry out the run in a folder that this process has locked."""
    own, config = setup.ranks, describe(setup)
    if resume:
        own.together(lambda: check_same(config, json.loads((out / "config.json").read_text(encoding="utf-8"))))
    else:
        own.first(lambda: start_folder(out, config, setup.settings))
    run = Run(setup, out)
    with full_disk(out), ranks.lost(own, out):
        run.go()
    trainees = [trainee for trainee in (setup.teacher, *setup.students) if trainee is not None]
    summary = {
        "results": [result(trainee, run.rows, run.teacher_top1) for trainee in trainees],
        "seconds": time.perf_counter() - began,
        "images": {name: config["images"][name] for name in ("train", "validation")},
        "skipped": setup.skipped,
        "versions": {
            "fastkd": __version__, "torch": torch.__version__, "timm": timm.__version__,
            "python": platform.python_version(),
        },
        "machine": machine(setup),
        "date": dt.date.today().isoformat(),
        "config": config,
    }  # fmt: skip
    if setup.ranks.rank == 0:
        with full_disk(out):
            report.write_json(out / "summary.json", summary)
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    return summary | {"out": str(out)}


def saved_settings(out: str, option: str = "--resume") -> Settings:
    """Return the settings of the run in a folder.

    Raises:
        InputError: there is no run in the folder.
    """
    if not (Path(out) / "config.json").is_file():
        raise InputError(f"{option}: {out} holds no run (no config.json)")
    try:
        return dataclasses.replace(read_settings(Path(out) / CONFIG), out=out)
    except (OSError, YAMLError, ValueError, TypeError, AttributeError) as error:
        detail = " ".join(str(error).split())
        raise InputError(f"{option}: {Path(out) / CONFIG} cannot be read as the settings of a run: {detail}") from error


def check_resume(now: Settings, before: Settings) -> None:
    """Raises:
    InputError: settings that would change the run's numbers; the message lists them.
    """
    if changed := differences(anchored(now), anchored(before)):
        raise InputError(f"--resume: the run was started with other settings: {'; '.join(changed)}")


def check_same(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Check that the data and the layers are still those of the run."""
    names = ("images", "classes", "matched")
    now = json.loads(json.dumps({name: now[name] for name in names}))
    changed = [
        f"{name}: {now[name]} (the run has {before.get(name)})" for name in names if now[name] != before.get(name)
    ]
    if changed:
        raise InputError(f"--resume: not as the run was started: {'; '.join(changed)}")


def same_batches(settings: Settings, world: int) -> Settings:
    """Return the settings with as many images in a step as the run has, on whatever number of processes it began.

    Raises:
        InputError: these processes cannot share the images of a step equally.
    """
    before = json.loads((Path(str(settings.out)) / "config.json").read_text(encoding="utf-8"))["processes"]

    def share(batch: int | None) -> Any:
        if batch is not None and batch * before % world:
            raise InputError(
                f"--resume: a step of the run has {batch * before} images, which {world} processes cannot share equally"
            )
        return None if batch is None else batch * before // world

    own = tuple(dataclasses.replace(stage, batch_size=share(stage.batch_size)) for stage in settings.stages)
    return dataclasses.replace(settings, batch_size=share(settings.batch_size), stages=own)


def check_out(settings: Settings, resume: bool) -> None:
    """Check that the run can use the requested folder."""
    if settings.out is None:
        return
    out = Path(settings.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file, not a folder")
    for role in ("teacher", "student"):
        given = getattr(settings, f"{role}_checkpoint")
        if given and Path(given).resolve().parent == out.resolve():
            raise InputError(f"--out: {out} holds the --{role}-checkpoint, which the run would replace; name another")
    finished = (out / "summary.json").exists()
    if resume and finished:
        raise InputError(f"--resume: the run in {settings.out} is finished")
    if finished and not settings.overwrite:
        raise InputError(f"--out: {settings.out} holds a finished run; name another folder or give --overwrite")
    if not resume and not settings.overwrite and checkpoint.latest(out / CHECKPOINTS) is not None:
        raise InputError(f"--out: {out} holds an unfinished run; go on with --resume {out}, or give --overwrite")


def choose_folder(settings: Settings) -> Path:
    """Return the folder for the results: the requested one, or the first free one of runs/NAME, runs/NAME-2, ..."""
    if settings.out is None:
        name = Path(settings.data).resolve().name
        number = 1
        while (out := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
            number += 1
        return out
    return Path(settings.out)


def check_room(out: Path, setup: Setup) -> None:
    """Check that the disk has room for two checkpoints."""
    parent = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    need, free = 2 * checkpoint_bytes(setup), shutil.disk_usage(parent).free
    if free < need:
        raise InputError(f"--out: {out} has {free / 1e9:.2f} GB left, two checkpoints need {need / 1e9:.2f} GB")


def start_folder(out: Path, config: dict[str, Any], settings: Settings) -> None:
    """Delete an earlier run's files from the folder; write the settings and the values derived from them.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        for name in FILES:
            (out / name).unlink(missing_ok=True)
        for path in out.glob("student*_epoch*.safetensors"):
            path.unlink()
        for name in FOLDERS:
            shutil.rmtree(out / name, ignore_errors=True)
        with checkpoint.replacing(out / CONFIG) as partial:  # config.json, the sign of a run, comes last
            write_settings(partial, settings)
        (out / CLASSES).write_text("".join(f"{name}\n" for name in config["classes"]), encoding="utf-8")
        report.write_json(out / "config.json", config)
    except OSError as error:
        raise InputError(f"--out: {out} cannot be written: {error.strerror}") from error


def checkpoint_bytes(setup: Setup) -> int:
    """Estimate the bytes of a checkpoint: weights, two numbers per weight for the optimiser, the weight average."""
    copies = 3 + (setup.settings.ema is not None)
    sizes = [sum(p.numel() * p.element_size() for p in x.network.parameters()) for x in setup.students]
    return copies * sum(sizes)


def describe(setup: Setup) -> dict[str, Any]:
    """Return the content of config.json: the settings and the values derived from them."""
    settings, nets = setup.settings, setup.nets
    loading = {"workers": settings.workers, "processes": setup.ranks.world}  # the order of sequential data needs them
    return plain(settings) | {
        "img_size": nets.img_size,
        "device": str(setup.device),
        "classes": setup.data.classes,
        "student_args": nets.student_args,
        "teacher_args": nets.teacher_args,
        "stages": [dataclasses.asdict(stage) for stage in stages(settings)],
        "matched": [getattr(task, "matched", []) for task in setup.tasks],
        "images": fingerprint(setup.data) | (loading if setup.data.in_order else {}),
        "processes": setup.ranks.world,
    }


def cache_key(setup: Setup) -> str:
    """Return what cached logits depend on besides the weights; names and sizes do not tell datasets apart."""
    settings, transform = setup.settings, setup.students[-1].loaders[0].images.transform
    source = [settings.data, settings.data_root, settings.train_split, fingerprint(setup.data), repr(transform)]
    return json.dumps([*source, settings.exif, settings.seed if settings.augment else None])


def machine(setup: Setup) -> str:
    name = torch.cuda.get_device_name(setup.device) if setup.device.type == "cuda" else cpu_name()
    processes = f" in each of {setup.ranks.world} processes" if setup.ranks.world > 1 else ""
    return f"{name}, {torch.get_num_threads()} threads{processes}"


class Place(NamedTuple):
    """The progress of a run: an entry of its plan and the number of its finished steps."""

    entry: int = 0
    step: int = 0

    @property
    def name(self) -> str:
        return f"{self.entry:06d}-{self.step:09d}"


class Run:
    """A run: its plan, a list of epochs of networks, and its progress."""

    def __init__(self, setup: Setup, out: Path) -> None:
        self.setup, self.out = setup, out
        self.main = setup.ranks.rank == 0
        self.rows: list[Row] = []
        self.teacher_top1: float | None = None
        teacher = [] if setup.teacher is None else [(setup.teacher, epoch) for epoch in range(setup.teacher.epochs)]
        self.first_student = len(teacher)
        self.plan = teacher + [
            (student, epoch) for epoch in range(setup.students[-1].epochs) for student in setup.students
        ]
        self.steps = 0  # since the last checkpoint

    def go(self) -> None:
        """Run all remaining epochs. Log, picture and weights are written after each."""
        settings = self.setup.settings
        place = self._load()
        boards: list[Any] = []
        if self.main and settings.tensorboard:
            boards.append(report.TensorBoard(self.out / EVENTS, self.rows))
        if self.main and settings.wandb is not None:
            boards.append(report.WeightsAndBiases(settings.wandb, self.out, plain(settings)))
        steps = [trainee.steps(epoch) for trainee, epoch in self.plan]
        done, total = sum(steps[: place.entry]) + place.step, sum(steps)
        with (
            tqdm(total=total, initial=done, unit="step", disable=None if self.main else True, smoothing=0.05) as bar,
            ranks.Stop(self.setup.ranks) as stop,
        ):
            if place.entry >= self.first_student:
                self._finish_teacher()
            for entry in range(place.entry, len(self.plan)):
                if entry == self.first_student and place.entry < entry:
                    self._finish_teacher()
                self._epoch(entry, place.step if entry == place.entry else 0, bar, stop, boards)
        for board in boards:
            board.close()

    def _epoch(self, entry: int, start: int, bar: tqdm, stop: ranks.Stop, boards: list[Any]) -> None:
        trainee, epoch = self.plan[entry]
        bar.set_description(f"{trainee.label} {epoch + 1}/{trainee.epochs}")
        every, (stage, own_epoch) = self.setup.settings.checkpoint_every, trainee.at(epoch)
        if self.main and len(trainee.stages) > 1 and own_epoch == start == 0:
            now = trainee.stages[stage]
            bar.write(f"{trainee.label:<17} stage {stage + 1}/{len(trainee.stages)}: {now.task}, {now.epochs} epochs")
        if start < trainee.steps(epoch):
            for step in trainee.train_epoch(epoch, bar, start, lambda: stop.signal):
                self.steps += 1
                if stop.asked(trainee.wished):
                    self._save(Place(entry, step))
                    stop.leave(self.out)
                if every and self.steps >= every and step < trainee.steps(epoch):
                    self._save(Place(entry, step))
        row = trainee.row(epoch)
        self.rows.append(row)
        if self.main:
            for board in boards:
                board.add(row)
            progress = f"{trainee.label:<17} epoch {epoch + 1:>3}/{trainee.epochs}"
            scores = f"top-1 {row['top1']:6.2f}%  top-5 {row['top5']:6.2f}%"
            bar.write(f"{progress}  loss {row['loss']:.4f}  {scores}  {row['seconds']:.1f} s")
            sys.stdout.flush()
        self._export(entry)
        self._save(Place(entry + 1, 0))
        if entry + 1 < len(self.plan) and stop.asked(trainee.wished):
            stop.leave(self.out)

    def _export(self, entry: int) -> None:
        """Write the weights for timm, the log and the picture."""
        setup, (trainee, _) = self.setup, self.plan[entry]
        if trainee is not setup.teacher:
            file = self.out / f"{FILE_OF[trainee.label]}.safetensors"
            weights = checkpoint.weights_of(trainee.network)
            if self.main:
                self._write(file, weights, "top1")
                if trainee.ema is not None:
                    average = checkpoint.weights_of(trainee.ema.module)
                    self._write(file.with_stem(f"{file.stem}_ema"), average, "top1_ema")
        if self.main:
            report.write_log(self.out / "log.csv", self.rows)
            if trainee is setup.students[-1]:
                title = f"{setup.settings.student} learns from {setup.settings.teacher}"
                title += f" on {Path(setup.settings.data).name}"
                report.write_curve(self.out / "curve.png", self.rows, self.teacher_top1, title)

    def _write(self, file: Path, weights: checkpoint.Tensors, key: str) -> None:
        """Write a student's weights of this epoch, a second time if they are its best, and keep those of the best."""
        last, keep = self.rows[-1], self.setup.settings.keep
        own = [row for row in self.rows if row["network"] == last["network"]]
        ranking = [row["epoch"] for row in sorted(own, key=lambda row: -row[key])]  # equal ones in their order
        about = self.setup.settings.student, self.setup.nets.student_args, self.setup.data.classes
        paths = {file: True, file.with_stem(f"{file.stem}_best"): ranking[0] == last["epoch"]}
        paths[file.with_stem(f"{file.stem}_epoch{last['epoch']}")] = last["epoch"] in ranking[:keep]
        for path in (path for path, wanted in paths.items() if wanted):
            checkpoint.write_tensors(path, weights, *about)
        for epoch in ranking[keep:]:
            file.with_stem(f"{file.stem}_epoch{epoch}").unlink(missing_ok=True)

    def _finish_teacher(self) -> None:
        """Finish the teacher for the students: take its trained or given weights, measure top-1, cache its logits."""
        setup, teacher = self.setup, self.setup.teacher
        if teacher is None or setup.nets.teacher is None:
            return
        if teacher.epochs and teacher.stage < 0:  # trained before this process
            setup.nets.teacher.load_state_dict(load_file(self.out / "teacher.safetensors"))
        setup.nets.teacher.requires_grad_(False)
        if teacher.epochs:
            self.teacher_top1 = next(row["top1"] for row in reversed(self.rows) if row["network"] == teacher.label)
        elif not new_head(setup) and self.teacher_top1 is None:
            self.teacher_top1 = teacher.evaluate()["top1"]
            if (note := class_order_note(setup, self.teacher_top1)) and self.main:
                tqdm.write(note)
        if setup.cache is not None:
            loader = setup.students[-1].loaders[0]
            setup.cache.fill(setup.nets.teacher, setup.nets.student, loader, cache_key(setup))

    def _save(self, place: Place) -> None:
        """Write a checkpoint of the current network; the previous one is deleted when this one is complete."""
        setup = self.setup
        self.steps = 0
        teaching = place.entry < self.first_student
        under_way = [setup.teacher] if teaching else setup.students
        weights: dict[str, checkpoint.Tensors] = {}
        state: dict[str, Any] = {}
        for trainee in under_way:
            assert trainee is not None
            if trainee.stage >= 0 and (name := not_finite(trainee.network)) is not None:
                raise DivergedError(f"the weights {name} of {trainee.label} are not finite; nothing is written")
            own, rest = trainee.state()
            weights |= {f"{FILE_OF[trainee.label]}.{kind}": tensors for kind, tensors in own.items()}
            state[trainee.label] = rest
        if self.main:
            state |= {"rows": self.rows, "teacher_top1": self.teacher_top1}
            if place.entry == self.first_student and setup.teacher is not None and setup.teacher.epochs:
                about = str(setup.settings.teacher), setup.nets.teacher_args, setup.data.classes
                checkpoint.write_weights(self.out / "teacher.safetensors", setup.teacher.network, *about)
            checkpoint.write(self.out / CHECKPOINTS, place.name, weights, state)

    def _load(self) -> Place:
        """Load the last checkpoint, if there is one."""
        path = self.setup.ranks.first(lambda: checkpoint.latest(self.out / CHECKPOINTS))
        if path is None:
            return Place()
        place = Place(*map(int, path.name.split("-")))
        weights, state = self.setup.ranks.together(lambda: checkpoint.read(path))
        self.rows, self.teacher_top1 = state["rows"], state["teacher_top1"]
        teaching = place.entry < self.first_student
        for trainee in [self.setup.teacher] if teaching else self.setup.students:
            assert trainee is not None
            prefix = f"{FILE_OF[trainee.label]}."
            own = {key.removeprefix(prefix): x for key, x in weights.items() if key.startswith(prefix)}
            trainee.load_state(own, state[trainee.label])
        return place


@contextmanager
def full_disk(out: Path) -> Iterator[None]:
    """Turn an error in writing a file into a one-line error that ends the run."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or out} cannot be written: {error.strerror or error}; what was written before stays"
        ) from error


def result(trainee: Trainee, rows: list[Row], teacher_top1: float | None) -> Row:
    """Return a row of the table: top-1 after the last epoch, and means over all steps including data loading."""
    own = [row for row in rows if row["network"] == trainee.label]
    seconds = sum(row["seconds"] for row in own)
    line = {
        "network": trainee.label,
        "top1": own[-1]["top1"] if own else teacher_top1,
        "seconds_per_step": seconds / sum(row["steps"] for row in own) if own else None,
        "loss_share": sum(row["loss_seconds"] for row in own) / seconds if trainee.clock else None,
    }
    return line | ({"top1_ema": own[-1]["top1_ema"]} if own and "top1_ema" in own[-1] else {})
