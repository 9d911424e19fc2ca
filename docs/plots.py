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
    axes = figure.subplots()
    rivals = [name for name in ("eager", "compile") if any(name in case["others"] for case in cases)]
    height = 0.8 / len(rivals)
    for r, rival in enumerate(rivals):
        at = [(i + r * height, case["others"][rival]) for i, case in enumerate(cases) if rival in case["others"]]
        axes.barh([y for y, _ in at], [x - 1 for _, x in at], height, left=1, label=f"over {rival}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 5, 10, 20, 50]
    axes.set_xticks(ticks, [f"{x:g}x" for x in ticks])
    axes.set_yticks([i + height * (len(rivals) - 1) / 2 for i in range(len(cases))], [case["case"] for case in cases])
    axes.invert_yaxis()
    axes.set_xlabel("times faster than the other provider, forward + backward")
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
