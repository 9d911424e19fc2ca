"""Modules over logits."""

from torch import Tensor

from fastkd import functional as F
from fastkd.losses._fixed import FixedLoss
from fastkd.ops import _checks as check
from fastkd.ops.logits import LogitReduction, RowReduction


class SoftTargetLoss(FixedLoss):
    """fastkd.soft_target_loss with its options fixed: loss(student (B, C), teacher (B, C)) -> scalar.

    Args:
        temperature: T, 1e-6 to 1e6; 1 as manifold distillation has it.
        reduction: "batchmean", "mean" (DeiT's division by B C), "sum" or "none".
    """

    shown = ("temperature", "reduction")

    def __init__(self, *, temperature: float = 1.0, reduction: LogitReduction = "batchmean") -> None:
        check.temperature(temperature)
        check.one_of("reduction", reduction, ("batchmean", "mean", "sum", "none"))
        super().__init__(temperature=temperature, reduction=reduction)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.soft_target_loss(student, teacher, **self.options)


class DKDLoss(FixedLoss):
    """fastkd.dkd_loss with its options fixed: loss(student (B, C), teacher (B, C), label (B,)) -> scalar.

    Args:
        alpha, beta, temperature: 1, 4 and 1, as CIKD has them (on ImageNet without it 1, 0.5 and 1 are used).
        reduction: "mean" over images, "sum" or "none".
    """

    shown = ("alpha", "beta", "temperature", "reduction")

    def __init__(
        self, *, alpha: float = 1.0, beta: float = 4.0, temperature: float = 1.0, reduction: RowReduction = "mean"
    ) -> None:
        check.number("alpha", alpha, low=0)
        check.number("beta", beta, low=0)
        check.temperature(temperature)
        check.one_of("reduction", reduction, ("mean", "sum", "none"))
        super().__init__(alpha=alpha, beta=beta, temperature=temperature, reduction=reduction)

    def forward(self, student: Tensor, teacher: Tensor, label: Tensor | int) -> Tensor:
        return F.dkd_loss(student, teacher, label, **self.options)


class NKDLoss(FixedLoss):
    """fastkd.nkd_loss with its options fixed: loss(student (B, C), teacher (B, C), label (B,) or (B, C)) -> scalar.

    Args:
        gamma, temperature: 1 and 1, the code's for DeiT (ResNet on ImageNet 1.5, 1; CIFAR-100 3.5, 3).
        reduction: "mean" over images, "sum" or "none".
    """

    shown = ("gamma", "temperature", "reduction")

    def __init__(self, *, gamma: float = 1.0, temperature: float = 1.0, reduction: RowReduction = "mean") -> None:
        check.number("gamma", gamma, low=0)
        check.temperature(temperature)
        check.one_of("reduction", reduction, ("mean", "sum", "none"))
        super().__init__(gamma=gamma, temperature=temperature, reduction=reduction)

    def forward(self, student: Tensor, teacher: Tensor, label: Tensor | int) -> Tensor:
        return F.nkd_loss(student, teacher, label, **self.options)
