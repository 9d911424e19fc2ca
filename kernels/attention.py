"""Attention losses from tiles of scores: no N_q x N_k map beyond a bounded strip, which only averages of heads need.

Scores are z = scale q kᵀ + bias, in units of log 2 under a softmax. Of a row are kept its maxima m, the student's sum
l_s = Σ e^{z_s-m_s} and ρ = l_s / l_t - 1, 16 bytes, from which every pass forms p anew. For KL(a ‖ b):

    Σ_j p_a log(p_a / p_b) = u / l_a + log(l_b / l_a),  u = Σ_j e^{z_a-m_a} ((z_a - m_a) - (z_b - m_b)),
    log(l_b / l_a) = log(1 + x / l_a),                  x = Σ_j e^{z_b-m_b} - e^{z_a-m_a},

both corrected whenever a maximum moves. x is summed by itself so that near a match the two terms keep their digits, and
p_s - p_t = (e_s - e_t - ρ e_t) / l_s is exactly 0 for equal networks. A gradient of the form p (v - Σ p v) needs two
numbers more, c and v_top. Gradients of 16-bit networks go to the matrix units as two terms, high and low: one shows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._attention_bias import _attention_bias_kernel
from ._attention_fused import _attention_fused_kernel
from ._attention_match import _attention_keys_kernel, _attention_rows_kernel
from ._attention_mean import _attention_head_kernel, _attention_mean_kernel, _attention_stats_kernel
from ._attention_rows import LOG2_E
from ._attention_scores import CENTRE_BLOCK, _attention_centre_kernel
from ._attention_tiles import CONFIGS, Tile
from ._common import architecture, blocks, cdiv, float32_products, multiprocessors, stored_gradient

STRIP_BYTES = 64 << 20  # of what averages of heads keep
PARTIAL_BYTES = 32 << 20  # of a bias gradient's partial sums


def _broadcast(x: Tensor | None, ndim: int) -> tuple[int, ...]:
    """Strides, 0 along dimensions of size 1."""
    if x is None:
        return (0,) * ndim
    return tuple(0 if n == 1 else stride for n, stride in zip(x.shape[:ndim], x.stride()[:ndim], strict=True))


def _width(d: int) -> int:
    return max(1 << (d - 1).bit_length(), 16)  # triton.next_power_of_2 takes microseconds


class Operands(NamedTuple):
    """A network in a launch: one argument, because each takes a microsecond. It holds no tuples, of which Triton 3.6
    loses the strides of 1 in loops."""

    q: Tensor  # (B, H, N_q, d)
    q_stride_b: int
    q_stride_h: int
    q_stride_n: int
    q_stride_d: int
    k: Tensor  # (B, H, N_k, d)
    k_stride_b: int
    k_stride_h: int
    k_stride_n: int
    k_stride_d: int
    mean: Tensor  # (B, H, d), of keys; unused unless IS_CENTRED
    bias: Tensor  # (B | 1, H | 1, N_q | 1, N_k | 1); unused unless HAS_BIAS
    bias_stride_b: int
    bias_stride_h: int
    bias_stride_q: int
    bias_stride_k: int
    top: Tensor  # (B | 1, H | 1, N_q | 1), maxima of the bias' rows; unused unless HAS_BIAS
    top_stride_b: int
    top_stride_h: int
    top_stride_q: int
    D: int


class _Network:
    """Arguments of one network in a launch."""

    def __init__(self, q: Tensor, k: Tensor, bias: Tensor | None, scale: float, has_softmax: bool) -> None:
        self.q, self.k, self.scale = q, k, scale
        self.bias = None if has_softmax and bias is not None and bias.shape[3] == 1 else bias  # the same for all keys
        self.top = None if self.bias is None or not has_softmax else self.bias.amax(-1)
        self.has_softmax, self.is_centred = has_softmax, False
        self.mean = q  # a stand-in for what is not read

    def widen(self) -> None:
        """Convert to float32 like the other network: 16-bit beside float32 saves little and spills registers."""
        q = self.q.float()
        self.q, self.k = q, q if self.k is self.q else self.k.float()

    def centre(self, mask: Tensor | None) -> None:
        self.is_centred = self.has_softmax and self.k.dtype == torch.float32
        if not self.is_centred:
            return
        B, H, N_k, D = self.k.shape
        self.mean = self.k.new_empty((B, H, D), dtype=torch.float32)
        BLOCK_D = min(_width(D), 64)
        _attention_centre_kernel[(B * H, cdiv(D, BLOCK_D))](
            self.k, (self.k if mask is None else mask, *_broadcast(mask, 2)), self.mean, self.k.stride(), H, N_k, D,
            HAS_MASK=mask is not None, BLOCK_N=CENTRE_BLOCK, BLOCK_D=BLOCK_D,
        )  # fmt: skip

    def operands(self) -> Operands:
        bias, top = (self.q if x is None else x for x in (self.bias, self.top))  # stand-ins
        return Operands._make((
            self.q, *self.q.stride(), self.k, *self.k.stride(), self.mean,
            bias, *_broadcast(self.bias, 4), top, *_broadcast(self.top, 3), self.q.shape[3],
        ))  # fmt: skip


class _Problem:
    """The arguments that all kernels of a call share, by name."""

    def __init__(
        self,
        student: _Network,
        teacher: _Network,
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
        has_softmax = divergence != "score_mse"
        in_log2 = LOG2_E.value if has_softmax else 1.0
        mask = None if key_mask is None else key_mask.view(torch.uint8)
        networks = (student, teacher)
        itemsize = max(x.itemsize for network in networks for x in (network.q, network.k))
        for network in networks:
            if itemsize == torch.float32.itemsize:
                network.widen()
            network.centre(mask)
        (B, H, N_q, D_s), D_t, N_k = student.q.shape, teacher.q.shape[3], student.k.shape[2]
        self.B, self.H, self.N_q, self.N_k = B, H, N_q, N_k
        precision = "ieee" if itemsize == 2 else float32_products()
        table = CONFIGS[architecture(student.q.device), 2 if itemsize == 2 else precision]
        width, widest = max(_width(D_s), _width(D_t)), max(table)
        is_wide = width > widest
        self.config = table[widest if is_wide else min(w for w in table if w >= width)]
        self.blocks = {
            "BLOCK_DS": widest if is_wide else _width(D_s), "BLOCK_DT": widest if is_wide else _width(D_t)
        }  # fmt: skip
        self.pieces = cdiv(D_s, self.blocks["BLOCK_DS"])
        self.arguments: dict[str, Any] = {
            "student": student.operands(),
            "teacher": teacher.operands(),
            "key_mask": (student.q if mask is None else mask, *_broadcast(mask, 2)),
            "weight": (student.q if weight is None else weight, *_broadcast(weight, 3)),
            "HAS_BIAS_S": student.bias is not None,
            "HAS_BIAS_T": teacher.bias is not None,
            "IS_CENTRED_S": student.is_centred,
            "IS_CENTRED_T": teacher.is_centred,
            "H": H,
            "H_s": H,
            "H_t": teacher.q.shape[1],
            "N_q": N_q,
            "N_k": N_k,
            "rows_total": B * H * N_q,
            "row_start": row_start,
            "row_step": row_step,
            "first_b": 0,
            "first_row": 0,
            "strip_rows": N_q,
            "pitch": 0,
            "scale_s": student.scale * in_log2,
            "scale_t": teacher.scale * in_log2,
            "bias_scale": bias_scale * in_log2,
            "dbias_scale": bias_scale,
            "dq_scale": student.scale,
            "dk_scale": student.scale,
            "factor": factor,
            "inv_keys": 1 / N_k,
            "inv_H": 1 / H,
            "y_ptr": student.q,
            "dlog_ptr": student.q,
            "sum_ptr": student.q,
            "DIVERGENCE": divergence,
            "IS_MEAN": False,
            "HAS_MASK": mask is not None,
            "HAS_WEIGHT": weight is not None,
            "IS_CAUSAL": is_causal,
            "IS_WIDE": is_wide,
            "PRECISION": precision,
        }

    def launch(self, kernel: Any, grid: tuple[int, ...], tile: Tile, **more: Any) -> None:
        """Run a kernel with those of the arguments that it names."""
        arguments = {**self.arguments, **self.blocks, **blocks(tile), **more}
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        if torch.version.hip is not None:
            options["matrix_instr_nonkdim"] = 16  # rows that a warp computes, as elsewhere; 32 would need larger tiles
        kernel[grid](*[arguments[name] for name in kernel.arg_names], **options)

    def fused(self) -> Tile | None:
        """Run the kernel that computes every score once; all keys must fit on chip, and heads must fill the GPU."""
        heads, in_float32 = self.B * self.H, self.student.is_centred or self.teacher.is_centred
        if in_float32 or heads < multiprocessors(self.student.q.device):
            return None
        is_plain = self.student.bias is None and self.teacher.bias is None and self.arguments["DIVERGENCE"] != "js"
        tiles = (*self.config.fused, *self.config.plain) if is_plain else self.config.fused
        return next((tile for tile in tiles if tile.BLOCK_N >= self.N_k), None)

    def strips(self) -> Tile:
        """Return the tile of the kernel that compares networks head by head."""
        has_bias = self.student.bias is not None or self.teacher.bias is not None
        return self.config.narrow if has_bias else self.config.rows

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
    fused = p.fused()
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
    tile = p.strips()
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


def _stats(p: _Problem, network: _Network, scale: float, BLOCK_D: int, planes: int) -> Tensor:
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
    stats_s = _stats(p, p.student, p.arguments["scale_s"], p.blocks["BLOCK_DS"], 4)
    stats_t = _stats(p, p.teacher, p.arguments["scale_t"], p.blocks["BLOCK_DT"], 2)
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
    student = _Network(q_student, k, bias_student, scale_student, has_softmax)
    teacher = _Network(q_teacher, k_teacher, bias_teacher, scale_teacher, has_softmax)
    B, H, N_q = q_student.shape[:3]
    H_out = 1 if heads == "mean" else H
    losses = q_student.new_empty((B, H_out, N_q), dtype=torch.float32)
    dq, dk, dbias = (
        x.new_empty(x.shape if want else (0,), dtype=stored_gradient(x))
        for x, want in zip((q_student, k, losses if bias_student is None else bias_student), wanted, strict=True)
    )
    factor = 1.0
    if reduction == "mean":
        factor = 1 / (B * H_out) if row_weight is not None else 1 / (B * H_out * N_q)
    problem = _Problem(student, teacher, key_mask, row_weight, factor, divergence, bias_scale, is_causal, *rows)
    to_q, to_k, to_bias = (x if want else None for x, want in zip((dq, dk, dbias), wanted, strict=True))
    (_mean if heads == "mean" else _match)(problem, losses, to_q, to_k, to_bias, shared=k_student is None)
    loss = losses if reduction == "none" else losses.sum(dtype=torch.float64).float()
    return loss, dq, dk, dbias
