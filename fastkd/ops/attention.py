"""Attention-map losses from queries and keys, without the maps."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from fastkd._precision import accumulator, has_fast_float64, matrix_gain
from fastkd.ops import _checks as check
from fastkd.ops._autograd import distinct, refuse_double_backward, refuse_transforms, savable, scaled, wants_grad
from fastkd.ops._dispatch import Backend, call, resolve

Divergence = Literal["kl", "reverse_kl", "js", "ce", "mse", "score_mse"]
Heads = Literal["match", "mean"]
Reduction = Literal["mean", "sum", "none"]
DIVERGENCES, HEADS, REDUCTIONS = get_args(Divergence), get_args(Heads), get_args(Reduction)
Wanted = tuple[bool, bool, bool]  # which of dq, dk, dbias a call forms


class Maps(NamedTuple):
    """Options of the maps of one call, in the order of the operator's schema."""

    divergence: Divergence
    heads: Heads
    scales: tuple[float, float, float]  # of student, teacher and bias, with the temperature folded in
    is_causal: bool
    rows: tuple[int, int]  # query row i stands at position start + i step


class _Attention(torch.autograd.Function):
    """A scalar: forward forms the student's gradients while the strips are at hand; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, impl: Backend, reduction: Reduction, algorithm: str, maps: Maps, wanted: Wanted, *inputs: Tensor
    ) -> Tensor:
        loss, dq, dk, dbias = call(impl, "attention_fwd", *inputs, reduction, algorithm, *maps, wanted)
        ctx.save_for_backward(dq, dk, dbias)
        ctx.wanted, (q, k, _, _, bias, *_) = wanted, inputs
        ctx.dtypes = [None if x is None else x.dtype for x in (q, k, bias)]
        return cast(Tensor, loss)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("attention_loss")
        dq, dk, dbias = (
            scaled(x, dloss, dtype) if want else None
            for x, dtype, want in zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
        )
        return None, None, None, None, None, dq, dk, None, None, dbias, None, None, None


class _AttentionRows(torch.autograd.Function):
    """One loss per row, whose gradients come with weights of their own: backward forms the strips again."""

    @staticmethod
    def forward(ctx: Any, impl: Backend, maps: Maps, *inputs: Tensor | None) -> Tensor:
        loss, *_ = call(impl, "attention_fwd", *inputs, "none", "tile", *maps, (False, False, False))
        ctx.save_for_backward(*(None if x is None else savable(x) for x in inputs))
        ctx.impl, ctx.maps = impl, maps
        return cast(Tensor, loss)

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("attention_loss")
        *inputs, row_weight = ctx.saved_tensors
        if row_weight is not None:
            drows = torch.where(row_weight == 0, 0, drows)
        _, _, with_dq, with_dk, _, _, with_dbias, *_ = ctx.needs_input_grad
        wanted = with_dq, with_dk, with_dbias
        _, dq, dk, dbias = call(ctx.impl, "attention_fwd", *inputs, drows, "none", "tile", *ctx.maps, wanted)
        dq, dk, dbias = (x if want else None for x, want in zip((dq, dk, dbias), wanted, strict=True))
        # Stored gradients of float16 are float32: autograd casts them to the dtypes of the inputs.
        return None, None, dq, dk, None, None, dbias, None, None, None


def pick_algorithm(N_q: int, N_k: int, d_s: int, d_t: int, device: torch.device, gain: int = 1) -> str:
    """Choose the cheaper of strips and Grams for score_mse, in float32 multiply-adds per head; float64 counts twice.

    tile: N_q N_k (3 d_s + d_t) / gain, matrix_gain's.  gram: 2 (N_q + N_k) (2 d_s² + 2 d_s d_t + d_t²), without bias
    and causality, to a scalar, and never on a GPU whose float64 is crippled.
    """
    gram = 2 * (N_q + N_k) * (2 * d_s * d_s + 2 * d_s * d_t + d_t * d_t)
    return "gram" if has_fast_float64(device) and gain * gram < N_q * N_k * (3 * d_s + d_t) else "tile"


def _check_options(
    divergence: str,
    heads: str,
    reduction: str,
    scale_student: float | None,
    scale_teacher: float | None,
    temperature: float,
) -> None:
    check.one_of("divergence", divergence, DIVERGENCES)
    check.one_of("heads", heads, HEADS)
    check.one_of("reduction", reduction, REDUCTIONS)
    if heads == "mean" and divergence == "score_mse":
        raise ValueError("heads='mean' averages probabilities, which divergence='score_mse' has none of; use 'mse'")
    for name, scale in (("scale_student", scale_student), ("scale_teacher", scale_teacher)):
        if scale is not None:
            check.number(name, scale)
    check.temperature(temperature)


def _check_shapes(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, heads: str) -> None:
    for name, x in (("q_student", q_s), ("k_student", k_s), ("q_teacher", q_t), ("k_teacher", k_t)):
        check.tensor(name, x, 4, "(B, H, N, d)")
        check.not_empty(name, x)
    for who, q, k in (("student", q_s, k_s), ("teacher", q_t, k_t)):
        if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
            raise ValueError(
                f"q_{who} (B, H, N_q, d) and k_{who} (B, H, N_k, d) must agree in images, heads and width, "
                f"got {tuple(q.shape)} and {tuple(k.shape)}"
            )
    if (q_s.shape[0], q_s.shape[2], k_s.shape[2]) != (q_t.shape[0], q_t.shape[2], k_t.shape[2]):
        raise ValueError(
            "q_student, k_student and q_teacher, k_teacher must agree in images, queries and keys (B, N_q, N_k), got "
            f"{(q_s.shape[0], q_s.shape[2], k_s.shape[2])} and {(q_t.shape[0], q_t.shape[2], k_t.shape[2])}: "
            "give both class tokens or neither"
        )
    if heads == "match" and q_s.shape[1] != q_t.shape[1]:
        raise ValueError(
            f"heads='match' needs as many heads in both networks, got {q_s.shape[1]} and {q_t.shape[1]}: compare "
            "averages with heads='mean', or relation heads with qkv_relation_loss"
        )


def _check_mask(name: str, mask: Tensor | None, shape: tuple[int, int], letters: str) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(
            f"{name} must be a bool tensor (True counts), got {getattr(mask, 'dtype', type(mask).__name__)}"
        )
    check.dense(name, mask)
    if mask.shape != shape:
        raise ValueError(f"{name} must have shape {letters} = {shape}, got {tuple(mask.shape)}")


def _bias_4d(name: str, bias: Tensor | None, q: Tensor, N_k: int) -> Tensor | None:
    """Return the bias with leading dimensions of 1."""
    if bias is None:
        return None
    check.tensor(name, bias, range(5), "broadcastable to (B, H, N_q, N_k)")
    whole = (*q.shape[:3], N_k)
    bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    if any(n != 1 and n != m for n, m in zip(bias.shape, whole, strict=True)):
        raise ValueError(f"{name} must broadcast to (B, H, N_q, N_k) = {whole}, got {tuple(bias.shape)}")
    return bias


def _rows(query_slice: slice | None, N_q: int) -> slice:
    """Return the slice with start, stop and step within the N_q rows."""
    if query_slice is None:
        return slice(0, N_q, 1)
    if not isinstance(query_slice, slice):
        raise TypeError(f"query_slice must be a slice, got {type(query_slice).__name__}")
    step = 1 if query_slice.step is None else query_slice.step
    if step < 1:
        raise ValueError(f"query_slice must step forward, got {query_slice}")

    def within(position: int | None, default: int) -> int:  # slice.indices, which torch.compile does not trace
        if position is None:
            return default
        return min(max(position + N_q if position < 0 else position, 0), N_q)

    start, stop = within(query_slice.start, 0), within(query_slice.stop, N_q)
    if start >= stop:
        raise ValueError(f"query_slice must select at least one of the {N_q} queries, got {query_slice}")
    return slice(start, stop, step)


def attention_loss(
    q_student: Tensor,
    k_student: Tensor,
    q_teacher: Tensor,
    k_teacher: Tensor,
    *,
    divergence: Divergence = "kl",
    scale_student: float | None = None,
    scale_teacher: float | None = None,
    temperature: float = 1.0,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    bias_student: Tensor | None = None,
    bias_teacher: Tensor | None = None,
    heads: Heads = "match",
    query_slice: slice | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """Divergence of two networks' attention maps, from queries and keys: MiniLM (Wang et al. 2020, arXiv:2002.10957),
    TinyMIM (Ren et al. 2023, arXiv:2301.01296), and the score loss of TinyBERT (Jiao et al. 2020, arXiv:1909.10351).

        z = (q kᵀ scale + bias) / T,  p = softmax(z),  a row's loss L_i being

        "kl"          Σ_j p_t (log p_t - log p_s)             "ce"         -Σ_j p_t log p_s
        "reverse_kl"  Σ_j p_s (log p_s - log p_t)             "mse"        1/N_k Σ_j (p_s - p_t)²
        "js"          ½ KL(p_s ‖ m) + ½ KL(p_t ‖ m), m = (p_s + p_t)/2
                                                              "score_mse"  1/N_k Σ_j (z_s - z_t)²

    A key hidden by key_mask, by causality or by a bias of -inf in both networks adds 0 (and counts in N_k); one that
    only p_s excludes makes "kl" and "ce" +inf, with the finite gradient p_s - p_t; one that only p_t excludes does so
    to "reverse_kl", and either to "score_mse", whose gradients are then not finite. A row in which the teacher has no
    key to attend to adds 0; such a row of either network has gradient 0.

    Args:
        q_student: (B, H, N_q, d), float64 | float32 | bfloat16 | float16, any strides. Differentiable.
        k_student: (B, H, N_k, d). Differentiable.
        q_teacher, k_teacher: (B, H', N_q, d'), (B, H', N_k, d'); dtype and width may differ. Constants.
        divergence: see above. "kl" is KL(teacher ‖ student).
        scale_student, scale_teacher: factor of q kᵀ; None is d^-1/2 of each network.
        temperature: T > 0.
        is_causal: query i sees keys j <= i; needs N_q = N_k.
        key_mask: (B, N_k) bool, True = attend.
        query_mask: (B, N_q) bool; rows that are False add 0, and the mean is taken over an image's True rows, then over
            images (one without True rows adds 0).
        bias_student, bias_teacher: added to the scores, float, broadcastable to (B, H, N_q, N_k). The student's is
            differentiable, its gradient summed over the dimensions it broadcasts; the teacher's is a constant.
        heads: "match" compares head by head (H = H'); "mean" the head-averaged p (not for "score_mse").
        query_slice: rows to compare, e.g. slice(0, 1) for the class token's; query_mask and bias are given whole.
        reduction: "mean" over B, H and rows, "sum", or "none".
        backend: "auto", "eager", "native" or "triton".

    Returns:
        Scalar, float32 (float64 if an input is); (B, H, rows) for reduction "none", (B, 1, rows) with heads "mean".

    Raises:
        TypeError: not floating-point tensors, a mask that is not bool, query_slice not a slice, numbers that are not.
        ValueError: shapes that do not fit or are empty, devices that differ, an unknown option, an infinite scale, a
            temperature that is not finite and > 0, unequal head counts with heads "match", heads "mean" with
            "score_mse", is_causal with N_q != N_k, a slice of no rows or backwards, a teacher's q, k or bias that
            requires a gradient.
        RuntimeError: the named backend cannot run here; differentiated twice; under vmap or torch.func.
    """
    _check_options(divergence, heads, reduction, scale_student, scale_teacher, temperature)
    _check_shapes(q_student, k_student, q_teacher, k_teacher, heads)
    B, _, N_q, d_s = q_student.shape
    N_k, d_t = k_student.shape[2], q_teacher.shape[3]
    check.flag("is_causal", is_causal)
    if is_causal and N_q != N_k:
        raise ValueError(f"is_causal needs as many queries as keys, got {N_q} and {N_k}")
    _check_mask("key_mask", key_mask, (B, N_k), "(B, N_k)")
    _check_mask("query_mask", query_mask, (B, N_q), "(B, N_q)")
    bias_s = _bias_4d("bias_student", bias_student, q_student, N_k)
    bias_t = _bias_4d("bias_teacher", bias_teacher, q_teacher, N_k)
    check.same_device(
        q_student=q_student,
        k_student=k_student,
        q_teacher=q_teacher,
        k_teacher=k_teacher,
        key_mask=key_mask,
        query_mask=query_mask,
        bias_student=bias_s,
        bias_teacher=bias_t,
    )
    for name, x in (("q_teacher", q_teacher), ("k_teacher", k_teacher), ("bias_teacher", bias_teacher)):
        if x is not None:
            check.constant(name, x)
    rows = _rows(query_slice, N_q)
    refuse_transforms("attention_loss")

    if query_slice is not None:
        q_student, q_teacher = q_student[:, :, rows], q_teacher[:, :, rows]
        query_mask = None if query_mask is None else query_mask[:, rows]
        bias_s, bias_t = (x if x is None or x.shape[2] == 1 else x[:, :, rows] for x in (bias_s, bias_t))
    row_weight = None
    if query_mask is not None:
        operands = (q_student, k_student, q_teacher, k_teacher, bias_s, bias_t)
        row_weight = query_mask.to(accumulator(*(x for x in operands if x is not None)))
        if reduction == "mean":
            row_weight = row_weight / row_weight.sum(1, keepdim=True).clamp_min(1)
        row_weight = row_weight[:, None]
    scale_student = d_s**-0.5 if scale_student is None else scale_student
    scale_teacher = d_t**-0.5 if scale_teacher is None else scale_teacher
    maps = Maps(
        divergence=divergence,
        heads=heads,
        scales=(scale_student / temperature, scale_teacher / temperature, 1 / temperature),
        is_causal=bool(is_causal),
        rows=(rows.start, rows.step),
    )
    impl = resolve(backend, "attention_fwd", q_student, k_student, q_teacher, k_teacher, bias_s, bias_t)
    algorithm = "tile"
    if divergence == "score_mse" and reduction != "none" and bias_s is None and bias_t is None and not is_causal:
        gain = matrix_gain(q_student.device, q_student, k_student, q_teacher, k_teacher)
        algorithm = pick_algorithm(q_student.shape[2], N_k, d_s, d_t, q_student.device, gain)
        impl = "eager" if (impl, algorithm) == ("triton", "gram") else impl  # PyTorch operations, whoever is asked
    is_shared = k_student is q_student and algorithm == "tile"
    inputs = distinct(
        q_student, None if is_shared else k_student, q_teacher, k_teacher, bias_s, bias_t, key_mask, row_weight
    )
    if reduction == "none":
        return _AttentionRows.apply(impl, maps, *inputs)
    with_dbias = bias_s is not None and wants_grad(bias_s)
    wanted = wants_grad(q_student), not is_shared and wants_grad(k_student), with_dbias
    return _Attention.apply(impl, reduction, algorithm, maps, wanted, *inputs)


def _check_relations(relations: Sequence[str], weights: Sequence[float] | None) -> Sequence[float]:
    if isinstance(relations, str) or (isinstance(relations, list | tuple) and len(relations) == 0):
        raise ValueError(f"relations must list pairs such as 'qk', at least one, got {relations!r}")
    check.sequence("relations", relations, "pairs such as 'qk'")
    for i, pair in enumerate(relations):
        check.one_of(f"relations[{i}]", pair, [a + b for a in "qkv" for b in "qkv"])
    weights = [1.0] * len(relations) if weights is None else weights
    check.sequence("weights", weights, "numbers, one per relation")
    if len(weights) != len(relations):
        raise ValueError(f"weights must have one number per relation, got {len(weights)} for {len(relations)}")
    for i, w in enumerate(weights):
        check.number(f"weights[{i}]", w, low=0)
    return weights


def _split(name: str, triple: tuple[Tensor, Tensor, Tensor], heads: int) -> dict[str, Tensor]:
    """q, k, v (B, N, D) -> (B, heads, N, D/heads), views."""
    check.sequence(name, triple, "three tensors (q, k, v)")
    if len(triple) != 3:
        raise ValueError(f"{name} must be a triple (q, k, v), got {len(triple)} tensors")
    out = {}
    for letter, x in zip("qkv", triple, strict=True):
        check.tensor(f"{name} {letter}", x, 3, "(B, N, D)")
        check.not_empty(f"{name} {letter}", x)
        if x.shape != triple[0].shape:
            raise ValueError(f"{name} q, k, v must share one shape, got {tuple(triple[0].shape)} and {tuple(x.shape)}")
        if x.shape[2] % heads != 0:
            raise ValueError(f"{name} width {x.shape[2]} must be divisible by relation_heads = {heads}")
        out[letter] = x.unflatten(2, (heads, -1)).transpose(1, 2)
    return out


def qkv_relation_loss(
    student: tuple[Tensor, Tensor, Tensor],
    teacher: tuple[Tensor, Tensor, Tensor],
    *,
    relations: Sequence[str] = ("qq", "kk", "vv"),
    relation_heads: int,
    weights: Sequence[float] | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Self-attention relations: MiniLMv2 (Wang et al. 2021, arXiv:2012.15828; "qq", "kk", "vv"), TinyMIM and CIKD
    ("qk", "vv"), MiniViT (Zhang et al. 2022, arXiv:2204.07154; all nine pairs, there with cross-entropy).

        L = Σ_r w_r mean KL( softmax(a_t b_tᵀ (D_t/A)^-1/2) ‖ softmax(a_s b_sᵀ (D_s/A)^-1/2) ),  (a, b) = r

    over A relation heads and rows; heads are cut anew from the whole width, so head counts and widths may differ.

    Args:
        student: (q, k, v), each (B, N, D), float64 | float32 | bfloat16 | float16, any strides. Differentiable.
        teacher: (q, k, v), each (B, N, D'). Constants.
        relations: pairs over "q", "k", "v", the same in both networks.
        relation_heads: A, a divisor of D and D'.
        weights: per relation a number >= 0; None is 1 each.
        key_mask, query_mask: (B, N) bool, as in attention_loss (MiniLMv2's padding: the same mask for both).
        backend: "auto", "eager", "native" or "triton".

    Returns:
        Scalar, float32 (float64 if an input is).

    Raises:
        TypeError, ValueError, RuntimeError: as attention_loss; not three tensors of one shape, no or an unknown
            relation, weights of another length or < 0, relation_heads < 1 or no divisor of a width.
    """
    check.positive_int("relation_heads", relation_heads)
    weights = _check_relations(relations, weights)
    s, t = _split("student", student, relation_heads), _split("teacher", teacher, relation_heads)
    options: dict[str, Any] = {"key_mask": key_mask, "query_mask": query_mask, "backend": backend}
    terms = [
        w * attention_loss(s[r[0]], s[r[1]], t[r[0]], t[r[1]], **options)
        for r, w in zip(relations, weights, strict=True)
    ]
    return torch.stack(terms).sum()
