"""Drop-ins: each loss of fastkd.compat against the official form that it replaces, at the shapes of its paper."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Bar, Case, Inputs, Provider
from benchmarks.providers import dropins as providers

NEVER_SLOWER = Bar("eager", 1)


def randn(shape: tuple[int, ...], g: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=g, device=g.device).to(dtype)


def generator(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def layers(
    student: tuple[int, int, int], teacher: tuple[int, int, int], n: int, total: int, device: str, dtype: torch.dtype
) -> Inputs:
    """Return, per layer, the tokens of student and teacher and the row indices of the random term."""
    g = generator(device)
    s, t = ([randn(shape, g, dtype) + 0.2 for _ in range(n)] for shape in (student, teacher))
    index = [torch.randperm(total, generator=g, device=device)[: providers.K] for _ in range(n)]
    return Inputs(tuple(s), (*t, *index))


def pair(student: tuple[int, ...], teacher: tuple[int, ...], device: str, dtype: torch.dtype) -> Inputs:
    g = generator(device)
    return Inputs((randn(student, g, dtype) + 0.2,), (randn(teacher, g, dtype) + 0.2,))


def images(B: int, size: int, device: str, dtype: torch.dtype) -> Inputs:
    g = generator(device)
    return Inputs((randn((B, 3, size, size), g, dtype),), (torch.randint(100, (B,), generator=g, device=device),))


def padded(B: int, N: int, device: str) -> Tensor:
    """(B, N) int64 mask of texts of N, 3/4 N and 1/2 N tokens in turn."""
    lengths = torch.tensor([N, 3 * N // 4, N // 2], device=device).repeat(B)[:B]
    return (torch.arange(N, device=device) < lengths[:, None]).long()


def texts(
    shape_s: tuple[int, ...], shape_t: tuple[int, ...], n: int, N: int, device: str, dtype: torch.dtype
) -> Inputs:
    """Return n tensors of the student, n of the teacher, and the mask."""
    g = generator(device)
    s, t = ([randn(shape, g, dtype) for _ in range(n)] for shape in (shape_s, shape_t))
    return Inputs(tuple(s), (*t, padded(shape_s[0], N, device)))


def logits(name: str, B: int, C: int, device: str, dtype: torch.dtype) -> Inputs:
    g = generator(device)
    student, second, teacher = (3 * randn((B, C), g, dtype) for _ in range(3))
    label = torch.randint(C, (B,), generator=g, device=device)
    if name == "tinyvit_distill_loss":
        value, index = teacher.softmax(1).topk(100)
        return Inputs((student,), (value, index))
    if name == "DistillationLoss":
        return Inputs((student, second), (teacher, label))
    return Inputs((student,), (teacher,) if name == "KDLoss" else (teacher, label))


def features(B: int, N: int, Ds: int, Dt: int, device: str, dtype: torch.dtype) -> Inputs:
    """Return low and high tokens, the module's parameters and the noise that selects the masked tokens."""
    g = generator(device)
    low_s, high_s, low_t, high_t = (randn(shape, g, dtype) for D in (Ds, Dt) for shape in ((B, 2, N, D), (B, N, D)))
    parameters = [0.02 * randn(shape, g, dtype) for _, shape in providers.vitkd_shapes(Ds, Dt)]
    return Inputs((low_s, high_s, *parameters), (low_t, high_t, torch.rand(B, N, generator=g, device=device)))


def oracle(official: Callable[..., Any], *tensors: Tensor) -> Iterable[Tensor]:
    yield official(*tensors)


def case(
    name: str,
    inputs: Callable[[str, torch.dtype], Inputs],
    of_case: Mapping[str, Provider],
    reduced: int,
    flops: float,
    *bars: Bar,
    **options: Any,
) -> Case:
    return Case(
        name=f"dropins/{name}",
        inputs=inputs,
        providers=of_case,
        oracle=partial(oracle, of_case["eager"].call),
        reduced=reduced,
        flops=flops,
        bars=bars or (NEVER_SLOWER,),
        **options,
    )


def mf_flops(B: int, N: int, Ds: int, Dt: int) -> float:
    """Count half of each symmetric map and the product of the gradient with the whole map, for the three terms."""
    return (B * N * N + N * B * B + providers.K**2) * (3 * Ds + Dt)


def mf_case(name: str, B: int, extra: int, N: int, Ds: int, Dt: int, n: int, most: int, *bars: Bar) -> Case:
    cells = most or N
    return case(
        name,
        partial(layers, (B, N + extra, Ds), (B, N, Dt), n, B * cells),
        providers.mf_providers(most),
        cells * Ds,
        n * mf_flops(B, cells, Ds * N // cells, Dt * N // cells),
        *bars,
    )


def logits_case(name: str, B: int, C: int, *bars: Bar) -> Case:
    shape = f"{name}-{C}-b{B}"
    return case(shape, partial(logits, name, B, C), providers.LOGITS[name], B * C, 20 * B * C, *bars)


def text_case(name: str, B: int, H: int, N: int, d: int, *bars: Bar) -> Case:
    shape = (B, N, d) if name == "mmd_loss" else (B, H, N, d)
    heads = 1 if name == "mmd_loss" else H
    inputs = partial(texts, shape, shape, 2, N)
    return case(f"{name}-bert-b{B}", inputs, providers.TEXT[name], N * d * heads, 8 * B * heads * N * N * d, *bars)


CASES = (
    case(
        "layer_mf_loss-deit_ti-b32",
        partial(layers, (32, 196, 192), (32, 196, 384), 1, 32 * 196),
        providers.LAYER_MF_LOSS,
        196 * 192,
        mf_flops(32, 196, 192, 384),
        Bar("eager", 2),
        Bar("manifold_loss", 1 / 1.5),
    ),
    mf_case("mf_loss-deit_ti-8_layers-b16", 16, 1, 196, 192, 384, 8, 0),
    mf_case("mf_loss-swin_stage1-merged-b4", 4, 0, 3136, 96, 128, 1, 196),
    case(
        "GramLoss-vit_b-b16",
        partial(pair, (16, 256, 768), (16, 256, 768)),
        providers.GRAM_LOSS,
        256 * 768,
        16 * 256**2 * 4 * 768,
    ),
    case(
        "GramLoss-vit_s-masked_2048",
        partial(pair, (2048, 384), (2048, 384)),
        providers.GRAM_LOSS,
        2048 * 384,
        2048**2 * 4 * 384,
    ),
    case(
        "DeepInversionFeatureHook-resnet18_64-b32",
        partial(images, 32, 64),
        providers.HOOK,
        512 * 9,
        2 * 2 * 32 * 1.8e9 * (64 / 224) ** 2,
    ),
    case(
        "minilmv2_loss-bert-b12",
        partial(texts, (12, 128, 384), (12, 128, 768), 3, 128),
        providers.minilmv2_providers(48),
        128 * 384,
        3 * 2 * 12 * 128**2 * (384 + 768 + 384),
    ),
    case(
        "tinymim_loss-vit_b-b16",
        partial(pair, (16, 197, 3 * 192), (16, 197, 3 * 768)),
        providers.tinymim_providers(12),
        197 * 768,
        2 * 2 * 16 * 197**2 * (192 + 768 + 2 * 192),
    ),
    logits_case("KDLoss", 256, 1000),
    logits_case("DKDLoss", 256, 1000),
    logits_case("NKDLoss", 256, 1000),
    case(
        "ViTKDLoss-deit_ti-b16",
        partial(features, 16, 196, 192, 384),
        providers.vitkd_providers(192, 384),
        16 * 196 * 384 * 9,
        3 * 2 * 16 * 196 * (3 * 192 * 384 + 2 * 9 * 384**2),
    ),
    logits_case("DistillationLoss", 256, 1000),
    logits_case("tinyvit_distill_loss", 128, 21841),
    text_case("att_mse_loss", 12, 12, 128, 64),
    text_case("att_mse_sum_loss", 12, 12, 128, 64),
    text_case("att_ce_loss", 12, 12, 128, 64),
    text_case("att_ce_mean_loss", 12, 12, 128, 64),
    text_case("mmd_loss", 12, 12, 128, 384),
    text_case("tinybert_att_loss", 12, 12, 128, 64),
)
