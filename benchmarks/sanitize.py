"""Run a program under compute-sanitizer.

A machine without compute-sanitizer, or one that does not allow it, is reported and is no failure. Errors it finds are.
"""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.call import ROOT, alone


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


def check(tool: str, program: list[str], seconds: float = 60, log: Path | None = None) -> Verdict:
    """Run the program under a tool, for so many seconds at most; `log` receives what both print."""
    sanitizer = find()
    if sanitizer is None:
        return Verdict(tool, None, "no compute-sanitizer on this machine")
    command = [sanitizer, "--tool", tool, "--target-processes", "all", *program]
    # Without PyTorch's cache every tensor has its own allocation, so that out-of-bounds accesses are found.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    both: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **both, env=environment, cwd=ROOT, preexec_fn=alone) as run:
        try:
            text, _ = run.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)  # kills the program too, which would otherwise keep running
            return Verdict(tool, None, f"longer than {seconds:.3g} s")
    if log is not None:
        log.write_text(text)
    found = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", text)
    errors = sum(int(a or b) for a, b in found)
    if errors == 0 and found and run.returncode != 0:
        return Verdict(tool, None, f"its program ended with status {run.returncode}")
    if found:
        return Verdict(tool, errors)
    said = [line for line in text.splitlines() if line.startswith("=========") and len(line) > 12]
    return Verdict(tool, None, (said or text.splitlines() or ["it said nothing"])[-1].strip("= "))
