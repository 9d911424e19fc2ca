"""Run every example and store its time: python -m experiments.example_times [--json FILE]."""

import argparse
import datetime as dt
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from fastkd._version import __version__
from fastkd.info import cpu_name
from fastkd.train import report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/examples.json"


def seconds(example: Path) -> dict[str, float]:
    """Return the seconds of an example by the clock, and those of its processes on all cores."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, str(example)], check=True, env=os.environ | {"PYTHONPATH": path})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"clock": time.perf_counter() - start, "processor": cpu}


def main() -> None:
    """Run the examples one by one."""
    parser = argparse.ArgumentParser(prog="python -m experiments.example_times", description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS, help="file of the results")
    args = parser.parse_args()
    paths = [path for path in sorted((ROOT / "examples").glob("*.py")) if "__main__" in path.read_text()]
    header = {
        "machine": f"{cpu_name()}, {torch.get_num_threads()} threads",
        "versions": {"fastkd": __version__, "torch": torch.__version__},
        "date": dt.date.today().isoformat(),
    }
    report.write_json(args.json, header | {"examples": {path.stem: seconds(path) for path in paths}})


if __name__ == "__main__":
    main()
