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
    """Tiles of the kernels. A warp computes 16 rows of a product or more: of more warps than BLOCK_M / 16 (BLOCK_N / 16
    where keys are the rows), several would compute the same ones."""

    rows: Tile  # strips of queries, over keys
    narrow: Tile  # the same, where a bias or averages of heads take registers
    keys: Tile  # strips of keys, over queries
    bias: Tile  # one tile, over images and heads
    mean: Tile  # strips of queries, over keys and heads
    fused: tuple[Tile, ...] = ()  # all keys, up to BLOCK_N, and strips of queries: loss and gradients in one pass
    plain: tuple[Tile, ...] = ()  # more of these, where neither a bias nor js takes registers
    biased: Tile | None = None  # rows with a bias, where narrow ones spill
    wide: Tile | None = None  # the same of heads that are taken in pieces


_AMPERE = {
    64: Config(
        Tile(64, 32, 4, 2), Tile(64, 16, 4, 1), Tile(16, 64, 4, 2), Tile(64, 16, 4, 2), Tile(32, 32, 8, 2),
        (Tile(16, 64, 4, 2),), (Tile(16, 128, 4, 2),),
    ),
}  # fmt: skip
_HOPPER = {
    64: Config(
        Tile(64, 32, 4, 2), Tile(64, 16, 4, 2), Tile(32, 128, 8, 2), Tile(64, 16, 4, 2), Tile(64, 32, 8, 2),
        (Tile(32, 64, 4, 2), Tile(16, 128, 8, 2)), (Tile(16, 256, 8, 2),),
    ),
    128: Config(
        Tile(64, 16, 4, 2), Tile(64, 16, 4, 2), Tile(32, 64, 4, 2), Tile(64, 16, 4, 2), Tile(64, 32, 8, 2)
    ),
}  # fmt: skip
_BLACKWELL = {  # products in tensor memory, of 64 rows at least; smaller ones as on 8.x
    64: Config(
        Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2), Tile(64, 16, 8, 2), Tile(32, 32, 8, 2),
        (Tile(16, 64, 4, 1), Tile(16, 128, 8, 2)),
    ),
    128: Config(
        Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2), Tile(64, 16, 8, 2), Tile(32, 32, 8, 2)
    ),
}  # fmt: skip
_CDNA = {
    64: Config(
        Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(16, 64, 4, 1), Tile(64, 32, 4, 1), Tile(64, 32, 4, 1),
        (Tile(16, 64, 4, 1), Tile(32, 128, 8, 1)),
    ),
    128: Config(
        Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(16, 64, 4, 1), Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)
    ),
}  # fmt: skip
_FLOAT32 = {
    64: Config(
        Tile(32, 16, 8, 1), Tile(32, 16, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 16, 8, 1)
    ),
    128: Config(
        Tile(32, 16, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 32, 8, 1), Tile(32, 16, 8, 1)
    ),
}  # fmt: skip
_FLOAT32_BLACKWELL = {**_FLOAT32, 64: replace(_FLOAT32[64], keys=Tile(16, 32, 4, 1))}
_SHORT = Tile(64, 16, 4, 1)
_SHORT8 = Tile(64, 16, 8, 1)
_TF32_AMPERE = {
    16: Config(_SHORT, _SHORT, Tile(16, 64, 4, 1), _SHORT, _SHORT8),
    64: Config(_SHORT, _SHORT, Tile(16, 64, 4, 1), _SHORT, _SHORT8, biased=Tile(16, 32, 4, 1)),
}
_TF32_HOPPER = {64: Config(_SHORT, _SHORT, Tile(16, 64, 4, 1), _SHORT8, _SHORT8, wide=Tile(16, 32, 4, 1))}
_CDNA_FLOAT32 = {64: Config(_SHORT, _SHORT, Tile(16, 64, 4, 1), _SHORT, _SHORT)}
_TF32_BLACKWELL = {64: Config(_SHORT8, _SHORT8, Tile(16, 64, 8, 1), _SHORT8, _SHORT8, wide=_SHORT)}
# By architecture and how float32 is multiplied, or bytes of the widest input (all are taken as wide), and the widest
# head taken. Heads are padded to a power of two; those wider than the last are taken in pieces.
CONFIGS: dict[tuple[str, int | str], dict[int, Config]] = {
    ("8.x", 2): _AMPERE,
    ("9.0", 2): _HOPPER,
    ("10.x", 2): _BLACKWELL,
    ("cdna", 2): _CDNA,
    **dict.fromkeys((("8.x", "ieee"), ("9.0", "ieee")), _FLOAT32),
    ("10.x", "ieee"): _FLOAT32_BLACKWELL,
    ("8.x", "tf32"): _TF32_AMPERE,
    ("9.0", "tf32"): _TF32_HOPPER,
    ("10.x", "tf32"): _TF32_BLACKWELL,
    ("cdna", "ieee"): _CDNA_FLOAT32,
}
