"""Every allowed pair of values is in some call."""

import itertools

from tests._support.pairs import pairs

OPTIONS = {"a": [1, 2, 3], "b": "xyz", "c": [True, False], "d": [None, 0.5]}


def allowed(call: dict[str, object]) -> bool:
    return not (call.get("a") == 1 and call.get("b") == "x") and not (call.get("c") and call.get("d") == 0.5)


def test_every_allowed_pair_is_in_some_call() -> None:
    calls = pairs(OPTIONS, allowed=allowed)
    product = [dict(zip(OPTIONS, row, strict=True)) for row in itertools.product(*OPTIONS.values())]

    def held(rows: list[dict[str, object]]) -> set[tuple[object, ...]]:
        return {pair for row in rows for pair in itertools.combinations(row.items(), 2)}

    assert held(calls) == held([row for row in product if allowed(row)])
    assert all(allowed(call) for call in calls) and len(calls) < sum(map(allowed, product))
