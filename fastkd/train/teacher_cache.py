"""Cache on disk of the teacher's logits of all training images, for runs without augmentation."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import DataError
from .data import Loader
from .ranks import Ranks
from .tasks import renormalisation


class TeacherCache:
    """A float32 NumPy file (images, classes), named by a digest of teacher, images and transform."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder, self.ranks = folder, ranks
        self._table: np.ndarray | None = None

    @torch.no_grad()
    def fill(self, teacher: nn.Module, student: nn.Module, loader: Loader, about: str) -> Path:
        """Run the teacher once over the images if the file does not exist; all processes share the folder.

        Raises:
            DataError: the folder cannot be written.
        """
        path = self.folder / f"teacher-{digest(teacher, about)}.npy"
        if not self.ranks.first(path.exists):
            self._write(path, teacher.eval(), student, loader)
        self._table = np.load(path, mmap_mode="r")
        return path

    def rows(self, indices: Sequence[int]) -> Tensor:
        """(len(indices), classes)"""
        assert self._table is not None
        return torch.from_numpy(self._table[indices])

    def _write(self, path: Path, teacher: nn.Module, student: nn.Module, loader: Loader) -> None:
        partial = path.with_name(f".{path.name}")
        scale, shift = (x.to(loader.device, torch.float32) for x in renormalisation(student, teacher))
        ordered = loader.in_order()
        batches = ordered.batches
        assert batches is not None
        shape = batches.size, cast(int, teacher.num_classes)
        try:
            self.ranks.first(lambda: _create(partial, shape))
            table = np.load(partial, mmap_mode="r+")
            bar = tqdm(ordered, "teacher's logits", len(ordered), leave=False, disable=None)
            for number, (images, _) in enumerate(bar):
                logits = teacher(images * scale + shift)
                table[batches.indices(0, number)] = logits.float().cpu().numpy()
            table.flush()
            self.ranks.found(None)  # all ranks have written
            self.ranks.first(lambda: partial.replace(path))
        except OSError as error:
            raise DataError(f"--teacher-cache: {path} cannot be written: {error.strerror or error}") from error


def digest(teacher: nn.Module, about: str) -> str:
    """Return a digest of the teacher's weights and of everything else that the logits depend on."""
    total = hashlib.sha256(about.encode())
    for name, x in teacher.state_dict().items():
        total.update(name.encode() + x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def _create(path: Path, shape: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape).flush()
