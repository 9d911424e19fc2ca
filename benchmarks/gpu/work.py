"""A part of a step of a call on a GPU: its device, its clock, and the rows that it writes."""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu.device import Cpu, Cuda

Row = dict[str, Any]
LIMIT = 30.0  # seconds of an item before its process ends
MARGIN = 1.0  # seconds before the end of a step within which no item starts


class Work:
    """A part of a step: its device and clock, and the rows that it appends for the caller.

    small: whether this is a rehearsal. zero, until: time.monotonic() at the start of the call and the end of the step.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.step, self.part, self.small = args.step, args.part, args.small
        self.out, self.work = Path(args.out), Path(args.work)
        self.kernels = Path(args.kernels) if args.kernels else None
        self.zero, self.until = args.zero, args.until
        self.device: Cuda | Cpu = Cpu() if args.small else Cuda()
        self.rows = self.out / "rows.jsonl"
        self.begun = {row["item"] for row in self._earlier() if "item" in row}
        self.compiled: Counter[str] = Counter()

    def _earlier(self) -> Iterable[Row]:
        """Yield the rows of a process that died at this part."""
        with suppress(OSError):
            for line in self.rows.read_bytes().splitlines():
                with suppress(ValueError, KeyError, TypeError):
                    row = json.loads(line)
                    if (row["step"], row["part"]) == (self.step, self.part):
                        yield row

    def append(self, row: Row) -> None:
        """Append a line in one write, so that lines of several processes do not mix."""
        text = json.dumps({"step": self.step, "part": self.part, **row}, default=str) + "\n"
        file = os.open(self.rows, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, text.encode())
        os.close(file)

    def has_time(self) -> bool:
        return time.monotonic() < self.until - MARGIN

    def begin(self, item: str, limit: float = LIMIT) -> None:
        """Note that an item starts. If it takes longer than the limit, the process prints its stacks and ends."""
        self.append({"item": item, "state": "began", "at": round(time.monotonic() - self.zero, 3)})
        faulthandler.dump_traceback_later(limit, exit=True, file=2)  # pytest replaces sys.stderr
        self._began, self.compiled = time.monotonic(), Counter()

    def finish(self, item: str, row: Row) -> None:
        faulthandler.cancel_dump_traceback_later()
        seconds = round(time.monotonic() - self._began, 3)
        self.append({"item": item, "seconds": seconds, **self.compiled, **row})
        if row["state"] == "failed" and self.device.is_broken():
            os._exit(3)  # every later item would fail as well; the caller starts this part again behind this item

    def item(self, name: str, call: Callable[[], Row], limit: float = LIMIT) -> None:
        """Run an item, unless an earlier process died at it or no time is left. An exception is its result."""
        if name in self.begun or not self.has_time():
            return
        self.begin(name, limit)
        try:
            row = {"state": "passed", **call()}
        except Exception as error:
            row = {"state": "failed", "why": f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]}
        self.finish(name, row)

    def items(self, calls: dict[str, Callable[[], Row]], limit: float = LIMIT) -> None:
        self.append({"planned": list(calls)})
        for name, call in calls.items():
            self.item(name, call, limit)
