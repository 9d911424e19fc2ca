"""Relation loss: differences E of two Gram maps tile by tile, no map beyond a bounded strip.

With r, q the inverse norms of student and teacher rows and Ŝ_ij = r_i r_j <s_i, s_j>:
E_ij = Ŝ_ij - q_i q_j <t_i, t_j>,  dS_i = 4/(G n²) r_i (Σ_j E_ij r_j s_j - r_i s_i Σ_j E_ij Ŝ_ij).

All products are of 16-bit numbers. Maps take 16-bit rows as they are. A float32 row is multiplied by a power of two,
and float16 then holds it in two terms of 11 bits: three products of terms have the error of one float32 product.
The gradient's product takes all rows so; its W_ij = E_ij r_j, over that power of two, is one float16 term for bfloat16
students, the rounding of whose gradient is 3 bits coarser, and two for others.
"""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._common import PLANS, alike, architecture, blocks, cdiv, empty_gradient, multiprocessors
from ._relation_gram import (
    _relation_digits_kernel,
    _relation_factor_kernel,
    _relation_gram_apply_kernel,
    _relation_gram_kernel,
)
from ._relation_groups import _relation_group_kernel
from ._relation_maps import _relation_apply_kernel, _relation_map_kernel, _relation_scatter_kernel
from ._relation_rows import _relation_norms_kernel, _relation_scale_kernel, _relation_sum_kernel
from ._relation_tiles import (
    CONFIGS,
    DIGITS,
    GRAM_APPLIES,
    GRAMS,
    NORM_BLOCK,
    SCALE_BLOCK,
    SCATTER_BLOCK,
    SUM_BLOCK,
    UNALIGNED_GRAM_APPLIES,
    Apply,
    Group,
)

STRIP_BYTES = 32 << 20  # of W: it stays in cache between two launches; one map of 4096 rows in one term
GROUP_ROWS = 256  # of a group that one program takes whole
GRAM_BYTES = 16 << 20  # of digits that are multiplied in one launch
GRAM_ROWS = 1 << 14  # that a sum of products of digits takes at most: 2**14 rows times 4 products times 2**14 < 2**31
LAYERS = 16  # of equal shapes, that share their launches at most: each is an argument of the kernels


class Rows(NamedTuple):
    """A (B, N, D) tensor as G groups of n rows: strides of group, of runs of `run` rows, of a row in a run, of D."""

    group: int
    outer: int
    inner: int
    column: int


def _rows(x: Tensor, scope: str) -> Rows:
    return _rows_of(x.stride(), scope)


@lru_cache(PLANS)
def _rows_of(strides: tuple[int, ...], scope: str) -> Rows:
    b, n, d = strides
    return {"intra": Rows(b, 0, n, d), "inter": Rows(n, 0, b, d), "batch": Rows(0, b, n, d)}[scope]


def _is_aligned(s: Tensor, t: Tensor, *like_them: Tensor) -> bool:
    """Return whether rows are read in vectors, whose addresses take few registers."""
    steps = [step for x in (s, t) for step in (x.shape[2], *x.stride()[:2])]
    addresses = (x.data_ptr() for x in (s, t, *like_them))
    return s.stride(2) == t.stride(2) == 1 and not any(v % 16 for v in (*steps, *addresses))


class Term(NamedTuple):
    """Sums of squares by the programs of a launch, and the factor that makes a layer's mean of a layer's sum."""

    partial: Tensor
    scale: float


class Sums(NamedTuple):
    """Gradients of layers between two launches, rows in float16 that are to be multiplied by powers of two."""

    values: Tensor  # (layers, B * N, Ds)
    powers: Tensor  # (pieces, layers, B * N)
    width: int  # columns of a piece


class Alike:
    """Layers of one shape, dtype and strides, whose maps share launches; and their rows' inverse norms."""

    def __init__(self, students: Sequence[Tensor], teachers: Sequence[Tensor], normalize: bool, eps: float) -> None:
        self.students, self.teachers = tuple(students), tuple(teachers)
        self.normalize, self.eps = normalize, eps
        self.s, self.t = students[0], teachers[0]
        self.layers, (self.B, self.N, self.Ds), self.Dt = len(students), self.s.shape, self.t.shape[2]
        self.norms = self.s.new_empty((2, self.layers, self.B, self.N), dtype=torch.float32)
        self.has_norms = False
        self.config = CONFIGS[architecture(self.s.device), max(self.s.itemsize, self.t.itemsize)]
        self.is_narrow = self.s.itemsize == self.t.itemsize == 2
        self.terms = 1 if self.s.dtype == torch.bfloat16 else 2  # of W
        of_two = self.config.map_of_two if self.terms == 2 else None
        self.map = self.config.map if of_two is None else of_two

    @cached_property
    def is_aligned(self) -> bool:
        return _is_aligned(self.s, self.t, *self.students, *self.teachers)

    def form_norms(self) -> None:
        (BLOCK_R, BLOCK_K), tokens = NORM_BLOCK, self.B * self.N
        _relation_norms_kernel[(cdiv(tokens, BLOCK_R), 2, self.layers)](
            self.students, self.teachers, self.norms, _rows(self.s, "batch"), _rows(self.t, "batch"),
            self.layers * tokens, tokens, self.N, self.Ds, self.Dt, self.eps,
            NORMALIZE=self.normalize, BLOCK_R=BLOCK_R, BLOCK_K=BLOCK_K,
        )  # fmt: skip
        self.has_norms = True

    def short(self, n: int, is_drawn: bool = False) -> Group | None:
        """Return the tile of the kernel that takes groups of n rows whole, or None where maps are formed instead."""
        # Drawn or unaligned float32 rows would spill registers there, and two terms of W of 16-bit rows be computed by
        # warps twice.
        if n > GROUP_ROWS or (self.terms == 2 if self.is_narrow else is_drawn or not self.is_aligned):
            return None
        return self.config.group

    def sums(self) -> Sums | None:
        """Return room for the gradients of one scope that another adds to its own, if both take groups whole; else
        they are summed in float32."""
        tile = self.short(max(self.B, self.N))
        if tile is None or self.terms == 2:
            return None
        tokens, new = self.B * self.N, self.s.new_empty
        return Sums(
            new((self.layers, tokens, self.Ds), dtype=torch.float16),
            new((cdiv(self.Ds, tile.BLOCK_D), self.layers, tokens), dtype=torch.bfloat16),
            tile.BLOCK_D,
        )

    def scales(self, scope: str) -> Tensor | None:
        """(layers, G) by which float16 holds a W of raw rows, for largest values a of both networks:
        |W| <= (Ds a_s² + Dt a_t²) 2**-11 a_s."""
        if self.normalize:
            return None
        a_s, a_t = self.norms.amin({"intra": (3,), "inter": (2,), "batch": (2, 3)}[scope]).reciprocal_()
        bound = (self.Ds * a_s.square() + self.Dt * a_t.square()) * a_s
        return 2.0**25 / bound.clamp_min_(2.0**-90)

    def add(
        self,
        scope: str,
        dstudents: Sequence[Tensor] | None,
        rectify: str = "none",
        weight: float = 1.0,
        before: Sequence[Tensor] | None = None,
        index: Sequence[Tensor] | None = None,
        sums: Sums | None = None,
    ) -> Term:
        """Write the gradients of weight times the losses of a scope, added to float32 ones `before` or to the sums;
        without dstudents, to the sums alone. With index, per layer (K,), the groups are those rows of a batch, and so
        are dstudents (1, K, Ds)."""
        B, N, tokens = self.B, self.N, self.B * self.N
        G, n, run = {"intra": (B, N, None), "inter": (N, B, None), "batch": (1, tokens, N)}[scope]
        n = n if index is None else index[0].shape[0]
        every = self.layers * G
        s_rows, t_rows = _rows(self.s, scope), _rows(self.t, scope)
        has_grad = dstudents is not None or sums is not None
        d_rows = s_rows if dstudents is None else _rows(dstudents[0], scope)
        if index is not None:  # drawn rows are contiguous: N of them occupy N rows
            d_rows = Rows(0, N * self.Ds, self.Ds, 1)
        drawn = None if index is None else tuple(index)
        of_tokens = {"intra": (N, 1), "inter": (1, N), "batch": (0, 1)}[scope]
        out = None if dstudents is None else tuple(dstudents)
        added = None if before is None else tuple(before)
        networks = (self.layers * tokens, tokens, n, G, run, self.Ds, self.Dt)
        sizes = networks[1:-1]
        flags = {"NORMALIZE": self.normalize, "TERMS": self.terms}
        clamps = {"RECTIFY_S": rectify == "both", "RECTIFY_T": rectify != "none"}
        factor, mean = 4 * weight / (G * n * n), 1 / (G * n * n)
        new = self.s.new_empty

        tile = self.short(n, index is not None)
        if tile is not None:
            if not self.normalize and not self.has_norms:
                self.form_norms()
            full, tail, pitch = tile.cut(n)
            programs = min(every, multiprocessors(self.s.device))
            held = programs if has_grad else 0
            w = new((held, self.terms, pitch, pitch), dtype=torch.float16)
            along = new((held, full + (tail > 0), n), dtype=torch.float32)
            partial = new(every, dtype=torch.float32)
            values, powers, _ = sums or (None, None, 0)
            _relation_group_kernel[(programs,)](
                self.students, self.teachers, drawn, self.norms, self.scales(scope), partial, w, along, added, out,
                values, powers, s_rows, t_rows, of_tokens, d_rows, *networks, every, programs, full, pitch, factor,
                self.eps, HAS_NORMS=self.has_norms, HAS_GRAD=has_grad, TAIL=tail, **flags, **clamps, **blocks(tile),
            )  # fmt: skip
            self.has_norms = True
            return Term(partial, mean)

        if not self.has_norms:
            self.form_norms()
        scale = self.scales(scope)
        BLOCK_M = self.map.BLOCK_M
        columns = cdiv(n, BLOCK_M)
        pitch = columns * BLOCK_M  # W is stored in whole tiles, so that its rows are aligned and need no mask
        budget = STRIP_BYTES // (2 * self.terms * pitch)  # rows of W
        triangle = columns * (columns + 1) // 2
        # Several groups at a time if whole maps fit, otherwise strips of one map's rows.
        is_triangle = budget >= pitch or out is None
        groups = every if out is None else min(max(budget // pitch, 1), every)
        groups = cdiv(every, cdiv(every, groups))
        row_tiles = columns if is_triangle else min(max(budget // BLOCK_M, 1), columns)
        deepest = max(apply.BLOCK_M for apply in self.config.apply)
        step = max(deepest // BLOCK_M, 1)  # or a strip's last rows would be written with the next one's
        row_tiles = cdiv(cdiv(columns, cdiv(columns, row_tiles)), step) * step
        w_rows = cdiv(row_tiles * BLOCK_M, deepest) * deepest
        held = 0 if out is None else groups
        w = new((self.terms, held, w_rows, pitch), dtype=torch.float16)
        along = new((held, columns, n), dtype=torch.float32)
        partial = new(every * (triangle if is_triangle else columns * columns), dtype=torch.float32)
        strip = (w_rows, pitch, w.stride(0))
        done = 0
        for g in range(0, every, groups):
            for first_tile in range(0, columns, row_tiles):
                here, tall = min(groups, every - g), min(row_tiles, columns - first_tile)
                tiles = triangle if is_triangle else tall * columns
                _relation_map_kernel[(here * tiles,)](
                    self.students, self.teachers, drawn, self.norms, scale, partial[done:], w, along,
                    s_rows, t_rows, of_tokens, *networks, g, first_tile, tiles, *strip,
                    IS_TRIANGLE=is_triangle, HAS_GRAD=out is not None, **flags, **clamps, **blocks(self.map),
                )  # fmt: skip
                done += here * tiles
                if out is None:
                    continue
                rows = min(tall * BLOCK_M, n - first_tile * BLOCK_M)
                programs, apply_tiles, apply = _fill(self.config.apply, here, rows, self.Ds, self.s.device)
                _relation_apply_kernel[(programs,)](
                    w, along, self.students, drawn, self.norms, scale, added, out, s_rows, of_tokens, d_rows,
                    *sizes, g, first_tile * BLOCK_M, apply_tiles, columns, *strip, factor, **flags, **blocks(apply),
                )  # fmt: skip
        return Term(partial, mean)

    def scatter(
        self, drawn: Sequence[Tensor], index: Sequence[Tensor], before: Sequence[Tensor] | None, sums: Sums | None
    ) -> None:
        """Add the gradients of drawn rows, per layer (1, K, Ds), to float32 ones or to the sums."""
        K, (BLOCK_K, BLOCK_D) = len(index[0]), SCATTER_BLOCK
        if sums is not None:
            BLOCK_D = sums.width
        values, powers, _ = sums or (None, None, 0)
        tokens = self.B * self.N
        _relation_scatter_kernel[(K, self.layers, cdiv(self.Ds, BLOCK_D))](
            tuple(drawn), tuple(index), None if before is None else tuple(before), values, powers, K, self.Ds,
            tokens, self.layers * tokens, BLOCK_K=BLOCK_K, BLOCK_D=BLOCK_D,
        )  # fmt: skip


def _sum(
    loss: Tensor,
    terms: Sequence[Term],
    weights: tuple[float, ...] = (1.0,),
    means: Tensor | None = None,
    add: bool = False,
) -> None:
    """Write the weighted sum of terms to a loss (1,), and the terms to means (terms,); or add them to what is there."""
    partials, scales = zip(*terms, strict=True)
    counts = tuple(partial.numel() for partial in partials)
    _relation_sum_kernel[(1,)](partials, means, loss, counts, scales, weights, ADD=add, BLOCK=SUM_BLOCK)


def _fill(choices: tuple[Apply, ...], groups: int, rows: int, Ds: int, device: torch.device) -> tuple[int, int, Apply]:
    """The first configuration with a program for every multiprocessor, else the last: programs, tiles of rows, it."""
    for apply in choices:
        row_tiles = cdiv(rows, apply.BLOCK_M)
        programs = groups * row_tiles * cdiv(Ds, apply.BLOCK_D)
        if programs >= multiprocessors(device):
            break
    return programs, row_tiles, apply


def _gram(student: Tensor, teacher: Tensor, dstudent: Tensor | None, scope: str, normalize: bool, eps: float) -> Tensor:
    """||SSᵀ - TTᵀ||² = ||SᵀS||² - 2||SᵀT||² + ||TᵀT||², dŜ = 4/(G n²) (S(SᵀS) - T(TᵀS)).

    Both networks' rows stand side by side, Z = [S T]. A piece of the rows takes two launches: one writes them as digits
    of 8 bits, tokens side by side as integer units want them, and one adds their products to ZᵀZ.
    """
    B, N, Ds = student.shape
    Dt, new = teacher.shape[2], student.new_empty
    D = Ds + Dt
    G, n, run = {"intra": (B, N, None), "inter": (N, B, None), "batch": (1, B * N, N)}[scope]
    s_rows, t_rows = _rows(student, scope), _rows(teacher, scope)
    kind = architecture(student.device)
    tile, apply = GRAMS[kind], GRAM_APPLIES[kind]
    if not _is_aligned(student, teacher):
        apply = UNALIGNED_GRAM_APPLIES.get(kind, apply)
    columns = cdiv(D, tile.BLOCK_D)
    tiles = columns * (columns + 1) // 2

    peaks = None
    if not normalize:  # digits count from the largest number of a network's group
        alike = Alike([student], [teacher], normalize, eps)
        alike.form_norms()
        peaks = alike.norms[:, 0].amin({"intra": (2,), "inter": (1,), "batch": (1, 2)}[scope])

    step = max(tile.BLOCK_N, DIGITS.BLOCK_R)  # a multiple of both

    def whole(rows: int) -> int:
        return cdiv(rows, step) * step

    long = min(whole(n), max(GRAM_BYTES // (4 * D) // step, 1) * step)
    long = whole(cdiv(n, cdiv(n, long)))
    f_pitch = cdiv(Ds, 16) * 16
    of_group = 4 * D * (long + f_pitch) + 8 * tiles * tile.BLOCK_D**2
    groups = min(max(2 * GRAM_BYTES // of_group, 1), G) if n <= long else 1
    groups = cdiv(G, cdiv(G, groups))
    pieces = max(2 * multiprocessors(student.device) // (groups * tiles), cdiv(long, GRAM_ROWS))
    share = cdiv(long // tile.BLOCK_N, pieces)  # of a piece, in steps
    pieces = cdiv(long // tile.BLOCK_N, share)

    blocks = whole(n) // DIGITS.BLOCK_R
    planes = new((groups, 4, D, long), dtype=torch.int8)
    norms = new((2, G, n), dtype=torch.float32)
    lost = new((groups, 2, blocks), dtype=torch.int32)
    grams = new((groups, pieces, tiles, tile.BLOCK_D, tile.BLOCK_D), dtype=torch.float64)
    partial = new(4 * G * tiles, dtype=torch.float64)
    f = None if dstudent is None else new((2, groups, D, f_pitch), dtype=torch.float16)
    scale = 2.0 ** (11 - (n - 1).bit_length())  # a similarity of columns is at most n
    factors = {"f_pitch": f_pitch, "term": 0 if f is None else f.stride(0)}
    for g in range(0, G, groups):
        here = min(groups, G - g)
        for first in range(0, n, long):
            rows = whole(min(long, n - first))
            _relation_digits_kernel[(rows // DIGITS.BLOCK_R, 2, here)](
                student, teacher, peaks, norms, planes, lost, s_rows, t_rows, n=n, G=G, run=run, Ds=Ds, Dt=Dt,
                first_group=g, first_row=first, blocks=blocks, pitch=long, eps=eps, NORMALIZE=normalize,
                **DIGITS._asdict(),
            )  # fmt: skip
            _relation_gram_kernel[(here * pieces * tiles,)](
                planes, grams, D=D, pitch=long, steps=rows // tile.BLOCK_N, share=share, pieces=pieces, tiles=tiles,
                first_row=first, **tile._asdict(),
            )  # fmt: skip
        _relation_factor_kernel[(4 * tiles, here)](
            grams, lost, peaks, partial, f, G=G, D=D, Ds=Ds, first_group=g, pieces=pieces, tiles=tiles, blocks=blocks,
            **factors, scale=scale, BLOCK_D=tile.BLOCK_D, BLOCK=SUM_BLOCK,
        )  # fmt: skip
        if dstudent is not None:
            _relation_gram_apply_kernel[(cdiv(n, apply.BLOCK_M), here)](
                student, teacher, norms, peaks, f, dstudent, s_rows, t_rows, _rows(dstudent, scope), n=n, G=G, run=run,
                Ds=Ds, Dt=Dt, first_group=g, **factors, factor=4 / (G * n * n) / scale, NORMALIZE=normalize,
                **apply._asdict(),
            )  # fmt: skip
    loss = new(1, dtype=torch.float32)
    _sum(loss, [Term(partial, 1 / (G * n * n))])
    return loss.view(())


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
    dstudent = empty_gradient(student, with_grad)
    ds = dstudent if with_grad else None
    if algorithm == "gram":
        return _gram(student, teacher, ds, scope, normalize, eps), dstudent
    alike = Alike([student], [teacher], normalize, eps)
    loss = student.new_empty(1, dtype=torch.float32)
    _sum(loss, [alike.add(scope, None if ds is None else [ds], rectify)])
    return loss.view(()), dstudent


def _alike(students: list[Tensor], teachers: list[Tensor], indices: list[Tensor]) -> list[list[int]]:
    """Return the runs of layers that can share launches: those of equal shapes, dtypes and strides. Indices are made
    contiguous."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for layer, (s, t, index) in enumerate(zip(students, teachers, indices, strict=True)):
        key = (s.shape, s.stride(), s.dtype, t.shape, t.stride(), t.dtype, index.shape)
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
) -> tuple[Tensor, Tensor, list[Tensor]]:
    loss = students[0].new_empty(1, dtype=torch.float32)
    means = students[0].new_empty(3, dtype=torch.float32)
    every = len(students)
    dstudents = [empty_gradient(s, with_grad) for s in students]
    for at, layers in enumerate(_alike(students, teachers, indices)):
        alike = Alike([students[i] for i in layers], [teachers[i] for i in layers], True, 1e-12)
        index = [indices[i].contiguous() for i in layers]
        ds: Sequence[Tensor] | None = None
        before: Sequence[Tensor] | None = None
        drawn: Sequence[Tensor] | None = None
        sums: Sums | None = None
        if with_grad:
            # The three terms are added up before they are rounded, by the last of them.
            ds = [dstudents[i] for i in layers]
            one, sums = alike.s, alike.sums()
            if sums is None:
                before = ds
                if ds[0].dtype != torch.float32:
                    before = one.new_empty((len(layers), *one.shape), dtype=torch.float32).unbind()
            drawn = one.new_empty((len(layers), 1, len(index[0]), alike.Ds), dtype=torch.float32).unbind()
        of_images = alike.add("intra", before, weight=intra / every, sums=sums)
        of_draws = alike.add("batch", drawn, weight=random / every, index=index)
        if drawn is not None:
            alike.scatter(drawn, index, before, sums)
        of_tokens = alike.add("inter", ds, weight=inter / every, before=before, sums=sums)
        terms = [term._replace(scale=term.scale / every) for term in (of_images, of_tokens, of_draws)]
        _sum(loss, terms, (intra, inter, random), means, add=at > 0)
    return loss.view(()), means, dstudents


def manifold_bwd(dloss: Tensor, stored: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    stored = [d.contiguous() for d in stored]
    out = [torch.empty_like(d, dtype=dtype) for d in stored]
    for layers in alike(stored, most=LAYERS):
        elements = stored[layers[0]].numel()
        _relation_scale_kernel[(cdiv(elements, SCALE_BLOCK), len(layers))](
            tuple(stored[i] for i in layers), dloss, tuple(out[i] for i in layers), elements, BLOCK=SCALE_BLOCK
        )
    return out
