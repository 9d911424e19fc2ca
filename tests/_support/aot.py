"""What the GPU kernels are compiled as ahead of time: what public calls would launch, as the dry driver records it."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

import fastkd
from benchmarks.dry_driver import TARGETS, Launch, Specialisation, recorded
from fastkd import losses
from tests._support.cases import CASES, Case

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
STEMS = {"relation": ("relation", "manifold"), "attention": ("attention", "qkv")}


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
    _relation("grams", 32, 196, 192, 384, scope="batch", algorithm="gram"),
    _relation("raw grams", 4, 50, 24, 40, scope="batch", algorithm="gram", normalize=False),
    _manifold("deit", 8, 32, 196, 192, 768),
    _manifold("20 layers", 20, 4, 49, 96, 192),
    _attention("deit", 128, 3, 197, 64),
    _attention("deit reverse", 128, 3, 197, 64, mask=True, divergence="reverse_kl", is_causal=True),
    _attention("128 keys", 128, 3, 128, 64),
    _attention("128 keys js", 128, 3, 128, 64, mask=True, divergence="js"),
    _attention("257 keys", 128, 3, 257, 64),
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
    Case("nkd_loss", ((8, 1000),), lambda s: fastkd.nkd_loss(s, s.detach(), 3), "1000"),
    _views(lambda s: fastkd.relation_loss(s, s.detach()), "relation_loss", (4, 50, 65), 2),
    _views(lambda x: torch.cat(fastkd.batch_moments(x)), "batch_moments", (4, 5, 9, 33), 3),
    _views(lambda x: fastkd.image_prior(x, tv_l1=1.0, tv_l2=1.0, l2=1.0), "image_prior", (2, 3, 33, 33), 3),
    _views(lambda q: fastkd.attention_loss(q, q, q.detach(), q.detach()), "attention_loss", (2, 3, 33, 33), 3),
    Case("relation_loss", ((3, 9, 16),), lambda s: fastkd.relation_loss(s, _far(s.detach())), "64-bit strides"),
    Case("bn_stat_loss", ((2, 5, 3, 3),), lambda x: fastkd.bn_stat_loss([x, _far(x.detach())], *STATISTICS), "64-bit"),
    Case("attention_loss", (Q, Q), lambda q, k: fastkd.attention_loss(q, k, _far(q.detach()), k.detach()), "64-bit"),
]  # fmt: skip
CALLS = [*CASES, *LARGE]


def stem(case: Case) -> str:
    """Return the stem whose kernels a call launches; "rest" stands for those without matrix products."""
    return next((name for name, functions in STEMS.items() if case.function.split("_")[0] in functions), "rest")


def run(case: Case, dtype: torch.dtype, precision: str = "highest") -> None:
    """Make a call, and its backward where that has kernels; nothing where the call has none. The inputs are
    uninitialised: nothing reads them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        inputs = [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in case.shapes]
        result = case.call(*inputs)
        results = [x for x in (result if isinstance(result, tuple) else (result,)) if x.requires_grad]
        # The gradient of one number is computed in forward, where products are; backward scales it, with a kernel in
        # the manifold loss alone.
        if stem(case) == "rest" or "manifold" in case.function.lower() or any(x.ndim for x in results):
            torch.autograd.grad(results, inputs, [torch.empty_like(x) for x in results], allow_unused=True)
    except RuntimeError as error:
        if "cannot run here" not in str(error):
            raise
    finally:
        torch.set_float32_matmul_precision(before)


def launches(
    cases: Iterable[Case],
    target: str,
    dtypes: Iterable[torch.dtype] = DTYPES,
    precisions: Iterable[str] = ("highest", "high"),
) -> list[Launch]:
    """Return what calls and their backward would launch; float32 ones in several precisions of products."""
    with fastkd.backend("triton"), recorded(target) as found:
        for case in cases:
            for dtype in dtypes:
                for precision in precisions if dtype == torch.float32 else ("highest",):
                    run(case, dtype, precision)
    return found


@cache
def specialisations(target: str, of: str) -> list[Specialisation]:
    """Return all that the calls of a stem launch on a target."""
    found = launches([case for case in CALLS if stem(case) == of], target)
    return list({launch.kernel.key: launch.kernel for launch in found}.values())


def pairs(kernel: Specialisation) -> set[tuple[Any, ...]]:
    """Return what a compilation tests, beside its kernel: a type, an option's value, a target, a target's tile."""
    options = {p.name: kernel.constexprs[p.name] for p in kernel.function.params if p.is_constexpr}
    blocks = {name: options.pop(name) for name in [*options] if name.startswith("BLOCK")}
    sizes = tuple(size for name, size in blocks.items() if name not in ("BLOCK_DS", "BLOCK_DT"))  # those of heads
    types = "/".join(kernel.types())
    held = [*options.items(), ("types", types), ("target", kernel.target)]
    # Of other kernels, several targets have the same tiles; newer NVIDIA cards have the instructions of these two.
    if "PRECISION" in options and "16" in types and kernel.target in ("sm_80", "sm_90"):
        held.append(("tile", (kernel.target, *sizes, kernel.options.num_warps, kernel.options.num_stages)))
    return {(kernel.name, *one) for one in held}


@cache
def cover(of: str) -> tuple[list[Specialisation], list[Specialisation]]:
    """Return few specialisations of a stem that together hold all pairs of all targets, and the others."""
    kernels = [kernel for target in TARGETS for kernel in specialisations(target, of)]
    rest = {i: pairs(kernel) for i, kernel in enumerate(kernels)}
    missing = set().union(*rest.values())
    chosen = []
    while missing:
        best = max(rest, key=lambda i: len(rest[i] & missing))
        missing -= rest.pop(best)
        chosen.append(kernels[best])
    return chosen, [kernels[i] for i in rest]
