"""Attention losses from tiles of scores: no N_q x N_k map beyond a bounded strip, which only averages of heads need.

Scores are z = scale q kᵀ + bias, in units of log 2 under a softmax. Of a row are kept its maxima m, the student's sum
l_s = Σ e^{z_s-m_s} and ρ = l_s / l_t - 1, 16 bytes, from which every pass forms p anew. For KL(a ‖ b):

    Σ_j p_a log(p_a / p_b) = u / l_a + log(l_b / l_a),  u = Σ_j e^{z_a-m_a} ((z_a - m_a) - (z_b - m_b)),
    log(l_b / l_a) = log(1 + x / l_a),                  x = Σ_j e^{z_b-m_b} - e^{z_a-m_a},

both corrected whenever a maximum moves. x is summed by itself so that near a match the two terms keep their digits, and
p_s - p_t = (e_s - e_t - ρ e_t) / l_s is exactly 0 for equal networks. A gradient of the form p (v - Σ p v) needs two
numbers more, c and v_top. Gradients of 16-bit networks go to the matrix units as two terms, high and low: one shows.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._attention_bias import _attention_bias_kernel
from ._attention_fused import _attention_fused_kernel
from ._attention_match import _attention_keys_kernel, _attention_rows_kernel
from ._attention_mean import _attention_head_kernel, _attention_mean_kernel, _attention_stats_kernel
from ._attention_operands import Network, strided, width_of
from ._attention_rows import LOG2_E
from ._attention_tiles import CONFIGS, Tile
from ._common import PLANS, architecture, cdiv, empty_gradient, float32_products, multiprocessors

STRIP_BYTES = 64 << 20  # of what averages of heads keep
PARTIAL_BYTES = 32 << 20  # of a bias gradient's partial sums


class _Sizes(NamedTuple):
    """All that the numbers of a call's launches follow from."""

    shape: torch.Size  # of the student's queries
    N_k: int
    H_t: int
    D_t: int
    precision: str
    architecture: str
    multiprocessors: int
    itemsize: int  # of the widest input
    has_bias_s: bool
    has_bias_t: bool
    is_centred_s: bool
    is_centred_t: bool
    has_mask: bool
    has_weight: bool
    scale_s: float
    scale_t: float
    bias_scale: float
    factor: float
    divergence: str
    is_causal: bool
    row_start: int
    row_step: int


class Template(NamedTuple):
    """A kernel's arguments, with None in place of tensors; where each is, and where tensors are; a launch's options."""

    values: list[Any]
    places: dict[str, int]
    of_tensors: list[tuple[str, int]]
    options: dict[str, int]


class _Plan:
    """Tiles and numbers of a call, which are kept by its sizes."""

    def __init__(self, sizes: _Sizes) -> None:
        self.B, self.H, self.N_q, D_s = sizes.shape
        self.N_k, self.sizes = sizes.N_k, sizes
        table = CONFIGS[sizes.architecture, 2 if sizes.itemsize == 2 else sizes.precision]
        width, widest = max(width_of(D_s), width_of(sizes.D_t)), max(table)
        is_wide = width > widest
        self.config = table[widest if is_wide else min(w for w in table if w >= width)]
        self.BLOCK_DS, self.BLOCK_DT = (widest if is_wide else width_of(D) for D in (D_s, sizes.D_t))
        self.pieces = cdiv(D_s, self.BLOCK_DS)
        in_log2 = LOG2_E.value if sizes.divergence != "score_mse" else 1.0
        self.scale_s, self.scale_t = sizes.scale_s * in_log2, sizes.scale_t * in_log2
        self.numbers: dict[str, Any] = {
            "HAS_BIAS_S": sizes.has_bias_s,
            "HAS_BIAS_T": sizes.has_bias_t,
            "IS_CENTRED_S": sizes.is_centred_s,
            "IS_CENTRED_T": sizes.is_centred_t,
            "H": self.H,
            "H_s": self.H,
            "H_t": sizes.H_t,
            "N_q": self.N_q,
            "N_k": self.N_k,
            "rows_total": self.B * self.H * self.N_q,
            "row_start": sizes.row_start,
            "row_step": sizes.row_step,
            "first_b": 0,
            "first_row": 0,
            "strip_rows": self.N_q,
            "pitch": 0,
            "scale_s": self.scale_s,
            "scale_t": self.scale_t,
            "bias_scale": sizes.bias_scale * in_log2,
            "dbias_scale": sizes.bias_scale,
            "dq_scale": sizes.scale_s,
            "dk_scale": sizes.scale_s,
            "factor": sizes.factor,
            "inv_keys": 1 / self.N_k,
            "inv_H": 1 / self.H,
            "DIVERGENCE": sizes.divergence,
            "IS_MEAN": False,
            "HAS_MASK": sizes.has_mask,
            "HAS_WEIGHT": sizes.has_weight,
            "IS_CAUSAL": sizes.is_causal,
            "IS_WIDE": is_wide,
            "PRECISION": sizes.precision,
            "BLOCK_DS": self.BLOCK_DS,
            "BLOCK_DT": self.BLOCK_DT,
        }
        self.fused = self._fused()
        has_bias = sizes.has_bias_s or sizes.has_bias_t
        biased = (self.config.wide if is_wide else None) or self.config.biased or self.config.narrow
        self.strips = biased if has_bias else self.config.rows  # compares networks head by head
        self._templates: dict[tuple[int, Tile], Template] = {}

    def _fused(self) -> Tile | None:
        """Return the tile of the kernel that computes every score once; whole heads and all keys must fit on chip, and
        heads must fill the GPU."""
        sizes = self.sizes
        if self.numbers["IS_WIDE"] or sizes.is_centred_s or sizes.is_centred_t:
            return None
        if self.B * self.H < sizes.multiprocessors:
            return None
        is_plain = not sizes.has_bias_s and not sizes.has_bias_t and sizes.divergence != "js"
        tiles = (*self.config.fused, *self.config.plain) if is_plain else self.config.fused
        return next((tile for tile in tiles if tile.BLOCK_N >= self.N_k), None)

    def template(self, kernel: Any, tile: Tile, tensors: dict[str, Any], more: dict[str, Any]) -> Template:
        """Return what a kernel's launches have in common.

        Raises:
            KeyError: the kernel takes an argument that is neither a number of the plan nor given.
        """
        found = self._templates.get((id(kernel), tile))
        if found is None:
            named = {**dict.fromkeys(tensors), **self.numbers, "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N}
            named = {**dict.fromkeys(more), **named}
            options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
            if self.sizes.architecture == "cdna":
                options["matrix_instr_nonkdim"] = 16  # rows that a warp computes, as elsewhere; 32 needs larger tiles
            places = {name: at for at, name in enumerate(kernel.arg_names)}
            of_tensors = [(name, places[name]) for name in tensors if name in places]
            found = Template([named[name] for name in kernel.arg_names], places, of_tensors, options)
            self._templates[id(kernel), tile] = found
        return found


_plan = lru_cache(PLANS)(_Plan)


class _Problem:
    """The tensors that all kernels of a call share, and its plan."""

    def __init__(
        self,
        student: Network,
        teacher: Network,
        key_mask: Tensor | None,
        weight: Tensor | None,
        factor: float,
        divergence: str,
        bias_scale: float,
        is_causal: bool,
        row_start: int,
        row_step: int,
    ) -> None:
        self.student, self.teacher = student, teacher
        mask = None if key_mask is None else key_mask.view(torch.uint8)
        itemsize = max(student.q.itemsize, student.k.itemsize, teacher.q.itemsize, teacher.k.itemsize)
        for network in (student, teacher):
            if itemsize == torch.float32.itemsize:
                network.widen()
            network.centre(mask)
        q, q_t = student.q, teacher.q
        self.B, self.H, self.N_q, _ = q.shape
        self.N_k = student.k.shape[2]
        self.plan = _plan(_Sizes(
            q.shape, self.N_k, q_t.shape[1], q_t.shape[3], "ieee" if itemsize == 2 else float32_products(),
            architecture(q.device), multiprocessors(q.device), itemsize, student.bias is not None,
            teacher.bias is not None, student.is_centred, teacher.is_centred, mask is not None, weight is not None,
            student.scale, teacher.scale, bias_scale, factor, divergence, is_causal, row_start, row_step,
        ))  # fmt: skip
        self.config, self.pieces = self.plan.config, self.plan.pieces
        # y, dlog and sum: stand-ins of what a launch may not have
        self.tensors = {
            "student": student.operands(), "teacher": teacher.operands(), "key_mask": strided(mask, 2),
            "weight": strided(weight, 3), "y_ptr": q, "dlog_ptr": q, "sum_ptr": q,
        }  # fmt: skip

    def launch(self, kernel: Any, grid: tuple[int, ...], tile: Tile, **more: Any) -> None:
        """Run a kernel with those of the arguments that it names."""
        values, places, of_tensors, options = self.plan.template(kernel, tile, self.tensors, more)
        values = values.copy()
        for name, at in of_tensors:
            values[at] = self.tensors[name]
        for name, value in more.items():
            if name in places:
                values[places[name]] = value
        kernel[grid](*values, **options)

    def tiles(self, rows: int, columns: int, tile: Tile) -> dict[str, int]:
        return {"q_tiles": cdiv(rows, tile.BLOCK_M), "k_tiles": cdiv(columns, tile.BLOCK_N)}

    def keys(self, dk: Tensor, total: Tensor | None, images: int, **more: Any) -> None:
        """dk, plus total where that is given."""
        tile = self.config.keys
        tiles = cdiv(self.N_k, tile.BLOCK_N)
        added = {"sum_ptr": dk if total is None else total, "IS_ADDED": total is not None}
        self.launch(_attention_keys_kernel, (images * self.H * tiles, self.pieces), tile,
                    k_tiles=tiles, dk_ptr=dk, **added, **more)  # fmt: skip

    def bias_sums(self, dbias: Tensor) -> Tensor:
        """(splits, *bias): room for the partial sums of a bias' gradient, as many as fill the card."""
        tiles = self.tiles(1 if dbias.shape[2] == 1 else self.N_q, 1 if dbias.shape[3] == 1 else self.N_k,
                           self.config.bias)  # fmt: skip
        programs = dbias.shape[0] * dbias.shape[1] * tiles["q_tiles"] * tiles["k_tiles"]
        splits = min(4 * multiprocessors(dbias.device) // programs, PARTIAL_BYTES // (4 * dbias.numel()), 65535)
        return dbias.new_zeros((max(splits, 1), *dbias.shape), dtype=torch.float32)

    def bias(self, partial: Tensor, images: int, **more: Any) -> None:
        """Add the gradient of a strip of rows to partial sums (splits, B | 1, H | 1, N_q | 1, N_k | 1)."""
        splits, *shape = partial.shape
        tile = self.config.bias
        rows = more.get("strip_rows", self.N_q)
        # A dimension that is 1 on both sides is not summed over, and one of size 1 in a strip of images may be.
        sums = {f"SUM_{letter}": n == 1 for letter, n in zip("BHQK", shape, strict=True)}
        tiles = self.tiles(rows, self.N_k, tile)
        whole = {"B": images, "H": self.H, "Q": tiles["q_tiles"], "K": tiles["k_tiles"]}
        programs = steps = 1
        for letter, n in whole.items():
            if sums[f"SUM_{letter}"]:
                steps *= n
            else:
                programs *= n
        self.launch(_attention_bias_kernel, (programs, splits), tile, partial_ptr=partial, B_bias=shape[0],
                    H_bias=shape[1], steps=steps, per_split=cdiv(steps, splits),
                    bias_numel=partial[0].numel(), **sums, **tiles, **more)  # fmt: skip


def _match(p: _Problem, loss: Tensor, dq: Tensor | None, dk: Tensor | None, dbias: Tensor | None, shared: bool) -> None:
    """Row losses (B, H, N_q) and the gradients wanted, head by head. shared: keys are the queries, and dq is all."""
    q = p.student.q
    fused = p.plan.fused
    if dbias is None and (dq is not None or dk is not None) and fused is not None:
        d_queries, d_keys = dq, dk
        if shared and dq is not None:  # rounded once, as their sum
            d_queries, d_keys = (torch.empty_like(dq, dtype=torch.float32) for _ in range(2))
        p.launch(_attention_fused_kernel, (p.B * p.H,), fused, loss_ptr=loss,
                 dq_ptr=loss if d_queries is None else d_queries, dk_ptr=loss if d_keys is None else d_keys,
                 HAS_DQ=d_queries is not None, HAS_DK=d_keys is not None)  # fmt: skip
        if shared and d_queries is not None and d_keys is not None:
            torch.add(d_queries, d_keys, out=dq)
        return
    tile = p.plan.strips
    tiles = cdiv(p.N_q, tile.BLOCK_M)
    stats = q.new_empty((6, p.B, p.H, p.N_q), dtype=torch.float32)
    part = dq
    if shared and dq is not None and dq.dtype != torch.float32:
        part = torch.empty_like(dq, dtype=torch.float32)  # one rounding, of the sum
    p.launch(_attention_rows_kernel, (p.B * p.H * tiles, 1 if dq is None else p.pieces), tile, q_tiles=tiles,
             loss_ptr=loss, stats_ptr=stats, dq_ptr=loss if part is None else part, HAS_DQ=dq is not None)  # fmt: skip
    if shared and dq is not None:
        p.keys(dq, part, p.B, stats_ptr=stats)
    elif dk is not None:
        p.keys(dk, None, p.B, stats_ptr=stats)
    if dbias is not None:
        partial = p.bias_sums(dbias)
        p.bias(partial, p.B, stats_ptr=stats)
        dbias.copy_(partial.sum(0))


def _stats(p: _Problem, network: Network, scale: float, BLOCK_D: int, planes: int) -> Tensor:
    """(planes, B, H, N_q): m, l, and room."""
    B, H, N_q, _ = network.q.shape
    stats = network.q.new_empty((planes, B, H, N_q), dtype=torch.float32)
    tile = p.config.narrow
    tiles = cdiv(N_q, tile.BLOCK_M)
    p.launch(_attention_stats_kernel, (B * H * tiles,), tile, network=network.operands(), stats_ptr=stats,
             scale=scale, H=H, q_tiles=tiles, rows_total=B * H * N_q, HAS_BIAS=network.bias is not None,
             IS_CENTRED=network.is_centred, BLOCK_D=BLOCK_D)  # fmt: skip
    return stats


def _mean(p: _Problem, loss: Tensor, dq: Tensor | None, dk: Tensor | None, dbias: Tensor | None, shared: bool) -> None:
    """The same for maps averaged over heads, loss (B, 1, N_q): strip by strip, of which averages are kept."""
    q = p.student.q
    stats_s = _stats(p, p.student, p.plan.scale_s, p.plan.BLOCK_DS, 4)
    stats_t = _stats(p, p.teacher, p.plan.scale_t, p.plan.BLOCK_DT, 2)
    has_grad = dq is not None or dk is not None or dbias is not None
    budget = max(STRIP_BYTES // (8 * p.N_k), p.config.narrow.BLOCK_M) if has_grad else p.B * p.N_q
    images, rows = max(min(budget // p.N_q, p.B), 1), min(budget, p.N_q)
    y, dlog = (q.new_empty((images, rows, p.N_k) if has_grad else (1,), dtype=torch.float32) for _ in range(2))
    dkeys = dq if shared else dk
    total = None
    if dkeys is not None and (shared or rows < p.N_q):
        total = torch.zeros_like(dkeys, dtype=torch.float32)
    partial = None if dbias is None else p.bias_sums(dbias)
    dqueries = total if shared else dq

    mean, tile = p.config.mean, p.config.narrow
    for b in range(0, p.B, images):
        for r in range(0, p.N_q, rows):
            here, tall = min(images, p.B - b), min(rows, p.N_q - r)
            mean_tiles, tiles = (cdiv(tall, x.BLOCK_M) for x in (mean, tile))
            strip = {"first_b": b, "first_row": r, "strip_rows": tall, "pitch": p.N_k, "y_ptr": y, "dlog_ptr": dlog}
            p.launch(_attention_mean_kernel, (here * mean_tiles,), mean, loss_ptr=loss, stats_ptr=stats_s,
                     stats_t_ptr=stats_t, rows_s=stats_s[0].numel(), rows_t=stats_t[0].numel(), HAS_GRAD=has_grad,
                     q_tiles=mean_tiles, **strip)  # fmt: skip
            if not has_grad:
                continue
            strip |= {"stats_ptr": stats_s}
            p.launch(_attention_head_kernel, (here * p.H * tiles, 1 if dqueries is None else p.pieces), tile,
                     dq_ptr=y if dqueries is None else dqueries, HAS_DQ=dqueries is not None, IS_ADDED=shared,
                     q_tiles=tiles, **strip)  # fmt: skip
            if dkeys is not None:
                p.keys(dkeys if total is None else total, total, here, IS_MEAN=True, **strip)
            if partial is not None:
                p.bias(partial, here, IS_MEAN=True, **strip)
    if dkeys is not None and total is not None:
        dkeys.copy_(total)
    if dbias is not None and partial is not None:
        dbias.copy_(partial.sum(0))


def attention_fwd(
    q_student: Tensor,
    k_student: Tensor | None,
    q_teacher: Tensor,
    k_teacher: Tensor,
    bias_student: Tensor | None,
    bias_teacher: Tensor | None,
    key_mask: Tensor | None,
    row_weight: Tensor | None,
    reduction: str,
    algorithm: str,
    divergence: str,
    heads: str,
    scales: list[float],
    is_causal: bool,
    rows: list[int],
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Algorithm "tile" alone: ops sends "gram", which is PyTorch operations, to the eager backend."""
    k = q_student if k_student is None else k_student
    scale_student, scale_teacher, bias_scale = scales
    has_softmax = divergence != "score_mse"
    student = Network(q_student, k, bias_student, scale_student, has_softmax)
    teacher = Network(q_teacher, k_teacher, bias_teacher, scale_teacher, has_softmax)
    B, H, N_q, _ = q_student.shape
    H_out = 1 if heads == "mean" else H
    losses = q_student.new_empty((B, H_out, N_q), dtype=torch.float32)
    with_dq, with_dk, with_dbias = wanted
    dq, dk = empty_gradient(q_student, with_dq), empty_gradient(k, with_dk)
    dbias = empty_gradient(losses if bias_student is None else bias_student, with_dbias)
    factor = 1.0
    if reduction == "mean":
        factor = 1 / (B * H_out) if row_weight is not None else 1 / (B * H_out * N_q)
    problem = _Problem(student, teacher, key_mask, row_weight, factor, divergence, bias_scale, is_causal, *rows)
    (_mean if heads == "mean" else _match)(
        problem,
        losses,
        dq if with_dq else None,
        dk if with_dk else None,
        dbias if with_dbias else None,
        shared=k_student is None,
    )
    loss = losses if reduction == "none" else losses.sum(dtype=torch.float64).float()
    return loss, dq, dk, dbias
