"""What public calls launch on GPUs compiles for every architecture: without spills in loops, within shared memory, its
products on matrix units and each computed once.

Compiling takes the time. `make test` compiles few specialisations: together they have every kernel on every
architecture, each of its types and each value of its options, and on sm_80 and sm_90 every tile of 16-bit inputs. The
others are exhaustive.
"""

import os

import pytest

pytest.importorskip("triton", reason="no Triton here: its kernels are compiled where it is")

if os.getenv("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)

from benchmarks import aot as report
from benchmarks.dry_driver import TARGETS, Specialisation
from tests._support import aot

STEMS = (*aot.STEMS, "rest")
PARTS = 8  # of what is exhaustive, so that workers share it


def problems(kernels: list[Specialisation]) -> list[str]:
    reports = [report.inspect(kernel, is_brief=True) for kernel in kernels]
    return [f"{one}: {problem}" for one in reports for problem in one.problems()]


@pytest.mark.slow
@pytest.mark.parametrize("of", STEMS)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles(target: str, of: str) -> None:
    assert not problems([kernel for kernel in aot.cover(of)[0] if kernel.target == target])


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("of", STEMS)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_all(target: str, of: str, part: int) -> None:
    assert not problems([kernel for kernel in aot.cover(of)[1] if kernel.target == target][part::PARTS])
