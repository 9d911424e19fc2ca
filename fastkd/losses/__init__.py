"""The losses as modules, with the papers' defaults: weights, layers and reductions."""

from fastkd.losses.attention import AttentionLoss, QKVRelationLoss
from fastkd.losses.dearkd import EarlyDistillationLoss
from fastkd.losses.diversity import IntraDivergenceLoss
from fastkd.losses.logits import DKDLoss, NKDLoss, SoftTargetLoss
from fastkd.losses.moments import BatchNormStatLoss
from fastkd.losses.relation import ManifoldLoss, RelationLoss
from fastkd.losses.vitkd import ViTKDLoss

__all__ = [
    "AttentionLoss",
    "BatchNormStatLoss",
    "DKDLoss",
    "EarlyDistillationLoss",
    "IntraDivergenceLoss",
    "ManifoldLoss",
    "NKDLoss",
    "QKVRelationLoss",
    "RelationLoss",
    "SoftTargetLoss",
    "ViTKDLoss",
]
