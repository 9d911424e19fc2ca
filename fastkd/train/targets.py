"""Targets and their loss: mixup, label smoothing, cross-entropy."""

from timm.data import Mixup
from torch import nn

from .settings import Settings


def mixup(settings: Settings, num_classes: int) -> Mixup | None:
    if settings.mixup <= 0 and settings.cutmix <= 0:
        return None
    return Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=num_classes)


def criterion(mixed: bool, smoothing: float) -> nn.Module:
    """Return timm's cross-entropy for mixed targets or for class indices."""
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    if mixed:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()
