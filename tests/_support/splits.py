"""Native kernels made to split small inputs as they split large ones, on a given number of threads."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastkd.ops._dispatch import INTERPRETED
from fastkd.testing import backends, thresholds

THREADS = (1, 2, 3, 7)


def built(stem: str) -> dict[str, int]:
    """The stem's thresholds in this build: those of CUDA are `<stem>_cuda_...`, and alone where CUDA is emulated."""
    if INTERPRETED or "native" not in backends("moments_fwd"):
        return {}
    from fastkd import _C

    named = {name.replace(".", "_", 1): value for name, value in _C.thresholds().items()}
    return {name: value for name, value in named.items() if name.startswith(f"{stem}_")}


def around(size: int) -> list[int]:
    """One below a split, at it, one above, and several times over with a tail."""
    return sorted({max(size - 1, 1), size, size + 1, 3 * size + 1})


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_every_number_of_threads(run: Callable[[], tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """Yield the result of `run` on 1, 2, 3 and 7 threads, after a second call has given the same bits."""
    for count in THREADS:
        with threads(count):
            first, again = run(), run()
        assert all(map(torch.equal, first, again)), f"two calls on {count} threads differ"
        yield first


@contextlib.contextmanager
def lowered(**values: int) -> Iterator[None]:
    """Lower the thresholds that this build has for the device: an emulated CUDA has none of a CPU's."""
    known = {name for name in values if name in built(name.split("_")[0])}
    for name in values.keys() - known:
        stem = name.split("_")[0]
        has_kind = any(("_cuda_" in other) == ("_cuda_" in name) for other in built(stem))
        if has_kind:
            raise KeyError(name)
    with thresholds(**{name: values[name] for name in known}) if known else contextlib.nullcontext():
        yield
