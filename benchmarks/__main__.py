"""Command line of the benchmarks: python -m benchmarks --help, and python -m benchmarks COMMAND --help."""

import argparse
import fnmatch
import importlib
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.case import Case
from benchmarks.cases import CASES
from benchmarks.measure import SECONDS, measure

MODULES = {"gpu-call": "gpu.call", "gpu-kernels": "gpu.kernels"}
COMMANDS = ("compare", "aot", "scaling", "profile", "training", "capture", *MODULES)


def select(cases: Sequence[Case], device: str, dtype: str | None, pattern: str) -> list[Case]:
    def fits(case: Case) -> bool:
        return case.device == device and dtype in (None, str(case.dtype).removeprefix("torch."))

    return [case for case in cases if fits(case) and fnmatch.fnmatch(case.name, pattern)]


def quick(case: Case) -> Case:
    """Return the case without the providers that take long to compile."""
    return replace(case, providers={name: p for name, p in case.providers.items() if not p.thorough})


def main(argv: list[str] | None = None) -> int:
    """Print the table. Return status 1 only if fastkd itself fails the accuracy gate or cannot run."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return int(importlib.import_module(f"benchmarks.{MODULES.get(argv[0], argv[0])}").main(argv[1:]))
    about = f"{report.__doc__} Other commands: {', '.join(COMMANDS)}."
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=about)
    parser.add_argument("--case", metavar="GLOB", default="*", help="names to run, such as 'relation/*'")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: all")
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="rounds of each case; default: as many as --seconds allow"
    )
    seconds = "timed seconds per case, without its oracle, compilation and memory; default: %(default)s"
    parser.add_argument("--seconds", type=float, default=SECONDS, help=seconds)
    thorough = "also run the providers that take long to compile: tuned mode, compiled stock formulations"
    parser.add_argument("--thorough", action="store_true", help=thorough)
    where = "file for the results, or folder for <machine>.json; default: benchmarks/results/ after a run of every case"
    parser.add_argument("--json", type=Path, metavar="PATH", help=where)
    parser.add_argument("--list", action="store_true", help="only print the names of the cases")
    args = parser.parse_args(argv)
    cases = select(CASES, args.device, args.dtype, args.case)
    if not cases:
        parser.error(f"no case for {args.device} is called {args.case!r}; --list names all")
    if args.list:
        print("\n".join(map(str, cases)))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU")

    head = report.header(args.device)
    print(report.title(head), flush=True)
    begin, done = time.monotonic(), []
    is_whole = len(cases) == len(select(CASES, args.device, None, "*"))
    path = args.json or (report.RESULTS if is_whole and args.rounds is None else None)
    for case in cases:
        done.append(measure(case if args.thorough else quick(case), args.rounds, args.seconds))
        print(report.block(done[-1]), flush=True)
        if args.json is not None:  # keeps the finished cases if the run is interrupted
            report.write(args.json, head, report.rows(done))
    print(report.bars(done))
    print(f"{len(done)} cases in {time.monotonic() - begin:.0f} s")
    if path is not None:
        print(f"written to {report.write(path, head, report.rows(done))}")
    return int(any(m.figures["fastkd"].failure for m in done))


if __name__ == "__main__":
    sys.exit(main())
