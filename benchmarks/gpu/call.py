"""Measure and test everything on a GPU in one call of a few minutes: python -m benchmarks gpu-call.

Steps run in the order of their worth. Each part of a step is a process of its own: one that dies or hangs costs nothing
else. Results are written after every step and every ten seconds: a call that is cut anywhere leaves what it has.
The process of the call itself never touches the GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu import rehearsal, summary

Row = dict[str, Any]
ROOT = Path(__file__).parents[2]
SECONDS = 530.0  # a command may take 600; its last seconds go into ending processes and writing
EVERY = 10.0  # seconds between writes
GRACE = 5.0  # seconds between SIGINT and SIGKILL
TICK = 0.05
STARTS = 20  # of one part at most


class Step(NamedTuple):
    """A step of the call. budget: seconds of a call of SECONDS; a step also gets what the earlier ones have left over.

    parts: names of processes that run side by side. after_build: whether the step waits for the extension.
    """

    name: str
    budget: float
    parts: tuple[str, ...] = ("",)
    after_build: bool = False


STEMS = ("relation", "attention", "moments", "prior", "logits")
DTYPES = ("bfloat16", "float32", "float16")
SHARDS = 12
RIVALS = ("manifold", "intra_512", "intra_1024", "batch", "attention_197", "attention_4097", "moments", "resnet50")
STEPS = (
    Step("versions", 15),
    Step("smoke", 45, tuple(f"{stem}-{dtype}" for dtype in DTYPES for stem in STEMS)),
    Step("timings", 60),
    Step("training", 35),
    Step("native", 25, after_build=True),
    Step("suite", 160, tuple(f"{i + 1} of {SHARDS}" for i in range(SHARDS))),
    Step("rivals", 75, RIVALS),
    Step("counters", 40),
    Step("sanitizer", 60, ("memcheck", "racecheck")),
)
BUILD = Step("build", 150)
# The CUDA operators alone, beside the first steps, which need the other cores.
COMPILE = ("env", "FASTKD_BUILD_EXT=1", "FORCE_CUDA=1", "FORCE_ONLY_CUDA=1", "MAX_JOBS=4", "nice", "-n", "10")


def write(path: Path, text: str) -> None:
    """Replace a file at once: a reader, or a machine that stops, finds the old text or the new."""
    part = path.with_suffix(".part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def die_with_parent() -> None:
    """Let this process be killed when the one that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def alone() -> None:
    """Put a new process in a group of its own, to be ended whole, and let it die with its parent."""
    os.setpgrp()
    die_with_parent()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


class Call:
    """A call under way: its clock, its processes and its files in `out`.

    scale: the ratio of its seconds to those of the steps' budgets.
    command: (step, part, until) -> the command line of a process. The processes append rows to rows.jsonl.
    """

    def __init__(
        self,
        out: Path,
        seconds: float,
        scale: float,
        command: Callable[[Step, str, float], list[str]],
        environment: dict[str, str],
        header: Row | None = None,
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.scale = out, scale
        self.zero = time.monotonic()
        self.end = self.zero + seconds
        self._command, self._environment = command, environment
        self.steps: dict[str, Row] = {}
        self.items: dict[tuple[str, str, str], Row] = {}
        self.planned: dict[tuple[str, str], list[str]] = {}
        self.header = {"seconds": seconds, **(header or {})}
        self._read, self._saved = 0, self.zero
        self.rows = out / "rows.jsonl"
        self.rows.write_bytes(b"")
        self._log = (out / "log.txt").open("wb", buffering=0)
        self._running: list[subprocess.Popen[bytes]] = []

    def now(self) -> float:
        return round(time.monotonic() - self.zero, 3)

    def start(self, step: Step, part: str, until: float, log: Any = None) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            self._command(step, part, until),
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=log or self._log,
            stderr=subprocess.STDOUT,
            preexec_fn=alone,
        )
        self._running.append(process)
        return process

    def stop(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        """Interrupt processes, and kill those that do not end. What they have started ends with them."""
        for process in processes:
            _signal(process, signal.SIGINT)
        limit = time.monotonic() + GRACE * min(1.0, self.scale)
        while any(process.poll() is None for process in processes) and time.monotonic() < limit:
            time.sleep(TICK)
        for process in processes:
            _signal(process, signal.SIGKILL)
            process.wait()
            self._running.remove(process)

    def gather(self) -> None:
        """Read the rows written since the last time; the last line may not be whole yet."""
        with self.rows.open("rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")[0]
        for line in whole.splitlines():
            with suppress(ValueError, KeyError, TypeError):  # a process was killed within a line
                row = json.loads(line)
                key = row["step"], row["part"]
                if "planned" in row:
                    self.planned[key] = row["planned"]
                else:
                    self.items.setdefault((*key, row["item"]), {}).update(row)
        self._read += len(whole) + bool(whole)

    def results(self) -> Row:
        plan = {key: len(names) for key, names in self.planned.items()}
        for (name, part), n in plan.items():
            self.steps[name].setdefault("planned", {})[part] = n
        return {"header": self.header, "steps": self.steps, "items": list(self.items.values())}

    def save(self) -> None:
        self.gather()
        self._saved = time.monotonic()
        self.header["took"] = self.now()
        write(self.out / "gpu.json", json.dumps(self.results(), indent=0) + "\n")

    def _begun(self, step: Step, part: str) -> int:
        return sum(key[:2] == (step.name, part) for key in self.items)

    def run(self, step: Step, until: float, wait_for: subprocess.Popen[bytes] | None = None) -> None:
        """Run the parts of a step until they end, or until the time given; start those again that died on the way."""
        state = self.steps[step.name] = {"state": "running", "began": self.now(), "died": {}}
        while (
            wait_for is not None
            and wait_for.poll() is None
            and time.monotonic() < until - 0.4 * step.budget * self.scale
        ):
            self._tick()
        running, given_up, begun, starts = {}, False, dict.fromkeys(step.parts, 0), dict.fromkeys(step.parts, 1)
        for part in step.parts:
            running[part] = self.start(step, part, until)
        while running and time.monotonic() < until:
            self._tick()
            for part, process in list(running.items()):
                if process.poll() is None:
                    continue
                self.stop([running.pop(part)])
                if process.returncode == 0:
                    continue
                self.gather()
                state["died"].setdefault(part, []).append(process.returncode)
                self._mark(step, part, "died")
                if self._begun(step, part) > begun[part] and starts[part] < STARTS:
                    begun[part] = self._begun(step, part)
                    starts[part] += 1
                    running[part] = self.start(step, part, until)
                else:
                    given_up = True
        late = list(running)
        self.stop(list(running.values()))
        self.gather()
        for part in late:
            self._mark(step, part, "late")
        state |= {"ended": self.now(), "late": late, "state": "late" if late else "given up" if given_up else "done"}
        self.save()
        print(summary.step(step.name, self.results()), flush=True)

    def _mark(self, step: Step, part: str, state: str) -> None:
        """Name the item that a process was at when it ended."""
        for key, row in self.items.items():
            if key[:2] == (step.name, part) and row["state"] == "began":
                row["state"] = state

    def _tick(self) -> None:
        time.sleep(TICK)
        if time.monotonic() > self._saved + EVERY * min(1.0, self.scale):
            self.save()

    def run_all(self, steps: Sequence[Step], build: Step | None = None) -> None:
        """Run the steps by their timetable, with the build of the extension in the background."""
        building, before = None, {step.name: sum(s.budget for s in steps[: i + 1]) for i, step in enumerate(steps)}
        try:
            self.save()
            if build is not None:
                self.steps[build.name] = {"state": "running", "began": self.now()}
                with (self.out / "build.log").open("wb") as log:
                    building = self.start(build, "", self.zero + build.budget * self.scale, log)
            for step in steps:
                until = min(self.end, self.zero + before[step.name] * self.scale)
                if building is not None and (building.poll() is not None or step.name != steps[0].name):
                    self._look(building, build)
                self.run(step, until, building if step.after_build else None)
        finally:
            self.stop(list(self._running))
            if building is not None:
                self._look(building, build)
            self.gather()
            for row in self.steps.values():
                if row["state"] == "running":
                    row["state"] = "cut"
            self.save()

    def _look(self, building: subprocess.Popen[bytes], build: Step | None) -> None:
        """Note how the build has ended, and end one that takes too long."""
        assert build is not None
        state = self.steps[build.name]
        if building.poll() is None and time.monotonic() > self.zero + build.budget * self.scale:
            self.stop([building])
            state["late"] = ["build"]
        if building.returncode is not None and state["state"] == "running":
            state |= {"ended": self.now(), "state": "done" if building.returncode == 0 else "died"}


def terminated(number: int, frame: object) -> None:
    for other in (signal.SIGTERM, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)  # the rest is short
    raise KeyboardInterrupt


def environment(work: Path, rehearse: bool) -> dict[str, str]:
    """Return the processes' environment: the tree, kernels under the name they are imported by, caches of this call."""
    (work / "site").mkdir()
    (work / "site/fastkd_kernels").symlink_to(ROOT / "kernels")
    found = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(work / "site"))),
        "TRITON_CACHE_DIR": str(work / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return found | (rehearsal.environment(work, found["PATH"]) if rehearse else {})


def commit(kernels: Path | None) -> str:
    """Return the commit: that of the tree, or the one noted beside the carried kernels, where no git came along."""
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    with suppress(OSError, ValueError, TypeError):
        return str(json.loads((kernels / "keys.json").read_text())["commit"])  # type: ignore[operator]
    return "unknown"


def main(argv: list[str]) -> int:
    """Run the call. Return status 1 if a step did not end, or if something failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu-call", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu"), metavar="DIR", help="folder for the results")
    parser.add_argument("--seconds", type=float, help=f"length of the call in seconds; default: {SECONDS:g}")
    parser.add_argument(
        "--kernels", type=Path, metavar="DIR", help="folder of compiled kernels, filled by `gpu-kernels`"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="run on the CPU, without network, in a fifth of the time"
    )
    args = parser.parse_args(argv)
    out, kernels = args.out.resolve(), args.kernels and args.kernels.resolve()
    steps, planned, speed = list(STEPS), SECONDS, 1.0
    if args.rehearse:
        start = rehearsal.start()
        steps = [s._replace(parts=rehearsal.parts(s.name, s.parts), budget=s.budget + start) for s in STEPS]
        planned, speed = SECONDS + start * len(STEPS), rehearsal.SPEED
    seconds = args.seconds or speed * planned
    header = {"commit": commit(kernels), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, terminated)
    with tempfile.TemporaryDirectory(prefix="gpu-call-") as folder:

        def command(step: Step, part: str, until: float) -> list[str]:
            if step is BUILD:
                build = [*COMPILE, sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
                return rehearsal.BUILD if args.rehearse else build
            given = {"part": part, "out": out, "work": folder, "kernels": kernels or "", "zero": call.zero}
            options = [f"--{name}={value}" for name, value in (given | {"until": until}).items()]
            child = [sys.executable, "-m", "benchmarks.gpu.steps", step.name, *options]
            return [*rehearsal.prefix(step.name), *child, "--small"] if args.rehearse else child

        call = Call(
            out,
            seconds,
            seconds / planned,
            command,
            environment(Path(folder), args.rehearse),
            header | {"rehearsal": args.rehearse},
        )
        try:
            call.run_all(steps, BUILD)
        except KeyboardInterrupt:
            call.header["cut"] = call.now()
            call.save()
        text = summary.text(call.results())
        print(text, flush=True)
    return int(not summary.is_good(call.results()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
