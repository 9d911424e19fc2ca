"""Every Triton configuration compiles for every architecture and fits its shared memory.

Compiling takes the time, and configurations differ in one or two options. `make test` compiles each kernel for each
architecture, with each of its types and with each value of its options; the other products are exhaustive.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("triton", reason="no Triton here: its kernels are compiled where it is")

if os.getenv("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)

from benchmarks import aot as report
from tests._support import aot


def _held(variant: aot.Variant, target: str) -> set[tuple[str, str, Any]]:
    """Return the pairs of a kernel and an option's value that a compilation tests."""
    options = variant.constants | variant.options | {"types": tuple(variant.signature.values()), "target": target}
    return {(variant.kernel.fn.__name__, *option) for option in options.items()}


def _compilations() -> Iterator[Any]:
    """Yield every variant for every target: first those that together hold all pairs, then the exhaustive rest."""
    variants = aot.variants()
    rest = {(i, target): _held(v, target) for i, v in enumerate(variants) for target in v.targets}
    missing = set().union(*rest.values())
    while rest:
        number, target = chosen = max(rest, key=lambda which: len(rest[which] & missing))
        marks = () if missing & rest[chosen] else pytest.mark.exhaustive
        missing -= rest.pop(chosen)
        yield pytest.param(variants[number], target, marks=marks, id=f"{variants[number]}-{target}")


@pytest.mark.parametrize(("variant", "target"), [*_compilations()])
def test_compiles(variant: aot.Variant, target: str) -> None:
    compiled = variant.compile(target)
    assert compiled.asm["cubin" if target.startswith("sm") else "hsaco"]
    assert compiled.metadata.shared <= aot.SHARED_MEMORY[target]
    assert (getattr(compiled.metadata, "tmem_size", 0) or 0) <= aot.TENSOR_MEMORY
    assert not report.inspect(variant, compiled, target).problems()


def test_every_kernel_is_covered() -> None:
    """A kernel that no variant names would be compiled nowhere."""
    from pathlib import Path

    import fastkd_kernels

    defined = {
        line.removeprefix("def ").split("(")[0]
        for path in Path(next(iter(fastkd_kernels.__path__))).glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def _") and line.split("(")[0].endswith("_kernel")
    }
    assert defined == {variant.kernel.fn.__name__ for variant in aot.variants()}
