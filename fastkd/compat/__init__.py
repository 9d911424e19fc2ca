"""Signatures that people already call, so that a migration is one changed import: a file for each origin."""

from fastkd.compat.cls_kd import DKDLoss, KDLoss, NKDLoss, ViTKDLoss, register_cls_kd
from fastkd.compat.deepinversion import DeepInversionFeatureHook
from fastkd.compat.deit import DistillationLoss, tinyvit_distill_loss
from fastkd.compat.dinov3 import GramLoss
from fastkd.compat.manifold import layer_mf_loss, mf_loss
from fastkd.compat.relations import minilmv2_loss, tinymim_loss
from fastkd.compat.textbrewer import (
    att_ce_loss,
    att_ce_mean_loss,
    att_mse_loss,
    att_mse_sum_loss,
    mmd_loss,
    tinybert_att_loss,
)

__all__ = [
    "DKDLoss",
    "DeepInversionFeatureHook",
    "DistillationLoss",
    "GramLoss",
    "KDLoss",
    "NKDLoss",
    "ViTKDLoss",
    "att_ce_loss",
    "att_ce_mean_loss",
    "att_mse_loss",
    "att_mse_sum_loss",
    "layer_mf_loss",
    "mf_loss",
    "minilmv2_loss",
    "mmd_loss",
    "register_cls_kd",
    "tinybert_att_loss",
    "tinymim_loss",
    "tinyvit_distill_loss",
]
