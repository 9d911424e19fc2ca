"""Public calls pass through Triton's binder as on a GPU, for every architecture; their launches are well formed."""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="no Triton here: its binder is what is tested")

if os.getenv("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the binder in this process", allow_module_level=True)


import fastkd
import fastkd_kernels
from benchmarks.dry_driver import TARGETS, recorded
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
    absent = {"_relation_group_kernel"} if target == "gfx942" else set()  # its barrier would not order memory there
    assert seen == defined - absent


def test_arguments_are_specialised_as_on_a_gpu() -> None:
    """Types, alignment, unit strides and 64-bit strides reach the kernel's signature."""
    (case,) = (case for case in LARGE if str(case) == "relation_loss-64-bit strides")
    (maps, *_) = launches([case], "sm_90", [torch.bfloat16])
    assert maps.kernel.name == "_relation_group_kernel"
    types = maps.kernel.signature
    assert types["s_ptr"] == ("*bf16",) and "i64" in types["t_strides"]
    strides = maps.kernel.function.arg_names.index("s_strides")
    assert maps.kernel.constants[strides, 3] == 1


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 4096), (torch.float32, 2880)])
def test_maps_are_triangles_while_they_stay_in_cache(dtype: torch.dtype, most: int) -> None:
    """W of one map takes 32 MB in one float16 term of 4096 rows, or in two terms of 2880."""
    for n in (most - 1, most, most + 1):
        student = torch.empty(2, n, 16, dtype=dtype, requires_grad=True)
        with fastkd.backend("triton"), recorded("sm_90") as found:
            fastkd.relation_loss(student, student.detach(), algorithm="tile")
        maps = [launch.kernel for launch in found if launch.kernel.name == "_relation_map_kernel"]
        assert {kernel.constexprs["IS_TRIANGLE"] for kernel in maps} == {n <= most}
        assert len(maps) >= 2  # a map at a time


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_short_groups_take_one_launch(dtype: torch.dtype) -> None:
    for n in (255, 256, 257):
        student = torch.empty(2, n, 16, dtype=dtype, requires_grad=True)
        with fastkd.backend("triton"), recorded("sm_90") as found:
            fastkd.relation_loss(student, student.detach(), algorithm="tile")
        names = [launch.kernel.name.removeprefix("_relation_").removesuffix("_kernel") for launch in found]
        assert names == (["group", "sum"] if n <= 256 else ["norms", "map", "apply", "sum"])


def test_float32_products_take_tf32_where_pytorch_may() -> None:
    case = next(case for case in CASES if stem(case) == "attention")
    for precision, expected in (("highest", "ieee"), ("high", "tf32")):
        found = {
            launch.kernel.constexprs["PRECISION"]
            for launch in launches([case], "sm_90", [torch.float32], [precision])
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
