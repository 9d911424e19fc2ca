"""Public calls pass through Triton's binder as on a GPU, for every architecture; their launches are well formed."""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="no Triton here: its binder is what is tested")

if os.getenv("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the binder in this process", allow_module_level=True)


import fastkd_kernels
from benchmarks.dry_driver import TARGETS
from tests._support.aot import CALLS, LARGE, STEMS, launches, stem
from tests._support.cases import CASES


@pytest.mark.parametrize("target", TARGETS)
def test_calls_launch_every_kernel_within_the_limits(target: str) -> None:
    found = [launch for of in (*STEMS, "rest") for launch in launches([c for c in CALLS if stem(c) == of], target)]
    for launch in found:
        x, y, z = (*launch.grid, 1, 1)[:3]
        assert 0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16, (launch.kernel.name, launch.grid)
    seen = {launch.kernel.name for launch in found}
    defined = {
        line.removeprefix("def ").split("(")[0]
        for path in Path(next(iter(fastkd_kernels.__path__))).glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def _") and line.split("(")[0].endswith("_kernel")
    }
    assert seen == defined


def test_arguments_are_specialised_as_on_a_gpu() -> None:
    """Types, alignment, unit strides and 64-bit strides reach the kernel's signature."""
    (case,) = (case for case in LARGE if str(case) == "relation_loss-64-bit strides")
    (norms, *_) = launches([case], "sm_90", [torch.bfloat16])
    assert norms.kernel.name == "_relation_norms_kernel"
    types = norms.kernel.signature
    assert types["s_ptr"] == ("*bf16",) and "i64" in types.values()
    assert norms.kernel.constexprs["stride_sd"] == 1


def test_float32_products_take_tf32_where_pytorch_may() -> None:
    for precision, expected in (("highest", "ieee"), ("high", "tf32")):
        found = {
            launch.kernel.constexprs["PRECISION"]
            for launch in launches(CASES[:1], "sm_90", [torch.float32], [precision])
            if "PRECISION" in launch.kernel.constexprs
        }
        assert found == {expected}


@pytest.mark.slow
def test_a_recorded_kernel_compiles() -> None:
    """With scope intra, whose groups follow each other: `run` is None."""
    case = next(case for case in CASES if str(case) == "relation_loss-intra")
    kernels = {launch.kernel.key: launch.kernel for launch in launches([case], "sm_90", [torch.bfloat16])}
    assert any(kernel.constexprs.get("run", "") is None for kernel in kernels.values())
    for kernel in kernels.values():
        assert kernel.compile().asm["cubin"]
