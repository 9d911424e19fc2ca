"""Logit losses at ImageNet's 1,000 classes and ImageNet-21k's 21,841."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case, Inputs
from benchmarks.providers.logits import LOSSES, logits
from fastkd import reference


def scores(shape: tuple[int, int], labelled: bool, device: str, dtype: torch.dtype) -> Inputs:
    g = torch.Generator(device).manual_seed(0)
    student, teacher = ((3 * torch.randn(shape, generator=g, device=device)).to(dtype) for _ in range(2))
    label = torch.randint(shape[1], shape[:1], generator=g, device=device)
    return Inputs((student,), (teacher, label) if labelled else (teacher,))


def oracle(loss: str, *tensors: Tensor) -> Iterable[Tensor]:
    yield getattr(reference, f"{loss}_loss")(*tensors, **LOSSES[loss])


def case(name: str, loss: str, shape: tuple[int, int], device: str = "cpu", **options: Any) -> Case:
    B, C = shape
    return Case(
        name=f"logits/{name}",
        inputs=partial(scores, shape, loss != "soft_target"),
        providers=logits(loss, device),
        oracle=partial(oracle, loss),
        reduced=B * C,
        flops=20 * B * C,  # one operation for each of two softmaxes, two logarithms and the gradient
        device=device,
        **options,
    )


CASES = (
    case("soft_target-imagenet-b256", "soft_target", (256, 1000)),
    case("soft_target-imagenet21k-b128", "soft_target", (128, 21841)),
    case("dkd-imagenet-b256", "dkd", (256, 1000)),
    case("nkd-imagenet-b256", "nkd", (256, 1000)),
    *(
        case(f"gpu-{loss}-imagenet-b1024", loss, (1024, 1000), device="cuda", dtype=torch.bfloat16)
        for loss in ("soft_target", "dkd", "nkd")
    ),
)
