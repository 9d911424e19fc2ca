"""Compare time, memory and error of two runs: python -m benchmarks compare BEFORE AFTER."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
TABLES = ("cases", "dropins")
SAME = ("machine", "gpu", "versions")


class Change(NamedTuple):
    """A change of one figure, in the unit of `what`. worse: by more than the threshold and more than the scatter."""

    case: str
    provider: str
    what: str
    before: float
    after: float
    worse: bool

    @property
    def ratio(self) -> float:
        return self.after / self.before if self.before else float("inf")


def _rows(results: Row) -> Iterator[Row]:
    for table in TABLES:
        yield from results.get(table, ())


def _providers(results: Row) -> dict[tuple[str, str], Row]:
    return {(row["case"], name): p for row in _rows(results) for name, p in row["providers"].items()}


def _apart(before: Row, after: Row) -> bool:
    """Return whether the middle three fifths of the times do not overlap."""
    return bool(after["p20"] > before["p80"])


def changes(before: Row, after: Row, threshold: float, only: str = "fastkd") -> Iterator[Change]:
    """Return the changes of a provider that is in both runs. A new failure counts as infinitely slow."""
    old, new = _providers(before), _providers(after)
    for (case, name), a in old.items():
        b = new.get((case, name))
        if b is None or only not in (name, "all"):
            continue
        if "median" in a:
            if "median" not in b:
                yield Change(case, name, "time", a["median"], float("inf"), True)
                continue
            worse = b["median"] > (1 + threshold) * a["median"] and _apart(a, b)
            yield Change(case, name, "time", a["median"], b["median"], worse)
        for what, floor in (("memory", 2**20), ("loss_error", 1e-7), ("gradient_error", 1e-6)):
            if a.get(what) is not None and b.get(what) is not None:
                # Errors depend on the order of sums. Only twice the error is a change, and none below the floor.
                most = 1 + threshold if what == "memory" else 2
                yield Change(case, name, what, a[what], b[what], b[what] > most * a[what] + floor)


def lost_bars(before: Row, after: Row) -> list[str]:
    """Return the bars that were reached before and are missed after."""

    def reached(results: Row) -> dict[tuple[str, ...], bool]:
        bars = ((row["case"], bar) for row in _rows(results) for bar in row["bars"])
        return {(case, b["rival"], b["what"], f"{b['at_least']:.3g}"): b["passed"] for case, b in bars}

    old, new = reached(before), reached(after)
    return [f"{' '.join(key)}: reached before, missed after" for key, ok in old.items() if ok and not new.get(key, ok)]


def main(argv: list[str]) -> int:
    """Print every change. Return status 1 if one is a regression."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--threshold", type=float, default=0.1, help="share by which time and memory may grow, such as 0.1 for 10%%"
    )
    parser.add_argument("--provider", default="fastkd", help="provider to compare; all compares every provider")
    args = parser.parse_args(argv)
    before, after = (json.loads(path.read_text()) for path in (args.before, args.after))
    for key in SAME:
        was, now = before["header"][key], after["header"][key]
        if was != now:
            print(f"not the same {key}: {was} before, {now} after")
    found = list(changes(before, after, args.threshold, args.provider))
    width = max((len(c.case) for c in found), default=4)
    for c in found:
        figure = "{:.4g}" if c.what.endswith("error") else "{:.1f}"
        unit, scale = {"time": ("us", 1e6), "memory": ("kB", 1e-3)}.get(c.what, ("", 1.0))
        values = " -> ".join(figure.format(scale * x) for x in (c.before, c.after))
        verdict = "  REGRESSION" if c.worse else ""
        print(f"{c.case:<{width}}  {c.provider:<14}  {c.what:<14}  {values} {unit}  x{c.ratio:.2f}{verdict}")
    lost = lost_bars(before, after)
    print("\n".join(lost))
    worse = sum(c.worse for c in found)
    print(f"{len(found)} figures compared, {worse} regressions, {len(lost)} bars lost")
    return int(bool(worse or lost or not found))
