"""Tile shapes of the relation kernels, by architecture and dtype."""

from dataclasses import dataclass
from typing import NamedTuple

UNSPECIALIZED = (  # that a count is 1 or a multiple of 16, or so an offset's pointer, is not worth a compilation
    "partial_ptr", "loss_ptr", "total", "n", "run", "first_group", "first_tile", "first_row", "tiles", "row_tiles",
    "columns", "strips", "count", "G", "K", "N",
)  # fmt: skip
SUM_BLOCK = 1024
SCATTER_BLOCK = (32, 128)  # drawn rows, columns
NORM_BLOCK = (16, 128)  # rows, columns


class Map(NamedTuple):
    """Tiles of the difference map: BLOCK_M rows and columns, products over BLOCK_K."""

    BLOCK_M: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class Apply(NamedTuple):
    """W S: tiles of BLOCK_M rows and BLOCK_D columns, products over BLOCK_N rows of S."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


class Fused(NamedTuple):
    """Both in one: BLOCK_M rows of U = W S stay in registers as cdiv(Ds, BLOCK_D) <= 4 accumulators."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Config:
    map: Map
    apply: tuple[Apply, ...]  # the first that fills the card, else the last
    fused: dict[int, Fused]  # by the widest student it takes


# By architecture and how float32 is multiplied, or bytes of the wider input dtype. 8.x stays below the 99 KB that a
# block has on a consumer card, 10.x within the 512 columns of its tensor memory; a map of 128 rows spills 240 bytes a
# thread there under Triton 3.6. A warp computes 16 rows of a product or more: of more warps than BLOCK_M / 16, several
# would compute the same rows of a fused kernel.
CONFIGS: dict[tuple[str, int | str], Config] = {
    ("8.x", 2): Config(
        Map(128, 32, 8, 3),
        (Apply(128, 32, 128, 8, 3), Apply(64, 32, 64, 4, 3)),
        {256: Fused(64, 32, 32, 64, 4, 3)},
    ),
    ("9.0", 2): Config(
        Map(128, 64, 8, 3),
        (Apply(128, 64, 128, 8, 3), Apply(64, 64, 64, 4, 3)),
        {256: Fused(64, 32, 64, 64, 4, 3)},
    ),
    ("10.x", 2): Config(
        Map(64, 64, 8, 3),
        (Apply(128, 64, 128, 8, 3), Apply(64, 64, 64, 4, 3)),
        {256: Fused(64, 64, 64, 64, 8, 3), 384: Fused(64, 32, 64, 128, 8, 3)},
    ),
    ("cdna", 2): Config(
        Map(128, 32, 8, 2),
        (Apply(128, 32, 128, 8, 2), Apply(64, 32, 64, 4, 2)),
        {256: Fused(64, 64, 32, 64, 4, 2), 384: Fused(64, 64, 32, 128, 4, 2)},
    ),
    **dict.fromkeys(
        (("8.x", "ieee"), ("9.0", "ieee"), ("10.x", "ieee")),
        Config(
            Map(64, 16, 4, 3),
            (Apply(64, 16, 64, 4, 3), Apply(32, 16, 32, 2, 3)),
            {256: Fused(32, 16, 16, 64, 8, 3), 384: Fused(32, 16, 16, 128, 8, 3)},
        ),
    ),
    **dict.fromkeys(
        (("8.x", "tf32"), ("9.0", "tf32"), ("10.x", "tf32")),
        Config(
            Map(64, 16, 4, 3),
            (Apply(64, 16, 64, 4, 3), Apply(32, 16, 32, 2, 3)),
            {256: Fused(64, 16, 16, 64, 4, 3)},
        ),
    ),
    ("cdna", "ieee"): Config(
        Map(64, 16, 4, 2),
        (Apply(64, 16, 64, 4, 2), Apply(32, 16, 32, 1, 2)),
        {256: Fused(32, 16, 16, 64, 8, 2)},
    ),
}
