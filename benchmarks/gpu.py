"""Collect the results of `make gpu` in one JSON file and one Markdown file: python -m benchmarks gpu FOLDER.

Reads tests.xml (pytest), sanitizer.json, cases.json, profile.json and training.json, and reports missing ones as such.
"""

import argparse
import json
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.sanitize import Verdict

Row = dict[str, Any]
FILES = {"sanitizer": "sanitizer.json", "cases": "cases.json", "profile": "profile.json", "training": "training.json"}


def tests(path: Path) -> Row | None:
    """Return the number of each outcome, the names of failed tests, and the reasons for skips."""
    if not path.exists():
        return None
    outcomes: Counter[str] = Counter()
    failed, skipped = [], Counter[str]()
    for case in ET.parse(path).getroot().iter("testcase"):  # noqa: S314
        kinds = {child.tag for child in case}
        outcome = next((kind for kind in ("error", "failure", "skipped") if kind in kinds), "passed")
        outcomes[outcome] += 1
        if outcome in ("error", "failure"):
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        for skip in case.iter("skipped"):
            skipped[skip.get("message") or "no reason"] += 1
    return {"outcomes": dict(outcomes), "failed": failed, "skipped": dict(skipped)}


def collect(folder: Path) -> Row:
    """Return all results in the folder."""
    found: Row = {"tests": tests(folder / "tests.xml")}
    for key, name in FILES.items():
        path = folder / name
        found[key] = json.loads(path.read_text()) if path.exists() else None
    return found


def markdown(head: Row, found: Row) -> str:
    lines = [f"# {head['gpu'] or 'No GPU'}\n", report.title(head)]
    if (suite := found["tests"]) is None:
        lines.append("Tests: not run.\n")
    else:
        lines.append("Tests: " + ", ".join(f"{n} {kind}" for kind, n in suite["outcomes"].items()) + ".\n")
        lines += [f"- {name}" for name in suite["failed"]]
        lines += [f"- skipped {n}: {why}" for why, n in suite["skipped"].items()]
    verdicts = found["sanitizer"] and [str(Verdict(**verdict)) for verdict in found["sanitizer"]]
    lines.append(f"\ncompute-sanitizer: {'; '.join(verdicts) if verdicts else 'not run'}.\n")
    if found["cases"] is None:
        lines.append("Benchmarks: not run.\n")
    else:
        lines += ["| case | fastkd, ms | against | ratio | goal | |", "|---|---|---|---|---|---|"]
        for row in found["cases"]["cases"]:
            median = row["providers"]["fastkd"].get("median")
            ours = "-" if median is None else f"{median * 1e3:.3f}"
            for bar in row["bars"] or [None]:
                goal = "| - | - | - | |"
                if bar is not None:
                    ratio = "-" if bar["ratio"] is None else f"{bar['ratio']:.2f}"
                    verdict = "reached" if bar["passed"] else "missed"
                    goal = f"| {bar['rival']}, {bar['what']} | {ratio} | {bar['at_least']:.3g} | {verdict} |"
                lines.append(f"| {row['case']} | {ours} {goal}")
    if found["profile"] is None:
        lines.append("\nProfile: not run.\n")
    else:
        lines += ["\n| losses | part | host, ms | device, ms |", "|---|---|---|---|"]
        for row in found["profile"]["parts"]:
            device = "-" if row["device"] is None else f"{row['device'] * 1e3:.2f}"
            lines.append(f"| {row['losses']} | {row['part']} | {row['host'] * 1e3:.2f} | {device} |")
    if found["training"] is None:
        lines.append("\nTraining: not run.\n")
    else:
        lines += ["\n| training | setting | measured | goal, at most | |", "|---|---|---|---|---|"]
        for row in found["training"]["training"]:
            goal = "-" if row["goal"] is None else f"{row['goal']:.3g}"
            verdict = {True: "reached", False: "missed", None: ""}[row["reached"]]
            lines.append(
                f"| {row['figure']} | {row['setting']} | {row['value']:.3g} {row['unit']} | {goal} | {verdict} |"
            )
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """Return status 1 if a test failed, the sanitizer found errors, or tests or benchmarks did not run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    import torch

    head, found = report.header("cuda" if torch.cuda.is_available() else "cpu"), collect(folder)
    text = markdown(head, found)
    path = report.write(folder / "gpu.json", head, {"found": found})
    path.with_suffix(".md").write_text(text)
    print(text, f"written to {path} and {path.with_suffix('.md')}", sep="\n")
    suite = found["tests"]
    has_run = suite is not None and found["cases"] is not None
    return int(not has_run or bool(suite["failed"]) or any(v["errors"] for v in found["sanitizer"] or []))
