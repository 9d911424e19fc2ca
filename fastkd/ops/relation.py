"""Relation losses: mean squared differences of Gram maps, without the maps."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastkd._precision import accumulator, has_fast_float64, matrix_gain
from fastkd.ops import _checks as check
from fastkd.ops._autograd import refuse_double_backward, refuse_transforms, scaled, wants_grad
from fastkd.ops._dispatch import Backend, call, resolve

Scope = Literal["intra", "inter", "batch"]
Rectify = Literal["none", "both", "teacher"]
Algorithm = Literal["tile", "gram", "auto"]
ReturnTerms = bool | Literal["detached"]


class Maps(NamedTuple):
    """Options of the maps of one call, in the order of the operator's schema."""

    scope: Scope
    normalize: bool
    rectify: Rectify
    eps: float
    algorithm: Algorithm


class _Relation(torch.autograd.Function):
    """Forward forms the student's gradient while the maps' tiles are at hand; backward scales it."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, impl: Backend, maps: Maps, with_grad: bool) -> Tensor:
        loss, dstudent = call(impl, "relation_fwd", student, teacher, *maps, with_grad)
        ctx.save_for_backward(dstudent)
        ctx.dtype = student.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("relation_loss")
        (dstudent,) = ctx.saved_tensors
        return scaled(dstudent, dloss, ctx.dtype), None, None, None, None


class _Manifold(torch.autograd.Function):
    """The weighted sum of the three terms of matched layers, and the terms as values.

    The gradient of the sum is formed in forward; backward scales it.
    """

    @staticmethod
    def forward(
        ctx: Any, impl: Backend, weights: tuple[float, ...], n_layers: int, with_grad: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        students, teachers, indices = _thirds(tensors, n_layers)
        per_layer = [w / n_layers for w in weights]
        terms, dstudents = call(impl, "manifold_fwd", students, teachers, indices, *per_layer, with_grad)
        ctx.save_for_backward(*dstudents)
        ctx.dtypes = [s.dtype for s in students]
        means = [mean.clone() for mean in terms.mean(0).unbind()]
        ctx.mark_non_differentiable(*means)
        ctx.set_materialize_grads(False)
        return (sum(w * mean for w, mean in zip(weights, means, strict=True)), *means)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("manifold_loss")
        gradients = [scaled(d, dloss, dtype) for d, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return None, None, None, None, *gradients, *(None,) * (2 * len(gradients))


def _thirds(tensors: Sequence[Tensor], n: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return list(tensors[:n]), list(tensors[n : 2 * n]), list(tensors[2 * n :])


def pick_algorithm(n: int, Ds: int, Dt: int, rectify: str, device: torch.device, gain: int = 1) -> Algorithm:
    """Choose the cheaper of tile and gram, in float32 multiply-adds per row; float64 counts twice.

    tile: n (2 Ds + Dt) / gain, matrix_gain's.  gram: 2 (Ds² + Ds Dt + Dt²) + Ds (Ds + Dt), never with rectification,
    and never on a GPU whose float64 is crippled (all but compute capability 8.0, 9.0 and 10.0).
    """
    if rectify != "none" or not has_fast_float64(device):
        return "tile"
    gram = 2 * (Ds * Ds + Ds * Dt + Dt * Dt) + Ds * (Ds + Dt)
    return "gram" if gain * gram < n * (2 * Ds + Dt) else "tile"


def _take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Return rows `index` of the flattened batch as one group (1, K, D)."""
    N = x.shape[1]
    return x[index // N, index % N].unsqueeze(0)


def check_relation(
    student: Tensor,
    teacher: Tensor,
    scope: str,
    index: Tensor | None,
    rectify: str,
    eps: float,
    algorithm: str,
) -> None:
    """Check the arguments of relation_loss."""
    check.tensor("student", student, 3, "(B, N, Ds)")
    check.tensor("teacher", teacher, 3, "(B, N, Dt)")
    check.not_empty("student", student)
    check.not_empty("teacher", teacher)
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            "student and teacher must agree in images and tokens (B, N), "
            f"got {tuple(student.shape[:2])} and {tuple(teacher.shape[:2])}: drop class tokens, or resize a grid by "
            "fastkd.functional.resize_tokens"
        )
    check.same_device(student=student, teacher=teacher)
    check.one_of("scope", scope, ("intra", "inter", "batch"))
    check.one_of("rectify", rectify, ("none", "both", "teacher"))
    check.one_of("algorithm", algorithm, ("tile", "gram", "auto"))
    check.number("eps", eps, low=0)
    check.constant("teacher", teacher)
    if algorithm == "gram" and rectify != "none":
        raise ValueError(f"algorithm='gram' never forms the similarities that rectify={rectify!r} clamps; use 'tile'")
    if index is not None:
        if scope != "batch":
            raise ValueError(f"index needs scope='batch', got {scope!r}")
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            raise TypeError(f"index must be an int64 tensor, got {getattr(index, 'dtype', type(index).__name__)}")
        if index.ndim != 1 or index.numel() == 0:
            raise ValueError(f"index must have shape (K,) with K >= 1, got {tuple(index.shape)}")


def _checked_index(index: Tensor, student: Tensor) -> Tensor:
    """Return index on the student's device; its range is asserted there without waiting."""
    index = index.to(student.device, non_blocking=True)
    total = student.shape[0] * student.shape[1]
    check.rows("index", index, total)
    return index


def draw_rows(student: Tensor, num_samples: int, generator: torch.Generator | None) -> Tensor:
    """Draw num_samples distinct rows of the B*N tokens, or all of them if there are fewer."""
    total = student.shape[0] * student.shape[1]
    if generator is None:  # with one, the compiler would bind a graph to one total
        return torch.randperm(total, device=student.device)[:num_samples]
    return torch.randperm(total, generator=generator, device=generator.device)[:num_samples]


def relation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    scope: Scope = "intra",
    index: Tensor | None = None,
    normalize: bool = True,
    rectify: Rectify = "none",
    eps: float = 1e-12,
    algorithm: Algorithm = "auto",
    backend: Backend = "auto",
) -> Tensor:
    """Mean squared difference of relation maps: Hao et al. 2022 (arXiv:2107.01378, L_intra and L_inter; the code's
    element mean) and the Gram loss of DINOv3 (arXiv:2508.10104, L_Gram).

        L = 1/(G n²) Σ_g || f(S_g S_gᵀ) - f(T_g T_gᵀ) ||²,  rows of S_g and T_g of unit length

    Args:
        student: (B, N, Ds), float64 | float32 | bfloat16 | float16, any strides. Differentiable.
        teacher: (B, N, Dt), its dtype and width may differ. A constant.
        scope: what is related: "intra", the N tokens of an image (B maps N x N); "inter", a token across images
            (N maps B x B); "batch", all tokens of the batch (one map B*N x B*N, exact).
        index: (K,) int64 rows of the flattened (B*N, D) tokens, for scope "batch": the K x K map of those rows.
            Repeated rows are allowed. On the device of student, or moved there.
        normalize: relate unit vectors (cosines) rather than raw ones.
        rectify: clamp negative similarities to 0 in no map, "both" or the "teacher"'s alone.
        eps: a row whose norm is at most eps relates as 0 and gets gradient 0.
        algorithm: "tile" visits the maps, O(n² D); "gram" needs D x D matrices only, O(n D²), and no rectification;
            "auto" takes the cheaper (pick_algorithm).
        backend: "auto", "eager", "native" or "triton".

    Returns:
        Scalar, float32 (float64 if an input is).

    Raises:
        TypeError: not floating-point tensors, or index not int64.
        ValueError: shapes that do not fit or are empty, devices that differ, an unknown option, eps < 0, index
            without scope "batch", algorithm "gram" with rectification, or a teacher that requires a gradient.
        RuntimeError: the named backend cannot run here; a row index out of range; differentiated twice; under vmap
            or torch.func.
    """
    check_relation(student, teacher, scope, index, rectify, eps, algorithm)
    refuse_transforms("relation_loss")

    if index is not None:
        index = _checked_index(index, student)
        student, teacher, scope = _take_rows(student, index), _take_rows(teacher, index), "intra"
    B, N, Ds = student.shape
    if algorithm == "auto":
        n = {"intra": N, "inter": B, "batch": B * N}[scope]
        gain = matrix_gain(student.device, student, teacher)
        algorithm = pick_algorithm(n, Ds, teacher.shape[-1], rectify, student.device, gain)
    impl = resolve(backend, "relation_fwd", student, teacher)
    maps = Maps(scope=scope, normalize=normalize, rectify=rectify, eps=float(eps), algorithm=algorithm)
    return _Relation.apply(student, teacher, impl, maps, wants_grad(student))


def manifold_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    intra: float = 4.0,
    inter: float = 0.1,
    random: float = 0.2,
    num_samples: int = 192,
    generator: torch.Generator | None = None,
    index: Tensor | None = None,
    return_terms: ReturnTerms = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Fine-grained manifold distillation of one layer: Hao et al. 2022 (arXiv:2107.01378), weights of its code.

        L = intra L_intra + inter L_inter + random L_random

    with L_intra, L_inter the relation_loss of those scopes and L_random that of K rows drawn from all B*N tokens.

    Args:
        student: (B, N, Ds), float64 | float32 | bfloat16 | float16, any strides. Differentiable.
        teacher: (B, N, Dt). A constant.
        intra, inter, random: weights >= 0; a term of weight 0 is not computed unless return_terms.
        num_samples: K distinct rows of the random term; all of them where K > B*N.
        generator: source of the draw (not under torch.compile); torch's default generator if None.
        index: (K,) int64 rows to take instead of drawing them.
        return_terms: also give the unweighted (intra, inter, random), each differentiable by itself; "detached" gives
            them as values to log, at no cost.
        backend: "auto", "eager", "native" or "triton".

    Returns:
        Scalar, float32 (float64 if an input is), or (scalar, (intra, inter, random)).

    Raises:
        TypeError, ValueError, RuntimeError: as relation_loss; a weight < 0, num_samples < 1.
    """
    loss, terms = manifold_layers(
        [student],
        [teacher],
        intra=intra,
        inter=inter,
        random=random,
        num_samples=num_samples,
        generator=generator,
        indices=None if index is None else [index],
        return_terms=return_terms,
        backend=backend,
    )
    return (loss, terms) if return_terms else loss


def check_manifold(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    indices: Sequence[Tensor] | None,
    weights: dict[str, float],
    num_samples: int,
    return_terms: ReturnTerms,
) -> None:
    """Check the arguments of manifold_loss for one or several layers."""
    for name, weight in weights.items():
        check.number(name, weight, low=0)
    check.positive_int("num_samples", num_samples)
    if return_terms != "detached" and not isinstance(return_terms, bool):
        raise ValueError(f"return_terms must be True, False or 'detached', got {return_terms!r}")
    if len(students) != len(teachers) or len(students) == 0:
        raise ValueError(
            f"students and teachers must match layer by layer, got {len(students)} and {len(teachers)} layers"
        )
    if indices is not None and len(indices) != len(students):
        raise ValueError(f"indices must have one tensor per layer, got {len(indices)} for {len(students)} layers")
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        check_relation(s, t, "batch", None if indices is None else indices[i], "none", 0.0, "auto")


def manifold_layers(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    intra: float,
    inter: float,
    random: float,
    num_samples: int,
    generator: torch.Generator | None,
    indices: Sequence[Tensor] | None,
    return_terms: ReturnTerms,
    backend: Backend,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Mean of manifold_loss over matched layers, in one operator call where no term is cheaper by Grams.

    Return (loss, terms); the terms are meant to be read only if return_terms asks for them. Those to be differentiated
    have a gradient each, formed in forward: whichever of them a caller uses, nothing is computed twice.
    """
    weights = {"intra": intra, "inter": inter, "random": random}
    check_manifold(students, teachers, indices, weights, num_samples, return_terms)
    refuse_transforms("manifold_loss")
    if indices is None:
        indices = [draw_rows(s, num_samples, generator) for s in students]

    # Terms to be differentiated by themselves, Grams, and a sum that lacks a term each need calls of their own.
    separate = return_terms is True or (not return_terms and 0 in weights.values())
    for s, t in zip(students, teachers, strict=True):
        B, N, Ds = s.shape
        separate |= (s.dtype, s.device) != (students[0].dtype, students[0].device)
        gain = matrix_gain(s.device, s, t)
        separate |= any(pick_algorithm(n, Ds, t.shape[-1], "none", s.device, gain) == "gram" for n in (N, B))
    if not separate:
        indices = [_checked_index(index, s) for index, s in zip(indices, students, strict=True)]
        impl = resolve(backend, "manifold_fwd", *students, *teachers)
        loss, *terms = _Manifold.apply(
            impl, (intra, inter, random), len(students), wants_grad(*students), *students, *teachers, *indices
        )
        return loss, tuple(terms)

    def term(name: str, **options: Any) -> Tensor:
        if weights[name] == 0 and not return_terms:
            return students[0].new_zeros((), dtype=accumulator(*students, *teachers))
        losses = [
            relation_loss(s, t, backend=backend, **{k: v[i] if k == "index" else v for k, v in options.items()})
            for i, (s, t) in enumerate(zip(students, teachers, strict=True))
        ]
        return torch.stack(losses).mean()

    terms = (term("intra", scope="intra"), term("inter", scope="inter"), term("random", scope="batch", index=indices))
    loss = intra * terms[0] + inter * terms[1] + random * terms[2]
    if return_terms == "detached":
        terms = (terms[0].detach(), terms[1].detach(), terms[2].detach())
    return loss, terms
