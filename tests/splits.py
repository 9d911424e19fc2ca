"""Kernels on lowered thresholds: sizes around a split, and numbers of threads."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

THREADS = (1, 2, 3, 7)


def around(size: int) -> list[int]:
    """One below a split, at it, one above, and several times over with a tail."""
    return sorted({max(size - 1, 1), size, size + 1, 3 * size + 1})


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_every_number_of_threads(run: Callable[[], tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """What `run` returns on 1, 2, 3 and 7 threads: the same bits whenever it runs again on as many."""
    for count in THREADS:
        with on_threads(count):
            first, again = run(), run()
        assert all(map(torch.equal, first, again)), f"two calls on {count} threads differ"
        yield first
