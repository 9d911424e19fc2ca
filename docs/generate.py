"""Write the tables and pictures that README and docs show of benchmarks/results; tables go between markers.

python docs/generate.py           write
python docs/generate.py --check   fail if text or pictures differ from the committed results
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
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


def examples() -> str:
    """Return the time of the examples: the shortest, the median and the longest."""
    path = RESULTS / "examples.json"
    if not path.exists():
        return "The time of the examples is not measured yet.\n"
    found = json.loads(path.read_text())
    by_time = sorted((row["processor"], name) for name, row in found["examples"].items())
    (least, first), (most, last) = by_time[0], by_time[-1]
    middle = statistics.median(value for value, _ in by_time)
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    span = f"{least:.0f} (`{first}`) to {most:.0f} (`{last}`) seconds of processor time, {middle:.0f} in the median"
    where = f"Measured on {found['machine']} ({versions}), {found['date']}"
    return f"An example takes {span}, imports included. {where}.\n"


def newest() -> Row:
    """Return the results of the machine that was measured last."""
    return max(results("cases"), key=lambda found: str(found["header"]["date"]))


def _shown(name: str, row: Row | None) -> list[str]:
    """Return a provider's milliseconds, ratio to fastkd, extra memory and errors in a case of one machine."""
    p = {} if row is None else row["providers"].get(name, {})
    if "median" not in p:
        return [p.get("failure", "-").replace("|", "/"), *[""] * 5]
    ours = row["providers"]["fastkd"].get("median") if row else None
    return [
        ms(p["median"]),
        f"{ms(p['p20'])}-{ms(p['p80'])}",
        f"{p['median'] / ours:.2f}x" if ours else "-",
        "-" if p["memory"] is None else f"{p['memory'] / 2**20:.0f}",
        *("-" if p[key] is None else f"{p[key]:.0e}" for key in ("loss_error", "gradient_error")),
    ]


def _case(rows: list[Row | None]) -> str:
    """Return the table of a case's providers, with the columns of all machines side by side."""
    first = next(row for row in rows if row is not None)
    what = "forward + backward" if first["backward"] else "forward"
    size = f"{first['bytes'] / 1e6:.1f} MB, {first['flops'] / 1e9:.3g} GFLOP"
    names = dict.fromkeys(name for row in rows if row is not None for name in row["providers"])
    head = ["ms", "p20-p80", "time over fastkd's", "extra MB", "loss error", "gradient error"]
    marks = [""] if len(rows) == 1 else [f" ({chr(ord('A') + i)})" for i in range(len(rows))]
    return f"**{first['case']}**, {first['dtype']}, {what}, {size}\n\n" + table(
        ["provider", *(column + mark for mark in marks for column in head)],
        [[name, *(cell for row in rows for cell in _shown(name, row))] for name in names],
    )


def _picture(name: str, title: str) -> str:
    return f"![{title}](pictures/{name}.svg)\n"


def machines(found: list[Row]) -> str:
    """Return a line for each machine, with the letter that marks its columns if there are several."""
    marks = [""] if len(found) == 1 else [f"({chr(ord('A') + i)}) " for i in range(len(found))]
    return "\n".join(mark + machine(one["header"]) for mark, one in zip(marks, found, strict=True))


def glance() -> str:
    """Return the charts of time and memory of all machines, and of growth."""
    found = results("cases")
    if not found:
        return NONE
    parts = [
        "Time: how many times faster fastkd is than the same loss in eager PyTorch and under `torch.compile`.\n",
        _picture("overview-time", "Times faster than eager PyTorch and torch.compile, case by case"),
        "Memory: the peak above the inputs.\n",
        _picture("overview-memory", "Extra megabytes of fastkd, torch.compile and eager PyTorch, case by case"),
        machines(found),
    ]
    if grown := results("sweeps"):
        name = f"scaling-tokens-{grown[0]['header']['machine']}"
        parts += ["Growth: time and memory against the number of tokens.\n", _picture(name, "Growth with tokens")]
        parts += [machine(grown[0]["header"])]
    return "\n".join(parts)


def cases() -> str:
    """Return all cases, with the machines side by side."""
    found = results("cases")
    parts = [machines(found)]
    for one in found:
        parts += [_picture(f"roofline-{one['header']['machine']}", "Operations per second against operations per byte")]
    by_machine = [{row["case"]: row for row in one["cases"]} for one in found]
    for name in dict.fromkeys(name for rows in by_machine for name in rows):
        parts += [_case([rows.get(name) for rows in by_machine])]
    return "\n".join(parts) if found else NONE


def bars() -> str:
    """Return the goals and the measured ratios, with the machines side by side."""
    found = results("cases")
    ratios: dict[tuple[str, ...], list[str]] = {}
    reached, count = [0] * len(found), [0] * len(found)
    for i, one in enumerate(found):
        for row in one["cases"]:
            for bar in row["bars"]:
                goal = f"{bar['at_least']:.3g}" + (f" or {bar['or_below'] * 1e6:.0f} us" if bar["or_below"] else "")
                cells = ratios.setdefault((row["case"], f"{bar['rival']}, {bar['what']}", goal), ["-"] * len(found))
                missed = "" if bar["passed"] else " (missed)"
                cells[i] = "-" if bar["ratio"] is None else f"{bar['ratio']:.2f}{missed}"
                reached[i], count[i] = reached[i] + bar["passed"], count[i] + 1
    if not found:
        return NONE
    marks = ["ratio"] if len(found) == 1 else [f"ratio ({chr(ord('A') + i)})" for i in range(len(found))]
    text = table(["case", "against", "goal", *marks], [[*key, *cells] for key, cells in ratios.items()])
    total = ", ".join(f"{a} of {b} goals reached" for a, b in zip(reached, count, strict=True))
    return f"{machines(found)}\n{text}\n{total}.\n"


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
    """Return the results of `python -m experiments.anchoring`, means and ranges over its seeds."""
    path = RESULTS / "anchoring.json"
    if not path.exists():
        return NONE
    found = json.loads(path.read_text())

    def mean(runs: list[Row], name: str, form: str) -> str:
        values = [run[name] for run in runs if run[name] is not None]
        if not values:
            return "-"
        least, most = (format(limit(values), form) for limit in (min, max))
        return format(statistics.fmean(values), form) + (f" ({least} to {most})" if least != most else "")

    lines = [
        [label, mean(runs, "drift", ".2g"), mean(runs, "explained", ".1%"), mean(runs, "top1", ".1f")]
        for label, runs in found["rows"].items()
    ]
    head = ["network", "difference of patch relations", "variance of ink explained", "top-1 (%)"]
    seeds = len(next(iter(found["rows"].values())))
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    where = f"{found['machine']} ({versions}), {found['date']}"
    return f"{table(head, lines)}\nMean and range of {seeds} seed(s) on {where}.\n"


def studies() -> list[Row]:
    """Return the results of `make study`, of the digits first."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("study-*.json"))]


def times(found: Row) -> int:
    """Return by how much a study's runs are longer than those of `make study`."""
    return int(found["epochs"] // found["tuned_epochs"])


def name_of_study(found: Row) -> str:
    return str(found["data"]) + (f"-{times(found)}-times" if times(found) > 1 else "")


def study() -> str:
    """Return the results of `make study`: every method, and training without a teacher, on shares of the images."""
    from experiments.study import table as lines

    parts = []
    for found in studies():
        cell = {(run["method"], run["fraction"]): run for run in found["lines"]}
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        parts += [
            f"## {found['data'].capitalize()}" + (f", {times(found)} times the steps\n" if times(found) > 1 else "\n"),
            f"{found['seeds']} seed(s), {found['steps']:,} steps, top-1 of the teacher {found['teacher_top1']:.1f}%.\n",
            lines(found["lines"], found["costs"]) + "\n",
            *([gains(cell, fraction) for fraction in sorted({f for _, f in cell})] if found["seeds"] > 1 else []),
            f"\n![Top-1 of each method](pictures/study-{name_of_study(found)}.svg)\n",
            flat(found, cell),
            tuned(found),
            f"Measured on {found['machine']} ({versions}), {found['date']}.\n",
        ]
    return "\n".join(parts) or NONE


def gains(cell: Row, fraction: float) -> str:
    """Return a line that sorts the methods by their gain over none, which has to exceed two standard errors."""
    none = cell["none", fraction]
    won, lost, even = [], [], []
    for method in dict.fromkeys(method for method, _ in cell if method != "none"):
        own = cell[method, fraction]
        gain = own["top1"] - none["top1"]
        error = math.hypot(own["top1_spread"], none["top1_spread"]) / math.sqrt(own["seeds"])
        (even if abs(gain) <= 2 * error else won if gain > 0 else lost).append(f"{method} ({gain:+.1f})")
    groups = [("better than none", won), ("worse", lost), ("no difference beyond two standard errors", even)]
    text = "; ".join(f"{what}: {', '.join(names)}" for what, names in groups if names)
    return f"- With {none['images']} images ({fraction:.0%}), {text}."


def flat(found: Row, cell: Row) -> str:
    """Return what more steps change: the last quarter of the runs, and runs of twice the length."""

    def late(line: Row) -> float:
        points = line["curve"]
        return float(line["top1"] - points[len(points) * 3 // 4 - 1]["top1"])

    if times(found) > 1:
        shares = sorted({fraction for _, fraction in cell})
        rows = [
            [method, *(f"{late(cell[method, fraction]):+.1f}" for fraction in shares)]
            for method in dict.fromkeys(method for method, _ in cell)
        ]
        return "Change of top-1 in the last quarter of the steps:\n\n" + table(
            ["method", *map("{:.0%}".format, shares)], rows
        )
    rows = []
    for (method, fraction), line in cell.items():
        longer = [r["top1"] for r in found["longer"] if (r["method"], r["fraction"]) == (method, fraction)]
        if longer:
            rows.append([method, f"{fraction:.0%}", f"{line['top1']:.1f}", f"{late(line):+.1f}", f"{longer[0]:.1f}"])
    head = ["method", "share", "top-1", "change in the last quarter of the steps", "top-1 with twice the steps, seed 0"]
    return table(head, rows) if rows else "The runs with twice the steps are not finished.\n"


def tuned(found: Row) -> str:
    """Return the settings that were chosen without a teacher on a fifth of the training images."""
    rows = []
    for fraction in dict.fromkeys(run["fraction"] for run in found["tried"]):
        own = [run for run in found["tried"] if run["fraction"] == fraction]
        best = own[-1]["values"] | max(own[-2:], key=lambda run: run["top1"])["values"]
        crops = best.get("augment_args", {}).get("scale", ["none"])[0] if best.get("augment", True) else "none"
        scores = f"{min(run['top1'] for run in own):.1f} to {max(run['top1'] for run in own):.1f}"
        rows.append([f"{fraction:.0%}", f"{best['lr']:g}", str(crops), f"{best['weight_decay']:g}", scores])
    text = f"Settings, tuned with runs of {found['tuned_epochs']} epochs:\n\n"
    return text + table(["share", "learning rate", "smallest crop", "weight decay", "top-1 of what was tried"], rows)


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
    """Return three figures of the newest machine in a sentence each."""
    found = newest()
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
    """Return the commonest replacements, each with the gain that was measured last."""
    rows = {
        row["case"].removeprefix("dropins/"): (row["providers"], found["header"])
        for found in sorted((*results("cases"), *results("dropins")), key=lambda one: str(one["header"]["date"]))
        for row in (*found.get("cases", ()), *found.get("dropins", ()))
    }
    lines = []
    for this, by, case in MIGRATIONS:
        p, header = rows[case]
        eager, compiled = (f"{p[name]['median'] / p['fastkd']['median']:.2g}x" for name in ("eager", "compile"))
        memory = " instead of ".join(f"{p[name]['memory'] / 2**20:.0f}" for name in ("fastkd", "eager")) + " MB"
        where = f"{header['cpu'].split(',')[0].removesuffix(' Processor')}, {header['date'][:10]}"
        lines.append([this, f"`{by}`", f"{eager}, {compiled}", memory, where])
    return table(["replace", "by", "faster than it, than torch.compile of it", "extra memory", "measured on"], lines)


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


def _amount(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _counted(work: Row | None) -> list[str]:
    """Return launches, MB, GFLOP by unit and millions of exponentials as cells."""
    if work is None:
        return ["-"] * 4
    flops = " + ".join(f"{_amount(n / 1e9)} {unit}" for unit, n in work["flops"].items()) or "-"
    exponentials = _amount(work["exponentials"] / 1e6) if work["exponentials"] else "-"
    return [str(work["launches"]), _amount(work["bytes"] / 1e6), flops, exponentials]


def work() -> str:
    """Return the tables of counted work: per case, then the kernels of each target."""
    found = json.loads((RESULTS / "work.json").read_text())
    versions = found["header"]["versions"]
    header = found["header"]
    about = f"Triton {versions['triton']}, torch {versions['torch']}, commit {header['commit']}, {header['date'][:10]}."
    parts = [f"{about}\n*host us*: {header.get('host', header['cpu'])}.\n"]
    before = json.loads((RESULTS / "work-before.json").read_text())
    parts[0] += f"*before*: commit {before['header']['commit']}.\n"
    earlier = {(row["case"], row["dtype"], row["target"]): row["work"] for row in before["work"] if "target" in row}
    forms = {(row["case"], row["dtype"]): row["compile"] for row in found["work"] if "compile" in row}
    counted = [row for row in found["work"] if "target" in row]
    for target in dict.fromkeys(row["target"] for row in counted):
        rows = [row for row in counted if row["target"] == target]
        lines = []
        for row in rows:
            floor = row["floor"]
            own = [(kernel["launches"], kernel["launch_us"]) for kernel in row["kernels"] if "launch_us" in kernel]
            host = f"{sum(n * us for n, us in own) / sum(n for n, _ in own):.0f}" if own else "-"
            lines.append([row["case"], row["dtype"], "fastkd", *_counted(row["work"]), host])
            if was := earlier.get((row["case"], row["dtype"], target)):
                lines.append(["", "", "before", *_counted(was), ""])
            if target == "sm_90":
                lines.append(["", "", "compile", *_counted(forms[row["case"], row["dtype"]]), ""])
                least = [_amount(floor["bytes"] / 1e6), _amount(floor["flops"] / 1e9)]
                lines.append(["", "", "floor", "-", *least, "-", ""])
        head = ["case", "dtype", "", "launches", "MB", "GFLOP", "M exp", "host us"]
        parts.append(f"## {target}\n\n{table(head, lines)}")
        head = ["case", "kernel", "launches", "programs", "per SM", "registers", "blocks per SM", "host us"]
        lines = [
            [row["case"], kernel["kernel"]]
            + [str(kernel[key]) for key in ("launches", "programs")]
            + [f"{kernel['per_sm']:.1f}", *(str(kernel[key]) for key in ("registers", "blocks"))]
            + [f"{kernel['launch_us']:.0f}" if "launch_us" in kernel else "-"]
            for row in rows
            for kernel in row["kernels"]
        ]
        parts.append(table(head, lines))
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


def modes() -> str:
    """Return what each function does in each mode of people's loops, over its calls and backends."""
    lines = (RESULTS / "modes.jsonl").read_text().splitlines()
    found: dict[str, dict[str, set[str]]] = {}
    for function, _, mode, outcome in map(json.loads, lines):
        found.setdefault(mode, {}).setdefault(function, set()).add(outcome)
    functions = list(dict.fromkeys(name for row in found.values() for name in row))
    always = [mode for mode, row in found.items() if set.union(*row.values()) == {"same"}]
    words = {frozenset(["same"]): "same", frozenset(["refused"]): "refused"}
    others = [mode for mode in found if mode not in always]
    rows = [
        [f"`{name}`", *(words.get(frozenset(found[mode][name]), "same or refused") for mode in others)]
        for name in functions
    ]
    return (
        f"All {len(functions)} functions and modules give the results of a plain call in these modes: "
        f"{', '.join(always)}.\n\n{table(['function or module', *others], rows)}"
    )


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
        examples,
        glance,
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
        work,
        mutants,
        modes,
    )
}


def fill(text: str) -> str:
    """Return the text with each generated section inserted between its markers."""
    for name in re.findall(r"<!-- (\w+) -->\n", text):
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, tail = text.split(begin)[0], text.split(end)[1]
        text = head + begin + SECTIONS[name]() + end + tail
    return text


def badges() -> list[tuple[str, str]]:
    """Return (label, value) of what the project's own files say of it."""
    project = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'__version__ = "(.+)"', (ROOT / "fastkd/_version.py").read_text())
    found = {
        name: re.search(pattern, project)
        for name, pattern in (
            ("python", r'requires-python = ">=(.+)"'),
            ("pytorch", r'dependencies = \["torch>=(.+)"\]'),
            ("license", r'license = "(.+)"'),
        )
    }
    assert version and all(found.values())
    values = {name: match[1] for name, match in found.items() if match}
    goals = [bar["passed"] for one in results("cases") for row in one["cases"] for bar in row["bars"]]
    return [
        ("version", version[1]),
        ("python", f"{values['python']} or later"),
        ("pytorch", f"{values['pytorch']} or later"),
        ("speed goals", f"{sum(goals)} of {len(goals)} reached on CPU"),
        ("gpu", "not measured yet"),
        ("license", values["license"]),
    ]


def _bars(rows: list[Row]) -> list[Row]:
    """Return how many times faster fastkd is in each case that eager PyTorch or torch.compile ran."""
    found = []
    for row in rows:
        ours = row["providers"]["fastkd"].get("median")
        timed = {name: row["providers"].get(name, {}).get("median") for name in ("eager", "compile")}
        others = {name: seconds / ours for name, seconds in timed.items() if ours and seconds}
        if others and row["backward"]:
            found.append({"case": row["case"], "others": others})
    return found


def _memory(rows: list[Row]) -> list[Row]:
    """Return the extra bytes of each case by provider, for the cases of _bars."""
    named = {bar["case"] for bar in _bars(rows)}
    order = ("fastkd", "compile", "eager")
    return [
        {"case": row["case"], "bytes": {n: row["providers"].get(n, {}).get("memory") for n in order}}
        for row in rows
        if row["case"] in named
    ]


def pictures() -> Iterator[tuple[str, Any, Callable[[Any, Any], None], tuple[float, float]]]:
    """Yield (name, data, drawing function, size in inches) for every picture."""
    found = results("cases")
    backward = [[row for row in one["cases"] if row["backward"]] for one in found]
    titles = [one["header"]["gpu"] or one["header"]["cpu"] for one in found]
    if found:
        of_case = {bar["case"]: bar["others"] for bar in _bars(newest()["cases"])}
        chosen = [{"case": title, "others": of_case[case]} for case, title in HEADLINE]
        yield "headline", chosen, plots.speedups, (7.5, 3.2)
        times = [{"title": title, "cases": _bars(rows)} for title, rows in zip(titles, backward, strict=True)]
        height = 1 + 0.28 * max(len(one["cases"]) for one in times)
        yield "overview-time", times, plots.speedups_of_machines, (7.5 + 3.5 * (len(times) - 1), height)
        memory = [{"title": title, "cases": _memory(rows)} for title, rows in zip(titles, backward, strict=True)]
        yield "overview-memory", memory, plots.memory_of_machines, (7.5 + 3.5 * (len(memory) - 1), height)
    for one in found:
        rows = [row for row in one["cases"] if "median" in row["providers"]["fastkd"]]
        limits = {
            key: statistics.median(row[key] for row in rows if row["dtype"] == "float32") for key in ("copy", "matmul")
        }
        points = [
            {"case": r["case"], "flops": r["flops"], "bytes": r["bytes"], "seconds": r["providers"]["fastkd"]["median"]}
            for r in rows
        ]
        yield f"roofline-{one['header']['machine']}", {**limits, "cases": points}, plots.roofline, (6, 4)
    for found in studies():
        from experiments.study import draw

        chosen = {key: found[key] for key in ("lines", "teacher_top1")}
        yield f"study-{name_of_study(found)}", chosen, draw, (9, 4)
    path = RESULTS / "anchoring.json"
    if path.exists():
        from experiments.anchoring import draw as bars_of_seeds

        yield "anchoring", json.loads(path.read_text())["rows"], bars_of_seeds, (9, 3)
    for found in results("sweeps"):
        for variable in dict.fromkeys(row["variable"] for row in found["sweeps"]):
            rows = [row for row in found["sweeps"] if row["variable"] == variable]
            yield f"scaling-{variable}-{found['header']['machine']}", rows, plots.scaling, (9, 3.5)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with status 1 if anything differs")
    check = parser.parse_args(arguments).check
    stale = []
    for page in PAGES:
        old = page.read_text()
        new = fill(old)
        if old != new:
            stale.append(page)
            if not check:
                page.write_text(new)
    drawn = {name: drawings.flow(rows) for name, rows in drawings.DRAWINGS.items()}
    for name, svg in {**drawn, "badges": drawings.badges(badges())}.items():
        drawing = PICTURES / f"{name}.svg"
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
