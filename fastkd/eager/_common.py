"""Chunk sizes, shared by all eager forms."""

CHUNK = 1 << 21  # elements of a temporary: 8 MB in float32


def chunks(total: int, elements_each: int) -> range:
    """Return the starts of pieces of at most CHUNK elements, for `total` items of `elements_each` elements."""
    return range(0, total, max(1, CHUNK // max(1, elements_each)))
