"""Calls of every loss of fastkd.compat."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastkd import compat
from fastkd.testing import DEVICE
from tests._support.calls import Call, randn


def dropins() -> list[Call]:
    """A call of each loss, under its name."""
    found = []

    def call(
        name: str, op: str | None, student: str, arguments: dict[str, Any], constants: dict[str, Any] | None = None,
        made: Callable[[], Any] | None = None,
    ) -> None:  # fmt: skip
        target = made or (lambda: getattr(compat, name))
        found.append(Call(f"compat.{name}", op, (student,), arguments, module=target, constants=constants or {}))

    logits = {"logit_s": randn(4, 9), "logit_t": randn(4, 9, seed=1)}
    label = {"gt_label": torch.tensor([3, 0, 8, 3], device=DEVICE)}
    call("KDLoss", None, "logit_s", logits, made=lambda: compat.KDLoss("kd", True))
    call("DKDLoss", "softmax_kl", "logit_s", logits | label, made=lambda: compat.DKDLoss("dkd", True))
    call("NKDLoss", "nkd", "logit_s", logits | label, made=lambda: compat.NKDLoss("nkd", True))
    call(
        "DistillationLoss", "softmax_kl", "outputs",
        {"inputs": randn(4, 9), "outputs": (randn(4, 9, seed=1), randn(4, 9, seed=2)), "labels": label["gt_label"]},
        made=lambda: compat.DistillationLoss(nn.functional.cross_entropy, nn.Identity(), "soft", 0.3, 2.0),
    )  # fmt: skip
    stored = {
        "logits_index": torch.arange(3, device=DEVICE).expand(4, 3),
        "logits_value": randn(4, 9).softmax(1)[:, :3],
    }
    call("tinyvit_distill_loss", None, "outputs", stored | {"outputs": randn(4, 9, seed=1)})

    pairs = {"preds_S": [randn(2, 2, 9, 6), randn(2, 9, 6)], "preds_T": [randn(2, 2, 9, 8), randn(2, 9, 8, seed=1)]}
    mask = {"mask": torch.arange(18, device=DEVICE).view(2, 9) % 3 > 0}
    call("ViTKDLoss", None, "preds_S", pairs | mask, made=lambda: compat.ViTKDLoss("vitkd", True, 6, 8).to(DEVICE))

    features = {"output_feats": randn(2, 9, 6), "target_feats": randn(2, 9, 8, seed=1)}
    call("GramLoss", "relation_fwd", "output_feats", features, made=compat.GramLoss)
    tokens, index = {"F_s": randn(2, 9, 6), "F_t": randn(2, 9, 8, seed=1)}, torch.tensor([0, 17, 5], device=DEVICE)
    call("layer_mf_loss", "relation_fwd", "F_s", tokens | {"index": index}, {"K": 3})
    blocks = {"block_outs_s": [randn(2, 17, 4)], "block_outs_t": [randn(2, 16, 6, seed=1)], "indices": [index % 8]}
    grid = {"layer_ids_s": [0], "layer_ids_t": [0], "K": 3, "max_patch_num": 4}
    call("mf_loss", "manifold_fwd", "block_outs_s", blocks, grid)

    padding = {"attention_mask": torch.arange(12, device=DEVICE).view(2, 6) % 6 < 5}
    projections = {"student": randn(2, 6, 24), "teacher": randn(2, 6, 48, seed=1)} | padding
    weights = {"relations": {(1, 1): 0.5, (2, 3): 0.5}, "A_r": 2}
    call("minilmv2_loss", "attention_fwd", "student", projections, weights)
    call("tinymim_loss", "attention_fwd", "student", projections, {"num_heads": 2})
    heads = {name: randn(2, 3, 6, 4, seed=seed) for seed, name in enumerate(("q_S", "k_S", "q_T", "k_T"))}
    padded = {"mask": padding["attention_mask"]}
    for name in ("att_mse_loss", "att_mse_sum_loss", "att_ce_loss", "att_ce_mean_loss"):
        call(name, "attention_fwd", "q_S", heads | padded)
    states = {"state_S": [randn(2, 6, 4), randn(2, 6, 4, seed=1)], "state_T": [randn(2, 6, 8), randn(2, 6, 8, seed=2)]}
    call("mmd_loss", "attention_fwd", "state_S", states | padded)
    layers = {"students": [(heads["q_S"], heads["k_S"])], "teachers": [(heads["q_T"], heads["k_T"])] * 2}
    call("tinybert_att_loss", "attention_fwd", "students", layers | padding)
    return found


DROPINS = dropins()
