"""Attention losses of TextBrewer and TinyBERT, from queries and keys."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastkd import functional as F
from fastkd.compat._masks import token_mask

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
    valid = token_mask("mask", mask, (k_S.shape[0], k_S.shape[-2]))
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
    k_S = students[0][1]
    key_mask = token_mask("attention_mask", attention_mask, (k_S.shape[0], k_S.shape[-2]))
    terms = [
        F.attention_loss(*student, *teacher, divergence="score_mse", key_mask=key_mask)
        for student, teacher in zip(students, teachers[every - 1 :: every], strict=True)
    ]
    return torch.stack(terms).sum()
