"""Relation losses: DeiT-Ti or DeiT-S students of 192 or 384 channels, teachers of twice that."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import ALLOWANCE, MATMUL, MB, Bar, Case, Inputs, Provider, mean_over_groups
from benchmarks.providers.relation import difference_by_grams, groups, manifold, relation
from fastkd import reference
from fastkd.ops.relation import Scope

Shape = tuple[int, int, int, int]  # B, N, Ds, Dt
Providers = Mapping[str, Provider]


def tokens(shape: Shape, layers: int, rows: int, device: str, dtype: torch.dtype) -> Inputs:
    """Return, per layer, the tokens of student and teacher and, if rows > 0, the row indices of the random term."""
    B, N, Ds, Dt = shape
    g = torch.Generator(device).manual_seed(0)

    def draw(D: int) -> tuple[Tensor, ...]:
        return tuple((torch.randn(B, N, D, generator=g, device=device) + 0.2).to(dtype) for _ in range(layers))

    students, teachers = draw(Ds), draw(Dt)
    index = [torch.randperm(B * N, generator=g, device=device)[:rows] for _ in range(layers)] if rows else []
    return Inputs(students, (*teachers, *index))


def tile_flops(G: int, n: int, Ds: int, Dt: int) -> float:
    """Count the operations for half of each symmetric map and for the product of the gradient with the whole map."""
    return G * n * n * (Ds + Dt + 2 * Ds)


def gram_flops(n: int, Ds: int, Dt: int) -> float:
    """Count the operations for half of each symmetric Gram matrix, the whole mixed one, and two gradient products."""
    return n * (Ds * Ds + 2 * Ds * Dt + Dt * Dt + 2 * Ds * (Ds + Dt))


def oracle(scope: Scope, student: Tensor, teacher: Tensor) -> Iterable[Tensor]:
    s, t = groups(student, scope), groups(teacher, scope)
    n = s.shape[1]
    if (
        n * n * 8 > 512 * MB
    ):  # a whole map and its copies would not fit in memory; float64 loses nothing to cancellation here
        yield difference_by_grams(s, t)
    else:
        yield from mean_over_groups(reference.relation_loss, s, t, entries=n * n)


def manifold_oracle(*tensors: Tensor) -> Iterable[Tensor]:
    layers = len(tensors) // 3
    for s, t, index in zip(tensors[:layers], tensors[layers : 2 * layers], tensors[2 * layers :], strict=True):
        yield reference.manifold_loss(s, t, index=index) / layers


def two_gradients(gradients: int) -> float:
    return 2 * gradients + 16 * MB


def case(name: str, scope: Scope, shape: Shape, *bars: Bar, providers: Providers | None = None, **options: Any) -> Case:
    B, N, Ds, Dt = shape
    G, n = {"intra": (B, N), "inter": (N, B), "batch": (1, B * N)}[scope]
    return Case(
        name=f"relation/{name}",
        inputs=partial(tokens, shape, 1, 0),
        providers=providers or relation(scope),
        oracle=partial(oracle, scope),
        reduced=n * Ds,
        flops=gram_flops(n, Ds, Dt) if scope == "batch" else tile_flops(G, n, Ds, Dt),
        bars=(*bars, Bar(ALLOWANCE, 1, "memory")),
        allowance=two_gradients,
        **options,
    )


def manifold_case(name: str, layers: int, shape: Shape, *bars: Bar, **options: Any) -> Case:
    (B, N, Ds, Dt), K = shape, 192
    return Case(
        name=f"relation/{name}",
        inputs=partial(tokens, shape, layers, K),
        providers=manifold(),
        oracle=manifold_oracle,
        reduced=N * Ds,
        flops=layers * (tile_flops(B, N, Ds, Dt) + tile_flops(N, B, Ds, Dt) + tile_flops(1, K, Ds, Dt)),
        bars=(*bars, Bar(ALLOWANCE, 1, "memory")),
        allowance=two_gradients,
        **options,
    )


def first_images(B: int, x: Tensor) -> Tensor:
    return x[:B]


def in_bfloat16(scope: Scope, shape: Shape) -> Case:
    """Return a case in bfloat16 that also runs fastkd in float32 on the same inputs, for comparison."""
    providers = relation(scope)
    providers["fastkd float32"] = replace(providers["fastkd"], prepare=Tensor.float)
    bar = Bar("fastkd float32", 1)
    return case(f"{scope}-deit_ti-bf16", scope, shape, bar, providers=providers, dtype=torch.bfloat16)


DIRECT = {"eager", "compile"}  # its maps of 25,088 x 25,088 would take 7.5 GB, and half a minute on two cores
WITHOUT_MAPS = {
    **{name: provider for name, provider in relation("batch").items() if name not in DIRECT},
    "fastkd 6,272": replace(relation("batch")["fastkd"], prepare=partial(first_images, 32), gated=False),
}
GPU: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}

CASES = (
    case("intra-deit_ti-b32", "intra", (32, 196, 192, 384), Bar("compile", 2), Bar("eager", 3), Bar(MATMUL, 0.65)),
    case("intra-deit_s_512-b8", "intra", (8, 1024, 384, 768), Bar("compile", 2), Bar(MATMUL, 0.8)),
    case("inter-deit_ti-b128", "inter", (128, 196, 192, 384), Bar("compile", 2)),
    manifold_case("manifold-deit_ti-8_layers-b32", 8, (32, 196, 192, 384), Bar("compile", 2.2)),
    case("batch-deit_ti-b32", "batch", (32, 196, 192, 384), Bar("eager", 8)),
    case("batch-deit_ti-b128", "batch", (128, 196, 192, 384), Bar("fastkd 6,272", 1 / 4.4), providers=WITHOUT_MAPS),
    in_bfloat16("intra", (32, 196, 192, 384)),
    in_bfloat16("inter", (128, 196, 192, 384)),
    manifold_case("gpu-manifold-deit_ti-8_layers-b256", 8, (256, 196, 192, 384), Bar("compile", 2), **GPU),
    case("gpu-intra-deit_s_512-b64", "intra", (64, 1024, 384, 768), Bar("compile", 1.5), **GPU),
    case("gpu-intra-deit_s_1024-b16", "intra", (16, 4096, 384, 768), Bar("compile", 3), **GPU),
    case("gpu-batch-deit_ti-b128", "batch", (128, 196, 192, 384), Bar("eager", 20), **GPU),
)
