"""The results of a call on a GPU as text: at most 100 lines, the most important first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]
LINES, WIDTH = 100, 118  # a reader may get only the last 12,000 characters of the output
BAD = ("failed", "died", "late")
ORDER = ("versions", "smoke", "timings", "training", "native", "suite", "rivals", "counters", "sanitizer")


def _of(results: Row, step: str) -> list[Row]:
    return [row for row in results["items"] if row["step"] == step]


def is_good(results: Row) -> bool:
    """Return whether nothing has failed or died, and every step has a result. Late ones are what a short call costs."""
    steps = {name: state for name, state in results["steps"].items() if name in ORDER}
    have_ended = {row["step"] for row in results["items"] if row["state"] in ("passed", "skipped")}
    given_up = any(state["state"] in ("given up", "cut", "running") for state in steps.values())
    failed = any(row["state"] in ("failed", "died") for row in results["items"])
    return not (given_up or failed or "cut" in results["header"]) and have_ended >= steps.keys()


def step(name: str, results: Row) -> str:
    """Return one line: how a step ended, and how its items did."""
    state = results["steps"][name]
    counts = Counter(row["state"] for row in _of(results, name))
    planned = sum(state.get("planned", {}).values())
    items = ", ".join(f"{n} {kind}" for kind, n in counts.items()) or "no items"
    compiled = sum(row.get("compiled", 0) for row in _of(results, name))
    kernels = sum(row.get("carried", 0) for row in _of(results, name))
    notes = [f"{sum(counts.values())} of {planned} items"] if planned > sum(counts.values()) else []
    notes += [f"{compiled} kernels compiled, {kernels} from the cache"] if compiled or kernels else []
    notes += [
        f"a process ended {len(codes)} times: {part or name} {codes}" for part, codes in state.get("died", {}).items()
    ]
    when = f"{state['began']:.1f}-{state['ended']:.1f} s" if "ended" in state else f"from {state['began']:.1f} s"
    return "; ".join([f"{name}: {state['state']}, {when}; {items}", *notes])


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3f}"


def _timing(row: Row) -> str:
    providers = row.get("providers", {})
    ours, eager = (providers.get(name, {}).get("median") for name in ("fastkd", "eager"))
    ratio = f"{eager / ours:.2f}x" if ours and eager else "-"
    graphs = " ".join(f"{name} {_ms(t)}" for name, t in row.get("graphs", {}).items()) or "-"
    floor = row.get("floor")
    share = f"{floor / ours:.0%} of floor" if floor and ours else ""
    why = row.get("why") or providers.get("fastkd", {}).get("failure", "")
    name = row["item"].removesuffix("-cuda")
    times = f"{_ms(ours):>9}{_ms(eager):>10}{ratio:>8}  graph {graphs}  host {_ms(row.get('host'))}"
    return f"{name:<46}{times}  {share}  {why}"


def _versions(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        values = {k: v for k, v in row.items() if k not in ("step", "part", "item", "at", "seconds")}
        yield f"{row['item']}: " + ", ".join(f"{k} {v}" for k, v in values.items() if k != "state" or v != "passed")


def _bad(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        if row["state"] in BAD:
            yield f"{row['state'].upper()} {row['item']}: {row.get('why', '')}"


def _stems(rows: list[Row]) -> Iterator[str]:
    """Yield the outcomes of the tests of each folder."""
    stems: dict[str, Counter[str]] = {}
    for row in rows:
        stems.setdefault(row["item"].removeprefix("tests/").split("/")[0], Counter())[row["state"]] += 1
    yield ", ".join(f"{stem} {dict(n)}" for stem, n in stems.items()).replace("'", "")


def _rival(row: Row) -> str:
    providers = row.get("providers", {})
    ours = providers.get("fastkd", {}).get("median")
    others = (f"{name} {_ms(p.get('median'))}" for name, p in providers.items())
    bars = (f"{b['rival']} {b['ratio'] or 0:.2f} of {b['at_least']:.3g}" for b in row.get("bars", ()))
    return f"{row['item']}: {', '.join(others)} ms; {'; '.join(bars) if ours else row.get('why', '')}"


def _section(name: str, rows: list[Row]) -> Iterator[str]:
    if name == "versions":
        yield from _versions(rows)
        return
    if name in ("timings", "native"):
        yield from map(_timing, (row for row in rows if "providers" in row))
    elif name == "training":
        for row in rows:
            parts = ", ".join(f"{p['part']} {_ms(p['device'] or p['host'])}" for p in row.get("parts", ()))
            yield f"{row['item']}: {parts} ms"
    elif name == "suite":
        yield from _stems(rows)
    elif name == "rivals":
        yield from map(_rival, rows)
    elif name == "counters":
        for row in rows:
            for kernel in row.get("kernels", ()):
                yield ", ".join(f"{k} {v}" for k, v in kernel.items())
    elif name == "sanitizer":
        yield from (str(row.get("verdict", row["item"])) for row in rows)
    yield from _bad(rows)


def text(results: Row) -> str:
    """Return at most 100 lines: every step's line, then its figures and failures, each step's share capped."""
    steps = [name for name in ORDER if name in results["steps"]]
    head = "commit {commit}, {date}, took {took} s".format_map(
        {"commit": "", "date": "", "took": ""} | results["header"]
    )
    lines = [step(name, results) for name in results["steps"]]
    room = LINES - len(lines) - 1
    sections = {name: [*_section(name, _of(results, name))] for name in steps}
    while sum(len(x) + 1 for x in sections.values() if x) > room:  # the longest gives way first
        longest = max(sections.values(), key=len)
        hidden = 2 if not longest[-1].startswith("... ") else 1 + int(longest[-1].split()[1])
        del longest[-2:]
        longest.append(f"... {hidden} more in gpu.json")
    found = [line for name, rows in sections.items() if rows for line in (f"== {name}", *rows)]
    return "\n".join(line[:WIDTH].rstrip() for line in (*found, head, *lines))
