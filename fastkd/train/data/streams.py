"""Datasets that are read in order, by timm's readers."""

import copy
import os
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

from PIL import Image
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .. import DataError, InputError
from ..ranks import Ranks
from .images import as_rgb, seed_all


def shards(part: Dataset) -> list[str]:
    """Return the files of a WebDataset; none for other data."""
    reader: Any = getattr(part, "reader", None)
    if type(reader).__name__ != "ReaderWds":
        return []
    return [os.path.join(reader.root, name) for name in reader.split_info.filenames]  # or addresses


class Stream(IterableDataset):
    """The transformed images of data that can only be read in sequence."""

    def __init__(
        self,
        source: Any,
        transform: Callable[[Image.Image], Any],
        seed: int,
        ranks: Ranks,
        workers: int,
        batch: int,
        upright: bool = True,
    ) -> None:
        self.source, self.transform, self.seed, self.epoch, self.upright = source, transform, seed, 0, upright
        self.ranks, self.workers, self.batch = ranks, workers, batch
        self.source.transform = None

    def __len__(self) -> int:
        self.reader()
        return len(self.source)

    def reader(self) -> Any:
        """Return timm's reader, shared by stages and networks, for this rank and worker; it yields full batches."""
        reader = self.source.reader
        reader.batch_size = self.batch
        reader.dist_rank, reader.dist_num_replicas = self.ranks
        reader.set_loader_cfg(num_workers=self.workers)
        return reader

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        worker = get_worker_info()
        samples = self._samples()
        for number in count():
            try:
                image, target = next(samples)
                image = as_rgb(image, self.upright)
            except StopIteration:
                return
            except Exception as error:  # each reader's own, such as more workers than shards
                raise DataError(f"--data: {' '.join(str(error).split())}") from error
            seed_all(self.seed, self.epoch, self.ranks.rank, worker.id if worker else 0, number)
            yield self.transform(image), int(target)

    def _samples(self) -> Iterator[tuple[Image.Image, Any]]:
        reader = self.reader()
        if not reader.is_training:
            # The share is assigned already, so timm is set to one process; else it repeats and omits images to give
            # every process as many.
            reader._lazy_init()
            reader.dist_num_replicas = 1
        yield from self.source


def check_shards(stream: Stream) -> None:
    """Check that each process that loads training images has a shard; TensorFlow Datasets are split if necessary.

    Raises:
        InputError: there are fewer shards than processes.
    """
    reader, world, workers = stream.reader(), stream.ranks.world, stream.workers
    files = shards(stream.source)
    has = len(files) // world if files else workers
    if type(reader).__name__ == "ReaderHfids":
        alike = copy.copy(reader)
        alike.is_training, alike.num_workers = False, 1  # otherwise timm raises or warns with a message of its own
        alike._lazy_init()
        has = alike.ds.num_shards
    if has < workers:
        raise InputError(f"--workers: {workers} need a shard each to train on, a process gets {has}")
