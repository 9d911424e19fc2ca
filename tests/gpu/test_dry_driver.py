"""Public calls pass through Triton's binder as on a GPU, for every architecture; their launches are well formed."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import losses
from tests._support.cases import CASES, Case

pytest.importorskip("triton", reason="no Triton here: its binder is what is tested")

if os.getenv("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the binder in this process", allow_module_level=True)

import fastkd_kernels
from benchmarks.dry_driver import TARGETS, Launch, recorded

DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def _relation(option: str, B: int, N: int, D_s: int, D_t: int, **options: str | bool) -> Case:
    def call(student: Tensor) -> Tensor:
        teacher = student.new_empty(B, N, D_t)
        return fastkd.relation_loss(student, teacher, **options)

    return Case("relation_loss", ((B, N, D_s),), call, option)


def _manifold(option: str, layers: int, B: int, N: int, D_s: int, D_t: int) -> Case:
    module, index = losses.ManifoldLoss(), torch.arange(192) % (B * N)

    def call(*students: Tensor) -> Tensor:
        teachers = [s.new_empty(B, N, D_t) for s in students]
        return module(list(students), teachers, indices=[index] * layers)

    return Case("manifold_loss", ((B, N, D_s),) * layers, call, option)


def _attention(
    option: str, B: int, H: int, N: int, d: int, bias: tuple[int, ...] = (), mask: bool = False, **options: object
) -> Case:
    def call(q: Tensor, k: Tensor, *biases: Tensor) -> Tensor:
        teacher = q.new_empty(B, H, N, d), q.new_empty(B, H, N, d)
        key_mask = torch.ones(B, N, dtype=torch.bool) if mask else None
        biases = {"bias_student": biases[0], "bias_teacher": biases[0].detach()} if biases else {}
        return fastkd.attention_loss(q, k, *teacher, key_mask=key_mask, **biases, **options)

    return Case("attention_loss", ((B, H, N, d), (B, H, N, d), *([bias] if bias else ())), call, option)


def _views(function: Callable[..., Tensor], name: str, shape: tuple[int, ...], dim: int) -> Case:
    """A call on a view whose rows start at addresses that are no multiple of 16 bytes."""

    def call(x: Tensor) -> Tensor:
        return function(x.narrow(dim, 1, x.shape[dim] - 1))

    return Case(name, (shape,), call, "unaligned")


def _far(x: Tensor) -> Tensor:
    """x with a first stride that needs 64 bits."""
    reach = 2**31 * (len(x) - 1) + x[0].numel()
    return torch.empty(reach, dtype=x.dtype).as_strided(x.shape, (2**31, *x.stride()[1:]))


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


Q = (2, 3, 9, 8)
STATISTICS = [torch.zeros(5)] * 2, [torch.ones(5)] * 2
# Sizes of real models: they choose the larger tiles, whole maps and strips, several launches, wide heads.
LARGE = [
    _relation("deit", 64, 196, 192, 768),
    _relation("inter", 64, 196, 384, 1024, scope="inter", rectify="both"),
    _relation("long", 2, 1024, 384, 1024),
    _relation("4096", 1, 4096, 384, 1024, algorithm="tile"),
    _relation("wide", 4, 256, 768, 1536, normalize=False),
    _relation("narrow", 4, 49, 24, 40),
    _manifold("deit", 8, 32, 196, 192, 768),
    _manifold("20 layers", 20, 4, 49, 96, 192),
    _attention("deit", 64, 3, 197, 64),
    _attention("causal", 2, 3, 197, 64, is_causal=True),
    _attention("js", 2, 3, 197, 64, divergence="js", temperature=2.0),
    _attention("swin", 64, 3, 49, 32, bias=(1, 3, 49, 49)),
    _attention("bias per image", 4, 3, 197, 64, bias=(4, 3, 197, 197), divergence="js", reduction="none"),
    _attention("masked", 4, 12, 512, 64, mask=True, reduction="none"),
    _attention("wide heads", 2, 4, 197, 128, bias=(1, 4, 197, 197)),
    _attention("wider heads", 2, 2, 65, 256),
    _attention("mean", 4, 12, 197, 64, heads="mean"),
    _attention("mean bias", 4, 12, 197, 64, bias=(1, 12, 197, 197), heads="mean", divergence="reverse_kl"),
    _attention("short", 128, 3, 17, 64),
    _attention("one key", 2, 3, 1, 16),
    Case("batch_moments", ((16, 64, 56, 56),), fastkd.batch_moments, "resnet"),
    Case("batch_moments", ((16, 2048, 7, 7),), fastkd.batch_moments, "7x7"),
    Case("batch_moments", ((64, 768),), fastkd.batch_moments, "columns"),
    Case("batch_moments", ((8, 64, 56, 56),), lambda x: fastkd.batch_moments(_channels_last(x)), "channels last"),
    Case("image_prior", ((4, 3, 224, 224),), lambda x: fastkd.image_prior(x, tv_l1=1.0, tv_l2=1.0, l2=1.0), "224"),
    Case("soft_target_loss", ((8, 1000),), lambda s: fastkd.soft_target_loss(s, s.detach(), temperature=4.0), "1000"),
    Case("soft_target_loss", ((8, 21841),), lambda s: fastkd.soft_target_loss(s, s.detach(), temperature=4.0), "21841"),
    _views(lambda s: fastkd.relation_loss(s, s.detach()), "relation_loss", (4, 50, 65), 2),
    _views(lambda x: torch.cat(fastkd.batch_moments(x)), "batch_moments", (4, 5, 9, 33), 3),
    _views(lambda x: fastkd.image_prior(x, tv_l1=1.0, tv_l2=1.0, l2=1.0), "image_prior", (2, 3, 33, 33), 3),
    _views(lambda q: fastkd.attention_loss(q, q, q.detach(), q.detach()), "attention_loss", (2, 3, 33, 33), 3),
    Case("relation_loss", ((3, 9, 16),), lambda s: fastkd.relation_loss(s, _far(s.detach())), "64-bit strides"),
    Case("bn_stat_loss", ((2, 5, 3, 3),), lambda x: fastkd.bn_stat_loss([x, _far(x.detach())], *STATISTICS), "64-bit"),
    Case("attention_loss", (Q, Q), lambda q, k: fastkd.attention_loss(q, k, _far(q.detach()), k.detach()), "64-bit"),
]  # fmt: skip
CALLS = [*CASES, *LARGE]


def launches(case: Case, target: str, dtype: torch.dtype, precision: str = "highest") -> Iterator[Launch]:
    """Yield what a call and its backward would launch; nothing where it has no Triton kernel.

    The inputs are uninitialised: nothing reads them.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with fastkd.backend("triton"), recorded(target) as found:
            inputs = [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in case.shapes]
            result = case.call(*inputs)
            results = [x for x in (result if isinstance(result, tuple) else (result,)) if x.requires_grad]
            torch.autograd.grad(results, inputs, [torch.empty_like(x) for x in results], allow_unused=True)
    except RuntimeError as error:
        if "cannot run here" not in str(error):
            raise
    finally:
        torch.set_float32_matmul_precision(before)
    yield from found


@pytest.mark.parametrize("target", TARGETS)
def test_calls_launch_every_kernel_within_the_limits(target: str) -> None:
    seen = set()
    for case in CALLS:
        for dtype in DTYPES:
            for precision in ("highest", "high") if dtype == torch.float32 else ("highest",):
                for launch in launches(case, target, dtype, precision):
                    x, y, z = (*launch.grid, 1, 1)[:3]
                    assert 0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16, (str(case), launch.grid)
                    seen.add(launch.kernel.name)
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
    (norms, *_) = launches(case, "sm_90", torch.bfloat16)
    assert norms.kernel.name == "_relation_norms_kernel"
    types = norms.kernel.signature
    assert types["s_ptr"] == ("*bf16",) and "i64" in types.values()
    assert norms.kernel.constexprs["stride_sd"] == 1


def test_float32_products_take_tf32_where_pytorch_may() -> None:
    case = CASES[0]
    for precision, expected in (("highest", "ieee"), ("high", "tf32")):
        found = {
            launch.kernel.constexprs["PRECISION"]
            for launch in launches(case, "sm_90", torch.float32, precision)
            if "PRECISION" in launch.kernel.constexprs
        }
        assert found == {expected}


@pytest.mark.slow
def test_a_recorded_kernel_compiles() -> None:
    """With scope intra, whose groups follow each other: `run` is None."""
    case = next(case for case in CASES if str(case) == "relation_loss-intra")
    kernels = {launch.kernel.key: launch.kernel for launch in launches(case, "sm_90", torch.bfloat16)}
    assert any(kernel.constexprs.get("run", "") is None for kernel in kernels.values())
    for kernel in kernels.values():
        assert kernel.compile().asm["cubin"]
