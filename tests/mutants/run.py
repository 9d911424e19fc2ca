"""Plant the faults of tests/mutants/*.toml one at a time in a scratch copy, and record the test that notices each.

python tests/mutants/run.py [NAME ...] [--jobs 2] [--json tests/mutants/results.json]

A mutant is a text that occurs once in a file and what replaces it. Its tests are run as `make test` runs them: kernels/
under Triton's interpreter, csrc/cuda as emulated on a CPU, everything else as it is. The status is 1 if one survives.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest depends on it there

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RESULTS = HERE / "results.json"
LIMIT = 900  # seconds for the tests of one mutant; a fault may make a loop endless


@dataclass(frozen=True)
class Mutant:
    """One planted fault.

    name: unique. fault: what is wrong, in words. file: relative to the root. old: a text that occurs there once.
    new: what replaces it. tests: pytest's arguments that select the tests of its stem.
    """

    name: str
    fault: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def key(self) -> str:
        """A digest of the change: a result holds for this change alone, in whichever file it stands."""
        return hashlib.sha256(repr((self.old, self.new)).encode()).hexdigest()[:16]

    @property
    def is_compiled(self) -> bool:
        return self.file.startswith("csrc/") and not self.is_emulated

    @property
    def is_emulated(self) -> bool:
        return self.file.startswith("csrc/cuda/")

    @property
    def is_interpreted(self) -> bool:
        return self.file.startswith("kernels/")

    def changed(self, source: str) -> str:
        count = source.count(self.old)
        if count != 1 or self.old == self.new:
            raise ValueError(f"{self.name}: its text occurs {count} times in {self.file}, expected once")
        return source.replace(self.old, self.new)


def mutants() -> list[Mutant]:
    """Every mutant of tests/mutants/*.toml; a file's `tests` are those of its mutants that name none."""
    found = []
    for path in sorted(HERE.glob("*.toml")):
        table = tomllib.loads(path.read_text())
        rows = ({"tests": table["tests"], **row} for row in table["mutant"])
        found += [Mutant(**{**row, "tests": tuple(row["tests"])}) for row in rows]
    return found


def pytest(folder: Path, mutant: Mutant, tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run tests of a tree as `make test` would for the mutant's kind of file, up to the first that fails."""
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-v", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-W", "ignore", *tests]
    if mutant.is_interpreted:
        env["TRITON_INTERPRET"] = "1"
        command += ["-m", "triton and not exhaustive"]
    else:
        command += ["-m", "not exhaustive"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=LIMIT)


class Copy:
    """A scratch copy of the tree, with an extension of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        files = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")
        for name in filter(None, files):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        for pattern in ("_built_for.py", "_C.*", "_recorder.*"):
            for path in (ROOT / "fastkd").glob(pattern):
                shutil.copy2(path, folder / "fastkd" / path.name)
        (folder / "fastkd_kernels").symlink_to("kernels")
        self.is_stale = False  # whether the extension is that of a mutant

    def build(self) -> bool:
        """Compile what changed. Returns whether that worked."""
        self.is_stale = False
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        env = os.environ | {"FASTKD_BUILD_EXT": "1", "FORCE_ONLY_CPU": "1"}
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, check=False).returncode == 0

    def caught_by(self, mutant: Mutant) -> str:
        """The first test that fails with the fault and passes without it; "" if all pass."""
        try:
            run = pytest(self.folder, mutant, mutant.tests)
        except subprocess.TimeoutExpired:
            return f"a test that ran longer than {LIMIT} s"
        if run.returncode == 0:
            return ""
        if found := re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", run.stdout, re.MULTILINE):
            test, how = found[1], ""
        elif run.returncode < 0 and (lines := re.findall(r"^(tests/\S+)", run.stdout, re.MULTILINE)):
            test, how = lines[-1], f", killed by signal {-run.returncode}"
        else:
            raise RuntimeError(
                f"{mutant.name}: pytest ended with {run.returncode}\n{run.stdout[-3000:]}{run.stderr[-3000:]}"
            )
        if pytest(ROOT, mutant, (test,)).returncode != 0:
            raise RuntimeError(f"{mutant.name}: {test} fails without the fault too")
        return test + how

    def plant(self, mutant: Mutant) -> str:
        """The test that catches the mutant; "" if it survives."""
        path = self.folder / mutant.file
        source = path.read_text()
        if self.is_stale and not mutant.is_compiled and not self.build():
            raise RuntimeError("the unchanged extension does not build")
        path.write_text(mutant.changed(source))
        try:
            if mutant.is_compiled and not self.build():
                raise RuntimeError(f"{mutant.name} does not compile")
            return self.caught_by(mutant)
        finally:
            path.write_text(source)
            self.is_stale |= mutant.is_compiled


def run(chosen: list[Mutant], jobs: int) -> Iterator[tuple[Mutant, str, float]]:
    """(mutant, the test that caught it or "", seconds), in the order in which they end."""
    done: SimpleQueue[tuple[Mutant, str, float] | BaseException] = SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="fastkd-mutants-") as scratch:
        copies: SimpleQueue[Copy] = SimpleQueue()
        for i in range(jobs):
            copies.put(Copy(Path(scratch, str(i))))

        def work(mutant: Mutant) -> None:
            copy, start = copies.get(), time.monotonic()
            try:
                done.put((mutant, copy.plant(mutant), time.monotonic() - start))
            except BaseException as error:  # raised again where results are read
                done.put(error)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(jobs) as pool:
            for mutant in chosen:
                pool.submit(work, mutant)
            for _ in chosen:
                result = done.get()
                if isinstance(result, BaseException):
                    pool.shutdown(cancel_futures=True)
                    raise result
                yield result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="regular expressions of the mutants to plant; all without one")
    parser.add_argument("--new", action="store_true", help="only those without a result")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="mutants at a time")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file that the results are merged into")
    args = parser.parse_args()
    every = mutants()
    known = json.loads(args.json.read_text()) if args.json.exists() else {}
    results = {m.name: known[m.name] for m in every if m.name in known and known[m.name]["key"] == m.key}
    chosen = [m for m in every if not args.names or any(re.search(name, m.name) for name in args.names)]
    chosen.sort(key=lambda m: m.file)  # neighbours then share what is compiled
    chosen = [m for m in chosen if not (args.new and results.get(m.name, {}).get("caught_by"))]
    survived = 0
    for mutant, test, seconds in run(chosen, args.jobs):
        survived += not test
        print(f"{mutant.name}: {test or 'SURVIVED'} ({seconds:.0f} s)", flush=True)
        results[mutant.name] = {
            "key": mutant.key,
            "file": mutant.file,
            "fault": mutant.fault,
            "caught_by": test,
            "seconds": round(seconds),
        }
        args.json.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    print(f"{len(chosen)} planted, {survived} survived")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
