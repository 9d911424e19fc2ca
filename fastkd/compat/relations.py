"""Relation losses of MiniLMv2 and TinyMIM, from the tensors that their codes have before they form maps."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastkd import functional as F
from fastkd.compat._masks import token_mask
from fastkd.ops import _checks as check

Projections = Tensor | Sequence[Tensor]
FORMS = "(B, N, 3D), (3, B, H, N, d), or q, k, v of shape (B, N, D) or (B, H, N, d)"


def _in_heads(name: str, x: Tensor, heads: int | None) -> Tensor:
    """(B, N, D) or (B, H, N, d) -> (B, H, N, d), as views."""
    check.tensor(name, x, (3, 4), FORMS)
    if x.ndim == 4:
        if heads is not None and x.shape[1] != heads:
            raise ValueError(f"{name} must have {heads} heads, got {tuple(x.shape)}")
        return x
    if heads is None:
        raise ValueError(f"{name} of shape {tuple(x.shape)} needs the number of heads")
    check.positive_int("the number of heads", heads)
    if x.shape[2] % heads != 0:
        raise ValueError(f"{name} width {x.shape[2]} must be divisible by {heads} heads")
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _projections(name: str, x: Projections, heads: int | None) -> list[Tensor]:
    """Return q, k, v, each (B, H, N, d)."""
    if isinstance(x, Tensor):
        check.tensor(name, x, (3, 5), FORMS)
        if x.shape[0 if x.ndim == 5 else 2] % 3 != 0 or (x.ndim == 5 and x.shape[0] != 3):
            raise ValueError(f"{name} must be {FORMS}, got {tuple(x.shape)}")
        x = x.unbind(0) if x.ndim == 5 else x.chunk(3, -1)
    if len(x) != 3:
        raise ValueError(f"{name} must hold q, k and v, got {len(x)} tensors")
    return [_in_heads(f"{name} {letter}", part, heads) for letter, part in zip("qkv", x, strict=True)]


def minilmv2_loss(
    student: Projections,
    teacher: Projections,
    relations: Mapping[tuple[int, int], float],
    A_r: int | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """MiniLMv2's loss (arXiv:2012.15828) as minilmv2.bb computes it (minilmv2/minilmv2.py), without its maps.

        L = Σ_(m,n) w_mn 1/B Σ_b 1/(A_r n_b) Σ_heads,queries KL( softmax(t_m t_nᵀ d'^-1/2) ‖ softmax(s_m s_nᵀ d^-1/2) )

    over the n_b tokens of image or text b. It is the loop over `relations` of that code's forward, in one call. Padding
    is taken from the mask's places, where the original takes the first n_b tokens: equal for padding on the right, and
    for padding elsewhere the original compares the wrong tokens. A text without tokens adds 0; the original fails.

    Args:
        student: q, k, v of the student's layer. Differentiable. Either three tensors (B, N, D), the outputs of its
            linear layers; or (B, N, 3D), the output of a fused one; or three tensors (B, A_r, N, d), that code's
            relation vectors; or these stacked, (3, B, A_r, N, d).
        teacher: as student; its width may differ. Constants.
        relations: weights >= 0 by pair, 1 = q, 2 = k, 3 = v: {(1, 1): 1/3, (2, 2): 1/3, (3, 3): 1/3}.
        A_r: number of relation heads, a divisor of both widths. Not needed for (B, A_r, N, d).
        attention_mask: (B, N) or (B, 1, 1, N). int64 or bool: nonzero = token. Float: additive (0 = token, at most
            -1000 = padding), or 0 and 1.

    Returns:
        Scalar, float32 (float64 if an input is).

    Raises:
        TypeError: not floating-point tensors, a mask that is no tensor.
        ValueError: shapes of another form, no relation or one outside 1 to 3, a width that A_r does not divide.
        TypeError, ValueError, RuntimeError: as fastkd.attention_loss; a float mask of neither form.
    """
    s, t = _projections("student", student, A_r), _projections("teacher", teacher, A_r)
    mask = token_mask("attention_mask", attention_mask, (s[0].shape[0], s[0].shape[2]))
    if not relations or any(len(pair) != 2 or not {*pair} <= {1, 2, 3} for pair in relations):
        raise ValueError(f"relations must map pairs of 1 (q), 2 (k) and 3 (v) to weights, got {dict(relations)}")
    terms = []
    for (m, n), weight in relations.items():
        check.number(f"relations[{m}, {n}]", weight, low=0)
        pair = (s[m - 1], s[n - 1], t[m - 1], t[n - 1])
        terms.append(weight * F.attention_loss(*pair, key_mask=mask, query_mask=mask))
    return torch.stack(terms).sum()


def tinymim_loss(
    student: Projections, teacher: Projections, num_heads: int | None = None, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """TinyMIM's relation losses (arXiv:2301.01296) of one layer, as its code computes them (models_tinymim.py).

        mean over images, heads and queries of KL( softmax(a_t b_tᵀ d'^-1/2) ‖ softmax(a_s b_sᵀ d^-1/2) )

    for (a, b) = (q, k) and (v, v). CIKD adds both over two layers. The original takes the logarithm of the student's
    softmax, which is -inf where it underflows; here it is exact.

    Args:
        student: the student's layer. Differentiable. (B, N, 3D), the output of `qkv`; or (3, B, H, N, d), what
            `forward` makes of it; or q, k, v, each (B, N, D) or (B, H, N, d).
        teacher: as student, with as many heads; its width may differ. Constants.
        num_heads: H. Not needed for tensors with heads.
        attention_mask: as in minilmv2_loss (the original has none); padded queries are left out of the mean.

    Returns:
        (qk, vv), as the original's forward; scalars, float32 (float64 if an input is).

    Raises:
        TypeError, ValueError, RuntimeError: as minilmv2_loss.
    """
    q_s, k_s, v_s = _projections("student", student, num_heads)
    q_t, k_t, v_t = _projections("teacher", teacher, num_heads)
    mask = token_mask("attention_mask", attention_mask, (q_s.shape[0], q_s.shape[2]))
    qk = F.attention_loss(q_s, k_s, q_t, k_t, key_mask=mask, query_mask=mask)
    vv = F.attention_loss(v_s, v_s, v_t, v_t, key_mask=mask, query_mask=mask)
    return qk, vv
