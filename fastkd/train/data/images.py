"""One image and its label: read in RGB, transformed by a generator that seed, epoch and index determine."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import ImageDataset
from torch.utils.data import Dataset

from .. import DataError

RETRIES = 10  # consecutive unreadable images


def seed_all(*key: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch by the whole key; equal keys give equal draws."""
    random.seed(" ".join(map(str, key)))
    np.random.seed(random.getrandbits(32))  # noqa: NPY002  timm and torchvision draw from the global one
    # torch.manual_seed spends 0.1 ms per sample on recording its caller for GPUs that are not initialised.
    torch.default_generator.manual_seed(random.getrandbits(63))
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(random.getrandbits(63))


def as_rgb(image: Image.Image, upright: bool = True) -> Image.Image:
    """Convert an image to 8-bit RGB. 16-bit grey keeps its upper 8 bits, like 16-bit colours; Pillow would clip at 255.

    `upright` turns the image as its EXIF orientation says.

    Raises:
        ValueError: 32-bit pixels, whose white level is unknown.
    """
    if upright:
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers, mode {image.mode}; it needs 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:  # Pillow would warn
        image = image.convert("RGBA")
    return image.convert("RGB")


class Images(Dataset):
    """The transformed images of a timm dataset; an unreadable image is recorded and replaced by the next one."""

    def __init__(self, source: Any, transform: Callable[[Image.Image], Any], seed: int, upright: bool = True) -> None:
        self.source, self.transform, self.seed, self.upright = source, transform, seed, upright
        self.unreadable = torch.zeros(len(source), dtype=torch.bool).share_memory_()  # the workers' marks too

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Any, int]:
        epoch, index, copy = key
        image, target = self._load(index)
        seed_all(self.seed, epoch, index, *([copy] if copy else []))
        return self.transform(image), target

    def faults(self) -> list[str]:
        """Return the names of the images that could not be read so far."""
        return [self._name(index) for index in self.unreadable.nonzero().flatten().tolist()]

    def _load(self, index: int) -> tuple[Image.Image, int]:
        for i in range(index, index + RETRIES):
            try:
                return self._open(i % len(self))
            except Exception:  # noqa: PERF203  Pillow raises what its decoders do
                self.unreadable[i % len(self)] = True
        raise DataError(f"{RETRIES} images in a row cannot be read, from {self._name(index)} on")

    def _open(self, index: int) -> tuple[Image.Image, int]:
        if not isinstance(self.source, ImageDataset):
            image, target = self.source[index]
        else:
            file, target = self.source.reader[index][:2]
            image = Image.open(file)
        return as_rgb(image, self.upright), int(target)

    def _name(self, index: int) -> str:
        if isinstance(self.source, ImageDataset):
            return str(self.source.filename(index, absolute=True))
        return f"image {index}"
