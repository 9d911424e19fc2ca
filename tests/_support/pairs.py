"""Options tested together: every pair of values in some call, in as few calls as that takes."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest


def pairs(
    options: dict[str, Sequence[Any]], *, allowed: Callable[[dict[str, Any]], bool] = lambda _: True
) -> list[dict[str, Any]]:
    """Calls that together hold every allowed pair of values of two options.

    `allowed` is asked of calls of which some options may still be missing.
    """
    names = list(options)

    def is_allowed(row: Sequence[Any]) -> bool:
        return allowed(dict(zip(names, row, strict=False)))

    values = [list(each) for each in options.values()]
    return [dict(zip(names, row, strict=True)) for row in greedy(values, is_allowed)]


def greedy(values: list[list[Any]], is_allowed: Callable[[Sequence[Any]], bool]) -> Iterator[list[Any]]:
    """Yield rows that hold all allowed pairs: for each pair left the first allowed row, greedy in the other options."""
    places = [range(len(each)) for each in values]
    left = {
        (i, a, j, b) for i, j in itertools.combinations(range(len(places)), 2) for a in places[i] for b in places[j]
    }

    def new(row: dict[int, int], at: int, value: int) -> tuple[int, int]:
        """How many pairs a value adds to a row, and how many it has left in all."""
        own = sum(((i, a, at, value) if i < at else (at, value, i, a)) in left for i, a in row.items())
        return own, sum((at, value) in (pair[:2], pair[2:]) for pair in left)

    def complete(fixed: dict[int, int], row: tuple[int, ...] = ()) -> tuple[int, ...] | None:
        """The first allowed row with those positions, values that add most pairs tried first."""
        if not is_allowed([values[i][a] for i, a in enumerate(row)]):
            return None
        at = len(row)
        if at == len(places):
            return row
        chosen = fixed | dict(enumerate(row))
        choices = sorted([fixed[at]] if at in fixed else places[at], key=lambda b: new(chosen, at, b), reverse=True)
        return next((found for b in choices if (found := complete(fixed, (*row, b)))), None)

    for i, a, j, b in sorted(left):
        if (i, a, j, b) in left and (row := complete({i: a, j: b})):
            left -= {(m, row[m], n, row[n]) for m, n in itertools.combinations(range(len(row)), 2)}
            yield [values[m][c] for m, c in enumerate(row)]


def in_pairs(
    options: dict[str, Sequence[Any]], *, allowed: Callable[[dict[str, Any]], bool] = lambda _: True
) -> pytest.MarkDecorator:
    """Parametrize a test by such calls, each option an argument of its own: `@in_pairs({"dtype": DTYPES})`."""
    calls = pairs(options, allowed=allowed)
    ids = ["-".join(str(value).removeprefix("torch.") for value in call.values()) for call in calls]
    return pytest.mark.parametrize(tuple(options), [tuple(call.values()) for call in calls], ids=ids)
