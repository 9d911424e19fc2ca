"""Evaluation: top-1, top-5 and loss over all images, and whether weights are finite."""

from collections.abc import Callable
from typing import Any

import torch
from timm.utils import accuracy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from . import DataError
from .checkpoint import whole
from .ranks import ALONE, Ranks


def not_finite(network: nn.Module) -> str | None:
    """Return the first parameter with a NaN or an infinity."""
    for name, x in network.named_parameters():
        if not bool(torch.isfinite(whole(x) if isinstance(x, DTensor) else x.detach()).all()):
            return name
    return None


@torch.no_grad()
def evaluate(
    network: nn.Module,
    loader: Any,
    context: Any,
    ranks: Ranks = ALONE,
    watch: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> dict[str, float]:
    """Return top-1 and top-5 in percent and the mean cross-entropy over all images of the loader.

    `watch` receives images, targets and float32 logits of each batch.
    """
    network.eval()
    device = next(network.parameters()).device
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # a rank may have no image at all
    for images, targets in loader:
        with context:
            logits = network(images).float()
        rows = torch.stack([*accuracy(logits, targets, (1, 5)), nn.functional.cross_entropy(logits, targets)])
        totals[:3] += rows * len(targets)
        totals[3] += len(targets)
        if watch is not None:
            watch(images, targets, logits)
    *sums, count = ranks.sum(totals).tolist()
    if not count:
        raise DataError("--data: there is no validation image to be read")
    return dict(zip(("top1", "top5", "val_loss"), (x / count for x in sums), strict=True))
