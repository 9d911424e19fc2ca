"""Job of `fastkd invert`: check everything, then make batches until the folder has the requested images."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from fastkd._version import __version__
from fastkd.functional import soft_target_loss

from .. import DataError, InputError
from ..checkpoint import alone, replacing, saved_as, write_weights
from ..data import seed_all
from ..models import check_one_image, create_model, input_size, load_weights
from ..options import Size, as_yaml
from ..prepare import choose_device
from ..settings import Settings
from ..teacher_cache import digest
from .settings import Inversion
from .store import CONFIG, GRID, Store
from .synthesis import Inverter, normalisation


def invert(settings: Inversion) -> dict[str, Any]:
    """Synthesise the images into the output folder and return a summary.

    Raises:
        InputError: before anything is written.
        DivergedError: a loss that is not finite; names the layer. Finished batches stay.
        DataError: the disk is full and the like. Finished batches stay.
    """
    settings, model = open_teacher(check_settings(settings))
    device = choose_device(Settings(device=settings.device))
    img_size = settings.img_size or input_size(model)
    labels = check_labels(settings)
    rival = Rival.create(settings, model, img_size, device)
    try:
        inverter = Inverter(
            model.to(device), settings.preset, img_size=img_size, amp=settings.amp,
            student=None if rival is None else rival.student,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:  # the error for an unsupported size differs between architectures
        raise InputError(f"--teacher {settings.teacher}: {' '.join(str(error).split())[:300]}") from error
    wanted = header(settings, model, img_size, labels)
    with alone(Path(settings.out)):
        store = open_store(settings, wanted)
        try:
            write_settings(settings, Path(settings.out))
            if rival is not None and store.batches:
                rival.load(store.student)
            make_batches(settings, inverter, rival, store, labels)
        except OSError as error:
            raise DataError(
                f"{settings.out} cannot be written: {error.strerror or error}; "
                f"its {len(store.batches)} finished batches stay, and --resume goes on with them"
            ) from error
    entries = store.entries
    right = sum(entry["probability"] > 0.5 for entry in entries)
    return {
        "out": settings.out, "images": len(entries), "batches": len(store.batches), "sure": right / len(entries),
        "terms": store.batches[-1]["terms"], "grid": str(store.out / GRID),
    }  # fmt: skip


def check_settings(settings: Inversion) -> Inversion:
    """Check everything that needs no models, and fill in the model named in a checkpoint."""
    if settings.images < 1:
        raise InputError(f"--images: needs one at least, got {settings.images}")
    if settings.teacher_checkpoint is None and not settings.teacher_pretrained:
        raise InputError("--teacher-checkpoint: what an untrained teacher knows is nothing; or --teacher-pretrained")
    if settings.preset.competition > 0 and settings.student is None:
        raise InputError("--student: a competition needs the name of a timm model that competes")
    if settings.preset.intra > 0 and settings.preset.batch_size < 2:
        raise InputError("--intra: compares images of a batch; --batch-size 2 at least")
    if settings.teacher is not None:
        return settings
    saved = saved_as(settings.teacher_checkpoint)
    if saved is None:
        raise InputError("--teacher: needs the name of a timm model; the checkpoint does not tell it")
    name, args = saved
    return dataclasses.replace(settings, teacher=name, teacher_args=args | settings.teacher_args)


def open_teacher(settings: Inversion) -> tuple[Inversion, nn.Module]:
    """Return the network to invert, with its weights, and the settings with its number of classes."""
    assert settings.teacher is not None
    args = dict(settings.teacher_args)
    own = getattr(get_pretrained_cfg(settings.teacher, allow_unregistered=True), "num_classes", None)
    saved = args.pop("num_classes", None)
    num_classes = settings.num_classes or saved or own or 1000
    model, _ = create_model(
        "teacher", settings.teacher, args, num_classes=num_classes, img_size=settings.img_size,
        pretrained=settings.teacher_pretrained,
    )  # fmt: skip
    if settings.teacher_checkpoint is not None:
        load_weights("teacher", model, settings.teacher, settings.teacher_checkpoint)
    return dataclasses.replace(settings, teacher_args=args, num_classes=num_classes), model


def check_labels(settings: Inversion) -> tuple[int, ...]:
    assert settings.num_classes is not None
    labels = tuple(range(settings.num_classes)) if settings.labels is None else settings.labels
    if wrong := [label for label in labels if not 0 <= label < settings.num_classes]:
        raise InputError(f"--labels: {settings.teacher} has classes 0 to {settings.num_classes - 1}, got {wrong[0]}")
    if not labels:
        raise InputError("--labels: needs one at least")
    return labels


def header(settings: Inversion, teacher: nn.Module, img_size: Size, labels: Sequence[int]) -> dict[str, Any]:
    """Return the first line of the manifest: everything that the images depend on. Equal headers mean equal images."""
    assert settings.num_classes is not None
    digits = len(str(settings.num_classes - 1))
    content = dataclasses.asdict(settings) | {
        "teacher_weights": digest(teacher, ""), "img_size": img_size, "labels": list(labels),
        "classes": [f"{i:0{digits}}" for i in range(settings.num_classes)],
    }  # fmt: skip
    for name in (
        "images",
        "out",
        "resume",
        "device",
        "teacher_checkpoint",
        "teacher_pretrained",
    ):  # these settings do not change the images
        del content[name]
    versions = {"fastkd": __version__, "torch": torch.__version__, "timm": timm.__version__}
    return json.loads(json.dumps(content | {"versions": versions}))


def open_store(settings: Inversion, wanted: dict[str, Any]) -> Store:
    """Return the output folder: a new one, or the one to continue."""
    out = Path(settings.out)
    if not any(path.is_file() for path in out.rglob("[!.]*")):  # a killed process may leave an incomplete manifest
        try:
            return Store.create(out, wanted)
        except OSError as error:
            raise InputError(f"--out: {out} cannot be written: {error.strerror or error}") from error
    if not settings.resume:
        raise InputError(f"--out: {out} exists and is not empty; name another folder, or --resume to go on with it")
    store = Store.open(out)
    differing = [
        name for name in wanted.keys() | store.header.keys()
        if name != "versions" and wanted.get(name) != store.header.get(name)
    ]  # fmt: skip
    if differing:
        raise InputError(
            f"--resume: {out} was made with other settings: "
            + ", ".join(f"{n} {store.header.get(n)!r}, not {wanted.get(n)!r}" for n in sorted(differing))[:300]
        )
    return store


def write_settings(settings: Inversion, out: Path) -> None:
    """Write the options to a file, which makes the same images again in another folder."""
    values = dataclasses.asdict(settings)
    values |= values.pop("preset")
    for name in ("teacher_checkpoint", "student_checkpoint"):
        values[name] = values[name] and os.path.abspath(values[name])
    for name in ("out", "resume"):
        del values[name]
    with replacing(out / CONFIG) as partial:
        partial.write_text(as_yaml(values), encoding="utf-8")


def make_batches(
    settings: Inversion, inverter: Inverter, rival: "Rival | None", store: Store, labels: Sequence[int]
) -> None:
    """Make batches until there are enough images; each batch depends only on the seed and its number."""
    size = settings.preset.batch_size
    first = len(store.batches)
    last = first - (len(store.entries) - settings.images) // size
    with tqdm(total=max(0, last - first) * inverter.steps, unit="step", disable=None, smoothing=0.05) as bar:
        for number in range(first, last):
            bar.set_description(f"batch {number + 1}/{last}")

            def report(terms: dict[str, float]) -> None:
                bar.update()
                if terms:
                    bar.set_postfix_str(", ".join(f"{name} {value:.3g}" for name, value in terms.items()))

            own = torch.tensor([labels[(number * size + i) % len(labels)] for i in range(size)])
            batch = inverter.synthesise(own, seed=settings.seed * 1_000_003 + number, report=report)
            keep = min(size, settings.images - len(store.entries))
            store.add(batch.images[:keep], own[:keep].tolist(), batch.probabilities[:keep].tolist(), batch.terms)
            if rival is not None:
                rival.train([*store.entries, *store.pending], store, seed=settings.seed * 1_000_003 + number)
            store.commit(None if rival is None else rival.save)


class Rival:
    """The competing student, which is trained after each batch on all images so far.

    It learns the teacher's soft targets at the competition's temperature, by AdamW with a new state for each batch.
    """

    def __init__(self, settings: Inversion, student: nn.Module, args: dict[str, Any], teacher: nn.Module) -> None:
        self.settings, self.student, self.args, self.teacher = settings, student, args, teacher
        device = next(student.parameters()).device
        (mean, std), (mean_t, std_t) = (normalisation(model, device) for model in (student, teacher))
        self.mean, self.std = mean, std
        self.to_teacher = std / std_t, (mean - mean_t) / std_t

    @classmethod
    def create(cls, settings: Inversion, teacher: nn.Module, img_size: Size, device: torch.device) -> "Rival | None":
        """Return a rival, or None if there is no student."""
        if settings.student is None:
            return None
        assert settings.num_classes is not None
        seed_all(settings.seed)
        student, args = create_model(
            "student", settings.student, settings.student_args, num_classes=settings.num_classes, img_size=img_size
        )
        if settings.student_checkpoint is not None:
            load_weights("student", student, settings.student, settings.student_checkpoint)
        if settings.preset.batch_size == 1 and settings.student_steps > 0:
            check_one_image("student", student, img_size)
        return cls(settings, student.to(device), args, teacher.to(device))

    def train(self, entries: list[dict[str, Any]], store: Store, seed: int) -> None:
        """Train for `student_steps` steps on random images of the folder."""
        generator = torch.Generator().manual_seed(seed)
        seed_all(seed)
        self.student.train().requires_grad_(True)
        optimizer = torch.optim.AdamW(self.student.parameters(), lr=self.settings.student_lr, weight_decay=0.05)
        for _ in range(self.settings.student_steps):
            chosen = torch.randint(len(entries), (self.settings.preset.batch_size,), generator=generator).tolist()
            x = self._load([store.out / entries[i]["file"] for i in chosen])
            with torch.no_grad():
                target = self.teacher(x * self.to_teacher[0] + self.to_teacher[1])
            loss = soft_target_loss(self.student(x), target, temperature=self.settings.preset.temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.student.eval().requires_grad_(False)

    def save(self, path: Path) -> None:
        write_weights(path, self.student, str(self.settings.student), self.args)

    def load(self, path: Path) -> None:
        load_weights("student", self.student, str(self.settings.student), str(path))

    def _load(self, paths: list[Path]) -> Tensor:
        images = torch.stack([pil_to_tensor(Image.open(path)) for path in paths]).to(self.mean.device)
        return (images / 255 - self.mean) / self.std
