"""Writes the measured tables of the README from benchmarks/results; with --check, fails where they differ."""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def demo() -> str:
    """The closing table of `fastkd train` and the machine it ran on."""
    from fastkd.train.report import table

    summary = json.loads((ROOT / "benchmarks/results/demo.json").read_text())
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    return f"{table(summary['results'])}\n\nMeasured on {summary['machine']} ({versions}), {summary['date']}.\n"


def fill(text: str) -> str:
    """text with each generated section in place of what stands between its markers."""
    for name, section in (("demo", demo()),):
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, tail = text.split(begin)[0], text.split(end)[1]
        text = head + begin + section + end + tail
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    old = README.read_text()
    new = fill(old)
    if parser.parse_args().check:
        sys.exit("README.md differs from its measurements: python docs/generate.py" if new != old else 0)
    README.write_text(new)
