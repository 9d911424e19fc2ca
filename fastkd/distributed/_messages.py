"""The bytes that ranks send each other: tensors laid out in one message, and collectives over it."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = 1 << 22  # elements of a message or a temporary: 16 MB in float32

Group: TypeAlias = "dist.ProcessGroup | None"  # a string: PyTorch can be built without it
Shapes: TypeAlias = "Sequence[tuple[int, ...]]"


def start_gather(
    x: Tensor, sizes: Sequence[int], group: Any, parts: Sequence[Tensor] | None = None
) -> Callable[[], list[Tensor]]:
    """Start sending x to every rank. Return a function that waits for each rank's x (its size, ...), in order.

    On CPUs x is sent directly from rank to rank, because gloo's all-gather passes pieces around a ring in other
    threads. There this rank's own part is x itself, which must not be written to; `parts` can give memory for them.
    """
    rank = dist.get_rank(group)
    if x.device.type == "cpu":
        x = x.contiguous()
        if parts is None:
            parts = [x if r == rank else x.new_empty((size, *x.shape[1:])) for r, size in enumerate(sizes)]
        others = [(rank + i) % len(sizes) for i in range(1, len(sizes))]
        messages = [dist.P2POp(dist.isend, x, group=group, group_peer=r) for r in others]
        messages += [dist.P2POp(dist.irecv, parts[r], group=group, group_peer=r) for r in others]
        under_way = dist.batch_isend_irecv(messages) if messages else []
    else:
        padded = x.new_zeros((max(sizes), *x.shape[1:]))  # the collective takes equal shapes only
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        under_way = [dist.all_gather(parts, padded, group=group, async_op=True)]

    def wait() -> list[Tensor]:
        for work in under_way:
            work.wait()
        return [part[:size] for part, size in zip(parts, sizes, strict=True)]

    return wait


def offsets(shapes: Shapes, dtypes: Sequence[torch.dtype]) -> list[int]:
    """Return the byte offsets of consecutive tensors, each a multiple of 16, and the end of the last."""
    sizes = (-(-math.prod(shape) * dtype.itemsize // 16) * 16 for shape, dtype in zip(shapes, dtypes, strict=True))
    return list(itertools.accumulate(sizes, initial=0))


def views(message: Tensor, shapes: Shapes, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Return views of a message of bytes as tensors of given shapes and dtypes."""
    starts = offsets(shapes, dtypes)
    return [
        message[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        for start, shape, dtype in zip(starts, shapes, dtypes, strict=False)
    ]


def image_bytes(features: Sequence[Tensor]) -> int:
    """Return the bytes of one image in all features, each rounded up to a multiple of 16."""
    return offsets([x.shape[1:] for x in features], [x.dtype for x in features])[-1]


def images_of(message: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
    """Return the features in a message of bytes, in which each image is followed by the next with all its features.

    Each rank's images thus form one piece of the message, and all ranks' images one tensor per feature.
    """
    starts = offsets([x.shape[1:] for x in features], [x.dtype for x in features])
    of_image = message.view(-1, starts[-1])
    return [
        of_image[:, start : start + x[0].numel() * x.itemsize].view(x.dtype).view(-1, *x.shape[1:])
        for start, x in zip(starts, features, strict=False)
    ]


def pack(message: Tensor, features: Sequence[Tensor]) -> None:
    torch._foreach_copy_(images_of(message, features), [x.detach() for x in features])


def slices(total: int, elements_each: int) -> Iterator[slice]:
    """Cuts of `total` items of `elements_each` elements into pieces of at most CHUNK."""
    step = max(1, CHUNK // max(1, elements_each))
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def length(piece: slice) -> int:
    return piece.stop - piece.start
