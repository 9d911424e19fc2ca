"""Pictures of the benchmarks page, drawn by matplotlib from committed results. Each contains a digest of its data."""

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
DIGEST = re.compile(r"data sha256 ([0-9a-f]{64})")


def digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def drawn_from(picture: Path) -> str | None:
    """Return the digest in a picture, or None if there is none."""
    found = DIGEST.search(picture.read_text()) if picture.exists() else None
    return found[1] if found else None


def write(picture: Path, data: Any, draw: Callable[[Any, Any], None], size: tuple[float, float]) -> None:
    """Draw the data by draw(figure, data) into an SVG whose bytes depend only on the data and on matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    style = {"svg.hashsalt": "fastkd", "svg.fonttype": "none", "font.size": 9.0, "axes.spines.top": False}
    with mpl.rc_context({**style, "axes.spines.right": False}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, data)
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture, metadata={"Date": None, "Description": f"data sha256 {digest(data)}"})
    # matplotlib writes trailing blanks.
    picture.write_text("".join(f"{line.rstrip()}\n" for line in picture.read_text().splitlines()))


def speedups(figure: Any, cases: list[Row]) -> None:
    """Draw a bar per case and provider: how many times faster fastkd is."""
    _speedups(figure.subplots(), cases)


def speedups_of_machines(figure: Any, machines: list[Row]) -> None:
    """Draw the bars of each machine, side by side, with the cases in the same order."""
    _side_by_side(figure, machines, _speedups)


def memory_of_machines(figure: Any, machines: list[Row]) -> None:
    """Draw the extra memory of fastkd and its rivals in each case, side by side."""
    _side_by_side(figure, machines, _memory)


def _side_by_side(figure: Any, machines: list[Row], draw: Callable[[Any, list[Row]], None]) -> None:
    """Draw a panel per machine; a case that a machine has not measured keeps an empty line."""
    names = list(dict.fromkeys(case["case"] for one in machines for case in one["cases"]))
    panels = figure.subplots(1, len(machines), squeeze=False)[0]
    for i, (axes, one) in enumerate(zip(panels, machines, strict=True)):
        measured = {case["case"]: case for case in one["cases"]}
        draw(axes, [measured.get(name, {"case": name, "others": {}, "bytes": {}}) for name in names])
        axes.set_title(one["title"], fontsize=9)
        if i:
            axes.set_yticklabels([])


def _speedups(axes: Any, cases: list[Row]) -> None:
    rivals = [name for name in ("eager", "compile") if any(name in case["others"] for case in cases)]
    height = 0.8 / len(rivals)
    for r, rival in enumerate(rivals):
        at = [(i + r * height, case["others"][rival]) for i, case in enumerate(cases) if rival in case["others"]]
        axes.barh([y for y, _ in at], [x - 1 for _, x in at], height, left=1, label=f"over {rival}")
        for y, x in at:
            axes.text(1.03 * max(x, 1), y, f"{x:.2g}x", va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    ratios = [ratio for case in cases for ratio in case["others"].values()]
    axes.set_xlim(0.9 * min(1, *ratios), 1.4 * max(ratios))
    axes.set_ylim(-0.7, len(cases) - 0.3 + height)
    ticks = [x for x in (0.5, 1, 2, 5, 10, 20, 50) if axes.get_xlim()[0] <= x <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{x:g}x" for x in ticks])
    axes.set_yticks([i + height * (len(rivals) - 1) / 2 for i in range(len(cases))], [case["case"] for case in cases])
    axes.invert_yaxis()
    axes.set_xlabel("times faster than the other provider, forward + backward")
    axes.legend(frameon=False)


def _memory(axes: Any, cases: list[Row]) -> None:
    """Draw a line from the least to the most memory of a case, with a point for each provider."""
    for name, marker in (("eager", "s"), ("compile", "^"), ("fastkd", "o")):
        at = [(case["bytes"][name] / 2**20, i) for i, case in enumerate(cases) if case["bytes"].get(name)]
        if at:
            axes.plot(*zip(*at, strict=True), marker, markersize=5, label=name)
    for i, case in enumerate(cases):
        found = [value / 2**20 for value in case["bytes"].values() if value]
        if found:
            axes.plot([min(found), max(found)], [i, i], color="#bbbbbb", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.set_yticks(range(len(cases)), [case["case"] for case in cases])
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlabel("MB beside the inputs, at the peak")
    axes.legend(frameon=False)


def scaling(figure: Any, rows: list[Row]) -> None:
    """Draw seconds (left) and bytes (right) of the sweeps over one variable, with the fitted exponents."""
    left, right = figure.subplots(1, 2)
    for axes, key, slope, what in ((left, "seconds", "time", "seconds"), (right, "bytes", "memory", "extra bytes")):
        for row in rows:
            points = [(x, y) for x, y in zip(row["sizes"], row[key], strict=True) if y]
            if not points:
                continue
            fitted = "" if row[slope] is None else f", exponent {row[slope]:.2f}"
            style = "-o" if row["provider"] == "fastkd" else "--s"
            label = f"{row['sweep']}: {row['provider']}{fitted}"
            axes.loglog(*zip(*points, strict=True), style, label=label, markersize=3, linewidth=1)
        axes.set_xlabel(rows[0]["variable"])
        axes.set_ylabel(what)
        if axes.lines:
            axes.legend(frameon=False, fontsize=6.5)
        else:
            axes.set_visible(False)


def roofline(figure: Any, data: Row) -> None:
    """Draw FLOP/s against FLOP/byte, below the copy and matrix-product rates measured in the same runs."""
    axes = figure.subplots()
    copy, matmul = data["copy"], data["matmul"]
    found = [case["flops"] / case["bytes"] for case in data["cases"]]
    intensities = sorted([min(found) / 4, matmul / copy, max(found) * 4])
    axes.loglog(intensities, [min(copy * x, matmul) / 1e9 for x in intensities], color="black", linewidth=1)
    for stem in dict.fromkeys(case["case"].split("/")[0] for case in data["cases"]):
        points = [
            (case["flops"] / case["bytes"], case["flops"] / case["seconds"] / 1e9)
            for case in data["cases"]
            if case["case"].startswith(f"{stem}/")
        ]
        axes.loglog(*zip(*points, strict=True), "o", markersize=4, label=stem)
    axes.set_xlabel("operations per byte that must move")
    axes.set_ylabel("GFLOP/s")
    low = min(case["flops"] / case["seconds"] / 1e9 for case in data["cases"])
    axes.set_ylim(10 ** math.floor(math.log10(low)))
    axes.legend(frameon=False)
