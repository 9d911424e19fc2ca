"""Relation loss: differences E of two Gram maps tile by tile, no map beyond a bounded strip.

With r, q the inverse norms of student and teacher rows:  E_ij = r_i r_j <s_i, s_j> - q_i q_j <t_i, t_j>,
W_ij = E_ij r_j,  dS_i = 4/(G n²) r_i (Σ_j W_ij s_j - s_i r_i² Σ_j W_ij <s_i, s_j>).

Raw rows enter the products, so 16-bit ones reach the matrix units as they are. W goes there in the student's dtype: as
two terms, high and low, where that has 16 bits. One would do far from a match; a trained student's gradient is a small
difference of large terms and then 3 times as wrong as its own rounding.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ._common import architecture, float32_products, multiprocessors, stored_gradient
from ._relation_maps import (
    _relation_apply_kernel,
    _relation_fused_kernel,
    _relation_map_kernel,
    _relation_scatter_kernel,
)
from ._relation_rows import _relation_norms_kernel, _relation_sum_kernel
from ._relation_tiles import CONFIGS, NORM_BLOCK, SCATTER_BLOCK, SUM_BLOCK, Apply

STRIP_BYTES = 12 << 20  # of W, beside as many bytes as the student has
GRAM_CHUNK = 1 << 20  # elements of student and teacher taken to float64 at a time
LAYERS = 16  # of equal shapes, that share their launches at most: each is an argument of the kernels


class Rows(NamedTuple):
    """A (B, N, D) tensor as G groups of n rows: strides of group, of runs of `run` rows, of a row in a run, of D."""

    group: int
    outer: int
    inner: int
    column: int


def _rows(x: Tensor, scope: str) -> Rows:
    b, n, d = x.stride()
    return {"intra": Rows(b, 0, n, d), "inter": Rows(n, 0, b, d), "batch": Rows(0, b, n, d)}[scope]


def _largest(norms: Tensor, normalize: bool) -> Tensor:
    """(G,): a bound of |W| in each group, from inverse norms (|E| <= 2) or from norms."""
    if normalize:
        return 2 * norms[0].amax(1)
    return norms.amax(2).square().sum(0)


def _fill(choices: tuple[Apply, ...], groups: int, rows: int, Ds: int, device: torch.device) -> tuple[int, int, Apply]:
    """The first configuration with a program for every multiprocessor, else the last: programs, tiles of rows, it."""
    for apply in choices:
        row_tiles = triton.cdiv(rows, apply.BLOCK_M)
        programs = groups * row_tiles * triton.cdiv(Ds, apply.BLOCK_D)
        if programs >= multiprocessors(device):
            break
    return programs, row_tiles, apply


def _tile(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    loss: Tensor,
    dstudents: Sequence[Tensor] | None,
    scope: str,
    normalize: bool,
    rectify: str,
    eps: float,
    weight: float = 1.0,
    is_added: bool = False,
    index: Tensor | None = None,
) -> None:
    """Write the losses (layers,) of tensors of one shape, dtype and strides; write the gradients of weight times them,
    or add those to what dstudents hold. With index (layers, K) the groups are those rows of a batch, and so are
    dstudents (1, K, Ds)."""
    student, layers = students[0], len(students)
    B, N, Ds = student.shape
    Dt = teachers[0].shape[2]
    G, n, run = {"intra": (B, N, None), "inter": (N, B, None), "batch": (1, B * N, N)}[scope]
    n = n if index is None else index.shape[1]
    every, total = layers * G, layers * G * n
    s_rows, t_rows = _rows(student, scope), _rows(teachers[0], scope)
    config = CONFIGS[architecture(student.device), max(student.itemsize, teachers[0].itemsize)]
    # float16 would lose a W that is too large or small; bfloat16 has float32's range.
    has_scale = dstudents is not None and student.dtype == torch.float16

    s, t = tuple(students), tuple(teachers)
    of_student = {"n": n, "G": G, "run": run, "Ds": Ds}
    sizes = of_student | {"total": total, "Dt": Dt}
    norms = scale = student  # stand-ins for what is not read
    drawn = student if index is None else index
    if normalize or has_scale:
        norms = student.new_empty((2, every, n), dtype=torch.float32)
        BLOCK_R, BLOCK_K = NORM_BLOCK
        _relation_norms_kernel[(triton.cdiv(G * n, BLOCK_R), 2, layers)](
            s, t, drawn, norms, *s_rows, *t_rows, **sizes, eps=eps,
            HAS_INDEX=index is not None, INVERT=normalize, BLOCK_R=BLOCK_R, BLOCK_K=BLOCK_K,
        )  # fmt: skip
    if has_scale:
        scale = 2.0**14 / _largest(norms, normalize).clamp_min_(torch.finfo(torch.float32).tiny * 2.0**15)

    factor = 4 * weight / (G * n * n)
    flags = {"NORMALIZE": normalize, "TERMS": 2 if student.itemsize == 2 else 1, "PRECISION": float32_products()}
    flags["HAS_INDEX"] = index is not None
    clamps = {"RECTIFY_S": rectify == "both", "RECTIFY_T": rectify != "none"}
    BLOCK_M = config.map.BLOCK_M
    columns = triton.cdiv(n, BLOCK_M)
    pitch = columns * BLOCK_M  # W is stored in whole tiles, so that its rows are aligned and need no mask
    budget = (STRIP_BYTES + layers * student.numel() * student.itemsize) // (4 * pitch)  # rows of W
    triangle = columns * (columns + 1) // 2

    d_rows = s_rows if dstudents is None else _rows(dstudents[0], scope)
    if index is not None:  # drawn rows are contiguous: N of them occupy N rows
        d_rows = Rows(0, N * Ds, Ds, 1)
    if dstudents is None:
        partial = student.new_empty(every * triangle, dtype=torch.float32)
        _relation_map_kernel[(every * triangle,)](
            s, t, drawn, norms, scale, partial, student, student, *s_rows, *t_rows, **sizes,
            first_group=0, first_tile=0, tiles=triangle, pitch=0, stride_wg=0, term=0,
            IS_TRIANGLE=True, HAS_GRAD=False, HAS_SCALE=False, **flags, **clamps, **config.map._asdict(),
        )  # fmt: skip
    elif budget < pitch and Ds <= max(config.fused):
        fused = config.fused[min(width for width in config.fused if width >= Ds)]
        strips = triton.cdiv(n, fused.BLOCK_M)
        partial = student.new_empty(every * strips, dtype=torch.float32)
        _relation_fused_kernel[(every * strips,)](
            s, t, drawn, norms, scale, partial, tuple(dstudents), *s_rows, *t_rows, *d_rows, **sizes,
            strips=strips, factor=factor,
            HAS_SCALE=has_scale, IS_ADDED=is_added, CHUNKS=triton.cdiv(Ds, fused.BLOCK_D),
            **flags, **clamps, **fused._asdict(),
        )  # fmt: skip
    else:
        # Several groups at a time if whole maps fit, otherwise strips of one map's rows.
        is_triangle = budget >= pitch
        groups = min(max(budget // pitch, 1), every)
        groups = triton.cdiv(every, triton.cdiv(every, groups))
        row_tiles = columns if is_triangle else min(max(budget // BLOCK_M, 1), columns)
        row_tiles = triton.cdiv(columns, triton.cdiv(columns, row_tiles))
        terms = 2 if student.itemsize == 2 else 1
        deepest = max(apply.BLOCK_M for apply in config.apply)  # whose tiles are read whole too
        w = student.new_empty((terms, groups, triton.cdiv(row_tiles * BLOCK_M, deepest) * deepest, pitch))
        along = student.new_empty((groups, columns, n), dtype=torch.float32)
        partial = student.new_empty(every * (triangle if is_triangle else columns * columns), dtype=torch.float32)
        done = 0
        for g in range(0, every, groups):
            for first_tile in range(0, columns, row_tiles):
                here, tall = min(groups, every - g), min(row_tiles, columns - first_tile)
                tiles = triangle if is_triangle else tall * columns
                _relation_map_kernel[(here * tiles,)](
                    s, t, drawn, norms, scale, partial[done:], w, along, *s_rows, *t_rows, **sizes,
                    first_group=g, first_tile=first_tile, tiles=tiles, pitch=pitch,
                    stride_wg=w.stride(1), term=w.stride(0),
                    IS_TRIANGLE=is_triangle, HAS_GRAD=True, HAS_SCALE=has_scale, **flags, **clamps,
                    **config.map._asdict(),
                )  # fmt: skip
                done += here * tiles
                rows = min(tall * BLOCK_M, n - first_tile * BLOCK_M)
                programs, apply_tiles, apply = _fill(config.apply, here, rows, Ds, student.device)
                _relation_apply_kernel[(programs,)](
                    w, along, s, drawn, norms, scale, tuple(dstudents), *s_rows, *d_rows, **of_student,
                    first_group=g, first_row=first_tile * BLOCK_M, row_tiles=apply_tiles, columns=columns,
                    pitch=pitch, stride_wg=w.stride(1), term=w.stride(0), factor=factor,
                    HAS_SCALE=has_scale, IS_ADDED=is_added, **flags, **apply._asdict(),
                )  # fmt: skip

    count = partial.numel() // layers
    _relation_sum_kernel[(layers,)](
        partial, loss, count=count, stride_l=loss.stride(0), scale=1 / (G * n * n), BLOCK=SUM_BLOCK
    )


def _gram(student: Tensor, teacher: Tensor, dstudent: Tensor | None, scope: str, normalize: bool, eps: float) -> Tensor:
    """||SSᵀ - TTᵀ||² = ||SᵀS||² - 2||SᵀT||² + ||TᵀT||², dŜ = 4/(G n²) (S(SᵀS) - T(TᵀS)), in float64.

    Both networks' rows stand side by side, Z = [S T]: a piece takes three launches for ZᵀZ and one product for dŜ.
    """
    Ds, Dt = student.shape[2], teacher.shape[2]

    def folded(x: Tensor) -> Tensor:  # (G, runs, rows of a run, D), a view
        return x[None] if scope == "batch" else (x if scope == "intra" else x.transpose(0, 1))[:, None]

    def inverse_norms(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return norm.reciprocal().masked_fill_(norm <= eps, 0)

    networks = [(x, inverse_norms(x) if normalize else None) for x in (folded(student), folded(teacher))]
    ds = None if dstudent is None else folded(dstudent)
    (s, r), _ = networks
    G, runs, run = s.shape[:3]
    n = runs * run
    scale = 1 / (G * n * n)
    total = student.new_zeros((), dtype=torch.float64)

    def side_by_side(at: tuple[slice, ...]) -> Tensor:  # (groups, rows, Ds + Dt), of float32 unit rows
        shape = s[at].shape[:3]
        z = total.new_empty((*shape, Ds + Dt))
        for (x, inv), columns in zip(networks, (slice(0, Ds), slice(Ds, None)), strict=True):
            if inv is None:
                z[..., columns] = x[at]
            else:
                torch.mul(x[at], inv[at], out=z[..., columns])
        return z.flatten(1, 2)

    groups = min(max(GRAM_CHUNK // (Ds + Dt) ** 2, 1), G)
    long = min(max(GRAM_CHUNK // (groups * (Ds + Dt)), 1), run)
    many = max(GRAM_CHUNK // (groups * long * (Ds + Dt)), 1) if long == run else 1
    for g0 in range(0, G, groups):
        g = slice(g0, g0 + groups)
        pieces = [
            (g, slice(a, a + many), slice(b, b + long)) for a in range(0, runs, many) for b in range(0, run, long)
        ]
        zz = total.new_zeros((len(s[g]), Ds + Dt, Ds + Dt))
        for at in pieces:
            z = side_by_side(at)
            zz.baddbmm_(z.mT, z)
        ss, st, tt = zz[:, :Ds, :Ds], zz[:, :Ds, Ds:], zz[:, Ds:, Ds:]
        for gram, weight in ((ss, 1), (st, -2), (tt, 1)):
            total += weight * torch.linalg.vector_norm(gram).square()
        if ds is None:
            continue
        factor = torch.cat([ss, -st.mT], 1).mul_(4 * scale)
        for at in pieces:
            z = side_by_side(at)
            d = (z @ factor).view(ds[at].shape)
            if r is not None:
                s_hat = z[..., :Ds].view_as(d)
                d = d.addcmul_(s_hat, (s_hat * d).sum(-1, keepdim=True), value=-1).mul_(r[at])
            ds[at] = d
    return (total.clamp_min(0) * scale).float()  # rounding alone can take a zero below 0


def relation_fwd(
    student: Tensor,
    teacher: Tensor,
    scope: str,
    normalize: bool,
    rectify: str,
    eps: float,
    algorithm: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    dstudent = student.new_empty(student.shape if with_grad else (0,), dtype=stored_gradient(student))
    ds = dstudent if with_grad else None
    if algorithm == "gram":
        with torch.autocast(student.device.type, enabled=False):
            return _gram(student, teacher, ds, scope, normalize, eps), dstudent
    loss = student.new_empty(1, dtype=torch.float32)
    _tile([student], [teacher], loss, None if ds is None else [ds], scope, normalize, rectify, eps)
    return loss.view(()), dstudent


def _alike(students: list[Tensor], teachers: list[Tensor], indices: list[Tensor]) -> list[list[int]]:
    """Return the runs of layers that can share launches: those of equal shape, dtype and strides."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for layer, tensors in enumerate(zip(students, teachers, indices, strict=True)):
        key = tuple((x.shape, x.stride(), x.dtype) for x in tensors)
        groups.setdefault(key, []).append(layer)
    return [members[i : i + LAYERS] for members in groups.values() for i in range(0, len(members), LAYERS)]


def manifold_fwd(
    students: list[Tensor],
    teachers: list[Tensor],
    indices: list[Tensor],
    intra: float,
    inter: float,
    random: float,
    with_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    terms: dict[int, Tensor] = {}
    dstudents = [s.new_empty(s.shape if with_grad else (0,), dtype=stored_gradient(s)) for s in students]
    options: dict[str, Any] = {"normalize": True, "rectify": "none", "eps": 1e-12}
    for layers in _alike(students, teachers, indices):
        s, t = [students[i] for i in layers], [teachers[i] for i in layers]
        index = torch.stack([indices[i] for i in layers])
        sums = drawn = None
        if with_grad:
            # In float32 until the three terms are added up.
            sums = [d if d.dtype == torch.float32 else torch.empty_like(d, dtype=torch.float32)
                    for d in (dstudents[i] for i in layers)]  # fmt: skip
            drawn = s[0].new_empty((len(layers), 1, index.shape[1], s[0].shape[2]), dtype=torch.float32)
        loss = s[0].new_empty((3, len(layers)), dtype=torch.float32)
        _tile(s, t, loss[0], sums, "intra", **options, weight=intra)
        _tile(s, t, loss[1], sums, "inter", **options, weight=inter, is_added=True)
        _tile(s, t, loss[2], None if drawn is None else list(drawn), "batch", **options, weight=random, index=index)
        terms |= zip(layers, loss.unbind(1), strict=True)
        if sums is None or drawn is None:
            continue
        (K, D), (BLOCK_K, BLOCK_D) = drawn.shape[2:], SCATTER_BLOCK
        _relation_scatter_kernel[(K, len(layers), triton.cdiv(D, BLOCK_D))](
            drawn, index, tuple(sums), K=K, D=D, BLOCK_K=BLOCK_K, BLOCK_D=BLOCK_D
        )
        if sums[0].dtype != dstudents[layers[0]].dtype:
            torch._foreach_copy_([dstudents[i] for i in layers], sums)
    return torch.stack([terms[i] for i in range(len(students))]), dstudents
