"""Every Triton kernel in every configuration, as it is compiled ahead of time: no GPU is needed for that."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import triton
from fastkd_kernels import moments
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}  # bytes of a block
DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel: the types of its arguments, its constants and its launch options."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        types = "-".join(sorted({t[1:] for t in self.signature.values() if t.startswith("*")}))
        return f"{self.kernel.fn.__name__}-{types}-" + "-".join(f"{k}={v}" for k, v in self.constants.items())

    def compile(self, target: str) -> CompiledKernel:
        signature = self.signature | dict.fromkeys(self.constants, "constexpr")
        ordered = {name: signature[name] for name in self.kernel.arg_names}
        source = ASTSource(self.kernel, ordered, constexprs=self.constants)
        return triton.compile(source, target=TARGETS[target], options=self.options)


def _signature(kernel: Any, pointers: dict[str, str], constants: dict[str, Any]) -> dict[str, str]:
    """Pointers as given; every other argument that is not a constant is a 32-bit integer, as most launches pass."""
    return {n: f"*{pointers[n]}" if n in pointers else "i32" for n in kernel.arg_names if n not in constants}


def _moments() -> Iterator[Variant]:
    for dtype, per_image, (BLOCK_G, BLOCK_I, num_warps) in product(
        DTYPES, (False, True), (moments.PLANES, moments.COLUMNS)
    ):
        constants = {"PER_IMAGE": per_image, "BLOCK_G": BLOCK_G, "BLOCK_I": BLOCK_I}
        for kernel, pointers in (
            (moments._moments_partial_kernel, {"x_ptr": dtype, "partial_ptr": "fp32"}),
            (
                moments._moments_bwd_kernel,
                {"x_ptr": dtype, "dx_ptr": dtype} | dict.fromkeys(("dmean_ptr", "dvar_ptr", "mean_ptr"), "fp32"),
            ),
        ):
            yield Variant(kernel, _signature(kernel, pointers, constants), constants, {"num_warps": num_warps})
    kernel, constants = moments._moments_merge_kernel, {"BLOCK_G": 128}
    pointers = dict.fromkeys(("partial_ptr", "mean_ptr", "var_ptr"), "fp32")
    yield Variant(kernel, _signature(kernel, pointers, constants), constants)


def variants() -> list[Variant]:
    return list(_moments())
