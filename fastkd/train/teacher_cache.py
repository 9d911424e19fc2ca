"""Cache on disk of the teacher's answers to the training images: logits, and tokens of layers that a task compares."""

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastkd import capture

from . import DataError, InputError
from .data import Loader
from .models import Layer
from .ranks import Ranks
from .tasks import renormalisation


class TeacherCache:
    """A NumPy file of records (epochs, images), named by a digest of teacher, images, transform and content.

    A sample depends only on seed, epoch and index, so each epoch of the file has the teacher's answers to the views
    that every student sees in that epoch. Images without augmentation are the same in all epochs, and take one.

    Args:
        shape: number of epochs of different views, and of images.
        classes, top: number of the teacher's logits, and of the largest ones that are kept in float32; the others get
            equal shares of the remaining probability.

    layers: layers whose tokens are kept too, in float16.
    """

    def __init__(self, folder: Path, ranks: Ranks, shape: tuple[int, int], classes: int, top: int | None) -> None:
        self.folder, self.ranks, self.shape, self.classes = folder, ranks, shape, classes
        self.top = classes if top is None else min(top, classes)
        self.layers: list[Layer] = []
        self._table: np.ndarray | None = None

    @property
    def record(self) -> np.dtype:
        """Return the type of what an image has in the file."""
        fields: list[tuple[Any, ...]] = [("logits", "f4", (self.top,))]
        if self.top < self.classes:
            fields += [("classes", np.min_scalar_type(self.classes), (self.top,)), ("rest", "f4")]
        return np.dtype(fields + [(layer.name, "f2", (layer.tokens, layer.width)) for layer in self.layers])

    @property
    def bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.record.itemsize

    def described(self) -> str:
        tokens = f", tokens of {', '.join(layer.name for layer in self.layers)}" if self.layers else ""
        what = f"{self.shape[0]} epochs of {self.shape[1]} images, {self.top} of {self.classes} logits{tokens}"
        return f"--teacher-cache: {self.bytes / 1e6:,.1f} MB in {self.folder}: {what}"

    def check_room(self) -> None:
        """Raises:
        InputError: the disk has no room for a new file.
        """
        nearest = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        if (free := shutil.disk_usage(nearest).free) < self.bytes:
            raise InputError(f"{self.described()}; {free / 1e6:,.1f} MB are left")

    @torch.no_grad()
    def fill(self, teacher: nn.Module, student: nn.Module, loader: Loader, about: str) -> Path:
        """Run the teacher once over all views if the file does not exist; all processes share the folder.

        Raises:
            DataError: the folder cannot be written.
            InputError: the file has fewer epochs or other content than the run needs, or is damaged.
        """
        path = self.folder / f"teacher-{digest(teacher, about + json.dumps(self.record.descr))}.npy"
        if not self.ranks.first(path.exists):
            self._write(path, teacher.eval(), student, loader)
        try:
            self._table = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise InputError(f"--teacher-cache: {path} is damaged ({error}); delete it") from error
        epochs, images = self.shape
        if self._table.shape[0] < epochs or self._table.shape[1:] != (images,):
            raise InputError(
                f"--teacher-cache: {path} has {self._table.shape[0]} epochs of {self._table.shape[1:]} images, the run "
                f"needs {epochs} of {images}; delete it, or name another folder"
            )
        return path

    def known(self, epoch: int, indices: Sequence[int], device: torch.device) -> dict[str, Any]:
        """Return the keyword arguments of a task for these images in this epoch."""
        assert self._table is not None
        rows = self._table[epoch if self.shape[0] > 1 else 0][indices]
        values = {
            name: torch.from_numpy(np.ascontiguousarray(rows[name])).to(device) for name in rows.dtype.names or ()
        }
        logits = values["logits"]
        if "rest" in values:
            logits = values["rest"][:, None].repeat(1, self.classes).scatter_(1, values["classes"].long(), logits)
        tokens = {layer.name: values[layer.name] for layer in self.layers}
        return {"teacher_logits": logits} | ({"teacher_tokens": tokens} if tokens else {})

    def _rows(self, logits: Tensor, tokens: list[Tensor]) -> np.ndarray:
        rows = np.empty(len(logits), self.record)
        if self.top == self.classes:
            rows["logits"] = logits.numpy()
        else:
            largest, classes = logits.topk(self.top)
            others = logits.scatter(1, classes, -torch.inf).logsumexp(1) - math.log(self.classes - self.top)
            rows["logits"], rows["classes"], rows["rest"] = largest.numpy(), classes.numpy(), others.numpy()
        for layer, x in zip(self.layers, tokens, strict=True):
            rows[layer.name] = x.half().cpu().numpy()
        return rows

    def _write(self, path: Path, teacher: nn.Module, student: nn.Module, loader: Loader) -> None:
        partial = path.with_name(f".{path.name}")
        scale, shift = (x.to(loader.device, torch.float32) for x in renormalisation(student, teacher))
        ordered = loader.in_order()
        batches = ordered.batches
        assert batches is not None
        try:
            self.ranks.first(lambda: _create(partial, self.shape, self.record))
            table = np.load(partial, mmap_mode="r+")
            names = [layer.name for layer in self.layers]
            watched: Any = capture.tokens(teacher, names) if names else nullcontext([])
            with watched as tokens:
                for epoch in range(self.shape[0]):
                    about = f"teacher's answers, epoch {epoch + 1}/{self.shape[0]}"
                    bar = tqdm(ordered.epoch(epoch), about, len(ordered), leave=False, disable=None)
                    for number, (images, _) in enumerate(bar):
                        logits = teacher(images * scale + shift)
                        table[epoch, batches.indices(epoch, number)] = self._rows(logits.float().cpu(), list(tokens))
            table.flush()
            self.ranks.found(None)  # all ranks have written
            self.ranks.first(lambda: partial.replace(path))
        except OSError as error:
            raise DataError(f"--teacher-cache: {path} cannot be written: {error.strerror or error}") from error


def digest(teacher: nn.Module, about: str) -> str:
    """Return a digest of the teacher's weights and of everything else that the answers depend on."""
    total = hashlib.sha256(about.encode())
    for name, x in teacher.state_dict().items():
        total.update(name.encode() + x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def _create(path: Path, shape: tuple[int, int], record: np.dtype) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.lib.format.open_memmap(path, mode="w+", dtype=record, shape=shape).flush()
