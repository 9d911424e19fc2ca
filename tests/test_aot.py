"""Every Triton configuration compiles for every architecture and fits its shared memory."""

import os

import pytest

pytest.importorskip("triton", reason="no Triton here: its kernels are compiled where it is")

if os.getenv("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)

import aot

from benchmarks import aot as report


@pytest.mark.parametrize(("variant", "target"), [(v, target) for v in aot.variants() for target in v.targets], ids=str)
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
