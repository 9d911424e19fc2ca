"""Providers of the attention-map KL: with maps, in checkpointed chunks, by two calls of stock attention, fastkd."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastkd
from benchmarks.case import Provider, in_pytorch


def _kl_sum(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
    """Σ KL(softmax(q_t k_tᵀ d^-1/2) ‖ softmax(q_s k_sᵀ d^-1/2)); softmax and KL in float32, as under autocast."""
    acc = torch.promote_types(q_s.dtype, torch.float32)
    log_s = F.log_softmax(q_s @ k_s.mT * q_s.shape[-1] ** -0.5, -1, dtype=acc)
    log_t = F.log_softmax(q_t @ k_t.mT * q_t.shape[-1] ** -0.5, -1, dtype=acc)
    return F.kl_div(log_s, log_t, log_target=True, reduction="sum")


def maps(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
    return _kl_sum(q_s, k_s, q_t, k_t) / q_s[..., 0].numel()


def chunks(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, rows: int = 128) -> Tensor:
    """Return the KL, computed in chunks of rows whose maps are recomputed in backward."""
    parts = zip(q_s.split(rows, 2), q_t.split(rows, 2), strict=True)
    terms = [checkpoint(_kl_sum, a, k_s, b, k_t, use_reentrant=False) for a, b in parts]
    return torch.stack(terms).sum() / q_s[..., 0].numel()


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ d^-1/2) v and the log-sum-exp of its rows, from PyTorch's fused attention."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif q.dtype == torch.float32:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return out, lse[..., : q.shape[2]]


def stock_attention(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
    """KL = scale_t q_t·A(q_t, k_t, k_t) - scale_s q_s·A(q_t, k_t, k_s) - lse_t + lse_s, A(q, k, v) = softmax(q kᵀ) v.

    dlse_s = scale_s d(q_s·A(q_s, k_s, k_s)) with A's q and k constant, so two attention calls give the gradient.
    """
    acc = torch.promote_types(q_s.dtype, torch.float32)
    held, lse_s = _attend(q_s.detach(), k_s.detach(), k_s)
    crossed, lse_t = _attend(q_t, k_t, k_s)
    with torch.no_grad():
        own, _ = _attend(q_t, k_t, k_t)
        score_t = (q_t.to(acc) * own).sum(-1) * q_t.shape[-1] ** -0.5
    scale = q_s.shape[-1] ** -0.5
    score_s, self_s = ((q_s.to(acc) * out).sum(-1) * scale for out in (crossed, held))
    return (score_t - score_s - lse_t + lse_s + self_s - self_s.detach()).mean()


def attention() -> dict[str, Provider]:
    return {
        **in_pytorch(maps),
        "chunks": Provider(chunks),
        "chunks compile": Provider(chunks, compiled=True, thorough=True),
        "two SDPA calls": Provider(stock_attention),
        "fastkd eager": Provider(partial(fastkd.attention_loss, backend="eager"), thorough=True),
        "fastkd": Provider(fastkd.attention_loss),
    }


def _relations(heads: int, *tensors: Tensor) -> Tensor:
    """MiniLMv2's loss: KL of the q-q, k-k and v-v maps of heads that split the whole width."""
    q_s, k_s, v_s, q_t, k_t, v_t = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in tensors)
    return maps(q_s, q_s, q_t, q_t) + maps(k_s, k_s, k_t, k_t) + maps(v_s, v_s, v_t, v_t)


def _relations_fastkd(heads: int, q: Tensor, k: Tensor, v: Tensor, *teacher: Tensor) -> Tensor:
    q_t, k_t, v_t = teacher
    return fastkd.qkv_relation_loss((q, k, v), (q_t, k_t, v_t), relation_heads=heads)


def relations(heads: int) -> dict[str, Provider]:
    return {**in_pytorch(partial(_relations, heads)), "fastkd": Provider(partial(_relations_fastkd, heads))}
