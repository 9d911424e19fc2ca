"""The distillation losses of cls_KD (mmcls/models/dis_losses), under the names and defaults of its configs."""

import contextlib
import importlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastkd import functional as F
from fastkd import losses
from fastkd.ops import _checks as check
from fastkd.ops.logits import check_pair, soft_cross_entropy


class KDLoss(nn.Module):
    """cls_KD's KDLoss (kd.py): Hinton's soft targets as a cross-entropy, with the weight of the other loss.

        L = -α T²/B Σ_b Σ_i q_i log p_i,  p and q the softmax of student/T and teacher/T

    The teacher's entropy is included, so that L does not vanish where student = teacher. The original takes the
    logarithm of the softmax, which is -inf where it underflows; here it is exact.

    Args:
        name, use_this: accepted and unused, as in the original: the distiller reads them from the config.
        temp: T > 0.
        alpha: weight α.
    """

    def __init__(self, name: str, use_this: bool, temp: float = 4.0, alpha: float = 0.5) -> None:
        super().__init__()
        self.temp, self.alpha = temp, alpha

    def forward(self, logit_s: Tensor, logit_t: Tensor) -> tuple[float, Tensor]:
        """Return (1 - α, L): the factor of the student's own loss, and the distillation loss.

        Args:
            logit_s: (B, C) student logits. Differentiable.
            logit_t: (B, C) teacher logits. A constant: where the original would differentiate it, an error.

        Raises:
            TypeError, ValueError: as fastkd.soft_target_loss.
        """
        check_pair(logit_s, logit_t, ("logit_s", "logit_t"), self.temp)
        check.constant("logit_t", logit_t)
        loss = soft_cross_entropy(logit_s, logit_t, self.temp)
        return 1 - self.alpha, loss.sum() * (self.alpha * self.temp**2 / len(loss))


class DKDLoss(nn.Module):
    """cls_KD's DKDLoss (dkd.py): fastkd.dkd_loss with its defaults.

    Args:
        name, use_this: accepted and unused, as in the original: the distiller reads them from the config.
        temp: T > 0.
        alpha, beta: weights >= 0 of the target's and the other classes' term.
    """

    def __init__(self, name: str, use_this: bool, temp: float = 4.0, alpha: float = 1.0, beta: float = 6.0) -> None:
        super().__init__()
        self.temp, self.alpha, self.beta = temp, alpha, beta

    def forward(self, logit_s: Tensor, logit_t: Tensor, gt_label: Tensor) -> Tensor:
        """Return the loss of student logits (B, C), teacher logits (B, C) and class indices (B,) or (B, 1).

        Raises:
            TypeError, ValueError, RuntimeError: as fastkd.dkd_loss; mixed labels (B, C), which the original cannot
                take either.
        """
        label = gt_label.reshape(-1) if gt_label.shape == (len(logit_s), 1) else gt_label
        return F.dkd_loss(logit_s, logit_t, label, alpha=self.alpha, beta=self.beta, temperature=self.temp)


class NKDLoss(nn.Module):
    """cls_KD's NKDLoss (nkd.py), as it is since October 2023: fastkd.nkd_loss with its defaults.

    From July to October 2023 that file left the target among the other classes, and so computed another loss.

    Args:
        name, use_this: accepted and unused, as in the original: the distiller reads them from the config.
        temp: T > 0, of the other classes alone.
        gamma: weight >= 0 of the other classes.
    """

    def __init__(self, name: str, use_this: bool, temp: float = 1.0, gamma: float = 1.5) -> None:
        super().__init__()
        self.temp, self.gamma = temp, gamma

    def forward(self, logit_s: Tensor, logit_t: Tensor, gt_label: Tensor) -> Tensor:
        """Return the loss of student logits (B, C), teacher logits (B, C) and labels (B,), or mixed ones (B, C).

        Raises:
            TypeError, ValueError, RuntimeError: as fastkd.nkd_loss; labels (B, 1), which the original takes for
                mixed ones and all for class 0.
        """
        return F.nkd_loss(logit_s, logit_t, gt_label, gamma=self.gamma, temperature=self.temp)


class ViTKDLoss(losses.ViTKDLoss):
    """cls_KD's ViTKDLoss (vitkd.py): losses.ViTKDLoss by list inputs; checkpoints of the original load.

    Args:
        name, use_this: accepted and unused, as in the original: the distiller reads them from the config.
        student_dims, teacher_dims: widths Ds, Dt.
        alpha_vitkd, beta_vitkd: weights >= 0 of mimicking and generation.
        lambda_vitkd: share λ of masked tokens, in (0, 1].

    Raises:
        TypeError, ValueError: as losses.ViTKDLoss.
    """

    def __init__(
        self,
        name: str,
        use_this: bool,
        student_dims: int,
        teacher_dims: int,
        alpha_vitkd: float = 0.00003,
        beta_vitkd: float = 0.000003,
        lambda_vitkd: float = 0.5,
    ) -> None:
        super().__init__(student_dims, teacher_dims, alpha=alpha_vitkd, beta=beta_vitkd, mask_ratio=lambda_vitkd)

    def forward(  # type: ignore[override]
        self, preds_S: Sequence[Tensor], preds_T: Sequence[Tensor], *, mask: Tensor | None = None
    ) -> Tensor:
        """Return the loss. The mask is drawn as by the original: the same seed gives the same tokens.

        Args:
            preds_S: [low (B, 2, N, Ds), high (B, N, Ds)] of the student. Differentiable.
            preds_T: [low (B, 2, N, Dt), high (B, N, Dt)] of the teacher. Constants.
            mask: (B, N), nonzero = masked, instead of a draw (not in the original).

        Raises:
            TypeError, ValueError: as losses.ViTKDLoss; lists of other than two tensors.
        """
        if len(preds_S) != 2 or len(preds_T) != 2:
            raise ValueError(f"preds_S and preds_T must be [low, high], got {len(preds_S)} and {len(preds_T)} tensors")
        (low_s, high_s), (low_t, high_t) = preds_S, preds_T
        loss = super().forward(low_s, low_t, high_s, high_t, mask)
        assert isinstance(loss, Tensor)
        return loss


LOSSES = (KDLoss, DKDLoss, NKDLoss, ViTKDLoss)


def register_cls_kd(registry: Any, force: bool = True) -> None:
    """Register the losses of cls_KD under their names, so that a builder makes them from the configs as they are.

        from mmcls.registry import MODELS
        register_cls_kd(MODELS)   # after mmcls.models, whose losses of these names it replaces

    Importing fastkd.compat registers them in mmengine's root registry, if mmengine is installed, under the names that
    are free there: a registry of a project finds them through its parent.

    Args:
        registry: has `get(name)` and `register_module(name=, module=, force=)`, like mmengine's and mmcv's.
        force: replace what has one of the names; False leaves it.
    """
    for loss in LOSSES:
        if force or registry.get(loss.__name__) is None:
            registry.register_module(name=loss.__name__, module=loss, force=force)


with contextlib.suppress(ImportError):
    register_cls_kd(importlib.import_module("mmengine.registry").MODELS, force=False)
