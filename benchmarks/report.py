"""Write measured cases as a text table and as JSON."""

import json
import re
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import MB, Bar
from benchmarks.measure import Figures, Measured, Verdict
from fastkd import info

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
HEAD = (
    f"  {'provider':<18}{'ms':>10}  {'p20-p80':<17}{'/eager':>8}{'/compile':>9}{'MB':>7}"
    f"{'loss err':>10}{'grad err':>10}  {'GB/s (copy)':<14}GFLOP/s (product)"
)


def _commit() -> str:
    """Return the commit, marked "-dirty" if the tree differs from it by more than results and generated docs."""

    def git(*args: str) -> str:
        try:
            return subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:  # no git
            return ""

    commit = git("describe", "--always", "--exclude=*")
    written = [f":(top,exclude){path}" for path in ("benchmarks/results", "docs", "README.md")]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *written)
    return f"{commit}{'-dirty' if changed else ''}" if commit else "unknown"


def header(device: str) -> dict[str, Any]:
    """Return the machine, the date, the commit and the versions of a measurement."""
    found = info.collect()
    cpu = found["devices"][0].removeprefix("cpu: ")
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "machine": re.sub(r"[^a-z0-9]+", "-", (gpu or cpu).lower().replace("(r)", "")).strip("-"),
        "cpu": cpu,
        "gpu": gpu,
        "versions": found["versions"],
        "backends": {name: not why_not for name, why_not in found["backends"].items()},
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def title(head: dict[str, Any]) -> str:
    versions = "  ".join(f"{name} {version or '-'}" for name, version in head["versions"].items())
    return f"{head['gpu'] or head['cpu']}\n{versions}\ncommit {head['commit']}, {head['date']}\n"


def _cell(value: float | None, pattern: str, width: int) -> str:
    return f"{'-' if value is None else pattern.format(value):>{width}}"


def _times_faster(f: Figures, other: Figures | None) -> float | None:
    return other.median / f.median if other is not None and other.times else None


def _rate(rate: float, limit: float) -> str:
    return f"{rate / 1e9:.3g} ({rate / limit:.0%})" if rate > 0.01 * limit else "-"


def _row(name: str, f: Figures, measured: Measured) -> str:
    errors = _cell(f.loss_error, "{:.0e}", 10) + _cell(f.gradient_error, "{:.0e}", 10)
    if not f.times:
        return f"  {name:<18}{'-':>10}  {'':<17}{'-':>8}{'-':>9}{'-':>7}{errors}  {f.failure}"
    spread = f"{f.quantile(0.2) * 1e3:.4g}-{f.quantile(0.8) * 1e3:.4g}"
    cells = (
        _cell(_times_faster(f, measured.figures.get("eager")), "{:.2f}x", 8),
        _cell(_times_faster(f, measured.figures.get("compile")), "{:.2f}x", 9),
        _cell(None if f.memory is None else f.memory / MB, "{:.0f}", 7),
        errors,
    )
    rates = ""
    if measured.case.providers[name].gated:
        of_copy = _rate(measured.bytes / f.median, measured.copy)
        rates = f"{of_copy:<14}{_rate(measured.case.flops / f.median, measured.matmul)}"
    return f"  {name:<18}{f.median * 1e3:>10.3f}  {spread:<17}{''.join(cells)}  {rates}"


def _verdict(verdict: Verdict) -> str:
    bar: Bar = verdict.bar
    alternative = f" or {bar.or_below * 1e6:.0f} us" if bar.or_below else ""
    what = f"{bar.rival} / fastkd, {bar.what}"
    ratio = _cell(verdict.ratio, "{:.2f}", 8)
    return f"{what:<32}{ratio} / {bar.at_least:<6.3g}{alternative} {'pass' if verdict.passed else 'MISS'}"


def block(measured: Measured) -> str:
    """Return the text table of a case: one provider per line, then its bars."""
    case = measured.case
    rounds = max((len(f.times) for f in measured.figures.values()), default=0)
    lines = [
        f"{case.name}  {str(case.dtype).removeprefix('torch.')}  {'forward + backward' if case.backward else 'forward'}"
        f"  {measured.bytes / 1e6:.1f} MB, {case.flops / 1e9:.3g} GFLOP  {rounds} rounds"
        f"  copy {measured.copy / 1e9:.1f} GB/s, product {measured.matmul / 1e9:.0f} GFLOP/s",
        HEAD,
        *(_row(name, f, measured) for name, f in measured.figures.items()),
        *(f"  bar  {_verdict(v)}" for v in measured.verdicts()),
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def bars(cases: Sequence[Measured]) -> str:
    """Return all bars, one per line."""
    lines = [f"{m.case.name:<44}{_verdict(v)}" for m in cases for v in m.verdicts()]
    missed = sum(line.endswith("MISS") for line in lines)
    return "\n".join([*lines, f"{len(lines) - missed} of {len(lines)} bars reached"])


def provider_json(f: Figures) -> dict[str, Any]:
    """Return a provider's seconds, bytes and relative errors as JSON."""
    timed = (
        {"median": f.median, "p20": f.quantile(0.2), "p80": f.quantile(0.8), "rounds": len(f.times)} if f.times else {}
    )
    errors = {"loss_error": f.loss_error, "gradient_error": f.gradient_error}
    return {**timed, "memory": f.memory, **errors, **({"failure": f.failure} if f.failure else {})}


def rows(cases: Sequence[Measured]) -> dict[str, Any]:
    """Return the cases as JSON, in seconds, bytes, bytes/s and FLOP/s; the drop-ins in a table of their own."""
    tables: dict[str, Any] = {}
    for m in cases:
        row = {
            "case": m.case.name,
            "device": m.case.device,
            "dtype": str(m.case.dtype).removeprefix("torch."),
            "backward": m.case.backward,
            "bytes": m.bytes,
            "flops": m.case.flops,
            "copy": m.copy,
            "matmul": m.matmul,
            "providers": {name: provider_json(f) for name, f in m.figures.items()},
            "bars": [{**v.bar._asdict(), "ratio": v.ratio, "passed": v.passed} for v in m.verdicts()],
        }
        tables.setdefault("dropins" if m.case.name.startswith("dropins/") else "cases", []).append(row)
    return tables


def write(path: Path, head: dict[str, Any], body: dict[str, Any], prefix: str = "") -> Path:
    """Write header and body as JSON to the path or, if it is a folder, to <prefix><machine>.json in it."""
    path = path if path.suffix == ".json" else path / f"{prefix}{head['machine']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {"header": json.dumps(head, indent=1), **{name: _to_json(value) for name, value in body.items()}}
    path.write_text("{\n" + ",\n".join(f'"{name}": {text}' for name, text in parts.items()) + "\n}\n")
    return path


def _to_json(value: Any) -> str:
    """Return JSON with one line per row for a table of plain rows, indented JSON otherwise."""
    plain = isinstance(value, list) and not any(isinstance(x, (dict, list)) for row in value for x in row.values())
    return "[\n" + ",\n".join(map(json.dumps, value)) + "\n]" if plain else json.dumps(value, indent=1)
