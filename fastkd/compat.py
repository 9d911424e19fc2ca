"""Signatures that people already call, so that a migration is one changed import."""

import contextlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fastkd import functional as F
from fastkd.capture import BatchNormInputs, bn_inputs


def layer_mf_loss(F_s: Tensor, F_t: Tensor, K: int, *, index: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms of Hao et al. 2022 under the name and signature of their code (losses.py, layer_mf_loss).

    Args:
        F_s: (B, N, Ds) student tokens. Differentiable.
        F_t: (B, N, Dt) teacher tokens. A constant.
        K: rows of the random term; all of them where K > B*N.
        index: (K,) int64 rows to take instead of drawing them (not in the original).

    Returns:
        (patch, sample, rand): the intra, inter and random terms, unweighted element means.

    Raises:
        ValueError: as fastkd.manifold_loss; a teacher that requires a gradient; token counts that differ
            (the original slices and silently relates the wrong tokens when only the teacher has a class token).
    """
    _, terms = F.manifold_loss(F_s, F_t, num_samples=K, index=index, return_terms=True)
    return terms


class GramLoss(nn.Module):
    """DINOv3's Gram loss under the name and signature of its code (dinov3/loss/gram_loss.py).

    Args:
        apply_norm: relate unit vectors.
        img_level: accepted and unused, as in the original: forward's argument of the same name decides.
        remove_neg: clamp negative similarities of both networks to 0.
        remove_only_teacher_neg: clamp those of the teacher alone.

    Raises:
        ValueError: both remove_neg and remove_only_teacher_neg.
    """

    def __init__(
        self,
        apply_norm: bool = True,
        img_level: bool = True,
        remove_neg: bool = True,
        remove_only_teacher_neg: bool = False,
    ) -> None:
        super().__init__()
        if remove_neg and remove_only_teacher_neg:
            raise ValueError("remove_neg and remove_only_teacher_neg exclude each other")
        self.apply_norm, self.remove_neg = apply_norm, remove_neg
        self.remove_only_teacher_neg = remove_only_teacher_neg

    def forward(self, output_feats: Tensor, target_feats: Tensor, img_level: bool = True) -> Tensor:
        """Mean squared difference of the Gram matrices, per image or over the whole batch.

        Args:
            output_feats: (B, N, D) student tokens; (B*N, D) too if not img_level. Differentiable.
            target_feats: (B, N, D') teacher tokens. A constant: where the original would differentiate it, an error.
            img_level: one map per image, else one over the batch.

        Raises:
            ValueError: shapes that do not fit, or target_feats that requires a gradient.
        """
        if not img_level and output_feats.ndim == 2 and target_feats.ndim == 2:
            output_feats, target_feats = output_feats.unsqueeze(0), target_feats.unsqueeze(0)
        return F.relation_loss(
            output_feats,
            target_feats,
            scope="intra" if img_level else "batch",
            normalize=self.apply_norm,
            rectify="both" if self.remove_neg else "teacher" if self.remove_only_teacher_neg else "none",
        )


class DeepInversionFeatureHook:
    """DeepInversion's batch-norm hook under the name and signature of its code (deepinversion.py).

        r_feature = ‖running_var - var‖ + ‖running_mean - mean‖,  moments of what enters the layer, var biased

    Args:
        module: a batch norm layer with running statistics, in eval mode.

    Raises:
        ValueError: a module that is no batch norm layer, or keeps no running statistics.
    """

    def __init__(self, module: nn.Module) -> None:
        self._capture = bn_inputs(module)
        self._layer: BatchNormInputs | None = self._capture.__enter__()

    @property
    def r_feature(self) -> Tensor:
        """The distance for the latest forward pass, computed when read; gradients flow to the layer's input.

        Raises:
            RuntimeError: before a forward pass, or after close.
        """
        layer = self._layer
        if layer is None:
            raise RuntimeError("r_feature is read after close(), which let go of the layer's input: read it before")
        return F.bn_stat_loss(layer.inputs, layer.running_means, layer.running_vars)

    def close(self) -> None:
        """Take the hook off the module and let go of its input."""
        # A layer that never ran is an error at the end of a `with`, not here.
        self._layer = None
        with contextlib.suppress(RuntimeError):
            self._capture.__exit__(None, None, None)


# TextBrewer's attention losses (textbrewer/losses.py) under their names, from queries and keys where the originals take
# scores q kᵀ d^-1/2 (B, H, N, N). Two things differ. Without a mask the originals drop every score <= -1e-3, meant for
# additively masked ones but hitting genuine ones too: here each counts, and `mask` is what masks. With a mask, scores
# arrive at the originals with padded keys already lowered by 10,000: here `mask` does that as well.


def _heads_joined(x: Tensor) -> Tensor:
    """(B, H, N, d) -> (B, 1, N, H d), whose scores are the sum over heads."""
    return x.transpose(1, 2).flatten(2).unsqueeze(1)


def _att_loss(
    divergence: Literal["score_mse", "ce"],
    q_S: Tensor,
    k_S: Tensor,
    q_T: Tensor,
    k_T: Tensor,
    mask: Tensor | None,
    scale_S: float,
    scale_T: float,
) -> Tensor:
    """Mean over heads and the batch's valid pairs ("score_mse") or queries ("ce")."""
    valid = None if mask is None else mask != 0
    loss = F.attention_loss(
        q_S,
        k_S,
        q_T,
        k_T,
        divergence=divergence,
        scale_student=scale_S,
        scale_teacher=scale_T,
        key_mask=valid,
        query_mask=valid,
        reduction="mean" if valid is None else "sum",
    )
    if valid is None:
        return loss
    lengths = valid.sum(1)
    mean_over = lengths.square() / k_S.shape[2] if divergence == "score_mse" else lengths
    return loss / (q_S.shape[1] * mean_over.sum())


def att_mse_loss(q_S: Tensor, k_S: Tensor, q_T: Tensor, k_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """TextBrewer's att_mse_loss from queries and keys: mean squared difference of scores over heads and valid pairs.

    Args:
        q_S, k_S: (B, H, N, d) of the student. Differentiable.
        q_T, k_T: (B, H, N, d') of the teacher. Constants.
        mask: (B, N), 0 where padded; the mean is over the valid pairs of the whole batch.

    Returns:
        Scalar, float32 (float64 if an input is).

    Raises:
        TypeError, ValueError, RuntimeError: as fastkd.attention_loss.
    """
    return _att_loss("score_mse", q_S, k_S, q_T, k_T, mask, q_S.shape[-1] ** -0.5, q_T.shape[-1] ** -0.5)


def att_mse_sum_loss(q_S: Tensor, k_S: Tensor, q_T: Tensor, k_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """TextBrewer's att_mse_sum_loss: att_mse_loss of the scores summed over heads; head counts may differ."""
    scale_S, scale_T = q_S.shape[-1] ** -0.5, q_T.shape[-1] ** -0.5
    q_S, k_S, q_T, k_T = (_heads_joined(x) for x in (q_S, k_S, q_T, k_T))
    return _att_loss("score_mse", q_S, k_S, q_T, k_T, mask, scale_S, scale_T)


def att_ce_loss(q_S: Tensor, k_S: Tensor, q_T: Tensor, k_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """TextBrewer's att_ce_loss from queries and keys: cross-entropy of the maps, mean over heads and valid queries.

    Arguments, result and errors as att_mse_loss.
    """
    return _att_loss("ce", q_S, k_S, q_T, k_T, mask, q_S.shape[-1] ** -0.5, q_T.shape[-1] ** -0.5)


def att_ce_mean_loss(q_S: Tensor, k_S: Tensor, q_T: Tensor, k_T: Tensor, mask: Tensor | None = None) -> Tensor:
    """TextBrewer's att_ce_mean_loss: att_ce_loss of the softmax of the scores' mean over heads; counts may differ."""
    scale_S, scale_T = (q.shape[-1] ** -0.5 / q.shape[1] for q in (q_S, q_T))
    q_S, k_S, q_T, k_T = (_heads_joined(x) for x in (q_S, k_S, q_T, k_T))
    return _att_loss("ce", q_S, k_S, q_T, k_T, mask, scale_S, scale_T)


def mmd_loss(state_S: Sequence[Tensor], state_T: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """TextBrewer's mmd_loss, its signature unchanged: mean squared difference of S1 S2ᵀ/D and T1 T2ᵀ/D', no map held.

    Args:
        state_S: two tensors (B, N, D) of the student. Differentiable.
        state_T: two tensors (B, N, D') of the teacher. Constants.
        mask: (B, N), 0 where padded; the mean is over the valid pairs of the whole batch.

    Returns:
        Scalar, float32 (float64 if an input is).

    Raises:
        TypeError, ValueError, RuntimeError: as fastkd.attention_loss.
    """
    s1, s2, t1, t2 = (x.unsqueeze(1) for x in (*state_S, *state_T))
    return _att_loss("score_mse", s1, s2, t1, t2, mask, 1 / s1.shape[-1], 1 / t1.shape[-1])


def tinybert_att_loss(
    students: Sequence[tuple[Tensor, Tensor]],
    teachers: Sequence[tuple[Tensor, Tensor]],
    attention_mask: Tensor | None = None,
) -> Tensor:
    """TinyBERT's attention loss (TinyBERT/task_distill.py): mean squared difference of scores, summed over layers.

    Student layer j learns from teacher layer j m + m - 1, m = teachers / students. Masked keys add 0 and stay in the
    mean, padded queries count, as there; genuine scores <= -100, which the original takes for masked ones, count here.

    Args:
        students: per layer (q, k), each (B, H, N, d). Differentiable.
        teachers: per layer (q, k), each (B, H, N, d'). Constants.
        attention_mask: (B, N), 0 where padded.

    Returns:
        Scalar, float32 (float64 if an input is).

    Raises:
        ValueError: no student layer, or teacher layers that are no multiple of them.
        TypeError, ValueError, RuntimeError: as fastkd.attention_loss.
    """
    if len(students) == 0 or len(teachers) == 0 or len(teachers) % len(students) != 0:
        raise ValueError(
            f"teachers must be a multiple of students in layers, got {len(teachers)} for {len(students)} layers"
        )
    every = len(teachers) // len(students)
    key_mask = None if attention_mask is None else attention_mask != 0
    terms = [
        F.attention_loss(*student, *teacher, divergence="score_mse", key_mask=key_mask)
        for student, teacher in zip(students, teachers[every - 1 :: every], strict=True)
    ]
    return torch.stack(terms).sum()
