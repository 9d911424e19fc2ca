"""Relation losses: signatures, formulas, and who runs a call, this process or the ranks of a group together."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastkd.ops import _checks as check
from fastkd.ops._dispatch import Backend
from fastkd.ops.relation import (
    Algorithm,
    ManifoldCall,
    Rectify,
    RelationCall,
    ReturnTerms,
    Scope,
    check_manifold,
    check_relation,
    run_manifold,
    run_relation,
)

if TYPE_CHECKING:
    from fastkd.distributed import Group

Terms = tuple[Tensor, Tensor, Tensor]  # intra, inter, random


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
    group: "Group" = None,
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
        eps: a row whose norm is at most eps, or 1e-18, relates as 0 and gets gradient 0.
        algorithm: "tile" visits the maps, O(n² D); "gram" needs D x D matrices only, O(n D²), and no rectification;
            "auto" takes the cheaper (pick_algorithm).
        backend: "auto", "eager", "native" or "triton".
        group: relate the images of all ranks of this process group (fastkd.distributed); None, those of this process.
            Then B may differ between ranks, `index` counts the tokens of all ranks in their order, and the first
            rank's is taken.

    Returns:
        Scalar, float32 (float64 if an input is).

    Raises:
        TypeError: not floating-point tensors, or index not int64.
        ValueError: shapes that do not fit or are empty, devices that differ, an unknown option, eps < 0, index
            without scope "batch", algorithm "gram" with rectification, or a teacher that requires a gradient.
        RuntimeError: the named backend cannot run here; a row index out of range; differentiated twice; under vmap
            or torch.func.
    """
    call = RelationCall(student, teacher, scope, index, normalize, rectify, eps, algorithm, backend)
    if group is not None:
        from fastkd.distributed.relation import relation_over_ranks

        return relation_over_ranks(call, group)
    check_relation(call)
    return run_relation(call)


def manifold_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    intra: float = 4.0,
    inter: float = 0.1,
    random: float = 0.2,
    num_samples: int = 192,
    generator: torch.Generator | None = None,
    index: Tensor | None = None,
    return_terms: ReturnTerms = False,
    backend: Backend = "auto",
    group: "Group" = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Fine-grained manifold distillation: Hao et al. 2022 (arXiv:2107.01378), weights of its code.

        L = intra L_intra + inter L_inter + random L_random,  the mean over matched layers

    with L_intra, L_inter the relation_loss of those scopes and L_random that of K rows drawn from all B*N tokens.

    Args:
        student: (B, N, Ds), or a list of one per matched layer, float64 | float32 | bfloat16 | float16, any strides.
            Differentiable.
        teacher: (B, N, Dt), or a list of as many. Constants.
        intra, inter, random: weights >= 0; a term of weight 0 is not computed unless return_terms.
        num_samples: K distinct rows of the random term; all of them where K > B*N. Each layer has rows of its
            own: pieces of one permutation, for layers with as many tokens.
        generator: source of the draw (not under torch.compile); torch's default generator if None.
        index: (K,) int64 rows to take instead: one draw for all layers.
        return_terms: also give the unweighted (intra, inter, random), each differentiable by itself; "detached" gives
            them as values to log, at no cost.
        backend: "auto", "eager", "native" or "triton".
        group: relate the images of all ranks of this process group (fastkd.distributed), whose first rank draws the
            rows for all; None, those of this process.

    Returns:
        Scalar, float32 (float64 if an input is), or (scalar, (intra, inter, random)).

    Raises:
        TypeError, ValueError, RuntimeError: as relation_loss; a weight < 0, num_samples < 1.
    """
    if group is None:
        student, teacher = check.layers("student", student), check.layers("teacher", teacher)
    students, teachers = check.unchecked_layers(student), check.unchecked_layers(teacher)
    indices = None if index is None else [index] * len(students)
    call = ManifoldCall(
        students, teachers, intra, inter, random, num_samples, generator, indices, return_terms, backend
    )
    return manifold_layers(call, group)


def manifold_layers(call: ManifoldCall, group: "Group") -> Tensor | tuple[Tensor, Terms]:
    """Return the mean of manifold_loss over layers, and its terms if the call asks for them."""
    if group is not None:
        from fastkd.distributed.manifold import manifold_over_ranks

        loss, terms = manifold_over_ranks(call, group)
    else:
        check_manifold(call)
        loss, terms = run_manifold(call)
    return (loss, terms) if call.return_terms else loss
