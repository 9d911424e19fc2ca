"""Attention-map losses: divergences of softmax(q kᵀ) maps of two networks."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NEVER = float("-inf")


def _log_softmax(z: Tensor) -> Tensor:
    """Rows that are all -inf stay so, with gradient 0."""
    has_key = (z != NEVER).any(-1, keepdim=True)
    return torch.where(has_key, torch.where(has_key, z, 0).log_softmax(-1), NEVER)


def _log_mean_of_heads(log_p: Tensor) -> Tensor:
    has_head = (log_p > NEVER).any(1, keepdim=True)
    log_mean = torch.where(has_head, log_p, 0).logsumexp(1, keepdim=True) - math.log(log_p.shape[1])
    return torch.where(has_head, log_mean, NEVER)


def _kl(log_p: Tensor, log_r: Tensor) -> Tensor:
    """Σ p (log p - log r), with 0 log 0 = 0."""
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_r, 0)).sum(-1)


def _divergence(name: str, log_s: Tensor, log_t: Tensor) -> Tensor:
    if name == "kl":
        return _kl(log_t, log_s)
    if name == "reverse_kl":
        return _kl(log_s, log_t)
    if name == "ce":
        p = log_t.exp()
        return -(p * torch.where(p > 0, log_s, 0)).sum(-1)
    if name == "mse":
        return (log_s.exp() - log_t.exp()).square().mean(-1)
    neither = (log_s == NEVER) & (log_t == NEVER)
    log_m = torch.logaddexp(torch.where(neither, 0, log_s), torch.where(neither, 0, log_t)) - math.log(2)
    return (_kl(log_s, log_m) + _kl(log_t, log_m)) / 2


def attention_loss(
    q_student: Tensor,
    k_student: Tensor,
    q_teacher: Tensor,
    k_teacher: Tensor,
    *,
    divergence: str = "kl",
    scale_student: float | None = None,
    scale_teacher: float | None = None,
    temperature: float = 1.0,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    bias_student: Tensor | None = None,
    bias_teacher: Tensor | None = None,
    heads: str = "match",
    query_slice: slice | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Divergence of the maps softmax(z), z = (q kᵀ scale + bias) / T; arguments as in fastkd.attention_loss."""
    N_q, N_k = q_student.shape[2], k_student.shape[2]
    acc = torch.float32
    for x in (q_student, k_student, q_teacher, k_teacher, bias_student, bias_teacher):
        acc = acc if x is None else torch.promote_types(acc, x.dtype)
    hidden = torch.zeros(len(q_student), 1, N_q, N_k, dtype=torch.bool, device=q_student.device)
    if key_mask is not None:
        hidden = hidden | ~key_mask[:, None, None, :]
    if is_causal:
        hidden = hidden | torch.ones(N_q, N_k, dtype=torch.bool, device=hidden.device).triu(1)
    rows = slice(None) if query_slice is None else query_slice

    def scores(q: Tensor, k: Tensor, scale: float | None, bias: Tensor | None) -> Tensor:
        z = q.to(acc) @ k.to(acc).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if bias is not None:
            z = z + bias.to(acc)
        return (z / temperature).masked_fill(hidden, NEVER)[:, :, rows]

    z_s = scores(q_student, k_student, scale_student, bias_student)
    z_t = scores(q_teacher, k_teacher, scale_teacher, bias_teacher)
    if divergence == "score_mse":
        loss = torch.where((z_s == NEVER) & (z_t == NEVER), 0, z_s - z_t).square().mean(-1)
    else:
        log_s, log_t = _log_softmax(z_s), _log_softmax(z_t)
        if heads == "mean":
            log_s, log_t = _log_mean_of_heads(log_s), _log_mean_of_heads(log_t)
        has_target = (log_t != NEVER).any(-1, keepdim=True)
        # A finite value in place of such rows: that of an infinite one would be multiplied by 0 in backward.
        log_t = torch.where(has_target, log_t, 0)
        loss = torch.where(has_target[..., 0], _divergence(divergence, log_s, log_t), 0)

    counted = torch.ones_like(loss[:, :1], dtype=torch.bool)
    if query_mask is not None:
        counted = query_mask[:, None, rows]
        loss = torch.where(counted, loss, 0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return (loss.sum(-1) / counted.sum(-1).clamp_min(1)).mean()


def qkv_relation_loss(
    student: tuple[Tensor, Tensor, Tensor],
    teacher: tuple[Tensor, Tensor, Tensor],
    *,
    relations: Sequence[str] = ("qq", "kk", "vv"),
    relation_heads: int,
    weights: Sequence[float] | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    """Σ_r w_r KL of the maps softmax(a bᵀ), a and b any two of q, k, v re-split into relation heads."""

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (relation_heads, -1)).transpose(1, 2)

    (s, t) = ({name: split(x) for name, x in zip("qkv", triple, strict=True)} for triple in (student, teacher))
    terms = [
        w * attention_loss(s[r[0]], s[r[1]], t[r[0]], t[r[1]], key_mask=key_mask, query_mask=query_mask)
        for r, w in zip(relations, weights or [1.0] * len(relations), strict=True)
    ]
    return torch.stack(terms).sum()
