"""A call on a GPU whose steps need neither a GPU nor torch: python staged_call.py DIR runs it until it is killed."""

import os
import signal
import sys
from pathlib import Path

from benchmarks.gpu import call

# It notes items as `benchmarks.gpu.steps` does, and ends as the name of its part says.
PART = """
import json, os, signal, sys, time
rows, step, part = sys.argv[1:]
def note(item, **row):
    file = os.open(rows, os.O_WRONLY | os.O_APPEND)
    os.write(file, (json.dumps({"step": step, "part": part, "item": item, **row}) + "\\n").encode())
with open(rows) as file:
    found = [row["item"] for row in map(json.loads, file) if (row["step"], row["part"]) == (step, part)]
for number in range(4):
    item = f"{part} {number}"
    if item in found:
        continue
    note(item, state="began")
    if part == "dies" and number == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if part == "hangs" and number == 1:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(60)
    if part == "dies at once":
        sys.exit(1)
    time.sleep(0.01)
    note(item, state="passed")
"""


def staged(out: Path, seconds: float) -> call.Call:
    def command(step: call.Step, part: str, until: float) -> list[str]:
        return [sys.executable, "-S", "-c", PART, str(out / "rows.jsonl"), step.name, part]

    return call.Call(out, seconds, seconds / call.SECONDS, command, dict(os.environ), {"commit": "x"})


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, call.terminated)
    steps = [call.Step(f"step{i}", 40, (f"well {i}", f"also {i}")) for i in range(12)]
    staged(Path(sys.argv[1]), 40.0).run_all(steps)
