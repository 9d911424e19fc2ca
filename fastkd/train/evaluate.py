"""Evaluation: top-1 over all images, and whether weights are finite."""

from typing import Any

import torch
from timm.utils import accuracy
from torch import nn
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
def evaluate(network: nn.Module, loader: Any, context: Any, ranks: Ranks = ALONE) -> float:
    """Return top-1 in percent over all images of the loader."""
    network.eval()
    right, count = None, 0
    for images, targets in loader:
        with context:
            logits = network(images)
        rows = accuracy(logits.float(), targets)[0] * len(targets)
        right = rows if right is None else right + rows
        count += len(targets)
    # A rank may have no image at all.
    device = next(network.parameters()).device
    totals = torch.tensor([0.0, count], dtype=torch.float64, device=device)
    if right is not None:
        totals[0] = right
    hits, images_seen = ranks.sum(totals).tolist()
    if not images_seen:
        raise DataError("--data: there is no validation image to be read")
    return hits / images_seen
