"""Tile shapes of the relation kernels, by architecture and dtype."""

from dataclasses import dataclass
from typing import NamedTuple

UNSPECIALIZED = (  # that a count is 1 or a multiple of 16, or so an offset's pointer, is not worth a compilation
    "partial_ptr", "loss_ptr", "counts", "total", "tokens", "n", "run", "first_group", "first_tile", "first_row",
    "tiles", "row_tiles", "columns", "groups", "programs", "full", "w_rows", "G", "K", "N",
    "D", "elements", "steps", "share", "pieces", "blocks",
)  # fmt: skip
SUM_BLOCK = 1024
SCALE_BLOCK = 4096
SCATTER_BLOCK = (32, 128)  # drawn rows, columns
NORM_BLOCK = (16, 128)  # rows, columns


class Group(NamedTuple):
    """Short groups: tiles of BLOCK_M rows, products of maps over BLOCK_K; gradients in pieces of BLOCK_D columns, over
    BLOCK_N rows. The last tile has as many rows as the smallest of `tails` that holds them (0: none), else BLOCK_M."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_D: int
    num_warps: int
    num_stages: int
    tails: tuple[int, ...] = (0,)

    def cut(self, n: int) -> tuple[int, int, int]:
        """Return how many full tiles a group of n rows has, the rows of its last tile (0: none), and of all tiles."""
        full, rest = divmod(n, self.BLOCK_M)
        tail = next(size for size in (*self.tails, self.BLOCK_M) if rest <= size)
        full, tail = (full + 1, 0) if tail == self.BLOCK_M else (full, tail)
        return full, tail, full * self.BLOCK_M + tail


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


class Digits(NamedTuple):
    """Digits of Grams: BLOCK_R rows, BLOCK_K columns at a time."""

    BLOCK_R: int
    BLOCK_K: int
    num_warps: int


class Gram(NamedTuple):
    """Tiles of BLOCK_D rows and columns of a Gram matrix, products over BLOCK_N rows of the networks."""

    BLOCK_D: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


class GramApply(NamedTuple):
    """Gradients by Grams: tiles of BLOCK_M rows and BLOCK_D columns, products over BLOCK_K columns of a network."""

    BLOCK_M: int
    BLOCK_K: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Config:
    group: Group | None  # None: groups of any length have maps
    map: Map
    apply: tuple[Apply, ...]  # the first that fills the card, else the last
    map_of_two: Map | None = None  # where W has two terms, if another


# By architecture and bytes of the wider input dtype. 8.x stays below the 99 KB that a block has on a consumer card,
# 10.x within the 512 columns of its tensor memory; a map of 128 rows spills 240 bytes a thread there under Triton 3.6,
# and where W has two terms up to 472 on 9.0, and 160 on 8.x if rows are not aligned. A short group of float32 rows
# would spill on 8.x. On cdna a barrier does not wait for stores to global memory, so that no thread may read what
# others of its program wrote.
CONFIGS: dict[tuple[str, int], Config] = {
    ("8.x", 2): Config(
        Group(64, 32, 32, 64, 8, 2),
        Map(128, 32, 8, 3),
        (Apply(128, 32, 128, 8, 3), Apply(64, 32, 64, 4, 3)),
        Map(64, 32, 4, 3),
    ),
    ("9.0", 2): Config(
        Group(64, 64, 64, 64, 8, 3, (0, 16, 32)),
        Map(128, 64, 8, 3),
        (Apply(128, 64, 128, 8, 3), Apply(64, 64, 64, 4, 3)),
        Map(64, 64, 4, 3),
    ),
    ("10.x", 2): Config(
        Group(64, 32, 32, 64, 8, 2, (0, 16)),
        Map(64, 64, 8, 3),
        (Apply(128, 64, 128, 8, 3), Apply(64, 64, 64, 4, 3)),
    ),
    ("cdna", 2): Config(
        None,
        Map(128, 32, 8, 2),
        (Apply(128, 32, 128, 8, 2), Apply(64, 32, 64, 4, 2)),
    ),
    ("8.x", 4): Config(
        None,
        Map(64, 16, 4, 2),
        (Apply(64, 32, 64, 4, 2),),
    ),
    ("9.0", 4): Config(
        Group(64, 16, 16, 64, 4, 2, (0, 16)),
        Map(64, 32, 4, 2),
        (Apply(64, 32, 64, 4, 2),),
    ),
    ("10.x", 4): Config(
        Group(64, 16, 32, 64, 8, 2),
        Map(64, 32, 8, 2),
        (Apply(64, 32, 64, 4, 2),),
    ),
    ("cdna", 4): Config(
        None,
        Map(64, 32, 4, 2),
        (Apply(64, 32, 64, 4, 2),),
    ),
}

DIGITS = Digits(32, 64, 4)
GRAMS = {
    "8.x": Gram(64, 32, 4, 3),
    "9.0": Gram(64, 64, 4, 3),
    "10.x": Gram(64, 32, 4, 3),
    "cdna": Gram(64, 64, 4, 2),
}
GRAM_APPLIES = {
    "8.x": GramApply(64, 16, 64, 4, 3),
    "9.0": GramApply(128, 16, 64, 8, 3),
    "10.x": GramApply(64, 32, 64, 8, 3),
    "cdna": GramApply(64, 32, 64, 4, 2),
}
# Of rows that are not read in vectors, whose addresses take registers.
UNALIGNED_GRAM_APPLIES = {"8.x": GramApply(32, 16, 64, 4, 3)}
