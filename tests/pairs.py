"""Options tested together: every pair of values in some call, in as few calls as that takes."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from allpairspy import AllPairs


def pairs(
    options: dict[str, Sequence[Any]], *, allowed: Callable[[dict[str, Any]], bool] = lambda _: True
) -> list[dict[str, Any]]:
    """Calls that together hold every allowed pair of values of two options.

    `allowed` is asked of calls of which some options may still be missing.
    """
    names = list(options)
    rows = AllPairs(list(options.values()), filter_func=lambda row: allowed(dict(zip(names, row, strict=False))))
    return [dict(zip(names, row, strict=True)) for row in rows]


def in_pairs(
    options: dict[str, Sequence[Any]], *, allowed: Callable[[dict[str, Any]], bool] = lambda _: True
) -> pytest.MarkDecorator:
    """Parametrize a test by such calls, each option an argument of its own: `@in_pairs({"dtype": DTYPES})`."""
    calls = pairs(options, allowed=allowed)
    ids = ["-".join(str(value).removeprefix("torch.") for value in call.values()) for call in calls]
    return pytest.mark.parametrize(tuple(options), [tuple(call.values()) for call in calls], ids=ids)
