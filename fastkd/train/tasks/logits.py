"""Losses between logits under one signature."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastkd.losses import DKDLoss, NKDLoss, SoftTargetLoss
from fastkd.train import InputError


class HardTargetLoss(nn.Module):
    """Cross-entropy with the teacher's decision: hard distillation of DeiT, Touvron et al. 2021 (arXiv:2012.12877)."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return nn.functional.cross_entropy(student.float(), teacher.argmax(1))


LOGIT_LOSSES: dict[str, Callable[..., nn.Module]] = {
    "soft": SoftTargetLoss,
    "hard": HardTargetLoss,
    "dkd": DKDLoss,
    "nkd": NKDLoss,
}


class LogitLoss(nn.Module):
    """loss(student (B, C), teacher (B, C), target) -> scalar. A mixed target (B, C) counts as its largest entry.

    Raises:
        InputError: no such loss, or arguments that it does not take.
    """

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        if name not in LOGIT_LOSSES:
            raise InputError(f"logits: needs one of {', '.join(LOGIT_LOSSES)} or None, got {name!r}")
        self.name = name
        try:
            self.loss = LOGIT_LOSSES[name](**options)
        except (TypeError, ValueError) as error:
            raise InputError(f"logit_options of {name!r}: {error}") from error

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        if self.name in ("dkd", "nkd"):
            loss: Tensor = self.loss(student, teacher, target.argmax(1) if target.ndim == 2 else target)
        else:
            loss = self.loss(student, teacher)
        return loss
