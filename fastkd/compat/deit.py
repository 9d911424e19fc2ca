"""The distillation losses of DeiT (deit/losses.py) and TinyViT (Cream/TinyViT/main.py)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import functional as F
from fastkd._precision import accumulator
from fastkd.ops import _checks as check
from fastkd.ops.logits import cross_entropy


class DistillationLoss(nn.Module):
    """DeiT's DistillationLoss (losses.py): a criterion and the distillation of a second head.

        L = (1 - α) criterion(outputs, labels) + α D
        soft: D = T²/(B C) Σ_b KL( softmax(teacher/T) ‖ softmax(outputs_kd/T) )
        hard: D = cross-entropy of outputs_kd and the teacher's largest class

    "soft" divides by B C, as DeiT does: C times less than Hinton's loss and its other implementations.

    Args:
        base_criterion: (outputs, labels) -> loss.
        teacher_model: inputs -> logits (B, C), called without gradients.
        distillation_type: "none", "soft" or "hard".
        alpha: weight α.
        tau: temperature T > 0 of "soft".

    Raises:
        ValueError: an unknown distillation_type.
    """

    def __init__(
        self,
        base_criterion: Callable[[Tensor, Any], Tensor],
        teacher_model: Callable[[Any], Tensor],
        distillation_type: str,
        alpha: float,
        tau: float,
    ) -> None:
        super().__init__()
        check.one_of("distillation_type", distillation_type, ("none", "soft", "hard"))
        self.base_criterion, self.teacher_model = base_criterion, teacher_model
        self.distillation_type, self.alpha, self.tau = distillation_type, alpha, tau

    def forward(self, inputs: Any, outputs: Tensor | tuple[Tensor, Tensor], labels: Any) -> Tensor:
        """Return the loss.

        Args:
            inputs: what the teacher sees.
            outputs: the student's (outputs, outputs_kd), each (B, C) logits; one tensor for "none". Differentiable.
            labels: of the criterion.

        Raises:
            ValueError: one tensor where a distillation needs two.
            TypeError, ValueError, RuntimeError: as fastkd.soft_target_loss.
        """
        outputs_kd = None
        if not isinstance(outputs, Tensor):
            outputs, outputs_kd = outputs
        base_loss = self.base_criterion(outputs, labels)
        if self.distillation_type == "none":
            return base_loss
        if outputs_kd is None:
            raise ValueError("distillation needs outputs = (outputs, outputs_kd), of the class and distillation token")
        with torch.no_grad():
            teacher = self.teacher_model(inputs)
        if self.distillation_type == "soft":
            distillation = F.soft_target_loss(outputs_kd, teacher, temperature=self.tau, reduction="mean")
        else:
            distillation = nn.functional.cross_entropy(outputs_kd, teacher.argmax(1))
        return base_loss * (1 - self.alpha) + distillation * self.alpha


def tinyvit_distill_loss(outputs: Tensor, logits_index: Tensor, logits_value: Tensor) -> Tensor:
    """TinyViT's loss on stored teacher probabilities (TinyViT/main.py), without the teacher's dense (B, C) targets.

        L = -1/B Σ_b Σ_c q_c log softmax(outputs)_c,  q the K stored values, the rest of 1 spread over C - K classes

    It replaces the rebuilding of the teacher's outputs and the soft-target cross-entropy on them.

    Args:
        outputs: (B, C) student logits. Differentiable.
        logits_index: (B, K) int classes of the stored values, distinct in each row, K < C.
        logits_value: (B, K) probabilities of the teacher. A constant.

    Returns:
        Scalar, float32 (float64 if outputs is).

    Raises:
        TypeError: not floating-point tensors, an index not of integers.
        ValueError: shapes that do not fit or are empty, K >= C, values that require a gradient.
    """
    check.tensor("outputs", outputs, 2, "(B, C)")
    check.not_empty("outputs", outputs)
    check.tensor("logits_value", logits_value, 2, "(B, K)")
    check.integers("logits_index", logits_index)
    check.constant("logits_value", logits_value)
    B, C = outputs.shape
    K = logits_value.shape[1]
    if logits_index.shape != logits_value.shape or len(logits_value) != B or not 0 < K < C:
        raise ValueError(
            f"logits_index and logits_value must be (B, K) with B = {B} and 0 < K < C = {C}, got "
            f"{tuple(logits_index.shape)} and {tuple(logits_value.shape)}"
        )
    q = logits_value.to(accumulator(outputs))
    return cross_entropy(outputs, q, logits_index.long()).mean()
