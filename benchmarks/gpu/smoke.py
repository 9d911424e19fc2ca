"""Small calls of real models that together launch every kernel; each is held to float64 in each dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import fastkd
from benchmarks.case import Case, Inputs, Provider, Result
from benchmarks.cases import attention, logits, moments, relation
from benchmarks.gpu.device import Cpu
from fastkd import reference
from fastkd.ops._dispatch import Backend
from fastkd.testing import poisoned_allocations

Form = Callable[..., Result]


def draw(shapes: list[tuple[int, ...]], leaves: int, device: str, dtype: torch.dtype) -> Inputs:
    """Return tensors of the shapes; the first ones receive gradients."""
    g = torch.Generator(device).manual_seed(0)
    x = [(torch.randn(shape, generator=g, device=device) + 0.2).to(dtype) for shape in shapes]
    return Inputs(tuple(x[:leaves]), tuple(x[leaves:]))


def _terms(form: Form, *tensors: Tensor) -> Iterable[Result]:
    yield form(reference, *tensors)


def _case(name: str, form: Form, shapes: list[tuple[int, ...]], leaves: int, reduced: int) -> Case:
    """Return a case of a form: (fastkd or fastkd.reference, *tensors) -> the result."""
    return Case(
        name=name,
        inputs=partial(draw, shapes, leaves),
        providers={"fastkd": Provider(partial(form, fastkd))},
        oracle=partial(_terms, form),
        reduced=reduced,
        flops=1.0,
    )


def _rows(f: ModuleType, s: Tensor, t: Tensor) -> Tensor:
    index = torch.arange(192, device=s.device) * 7 % (s.shape[0] * s.shape[1])
    return f.relation_loss(s, t, scope="batch", index=index)


def _rectified(scope: str, f: ModuleType, s: Tensor, t: Tensor) -> Tensor:
    return f.relation_loss(s, t, scope=scope, rectify="both")  # which Gram matrices cannot do


def _attention(options: dict[str, Any], f: ModuleType, *x: Tensor) -> Tensor:
    q, k, *bias = x[: len(x) // 2]
    q_t, k_t, *bias_t = x[len(x) // 2 :]
    biases = {"bias_student": bias[0], "bias_teacher": bias_t[0]} if bias else {}
    return f.attention_loss(q, k, q_t, k_t, **biases, **options)


def _attention_case(name: str, student: tuple[int, ...], teacher: tuple[int, ...], **options: Any) -> Case:
    bias = [(1, x[1], x[2], x[2]) for x in (student, teacher)] if options.pop("bias", False) else [(), ()]
    shapes = [shape for x, b in zip((student, teacher), bias, strict=True) for shape in (x, x, b) if shape]
    return _case(f"attention/{name}", partial(_attention, options), shapes, len(shapes) // 2, student[2] * student[3])


def _normalised(f: ModuleType, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Result:
    y, *found = f.batch_norm_moments(x, mean, var.abs() + 0.5, weight, bias)
    return y, *found


def _per_image(f: ModuleType, x: Tensor) -> Result:
    return f.batch_moments(x, dims="image")


def _competition(f: ModuleType, s: Tensor, t: Tensor) -> Tensor:
    return f.competition_loss(s, t)


def _prior(f: ModuleType, x: Tensor) -> Result:
    return f.image_prior(x, tv_l1=1.0, tv_l2=1.0, l2=1.0)


SMOKE: dict[str, tuple[Case, ...]] = {
    "relation": (
        relation.case("intra", "intra", (2, 196, 192, 384)),
        relation.manifold_case("manifold", 8, (16, 196, 192, 384)),
        relation.case("inter", "inter", (64, 24, 192, 384)),
        relation.case("intra_512", "intra", (2, 1024, 384, 768)),
        relation.case("intra_1024", "intra", (1, 4096, 384, 768)),
        relation.case("batch", "batch", (4, 196, 192, 384)),
        _case("relation/index", _rows, [(4, 196, 192), (4, 196, 384)], 1, 192 * 192),
        _case("relation/rectified", partial(_rectified, "inter"), [(16, 49, 96), (16, 49, 192)], 1, 16 * 96),
        _case("relation/long", partial(_rectified, "intra"), [(1, 4096, 192), (1, 4096, 384)], 1, 4096 * 192),
    ),
    "attention": (
        attention.case("vit_b", (2, 12, 197)),
        _attention_case("causal", (2, 3, 197, 64), (2, 3, 197, 64), is_causal=True, divergence="js"),
        attention.case("vit_l_518", (1, 4, 1370)),
        attention.case("vit_l_1024", (1, 2, 4097)),
        _attention_case("short", (64, 3, 49, 32), (64, 3, 49, 32)),
        _attention_case("swin", (16, 3, 49, 32), (16, 3, 49, 32), bias=True),
        _attention_case("bias", (2, 3, 197, 64), (2, 3, 197, 64), bias=True),
        _attention_case("mean", (2, 3, 197, 64), (2, 6, 197, 64), heads="mean"),
        _attention_case(
            "mean-bias", (2, 3, 197, 64), (2, 6, 197, 64), heads="mean", bias=True, divergence="reverse_kl"
        ),
        _attention_case("wide", (2, 2, 197, 128), (2, 2, 197, 128), divergence="score_mse"),
    ),
    "moments": (
        moments.case("layer1", (16, 256, 56, 56)),
        moments.case("layer1-nhwc", (16, 256, 56, 56), channels_last=True),
        moments.case("layer4", (16, 2048, 7, 7)),
        moments.layers_case("resnet50", moments.resnet50_shapes(4, 224)),
        _case("moments/per_image", _per_image, [(16, 64, 56, 56)], 1, 56 * 56),
        _case("moments/batch_norm", _normalised, [(16, 64, 56, 56), *[(64,)] * 4], 3, 16 * 56 * 56),
    ),
    "prior": (_case("prior/imagenet", _prior, [(4, 3, 224, 224)], 1, 4 * 3 * 224 * 224),),
    "logits": (
        logits.case("soft_target", "soft_target", (64, 1000)),
        logits.case("soft_target-21k", "soft_target", (64, 21841)),
        logits.case("dkd", "dkd", (64, 1000)),
        logits.case("nkd", "nkd", (64, 1000)),
        _case("logits/competition", _competition, [(64, 10), (64, 10)], 2, 64 * 10),
    ),
}


def _on(backend: Backend, call: Callable[..., Result | None], *tensors: Tensor) -> Result | None:
    with fastkd.backend(backend), poisoned_allocations():
        return call(*tensors)


def on(backend: Backend, case: Case, dtype: torch.dtype) -> Case:
    """Return the case with two providers: eager, the yardstick, and a backend with poisoned workspaces."""
    call = case.providers["fastkd"].call
    backends: tuple[Backend, ...] = ("eager", backend)
    providers: dict[str, Provider] = {name: Provider(partial(_on, name, call)) for name in backends}
    return replace(case, name=f"{case.name}-{backend}-{dtype}".replace("torch.", ""), providers=providers, dtype=dtype)


def touched(backend: Backend, stems: Iterable[str]) -> Iterator[Case]:
    """Yield the cases on small tensors, for which a sanitizer has the time."""
    for stem in stems:
        for case in SMOKE[stem]:
            yield Cpu().sized(on(backend, case, torch.float32))
