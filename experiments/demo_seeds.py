"""Run `make demo` with several seeds and store the results: python -m experiments.demo_seeds [--seeds 5] [--json FILE].

The file has the closing results of the first seed, as its summary.json, and the top-1 of every seed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from fastkd.train import report

RESULTS = Path(__file__).parents[1] / "benchmarks/results/demo.json"


def main() -> None:
    """Train once per seed, each in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m experiments.demo_seeds", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0 on")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file of the results")
    args = parser.parse_args()
    summaries = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            out = Path(folder, str(seed))
            command = [sys.executable, "-m", "fastkd", "train", "--seed", str(seed), "--out", str(out)]
            subprocess.run(command, check=True)
            summaries.append(json.loads((out / "summary.json").read_text()))
    top1: dict[str, list[float]] = {}
    for row in (row for summary in summaries for row in summary["results"]):
        top1.setdefault(row["network"], []).append(row["top1"])
    report.write_json(args.json, summaries[0] | {"seeds": top1})


if __name__ == "__main__":
    main()
