"""Relation losses: mean squared differences of Gram maps, without the maps."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastkd._precision import accumulator, has_fast_float64, matrix_gain
from fastkd.ops import _checks as check
from fastkd.ops._autograd import (
    distinct,
    refuse_double_backward,
    refuse_transforms,
    scaled,
    takes_operators,
    wants_grad,
)
from fastkd.ops._dispatch import Backend, call, resolve

EPS_FLOOR = 1e-18  # of a row's norm: below, products of two inverse norms are beyond float32

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


class RelationCall(NamedTuple):
    """One call of relation_loss: its arguments, checked by check_relation, and read by everything after."""

    student: Tensor  # (B, N, Ds)
    teacher: Tensor  # (B, N, Dt)
    scope: Scope = "intra"
    rows: Tensor | None = None  # (K,), the index of relation_loss
    normalize: bool = True
    rectify: Rectify = "none"
    eps: float = 1e-12
    algorithm: Algorithm = "auto"
    backend: Backend = "auto"

    def maps(self, algorithm: Algorithm) -> Maps:
        """Return the operator's options, with the algorithm that was chosen."""
        return Maps(self.scope, self.normalize, self.rectify, max(float(self.eps), EPS_FLOOR), algorithm)


class ManifoldCall(NamedTuple):
    """One call of manifold_loss for matched layers: its arguments, checked by check_manifold."""

    students: Sequence[Tensor]  # per layer (B, N, Ds)
    teachers: Sequence[Tensor]  # per layer (B, N, Dt)
    intra: float
    inter: float
    random: float
    num_samples: int
    generator: torch.Generator | None = None
    indices: Sequence[Tensor] | None = None  # per layer (K,)
    return_terms: ReturnTerms = False
    backend: Backend = "auto"


def term_weights(call: ManifoldCall) -> dict[str, float]:
    """Return the weights of the terms by name. Dynamo of torch 2.10 knows no properties of named tuples."""
    return {"intra": call.intra, "inter": call.inter, "random": call.random}


def layer_calls(call: ManifoldCall) -> list[RelationCall]:
    """Return the layers, each as a call of relation_loss with the options of the manifold loss."""
    return [RelationCall(s, t, backend=call.backend) for s, t in zip(call.students, call.teachers, strict=True)]


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
        students, teachers, indices = (list(tensors[i * n_layers : (i + 1) * n_layers]) for i in range(3))
        loss, means, dstudents = call(impl, "manifold_fwd", students, teachers, indices, *weights, with_grad)
        ctx.save_for_backward(*dstudents)
        ctx.impl, ctx.dtype = impl, students[0].dtype
        ctx.mark_non_differentiable(means)
        ctx.set_materialize_grads(False)
        return loss, means

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("manifold_loss")
        stored = list(ctx.saved_tensors)
        if ctx.impl != "native" and takes_operators(dloss):
            gradients = call(ctx.impl, "manifold_bwd", dloss, stored, ctx.dtype)
        else:
            gradients = [scaled(d, dloss, ctx.dtype) for d in stored]
        return None, None, None, None, *gradients, *(None,) * (2 * len(gradients))


def pick_algorithm(n: int, Ds: int, Dt: int, rectify: str, device: torch.device, gain: int = 1) -> Algorithm:
    """Choose the cheaper of tile and gram, in float32 multiply-adds per row; float64 counts twice.

    tile: n (2 Ds + Dt) / gain, matrix_gain's.  gram: 2 (Ds² + Ds Dt + Dt²) + Ds (Ds + Dt), never with rectification,
    and never on a GPU whose float64 is crippled (all but compute capability 8.0, 9.0 and 10.0). Triton's kernels need
    no float64 products: pick_of_digits has their counts.
    """
    if rectify != "none" or not has_fast_float64(device):
        return "tile"
    gram = 2 * (Ds * Ds + Ds * Dt + Dt * Dt) + Ds * (Ds + Dt)
    return "gram" if gain * gram < n * (2 * Ds + Dt) else "tile"


def pick_of_digits(n: int, Ds: int, Dt: int, rectify: str, terms: int) -> Algorithm:
    """Choose the cheaper of tile and gram for Triton's kernels, in 16-bit multiply-adds per row; 8-bit ones count as
    much.

    tile: terms n (2 Ds + Dt), with terms = 1 of 16-bit rows, else 3.  gram: 13 products of digits for half of
    (Ds + Dt)², and 3 Ds (Ds + Dt), never with rectification.
    """
    D = Ds + Dt
    gram = 13 * D * D // 2 + 3 * Ds * D
    return "gram" if rectify == "none" and gram < terms * n * (2 * Ds + Dt) else "tile"


def cheaper(n: int, student: Tensor, teacher: Tensor, rectify: str, impl: Backend) -> Algorithm:
    """Return the cheaper algorithm of a backend for maps of n rows of these networks."""
    Ds, Dt = student.shape[-1], teacher.shape[-1]
    if impl == "triton":
        return pick_of_digits(n, Ds, Dt, rectify, 1 if student.element_size() == teacher.element_size() == 2 else 3)
    gain = matrix_gain(student.device, student, teacher)
    return pick_algorithm(n, Ds, Dt, rectify, student.device, gain)


def _take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Return rows `index` of the flattened batch as one group (1, K, D)."""
    N = x.shape[1]
    return x[index // N, index % N].unsqueeze(0)


def check_relation(
    call: RelationCall,
    function: str = "relation_loss",
    names: tuple[str, str, str] = ("student", "teacher", "index"),
) -> None:
    """Check the arguments of relation_loss, for the public function and by the argument names given."""
    student, teacher, scope, index, normalize, rectify, eps, algorithm, _ = call
    check.tensor(names[0], student, 3, "(B, N, Ds)")
    check.tensor(names[1], teacher, 3, "(B, N, Dt)")
    check.not_empty(names[0], student)
    check.not_empty(names[1], teacher)
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"{names[0]} and {names[1]} must agree in images and tokens (B, N), "
            f"got {tuple(student.shape[:2])} and {tuple(teacher.shape[:2])}: drop class tokens, or resize a grid by "
            "fastkd.functional.resize_tokens"
        )
    check.same_device(**{names[0]: student, names[1]: teacher})
    check.one_of("scope", scope, ("intra", "inter", "batch"))
    check.one_of("rectify", rectify, ("none", "both", "teacher"))
    check.one_of("algorithm", algorithm, ("tile", "gram", "auto"))
    check.number("eps", eps, low=0)
    check.constant(names[1], teacher)
    if algorithm == "gram" and rectify != "none":
        raise ValueError(f"algorithm='gram' never forms the similarities that rectify={rectify!r} clamps; use 'tile'")
    if index is not None:
        if scope != "batch":
            raise ValueError(f"index needs scope='batch', got {scope!r}")
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            raise TypeError(f"{names[2]} must be an int64 tensor, got {getattr(index, 'dtype', type(index).__name__)}")
        check.dense(names[2], index)
        if index.ndim != 1 or index.numel() == 0:
            raise ValueError(f"{names[2]} must have shape (K,) with K >= 1, got {tuple(index.shape)}")
    check.flag("normalize", normalize)
    refuse_transforms(function)


def _checked_index(index: Tensor, student: Tensor) -> Tensor:
    """Return index on the student's device; its range is asserted there without waiting."""
    index = check.moved("index", index, student.device)
    total = student.shape[0] * student.shape[1]
    check.rows("index", index, total)
    return index


def _checked_indices(indices: Sequence[Tensor], students: Sequence[Tensor], impl: Backend) -> list[Tensor]:
    """Return the indices of layers of one device on that device; of layers with as many tokens they are asserted
    together, unless the operator reads them on the CPU anyway."""
    if impl == "native" and students[0].device.type == "cpu":
        return [check.moved("index", index, s.device) for index, s in zip(indices, students, strict=True)]
    first, totals = indices[0], [s.shape[0] * s.shape[1] for s in students]
    if any(total != totals[0] for total in totals[1:]):
        return [_checked_index(index, s) for index, s in zip(indices, students, strict=True)]
    if all(index is first for index in indices[1:]):
        return [_checked_index(first, students[0])] * len(students)
    moved = [check.moved("index", index, s.device) for index, s in zip(indices, students, strict=True)]
    check.rows("index", torch.cat(moved), totals[0])
    return moved


def draw_rows(students: Sequence[Tensor], num_samples: int, generator: torch.Generator | None) -> list[Tensor]:
    """Draw num_samples distinct rows of the B*N tokens of each layer, or all of them if there are fewer.

    Layers with as many tokens take successive pieces of one permutation, and of another when it is used up.
    """
    total, left = 0, torch.empty(0, dtype=torch.int64)
    drawn = []
    for s in students:
        tokens = s.shape[0] * s.shape[1]
        if tokens != total or left.device != s.device or len(left) < min(num_samples, tokens):
            total = tokens
            if generator is None:  # with one, the compiler would bind a graph to one total
                left = torch.randperm(total, device=s.device)
            else:
                left = torch.randperm(total, generator=generator, device=generator.device)
                left = check.moved("index", left, s.device)
        drawn.append(left[:num_samples])
        left = left[num_samples:]
    return drawn


def run_relation(call: RelationCall) -> Tensor:
    """Return relation_loss of checked arguments."""
    if call.rows is not None:
        index = _checked_index(call.rows, call.student)
        student, teacher = _take_rows(call.student, index), _take_rows(call.teacher, index)
        call = call._replace(student=student, teacher=teacher, scope="intra", rows=None)
    student, teacher, scope, _, _, rectify, _, algorithm, backend = call
    impl = resolve(backend, "relation_fwd", student, teacher)
    if algorithm == "auto":
        B, N, _ = student.shape
        algorithm = cheaper({"intra": N, "inter": B, "batch": B * N}[scope], student, teacher, rectify, impl)
    return _Relation.apply(*distinct(student, teacher), impl, call.maps(algorithm), wants_grad(student))


def check_manifold(call: ManifoldCall) -> None:
    """Check the arguments of manifold_loss for one or several layers."""
    students, teachers, indices = call.students, call.teachers, call.indices
    for name, weight in term_weights(call).items():
        check.number(name, weight, low=0)
    check.positive_int("num_samples", call.num_samples)
    check.source(call.generator)
    form = call.return_terms
    if not isinstance(form, bool) and (not isinstance(form, str) or form != "detached"):
        raise ValueError(f"return_terms must be True, False or 'detached', got {form!r}")
    if len(students) != len(teachers) or len(students) == 0:
        raise ValueError(
            f"students and teachers must match layer by layer, got {len(students)} and {len(teachers)} layers"
        )
    if indices is not None:
        check.sequence("indices", indices, "int64 tensors, one per layer")
    if indices is not None and len(indices) != len(students):
        raise ValueError(f"indices must have one tensor per layer, got {len(indices)} for {len(students)} layers")
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        layer = f"[{i}]" if len(students) > 1 else ""
        names = (f"student{layer}", f"teacher{layer}", f"index{layer}")
        check_relation(RelationCall(s, t, "batch", None if indices is None else indices[i]), "manifold_loss", names)


def run_manifold(call: ManifoldCall) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return the mean of manifold_loss over matched layers, with one operator call where no term is cheaper by Grams.

    Return (loss, terms); the terms are meant to be read only if return_terms asks for them. Those to be differentiated
    have a gradient each, formed in forward: whichever of them a caller uses, nothing is computed twice.
    """
    students, teachers, weights, return_terms = call.students, call.teachers, term_weights(call), call.return_terms
    indices = call.indices
    if indices is None:
        indices = draw_rows(students, call.num_samples, call.generator)

    # Terms to be differentiated by themselves, Grams, and a sum that lacks a term each need calls of their own.
    separate = return_terms is True or (not return_terms and 0 in weights.values())
    for s, t in zip(students, teachers, strict=True):
        separate |= (s.dtype, s.device) != (students[0].dtype, students[0].device)
        impl = resolve(call.backend, "relation_fwd", s, t)
        separate |= any(cheaper(n, s, t, "none", impl) == "gram" for n in s.shape[:2])
    if not separate:
        impl = resolve(call.backend, "manifold_fwd", *students, *teachers)
        if call.indices is not None:
            indices = _checked_indices(call.indices, students, impl)
        loss, means = _Manifold.apply(
            impl,
            tuple(weights.values()),
            len(students),
            wants_grad(*students),
            *distinct(*students, *teachers, *indices),
        )
        return loss, tuple(means.unbind())

    def term(name: str, calls: list[RelationCall]) -> Tensor:
        if weights[name] == 0 and not return_terms:
            return students[0].new_zeros((), dtype=accumulator(*students, *teachers))
        return torch.stack([run_relation(each) for each in calls]).mean()

    pairs = layer_calls(call)
    terms = (
        term("intra", pairs),
        term("inter", [pair._replace(scope="inter") for pair in pairs]),
        term("random", [pair._replace(scope="batch", rows=k) for pair, k in zip(pairs, indices, strict=True)]),
    )
    loss = call.intra * terms[0] + call.inter * terms[1] + call.random * terms[2]
    if not any(weights.values()) and not return_terms:
        loss = loss + sum(s[:0].sum() for s in students)  # differentiable, as every other loss
    if return_terms == "detached":
        terms = (terms[0].detach(), terms[1].detach(), terms[2].detach())
    return loss, terms
