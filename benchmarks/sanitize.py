"""Run compute-sanitizer on the tests of the CUDA operators: python -m benchmarks sanitize.

A machine without compute-sanitizer, or one that does not allow it, is reported and is no failure. Errors it finds are.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
TOOLS = ("memcheck", "racecheck")
TESTS = ("tests/moments", "tests/prior")
CHOSEN = (
    "native and not permuted and not float16"  # a selection with every kernel in every mode that fits the time limit
)
SECONDS = 240  # seconds per tool


class Verdict(NamedTuple):
    """The result of a tool. errors: None if the tool did not run; `why` has the reason."""

    tool: str
    errors: int | None
    why: str = ""

    def __str__(self) -> str:
        return f"{self.tool}: {f'not run, {self.why}' if self.errors is None else f'{self.errors} errors'}"


def find() -> str | None:
    """Return the path of compute-sanitizer, from PATH or from the toolkit."""
    homes = [os.getenv("CUDA_HOME", ""), "/usr/local/cuda"]
    places = [os.path.join(home, folder) for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def check(tool: str, program: list[str], seconds: float = SECONDS) -> Verdict:
    """Run the program under a tool."""
    sanitizer = find()
    if sanitizer is None:
        return Verdict(tool, None, "no compute-sanitizer on this machine")
    command = [sanitizer, "--tool", tool, "--target-processes", "all", *program]
    # Without PyTorch's cache every tensor has its own allocation, so that out-of-bounds accesses are found.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    both: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **both, env=environment, cwd=ROOT, start_new_session=True) as run:
        try:
            text, _ = run.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)  # kills the program too, which would otherwise keep running
            return Verdict(tool, None, f"longer than {seconds:g} s")
    found = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", text)
    errors = sum(int(a or b) for a, b in found)
    if errors == 0 and found and run.returncode != 0:
        return Verdict(tool, None, f"its program ended with status {run.returncode}")
    if found:
        return Verdict(tool, errors)
    said = [line for line in text.splitlines() if line.startswith("=========") and len(line) > 12]
    return Verdict(tool, None, (said or text.splitlines() or ["it said nothing"])[-1].strip("= "))


def main(argv: list[str]) -> int:
    """Run all tools. Return status 1 if they find errors."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks sanitize", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="PATH")
    args = parser.parse_args(argv)
    program = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", CHOSEN, *TESTS]
    verdicts = [check(tool, program) for tool in TOOLS]
    print(*verdicts, sep="\n")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([verdict._asdict() for verdict in verdicts], indent=1) + "\n")
    return int(any(verdict.errors for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
