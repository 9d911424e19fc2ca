"""Tile shapes of the attention kernels, by architecture and dtype."""

from dataclasses import dataclass, replace
from typing import NamedTuple

UNSPECIALIZED = (  # that a count is 1 or a multiple of 16 is not worth a compilation
    "H", "N_q", "N_k", "rows_total", "row_start", "row_step", "first_b", "first_row", "strip_rows", "H_s", "H_t",
    "pitch", "B_bias", "H_bias", "steps", "per_split", "q_tiles", "k_tiles", "bias_numel",
)  # fmt: skip


class Tile(NamedTuple):
    """Scores of BLOCK_M queries and BLOCK_N keys."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Config:
    rows: Tile  # strips of queries, over keys
    keys: Tile  # strips of keys, over queries
    bias: Tile  # one tile, over images and heads
    mean: Tile  # strips of queries, over keys and heads
    fused: tuple[Tile, ...] = ()  # all keys, up to BLOCK_N, and strips of queries: loss and gradients in one pass


_LARGE = {
    64: Config(
        Tile(64, 64, 8, 2), Tile(32, 128, 8, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 2),
        (Tile(32, 64, 4, 2), Tile(16, 128, 8, 2)),
    ),
    128: Config(Tile(64, 32, 8, 2), Tile(32, 64, 8, 2), Tile(32, 32, 4, 2), Tile(64, 32, 8, 2)),
}  # fmt: skip


_SMALL = {
    64: Config(
        Tile(64, 32, 8, 2), Tile(32, 64, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 8, 2),
        (Tile(16, 64, 4, 2), Tile(16, 128, 8, 2)),
    ),
    128: Config(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
}  # fmt: skip
_CDNA = {
    64: Config(
        Tile(64, 32, 8, 1), Tile(16, 32, 4, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1),
        (Tile(16, 64, 4, 1), Tile(16, 128, 8, 1)),
    ),
    128: Config(Tile(32, 32, 8, 1), Tile(16, 32, 4, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
}  # fmt: skip
_FLOAT32 = {
    64: Config(Tile(32, 16, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 16, 8, 1)),
    128: Config(Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 32, 8, 1), Tile(32, 16, 8, 1)),
}
_TINY = Tile(16, 16, 4, 1)
# By architecture, bytes of the widest input (all are taken as wide) and the widest head taken. Heads are padded to a
# power of two; those wider than the last are taken in pieces.
CONFIGS: dict[tuple[str, int], dict[int, Config]] = {
    ("8.x", 2): _SMALL,
    ("9.0", 2): _LARGE,
    ("10.x", 2): _LARGE | {64: replace(_LARGE[64], keys=Tile(32, 64, 8, 2), bias=Tile(64, 32, 8, 2))},
    ("cdna", 2): _CDNA,
    ("8.x", 4): _FLOAT32,
    ("9.0", 4): _FLOAT32,
    ("10.x", 4): _FLOAT32,
    ("cdna", 4): dict.fromkeys((64, 128), Config(_TINY, _TINY, _TINY, _TINY)),
}
