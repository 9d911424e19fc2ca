"""Write the tables and pictures that README and docs show of benchmarks/results; tables go between markers.

python docs/generate.py           write
python docs/generate.py --check   fail if text or pictures differ from the committed results
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import drawings
import plots

DOCS = Path(__file__).parent
ROOT = DOCS.parent
RESULTS = ROOT / "benchmarks/results"
PICTURES = DOCS / "pictures"
sys.path.insert(0, str(ROOT))  # experiments/, which is not installed
PAGES = (ROOT / "README.md", *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts))
NONE = "Not measured yet.\n"
Row = dict[str, Any]


def table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |\n"
        for line in lines
    )


def results(body: str) -> list[Row]:
    """Return the contents of the result files that have the table `body`: cases, sweeps, parts or training."""
    loaded = (json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json")))
    return [found for found in loaded if body in found and "header" in found]


def machine(header: Row) -> str:
    """Return a line with the machine, the versions, the commit and the date."""
    versions = ", ".join(f"{k} {v}" for k, v in header["versions"].items() if v and k in ("fastkd", "torch", "triton"))
    return f"{header['gpu'] or header['cpu']}; {versions}; commit {header['commit']}, {header['date'][:10]}.\n"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def demo() -> str:
    """Return the top-1 of `make demo` over its seeds and the machine it ran on."""
    summary = json.loads((RESULTS / "demo.json").read_text())
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    lines = [
        [network, f"{statistics.mean(top1):.1f}", f"{min(top1):.1f} to {max(top1):.1f}"]
        for network, top1 in summary["seeds"].items()
    ]
    seeds = len(next(iter(summary["seeds"].values())))
    measured = f"Measured on {summary['machine']} ({versions}), {summary['date']}.\n"
    return f"{table(['network', f'mean top-1 of {seeds} seeds (%)', 'range'], lines)}\n{measured}"


def demo_datafree() -> str:
    """Return the result table of `make demo-datafree` and the machine it ran on."""
    from experiments.data_free import table

    summary = json.loads((RESULTS / "demo-datafree.json").read_text())
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    took = f"{summary['seconds']:.0f} s, and {summary['cpu_seconds']:.0f} s of processor time,"
    measured = f"{took} on {summary['machine']} ({versions}), {summary['date']}"
    return f"{table(summary)}\n\n{summary['images']} images in each set. The whole took {measured}.\n"


def _case(row: Row) -> str:
    """Return the table of a case's providers: milliseconds, ratio to fastkd, extra memory and errors."""
    ours = row["providers"]["fastkd"].get("median")
    lines = []
    for name, p in row["providers"].items():
        if "median" not in p:
            lines.append([name, p.get("failure", "-").replace("|", "/"), "", "", "", "", ""])
            continue
        errors = ["-" if p[key] is None else f"{p[key]:.0e}" for key in ("loss_error", "gradient_error")]
        memory = "-" if p["memory"] is None else f"{p['memory'] / 2**20:.0f}"
        ratio = f"{p['median'] / ours:.2f}x" if ours else "-"
        lines.append([name, ms(p["median"]), f"{ms(p['p20'])}-{ms(p['p80'])}", ratio, memory, *errors])
    what = "forward + backward" if row["backward"] else "forward"
    title = (
        f"**{row['case']}**, {row['dtype']}, {what}, {row['bytes'] / 1e6:.1f} MB, {row['flops'] / 1e9:.3g} GFLOP\n\n"
    )
    head = ["provider", "ms", "p20-p80", "time over fastkd's", "extra MB", "loss error", "gradient error"]
    return title + table(head, lines)


def _picture(name: str, title: str) -> str:
    return f"![{title}](pictures/{name}.svg)\n"


def cases() -> str:
    """Return the pictures and all cases of every machine."""
    parts = []
    for found in results("cases"):
        name = found["header"]["machine"]
        parts += [f"### {found['header']['gpu'] or found['header']['cpu']}\n", machine(found["header"])]
        parts += [_picture(f"speedup-{name}", "Times faster than eager PyTorch and torch.compile, case by case")]
        parts += [_picture(f"roofline-{name}", "Operations per second against operations per byte")]
        parts += [_case(row) for row in found["cases"]]
    return "\n".join(parts) or NONE


def bars() -> str:
    """Return the goals and the measured ratios of every machine."""
    parts = []
    for found in results("cases"):
        lines = [
            [
                row["case"],
                f"{bar['rival']}, {bar['what']}",
                "-" if bar["ratio"] is None else f"{bar['ratio']:.2f}",
                f"{bar['at_least']:.3g}" + (f" or {bar['or_below'] * 1e6:.0f} us" if bar["or_below"] else ""),
                "reached" if bar["passed"] else "missed",
            ]
            for row in found["cases"]
            for bar in row["bars"]
        ]
        reached = sum(line[-1] == "reached" for line in lines)
        text = table(["case", "against", "ratio", "goal", ""], lines)
        parts.append(f"{machine(found['header'])}\n{text}\n{reached} of {len(lines)} goals reached.\n")
    return "\n".join(parts) or NONE


HEADLINE = (
    ("relation/intra-deit_ti-b32", "patch relations, 32 images of 196 tokens"),
    ("relation/manifold-deit_ti-8_layers-b32", "manifold loss, 8 layers"),
    ("relation/batch-deit_ti-b32", "all 6,272 tokens of a batch with all"),
    ("attention/vit_b-b32", "attention maps, ViT-B, 32 images of 197 tokens"),
    ("attention/vit_b_1024-b1", "attention maps, ViT-B, 4,096 tokens"),
    ("moments/resnet50_layer1", "BatchNorm statistics, (32, 256, 56, 56)"),
    ("prior/tv-imagenet-b32", "total variation, 32 images of 224 x 224"),
)


def anchoring() -> str:
    """Return the results of `python -m experiments.anchoring`, means over its seeds."""
    path = RESULTS / "anchoring.json"
    if not path.exists():
        return NONE
    found = json.loads(path.read_text())

    def mean(runs: list[Row], name: str, form: str) -> str:
        values = [run[name] for run in runs if run[name] is not None]
        return format(statistics.fmean(values), form) if values else "-"

    lines = [
        [label, mean(runs, "drift", ".2g"), mean(runs, "explained", ".1%"), mean(runs, "top1", ".1f")]
        for label, runs in found["rows"].items()
    ]
    head = ["network", "difference of patch relations", "variance of ink explained", "top-1 (%)"]
    seeds = len(next(iter(found["rows"].values())))
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{table(head, lines)}\nMean of {seeds} seed(s) on {found['machine']} ({versions}), {found['date']}.\n"


def study() -> str:
    """Return the results of `make study`: every method, and training without distillation, on shares of the digits."""
    path = RESULTS / "study.json"
    if not path.exists():
        return NONE
    from experiments.study import table as lines

    found = json.loads(path.read_text())
    cell = {(run["method"], run["fraction"]): run for run in found["lines"]}
    whole = max(fraction for _, fraction in cell)
    parts = [lines(found["lines"], found["costs"]) + "\n"]
    for fraction in sorted({fraction for _, fraction in cell}):
        none = cell["none", fraction]
        won, lost, even = [], [], []
        for method in dict.fromkeys(method for method, _ in cell if method != "none"):
            own = cell[method, fraction]
            gain, noise = own["top1"] - none["top1"], own["spread"] + none["spread"]
            (even if abs(gain) <= noise else won if gain > 0 else lost).append(f"{method} ({gain:+.1f})")
        groups = [("better than none", won), ("worse", lost), ("within the spread", even)]
        text = "; ".join(f"{what}: {', '.join(names)}" for what, names in groups if names)
        parts.append(f"- With {none['images']} images ({fraction:.0%}), {text}.")
    same = found["same"]
    of_loss = {
        name: [f"{point['loss']:.0e}" if point["loss"] else "0" for point in same[name]]
        for name in ("eager", "threads")
    }
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    parts += [
        f"\nThe first manifold run on {whole:.0%} of the images was repeated with the eager losses, and with the fused "
        "losses on another number of threads, which changes the rounding. Top-1 is "
        f"{same['top1']['fused']:.1f}%, {same['top1']['eager']:.1f}% and {same['top1']['threads']:.1f}%. "
        "The losses of the repeated runs differ from the first run after each epoch:\n",
        table(
            ["relative difference of the loss", *(str(i + 1) for i in range(len(same["eager"])))],
            [["eager losses", *of_loss["eager"]], ["other threads", *of_loss["threads"]]],
        )
        + "\n",
        "![Top-1 against the number of training images](pictures/study.svg)\n",
        f"Measured on {found['machine']} ({versions}), {found['date']}.\n",
    ]
    return "\n".join(parts)


def dropins() -> str:
    """Return milliseconds, extra memory and errors of each drop-in beside the official form that it replaces."""

    def cost(p: Row) -> str:
        if not p.get("median"):
            wrong = re.match("AssertionError: (loss|gradient) ", p.get("failure", ""))
            return "too inaccurate" if wrong else "does not run"
        return ms(p["median"]) + ("" if p["memory"] is None else f", {p['memory'] / 2**20:.0f}")

    parts = []
    for found in results("dropins"):
        lines = []
        for row in found["dropins"]:
            official, compiled, ours = (row["providers"][name] for name in ("eager", "compile", "fastkd"))
            goals = [bar for bar in row["bars"] if bar["rival"] == "eager"]
            errors = ", ".join(f"{ours[key]:.0e}" for key in ("loss_error", "gradient_error"))
            ratio = f"{official['median'] / ours['median']:.2f}x"
            goal = "".join(f" (goal {bar['at_least']:g})" for bar in goals)
            costs = [cost(p) for p in (official, compiled, ours)]
            lines.append([row["case"].removeprefix("dropins/"), *costs, f"{ratio}{goal}", errors])
        reached = [bar["passed"] for row in found["dropins"] for bar in row["bars"]]
        head = [
            "drop-in",
            "official form: ms, extra MB",
            "torch.compile of it",
            "drop-in",
            "times faster",
            "its errors",
        ]
        measured = f"{machine(found['header'])}\n{sum(reached)} of {len(reached)} goals reached."
        about = "Forward and backward; medians of interleaved rounds; errors of loss and gradient against float64."
        parts.append(f"{table(head, lines)}\n{about} {measured}\n")
    return "\n".join(parts) or NONE


def numbers() -> str:
    """Return three figures of the first machine in a sentence each."""
    found = results("cases")[0]
    rows = {row["case"]: row["providers"] for row in found["cases"]}

    def over(case: str, key: str) -> tuple[str, str]:
        ours, *others = (rows[case][name][key] for name in ("fastkd", "eager", "compile"))
        eager, compiled = (f"{other / ours:.2g}" for other in others)
        return eager, compiled

    relation, attention = (
        over("relation/manifold-deit_ti-8_layers-b32", "median"),
        over("attention/vit_b-b32", "median"),
    )
    memory = [rows["attention/vit_b_1024-b1"][name]["memory"] / 2**20 for name in ("fastkd", "eager", "compile")]
    lines = (
        f"- The manifold loss of 8 layers is **{relation[1]} times faster than torch.compile** of the official form, "
        f"{relation[0]} times faster than eager.",
        f"- Attention maps of ViT-B are **{attention[1]} times faster than torch.compile**, {attention[0]} times "
        "faster than eager.",
        f"- With 4,096 tokens they need **{memory[0]:.0f} MB** beside their inputs; eager {memory[1]:,.0f} MB, "
        f"torch.compile {memory[2]:,.0f} MB.",
    )
    return "\n".join(lines) + f"\n\nForward and backward. {machine(found['header'])}"


MIGRATIONS = (
    ("`losses.layer_mf_loss` of manifold distillation", "fastkd.compat.layer_mf_loss", "layer_mf_loss-deit_ti-b32"),
    ("`dinov3.loss.GramLoss`", "fastkd.compat.GramLoss", "GramLoss-vit_b-b16"),
    (
        "`DeepInversionFeatureHook`",
        "fastkd.compat.DeepInversionFeatureHook",
        "DeepInversionFeatureHook-resnet18_64-b32",
    ),
    ("`F.kl_div` of two attention maps", "fastkd.attention_loss", "attention/vit_b-b32"),
)


def migrations() -> str:
    """Return the commonest replacements, each with the measured gain."""
    rows = {
        row["case"].removeprefix("dropins/"): (row["providers"], found["header"])
        for found in (*results("cases"), *results("dropins"))
        for row in found.get("cases", found.get("dropins", []))
    }
    lines = []
    for this, by, case in MIGRATIONS:
        p, header = rows[case]
        eager, compiled = (f"{p[name]['median'] / p['fastkd']['median']:.2g}x" for name in ("eager", "compile"))
        memory = " instead of ".join(f"{p[name]['memory'] / 2**20:.0f}" for name in ("fastkd", "eager")) + " MB"
        where = f"{header['cpu'].split(',')[0].removesuffix(' Processor')}, {header['date'][:10]}"
        lines.append([this, f"`{by}`", f"{eager}, {compiled}", memory, where])
    return table(["replace", "by", "faster than it, than torch.compile of it", "extra memory", "measured on"], lines)


def headline() -> str:
    """Return milliseconds and extra memory of one case of each kind: official form, compiled form, fastkd."""
    parts = []
    for found in results("cases"):
        rows = {row["case"]: row["providers"] for row in found["cases"]}
        lines = []
        for case, title in HEADLINE:
            of_case = [rows.get(case, {}).get(name, {}) for name in ("eager", "compile", "fastkd")]
            if of_case[-1].get("median"):
                cells = [
                    f"{ms(p['median'])}, {p['memory'] / 2**20:.0f}"
                    if p.get("median") and p["memory"] is not None
                    else "-"
                    for p in of_case
                ]
                lines.append([title, *cells])
        if lines:
            head = ["forward + backward: ms, extra MB", "official form, eager", "torch.compile of it", "fastkd"]
            parts.append(f"{table(head, lines)}\n{machine(found['header'])}")
    return "\n".join(parts) or NONE


def scaling() -> str:
    """Return the fitted exponents beside the theoretical ones, and the pictures of the curves."""

    def exponent(row: Row, key: str) -> str:
        if row[key] is None:
            return "-"
        return f"{row[key]:.2f} (theory {row[f'{key}_theory']:g})"

    parts = []
    for found in results("sweeps"):
        lines = []
        for row in found["sweeps"]:
            measured = [size for size, t in zip(row["sizes"], row["seconds"], strict=True) if t]
            sizes = f"{row['variable']} {measured[0]} to {measured[-1]}"
            lines.append([row["sweep"], sizes, row["provider"], exponent(row, "time"), exponent(row, "memory")])
        parts.append(machine(found["header"]))
        parts.append(table(["loss", "sizes", "provider", "exponent of time", "exponent of memory"], lines))
        for variable in dict.fromkeys(row["variable"] for row in found["sweeps"]):
            name = f"scaling-{variable}-{found['header']['machine']}"
            parts.append(_picture(name, f"Time and memory against {variable}"))
    return "\n".join(parts) or NONE


def profiles() -> str:
    """Return the time of each part of a training step, with and without fused losses."""
    parts = []
    for found in results("parts"):
        rows = found["parts"]
        lines = []
        for part in dict.fromkeys(row["part"] for row in rows):
            of_part = {row["losses"]: row for row in rows if row["part"] == part}
            key = "device" if of_part["fused"]["device"] is not None else "host"
            lines.append([part, *(ms(of_part[losses][key]) for losses in ("fused", "eager"))])
        text = table(["part of the step", "fused losses, ms", "eager maps, ms"], lines)
        parts.append(f"{machine(found['header'])}\nBatch {found['batch']}.\n\n{text}")
    return "\n".join(parts) or NONE


def training() -> str:
    """Return the trainer's goals and measured figures."""

    def shown(row: Row, key: str) -> str:
        if row[key] is None:
            return "-"
        if row["unit"] == "seconds":
            return f"{row[key] * 1e3:.2f} ms"
        return f"{row[key]:.1%}" if row["unit"] == "share" else f"{row[key]:.2f}"

    parts = []
    for found in results("training"):
        lines = [
            [
                row["figure"],
                row["setting"],
                shown(row, "value"),
                "-" if row["goal"] is None else f"at most {shown(row, 'goal')}",
                {True: "reached", False: "missed", None: ""}[row["reached"]],
                ms(row["seconds"]),
                ms(row["against"]),
            ]
            for row in found["training"]
        ]
        head = ["figure", "setting", "measured", "goal", "", "step or image, ms", "loss or baseline, ms"]
        parts.append(f"{machine(found['header'])}\n{table(head, lines)}")
    return "\n".join(parts) or NONE


def _aot() -> Row | None:
    path = RESULTS / "aot.json"
    return json.loads(path.read_text()) if path.exists() else None


def rooflines() -> str:
    """Return the lower bound on the time of each case on each GPU."""
    found = _aot()
    if found is None:
        return NONE
    rows = found["rooflines"]
    cards = [key for key in rows[0] if key not in ("case", "dtype", "bytes", "flops")]
    lines = [
        [row["case"], row["dtype"], f"{row['bytes'] / 1e6:.0f}", f"{row['flops'] / 1e9:.3g}"]
        + [f"{row[card] * 1e3:.3f}" for card in cards]
        for row in rows
    ]
    return table(["case", "dtype", "MB", "GFLOP", *(f"{card}, ms" for card in cards)], lines)


def aot() -> str:
    """Return the table of all compiled kernels."""
    found = _aot()
    if found is None:
        return NONE
    versions, commit = found["header"]["versions"], found["header"]["commit"]
    parts = [f"Compiled by Triton {versions['triton']} and nvcc, commit {commit}, {found['header']['date'][:10]}."]
    older = {k["commit"] for k in found["kernels"] if "commit" in k}
    parts[0] += "".join(f" The CUDA kernels were read at commit {one}." for one in sorted(older)) + "\n"
    for stem in dict.fromkeys(kernel["stem"] for kernel in found["kernels"]):
        lines = [
            [
                k["kernel"].removeprefix(f"{stem}_"),
                k["types"].replace("c10::", ""),
                k["target"],
                str(k["registers"]),
                f"{k['stack']} B" if k["spills"] else "-",
                f"{k['shared'] / 1024:.0f}",
                f"{k['occupancy']:.0%}",
                f"{k['matrix']} x{k['products']} {k.get('shapes', '')}".strip() if k["matrix"] else "-",
                str(k.get("copies", "-")),
                str(k.get("barriers", "-")),
                f"{k['wide']} of {k['loads']}",
                re.sub(r"(?:num_)?(\w+)=", r"\1 ", k["options"]),
            ]
            for k in found["kernels"]
            if k["stem"] == stem
        ]
        head = [
            "kernel",
            "types",
            "target",
            "registers",
            "spilled",
            "shared KB",
            "occupancy",
            "matrix",
            "copies",
            "barriers",
            "16-byte loads",
            "as",
        ]
        parts.append(f"## {stem}\n\n{table(head, lines)}")
    return "\n".join(parts)


def mutants() -> str:
    """Return the planted faults by file, each with the test that caught it."""
    found = json.loads((ROOT / "tests/mutants/results.json").read_text())
    caught = sum(bool(row["caught_by"]) for row in found.values())
    parts = [f"{len(found)} faults planted, {caught} caught.\n"]
    for file in sorted({row["file"] for row in found.values()}):
        lines = [
            [row["fault"], f"`{row['caught_by'].removeprefix('tests/')}`" if row["caught_by"] else "not caught"]
            for row in found.values()
            if row["file"] == file
        ]
        parts.append(f"## {file}\n\n{table(['planted fault', 'caught by'], lines)}")
    return "\n".join(parts)


def capture_cost() -> str:
    """Return the time and memory of a step without and with capture."""
    found = json.loads((RESULTS / "capture.json").read_text())
    lines = [
        [
            f"{row['model']}, {'fused' if row['fused'] else 'unfused'}, {row['layers']} layers",
            *(ms(seconds) for seconds in row["seconds"]),
            f"{row['ratio']:.2f}",
            *(f"{peak / 2**20:.1f}" for peak in row["peak"]),
        ]
        for row in found["cost"]
    ]
    head = ["model", "ms", "with capture", "ratio", "peak MB", "with capture"]
    return f"{machine(found['header'])}\n{table(head, lines)}"


def capture_families() -> str:
    """Return what capture.qkv gives of each family of models."""
    found = json.loads((RESULTS / "capture.json").read_text())["families"]
    lines = [
        [
            row["family"],
            ", ".join(f"{n} {kind}" for kind, n in row["layers"].items()) or "none",
            f"{row['captured']}: {row['first']}" if row["captured"] else "none",
            row["refused"].replace("|", "/"),
        ]
        for row in found
    ]
    counts = {name: sum(row["library"] == name for row in found) for name in ("timm", "transformers")}
    head = ["family", "attention layers", "captured, with the first q", "refused, in these words"]
    return f"{counts['timm']} of timm, {counts['transformers']} of Hugging Face.\n\n{table(head, lines)}"


SECTIONS: dict[str, Callable[[], str]] = {
    section.__name__: section
    for section in (
        demo,
        demo_datafree,
        study,
        anchoring,
        numbers,
        migrations,
        headline,
        dropins,
        cases,
        bars,
        scaling,
        profiles,
        training,
        capture_cost,
        capture_families,
        rooflines,
        aot,
        mutants,
    )
}


def fill(text: str) -> str:
    """Return the text with each generated section inserted between its markers."""
    for name in re.findall(r"<!-- (\w+) -->\n", text):
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, tail = text.split(begin)[0], text.split(end)[1]
        text = head + begin + SECTIONS[name]() + end + tail
    return text


def pictures() -> Iterator[tuple[str, Any, Callable[[Any, Any], None], tuple[float, float]]]:
    """Yield (name, data, drawing function, size in inches) for every picture."""
    for found in results("cases"):
        name = found["header"]["machine"]
        rows = [row for row in found["cases"] if "median" in row["providers"]["fastkd"]]
        bars = []
        for row in rows:
            ours = row["providers"]["fastkd"]["median"]
            others = {
                n: p["median"] / ours
                for n, p in row["providers"].items()
                if n in ("eager", "compile") and "median" in p
            }
            if others and row["backward"]:
                bars.append({"case": row["case"], "others": others})
        yield f"speedup-{name}", bars, plots.speedups, (7.5, 1 + 0.28 * len(bars))
        if name == results("cases")[0]["header"]["machine"]:
            of_case = {bar["case"]: bar["others"] for bar in bars}
            chosen = [{"case": title, "others": of_case[case]} for case, title in HEADLINE]
            yield "headline", chosen, plots.speedups, (7.5, 3.2)
        limits = {
            key: statistics.median(row[key] for row in rows if row["dtype"] == "float32") for key in ("copy", "matmul")
        }
        points = [
            {"case": r["case"], "flops": r["flops"], "bytes": r["bytes"], "seconds": r["providers"]["fastkd"]["median"]}
            for r in rows
        ]
        yield f"roofline-{name}", {**limits, "cases": points}, plots.roofline, (6, 4)
    path = RESULTS / "study.json"
    if path.exists():
        from experiments.study import draw

        yield "study", json.loads(path.read_text())["lines"], draw, (6, 4)
    for found in results("sweeps"):
        for variable in dict.fromkeys(row["variable"] for row in found["sweeps"]):
            rows = [row for row in found["sweeps"] if row["variable"] == variable]
            yield f"scaling-{variable}-{found['header']['machine']}", rows, plots.scaling, (9, 3.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with status 1 if anything differs")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        old = page.read_text()
        new = fill(old)
        if old != new:
            stale.append(page)
            if not check:
                page.write_text(new)
    for name, rows in drawings.DRAWINGS.items():
        drawing, svg = PICTURES / f"{name}.svg", drawings.flow(rows)
        if not drawing.exists() or drawing.read_text() != svg:
            stale.append(drawing)
            if not check:
                drawing.parent.mkdir(exist_ok=True)
                drawing.write_text(svg)
    for name, data, draw, size in pictures():
        picture = PICTURES / f"{name}.svg"
        if plots.drawn_from(picture) != plots.digest(data):
            stale.append(picture)
            if not check:
                plots.write(picture, data, draw, size)
    names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
    if check and stale:
        print(f"differs from the committed results: {names} (run python docs/generate.py)", file=sys.stderr)
        return 1
    print(f"{'up to date' if not stale else f'written: {names}'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
