"""Batches of indices: the same for any number of processes and workers."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from ..ranks import Ranks


class Batches(Sampler[list[tuple[int, int, int]]]):
    """Keys (epoch, index, copy) of one rank's batches; the ranks' batches k together are a slice of the epoch's order.

    Args:
        repeats: number of consecutive copies of an image, each with its own augmentation and, if there are enough
            ranks, on its own rank. The length of an epoch stays, so it has fewer images (DeiT's repeated augmentation).
        passes: number of passes over the images in an epoch, each in its own order.
    """

    def __init__(
        self, images: int, batch_size: int, ranks: Ranks, seed: int | None, repeats: int = 1, passes: int = 1
    ) -> None:
        self.images, self.batch_size, self.ranks, self.seed = images, batch_size, ranks, seed  # no seed: in order, all
        self.repeats, self.passes, self.size = repeats, passes, images * passes
        self.epoch, self.start = 0, 0
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        whole = self.batch_size * self.ranks.world
        return self.size // whole if self.seed is not None else -(-self.size // whole)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for number in range(self.start, len(self)):
            copies = [self._copy(position) for position in self._positions(number)]
            if indices := self.indices(self.epoch, number):
                yield [(self.epoch, index, copy) for index, copy in zip(indices, copies, strict=True)]

    def indices(self, epoch: int, number: int) -> list[int]:
        ordered = self._ordered(epoch)
        return [ordered[position // self.repeats] for position in self._positions(number)]

    def _copy(self, position: int) -> int:
        # the pass counts too: no augmentation is drawn twice
        return position % self.repeats + self.repeats * (position // self.repeats // self.images)

    def _positions(self, number: int) -> range:
        """Return the positions of the batch's images and their copies in the epoch's order."""
        first = number * self.ranks.world * self.batch_size
        if self.repeats > 1:
            return range(first + self.ranks.rank, first + self.ranks.world * self.batch_size, self.ranks.world)
        first += self.ranks.rank * self.batch_size
        return range(min(first, self.size), min(first + self.batch_size, self.size))

    def _ordered(self, epoch: int) -> Sequence[int]:
        if self.seed is None:
            return range(self.size)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed((self.seed * 100_003 + epoch) % 2**63)
            orders = [torch.randperm(self.images, generator=generator) for _ in range(self.passes)]
            self._order = epoch, torch.cat(orders).tolist()
        return self._order[1]
