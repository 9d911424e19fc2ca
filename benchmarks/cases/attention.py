"""Attention-map KL from queries and keys: ViTs with heads of 64 channels, the teacher of the student's shape."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Bar, Case, Inputs, Provider, mean_over_groups
from benchmarks.providers.attention import attention, maps, relations
from fastkd import reference

Shape = tuple[int, int, int]  # B, H, N
Providers = Mapping[str, Provider]
d = 64


def projections(shape: tuple[int, ...], n: int, device: str, dtype: torch.dtype) -> Inputs:
    """Return n tensors of the student and n of the teacher: queries, keys (and values)."""
    g = torch.Generator(device).manual_seed(0)
    x = [torch.randn(shape, generator=g, device=device).to(dtype) for _ in range(2 * n)]
    return Inputs(tuple(x[:n]), tuple(x[n:]))


def nearly_alike(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Inputs:
    """Return queries and keys of a converged student, with a KL of 2e-4, so that p_s - p_t nearly cancels."""
    g = torch.Generator(device).manual_seed(0)
    teacher = [torch.randn(shape, generator=g, device=device) for _ in range(2)]
    student = [x + 0.015 * torch.randn(shape, generator=g, device=device) for x in teacher]
    return Inputs(tuple(x.to(dtype) for x in student), tuple(x.to(dtype) for x in teacher))


def oracle(*tensors: Tensor) -> Iterable[Tensor]:
    """Return the terms of the loss, a few heads each: its mean over images and heads is a mean over their pairs."""
    pairs = [x.flatten(0, 1).unsqueeze(1) for x in tensors]
    yield from mean_over_groups(maps, *pairs, entries=pairs[0].shape[2] ** 2)


def relations_oracle(heads: int, *tensors: Tensor) -> Iterable[Tensor]:
    for x_s, x_t in zip(tensors[:3], tensors[3:], strict=True):
        s, t = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (x_s, x_t))
        yield from mean_over_groups(reference.attention_loss, s, s, t, t, entries=heads * s.shape[2] ** 2)


def case(name: str, shape: Shape, *bars: Bar, providers: Providers | None = None, **options: Any) -> Case:
    B, H, N = shape
    return Case(
        name=f"attention/{name}",
        inputs=partial(projections, (*shape, d), 2),
        providers=providers or attention(),
        oracle=oracle,
        reduced=N * d,
        flops=8 * B * H * N * N * d,  # two products for the scores, two for the gradients
        bars=bars,
        **options,
    )


def near_case(name: str, shape: Shape, **options: Any) -> Case:
    error = Bar("two SDPA calls", 5, "error")
    return replace(case(name, shape, error, **options), inputs=partial(nearly_alike, (*shape, d)))


def relations_case(name: str, shape: Shape, *bars: Bar, providers: Providers | None = None, **options: Any) -> Case:
    B, H, N = shape
    return Case(
        name=f"attention/{name}",
        inputs=partial(projections, (B, N, H * d), 3),
        providers=providers or relations(12),
        oracle=partial(relations_oracle, 12),
        reduced=N * d,
        flops=3 * 4 * B * N * N * H * d,  # a relation: half of two symmetric maps, one gradient (G + Gᵀ) x
        bars=bars,
        **options,
    )


def with_float32(providers: Providers) -> Providers:
    return {**providers, "fastkd float32": replace(providers["fastkd"], prepare=Tensor.float)}


BF16: dict[str, Any] = {"dtype": torch.bfloat16}
GPU: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}

CASES = (
    case("vit_s-b16", (16, 6, 197), Bar("compile", 1.5), Bar("eager", 2.5)),
    case("vit_b-b32", (32, 12, 197), Bar("compile", 2.5), Bar("eager", 4)),
    case("vit_b_512-b2", (2, 12, 1024), Bar("compile", 1.5), Bar("eager", 3)),
    case("vit_b_1024-b1", (1, 12, 4096), Bar("compile", 1.9), Bar("eager", 5), Bar("eager", 50, "memory")),
    relations_case("minilmv2-vit_s-b16", (16, 6, 197), Bar("compile", 2.5)),
    *(
        case(f"{name}-bf16", shape, Bar("fastkd float32", 1.2), providers=with_float32(attention()), **BF16)
        for name, shape in (("vit_s-b16", (16, 6, 197)), ("vit_b-b32", (32, 12, 197)), ("vit_b_512-b2", (2, 12, 1024)))
    ),
    near_case("vit_s-near-b16-bf16", (16, 6, 197), **BF16),
    near_case("gpu-vit_b-near-b256", (256, 12, 197), **GPU),
    case("gpu-vit_b-b256", (256, 12, 197), Bar("compile", 3), Bar("two SDPA calls", 1), **GPU),
    case("gpu-vit_l_dinov2_518-b32", (32, 16, 1370), Bar("compile", 1.8), Bar("two SDPA calls", 1), **GPU),
    case("gpu-vit_l_1024-b8", (8, 16, 4097), Bar("compile", 1.8), Bar("two SDPA calls", 1), **GPU),
)
