"""What the chunked forms share."""

CHUNK = 1 << 21  # elements of a temporary: 8 MB in float32


def chunks(total: int, elements_each: int) -> range:
    """Starting points that cut `total` items of `elements_each` elements into pieces of at most CHUNK."""
    return range(0, total, max(1, CHUNK // max(1, elements_each)))
