"""Chunk sizes and sums, shared by all eager forms."""

from torch import Tensor

CHUNK = 1 << 21  # elements of a temporary: 8 MB in float32


def chunks(total: int, elements_each: int, most: int | None = None) -> range:
    """Return the starts of pieces of at most `most` (CHUNK) elements, for `total` items of `elements_each` elements."""
    return range(0, total, max(1, (CHUNK if most is None else most) // max(1, elements_each)))


def not_negative(total: Tensor) -> Tensor:
    """A sum >= 0 that cancellation and rounding can take below 0. NaN passes through."""
    return total.clamp_min(0)
