"""Collectives that gradients pass through."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.distributed._messages import image_bytes, images_of, pack
from fastkd.distributed._ranks import Agreed, Ranks


class Averaged(torch.autograd.Function):
    """Identity whose gradient is multiplied by the world size, by which DDP divides; applied to results only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, world: int) -> Tensor:
        ctx.world = world
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return dx * ctx.world, None


class Sum(torch.autograd.Function):
    """Sum over ranks. All ranks compute the same loss from it, so the gradient is already complete."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        return ranks.sum_(x.clone())

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return dx, None


class Gather(torch.autograd.Function):
    """Every rank's rows; as in Sum, a rank's own slice of the gradient is all of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, sizes: Sequence[int]) -> Tensor:
        ctx.start, ctx.size = sum(sizes[: ranks.rank]), sizes[ranks.rank]
        return ranks.gather(x, sizes)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        return dx[ctx.start : ctx.start + ctx.size], None, None


class Whole(torch.autograd.Function):
    """Every rank's images of several features. As in Sum, a rank's own slice of the gradient is all of it."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, agreed: Agreed, *features: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        sizes, images = agreed.sizes, agreed.images
        ctx.own = slice(sum(sizes[: ranks.rank]), sum(sizes[: ranks.rank + 1]))
        if images is None:
            bytes_of = [size * image_bytes(features) for size in sizes]
            message = features[0].new_empty(bytes_of[ranks.rank], dtype=torch.uint8)
            pack(message, features)
            images = ranks.gather(message, bytes_of)
        return tuple(images_of(images, features))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *(None if dx is None else dx[ctx.own] for dx in gradients)


def mean_over_ranks(losses: Sequence[Tensor], ranks: Ranks, sizes: list[int]) -> list[Tensor]:
    """Return means over all images from the means over each rank's images, in one message."""
    share = sizes[ranks.rank] / sum(sizes)
    joined = Sum.apply(torch.stack([loss.double() * share for loss in losses]), ranks)
    return [Averaged.apply(x.to(loss.dtype), ranks.world) for x, loss in zip(joined.unbind(), losses, strict=True)]
