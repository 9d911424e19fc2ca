"""What the public functions would launch compiles for every architecture, fits its shared memory and does not spill.

Compiling takes the time, and specialisations differ in one or two options. `make test` compiles kernels that together
have every architecture, every type and every value of every option; all others are exhaustive.
"""

import os
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton here: its kernels are compiled where it is")

if os.getenv("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)

import aot

import fastkd_kernels
from benchmarks import aot as report
from benchmarks.dry_driver import TARGETS, Specialisation


@cache
def _every_kernel() -> list[Specialisation]:
    return [kernel for target in TARGETS for kernel in aot.kernels(target)]


@cache
def _cover() -> list[Specialisation]:
    """Return few kernels that have every (kernel, target), (kernel, types) and (kernel, option, value)."""

    def pairs(kernel: Specialisation) -> set[tuple[str, ...]]:
        declared = {p.name for p in kernel.function.params if p.is_constexpr}
        options = {(name, str(value)) for name, value in kernel.constexprs.items() if name in declared}
        return {(kernel.name, *held) for held in (*options, tuple(kernel.types()), (kernel.target,))}

    rest = {kernel.key: (kernel, pairs(kernel)) for kernel in _every_kernel()}
    missing, chosen = set().union(*(held for _, held in rest.values())), []
    used: Counter[str] = Counter()
    while missing:
        kernel, held = max(rest.values(), key=lambda each: (len(each[1] & missing), -used[each[0].target]))
        del rest[kernel.key]
        used[kernel.target] += 1
        missing -= held
        chosen.append(kernel)
    return chosen


def _check(kernels: list[Specialisation]) -> None:
    problems = []
    for kernel in kernels:
        compiled = kernel.compile()
        assert compiled.asm["cubin" if kernel.target.startswith("sm") else "hsaco"]
        assert (getattr(compiled.metadata, "tmem_size", 0) or 0) <= aot.TENSOR_MEMORY
        found = report.inspect(kernel, compiled).problems()
        if compiled.metadata.shared > aot.SHARED_MEMORY[kernel.target]:
            found.append(f"{compiled.metadata.shared} bytes of shared memory")
        problems += [f"{kernel}: {problem}" for problem in found]
    assert not problems, "\n".join(problems)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_compiles(target: str) -> None:
    _check([kernel for kernel in _cover() if kernel.target == target])


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", TARGETS)
def test_all_compile(target: str) -> None:
    _check([kernel for kernel in _every_kernel() if kernel.target == target])


def test_every_kernel_is_covered() -> None:
    """A kernel that no call launches would be compiled nowhere."""
    defined = {
        line.removeprefix("def ").split("(")[0]
        for path in Path(next(iter(fastkd_kernels.__path__))).glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def _") and line.split("(")[0].endswith("_kernel")
    }
    assert defined == {kernel.name for kernel in _every_kernel()}
