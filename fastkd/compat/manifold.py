"""Losses of Hao et al.'s manifold distillation (manifold-distillation/losses.py)."""

from collections.abc import Sequence

from torch import Tensor

from fastkd import functional as F
from fastkd.functional.relation import manifold_layers
from fastkd.ops import _checks as check
from fastkd.ops.relation import ManifoldCall


def layer_mf_loss(F_s: Tensor, F_t: Tensor, K: int, *, index: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms of Hao et al. 2022 under the name and signature of their code (losses.py, layer_mf_loss).

    Args:
        F_s: (B, N, Ds) student tokens. Differentiable.
        F_t: (B, N, Dt) teacher tokens. A constant.
        K: rows of the random term; all of them where K > B*N.
        index: (K,) int64 rows to take instead of drawing them (not in the original).

    Returns:
        (patch, sample, rand): the intra, inter and random terms, unweighted element means.

    Raises:
        ValueError: as fastkd.manifold_loss; a teacher that requires a gradient; token counts that differ
            (the original slices and silently relates the wrong tokens when only the teacher has a class token).
    """
    _, terms = F.manifold_loss(F_s, F_t, num_samples=K, index=index, return_terms=True)
    return terms


def _merge(name: str, x: Tensor, max_patch_num: int) -> Tensor:
    """(B, P, C) -> (B, m², P/m² C): the tokens of a cell end to end, row by row, where P exceeds max_patch_num."""
    B, P, _ = x.shape
    if max_patch_num == 0 or max_patch_num >= P:
        return x
    n, m = check.root(P), int(max_patch_num**0.5)  # no isqrt: under torch.compile(dynamic=True) both are symbolic
    if n * n != P or n % m != 0:
        raise ValueError(
            f"{name} has {P} tokens, which max_patch_num = {max_patch_num} cannot merge: needs a square grid, without "
            f"class tokens, whose side is a multiple of {m}"
        )
    cells = x.unflatten(1, (m, n // m, m, n // m))
    return cells.transpose(2, 3).reshape(B, m * m, -1)


def mf_loss(
    block_outs_s: Sequence[Tensor],
    block_outs_t: Sequence[Tensor],
    layer_ids_s: Sequence[int],
    layer_ids_t: Sequence[int],
    K: int,
    w_sample: float | None = None,
    w_patch: float | None = None,
    w_rand: float | None = None,
    max_patch_num: int = 0,
    *,
    indices: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The manifold loss of matched layers under the name and signature of Hao et al.'s code (losses.py, mf_loss).

    The student's leading tokens that the teacher lacks (n_s - n_t of block 0) are dropped in every block. A grid of
    more than max_patch_num tokens is merged to isqrt(max_patch_num)² cells, in which tokens are joined end to end.

    Args:
        block_outs_s: the student's block outputs, each (B, n, Ds). Differentiable.
        block_outs_t: the teacher's, each (B, n', Dt). Constants.
        layer_ids_s, layer_ids_t: indices of the matched blocks, in pairs.
        K: rows of the random term, drawn anew for each pair.
        w_sample, w_patch, w_rand: weights >= 0 of the returned terms: all three, or none of them for 1 each. Give
            max_patch_num by name if you leave them out.
        max_patch_num: largest number of tokens; 0 merges nothing.
        indices: per pair the rows (K,) to take instead of drawing them (not in the original).

    Returns:
        (sample, patch, rand): the weighted means over the pairs, in the order of the original (layer_mf_loss has
        another).

    Raises:
        TypeError: some but not all weights.
        ValueError: lists of ids of unequal length (the original drops the rest) or without a pair; a teacher with
            more tokens than the student (the original then relates the wrong ones); tokens that cannot be merged.
        TypeError, ValueError, RuntimeError: as fastkd.manifold_loss.
    """
    if w_sample is None and w_patch is None and w_rand is None:
        w_sample = w_patch = w_rand = 1.0
    if w_sample is None or w_patch is None or w_rand is None:
        weights = (w_sample, w_patch, w_rand)
        raise TypeError(f"w_sample, w_patch, w_rand belong together: give all or none of them, got {weights}")
    for name, weight in (("w_sample", w_sample), ("w_patch", w_patch), ("w_rand", w_rand)):
        check.number(name, weight, low=0)
    if not isinstance(max_patch_num, int) or max_patch_num < 0:
        raise ValueError(f"max_patch_num must be an int >= 0, got {max_patch_num!r}")
    if len(layer_ids_s) != len(layer_ids_t):
        raise ValueError(
            f"layer_ids_s and layer_ids_t must match in pairs, got {len(layer_ids_s)} and {len(layer_ids_t)}"
        )
    for name, blocks in (("block_outs_s", block_outs_s), ("block_outs_t", block_outs_t)):
        for i, x in enumerate(blocks):
            check.tensor(f"{name}[{i}]", x, 3, "(B, N, D)")
    extra = block_outs_s[0].shape[1] - block_outs_t[0].shape[1]
    if extra < 0:
        raise ValueError(
            f"block_outs_t has {-extra} tokens more than block_outs_s ({block_outs_t[0].shape[1]} and "
            f"{block_outs_s[0].shape[1]}): drop the teacher's class tokens first"
        )
    students = [_merge("block_outs_s", block_outs_s[i][:, extra:], max_patch_num) for i in layer_ids_s]
    teachers = [_merge("block_outs_t", block_outs_t[i], max_patch_num) for i in layer_ids_t]
    call = ManifoldCall(
        students, teachers, intra=1.0, inter=1.0, random=1.0, num_samples=K, indices=indices, return_terms=True
    )
    _, (patch, sample, rand) = manifold_layers(call, None)
    return w_sample * sample, w_patch * patch, w_rand * rand
