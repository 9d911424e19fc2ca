"""Command line: python -m benchmarks --help."""

import argparse
import fnmatch
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.case import Case
from benchmarks.cases import CASES
from benchmarks.measure import measure


def select(cases: Sequence[Case], device: str, dtype: str | None, pattern: str) -> list[Case]:
    def fits(case: Case) -> bool:
        return case.device == device and dtype in (None, str(case.dtype).removeprefix("torch."))

    return [case for case in cases if fits(case) and fnmatch.fnmatch(case.name, pattern)]


def main(argv: list[str] | None = None) -> int:
    """Print the table; the status is 1 only if fastkd itself fails the accuracy gate or cannot run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=report.__doc__)
    parser.add_argument("--case", metavar="GLOB", default="*", help="names to run, such as 'relation/*'")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: all")
    parser.add_argument("--rounds", type=int, metavar="N", help="default: as many as a few seconds allow")
    where = "a file, or a folder for <machine>.json; default: benchmarks/results/ after a run of every case"
    parser.add_argument("--json", type=Path, metavar="PATH", help=where)
    parser.add_argument("--list", action="store_true", help="only print the names")
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
    done = []
    for case in cases:
        done.append(measure(case, args.rounds))
        print(report.block(done[-1]), flush=True)
    print(report.bars(done))
    is_whole = len(cases) == len(select(CASES, args.device, None, "*"))
    path = args.json or (report.RESULTS if is_whole and args.rounds is None else None)
    if path is not None:
        path = path if path.suffix == ".json" else path / f"{head['machine']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(report.to_json(head, done))
        print(f"written to {path}")
    return int(any(m.figures["fastkd"].failure for m in done))


if __name__ == "__main__":
    sys.exit(main())
