"""Batch moments at ResNet-50's layers, an inversion step, and the image prior."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import ALLOWANCE, COPY, MB, Bar, Case, Inputs, Result
from benchmarks.providers import moments as providers
from fastkd import reference

Shape = tuple[int, int, int, int]  # B, C, h, w


def activation(shape: Shape, channels_last: bool, device: str, dtype: torch.dtype) -> Inputs:
    g = torch.Generator(device).manual_seed(0)
    x = (torch.randn(shape, generator=g, device=device) + 0.2).to(dtype)
    return Inputs((x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format),))


def oracle(x: Tensor) -> Iterable[Result]:
    yield reference.batch_moments(x)


def one_gradient(gradients: int) -> float:
    """Return the allowance: no other tensor of the gradient's size, so at most half of one more."""
    return 1.5 * gradients + 16 * MB


def case(
    name: str, shape: Shape, *bars: Bar, channels_last: bool = False, backward: bool = True, **options: Any
) -> Case:
    B, C, h, w = shape
    return Case(
        name=f"moments/{name}",
        inputs=partial(activation, shape, channels_last),
        providers=providers.moments(backward),
        oracle=oracle,
        reduced=B * h * w,
        flops=(6 if backward else 4) * B * C * h * w,
        reads=2 if backward else 1,
        bars=(*bars, Bar("others", 1), *([Bar(ALLOWANCE, 1, "memory")] if backward else [])),
        allowance=one_gradient,
        backward=backward,
        **options,
    )


def resnet50_shapes(B: int, size: int) -> list[Shape]:
    """Return the input shapes of the 53 batch norms."""
    shapes: list[Shape] = [(B, 64, size // 2, size // 2)]
    at = size // 4
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        for block in range(blocks):
            shapes.append((B, width, at, at))
            at = at // 2 if stage and not block else at
            shapes += [(B, width, at, at), (B, 4 * width, at, at)]
        shapes.append((B, 4 * width, at, at))  # the shortcut's batch norm
    return shapes


def activations(shapes: list[Shape], device: str, dtype: torch.dtype) -> Inputs:
    g = torch.Generator(device).manual_seed(0)
    x = tuple(torch.randn(shape, generator=g, device=device).to(dtype) for shape in shapes)
    means = tuple(torch.randn(shape[1], generator=g, device=device) for shape in shapes)
    variances = tuple(torch.rand(shape[1], generator=g, device=device) + 0.5 for shape in shapes)
    return Inputs(x, (*means, *variances))


def layers_oracle(*tensors: Tensor) -> Iterable[Tensor]:
    n = len(tensors) // 3
    for layer in zip(tensors[:n], tensors[n : 2 * n], tensors[2 * n :], strict=True):
        yield reference.bn_stat_loss(*([x] for x in layer))


def layers_case(name: str, shapes: list[Shape], *bars: Bar, **options: Any) -> Case:
    elements = sum(B * C * h * w for B, C, h, w in shapes)
    return Case(
        name=f"moments/{name}",
        inputs=partial(activations, shapes),
        providers=providers.layers(),
        oracle=layers_oracle,
        reduced=max(B * h * w for B, _, h, w in shapes),
        flops=6 * elements,
        reads=2,
        bars=bars,
        **options,
    )


def normalised(shape: Shape, device: str, dtype: torch.dtype) -> Inputs:
    g = torch.Generator(device).manual_seed(0)
    mean, weight, bias = (torch.randn(shape[1], generator=g, device=device) for _ in range(3))
    variance = torch.rand(shape[1], generator=g, device=device) + 0.5
    return Inputs((torch.randn(shape, generator=g, device=device).to(dtype),), (mean, variance, weight, bias))


def normalised_oracle(*tensors: Tensor) -> Iterable[Result]:
    yield reference.batch_norm_moments(*tensors)


def images(shape: Shape, classes: int, device: str, dtype: torch.dtype) -> Inputs:
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape, generator=g, device=device).to(dtype)
    labels = torch.randint(classes, shape[:1], generator=g, device=device)
    return Inputs((x,), (labels,) if classes > 1 else ())


def step_oracle(x: Tensor, labels: Tensor) -> Iterable[Tensor]:
    yield providers.with_hooks(reference.batch_moments, x, labels)


def prior_oracle(x: Tensor) -> Iterable[Tensor]:
    yield reference.image_prior(x, tv_l1=1.0, tv_l2=1.0)


LAYER1, NHWC, BF16 = (32, 256, 56, 56), {"channels_last": True}, {"dtype": torch.bfloat16}
GPU: dict[str, Any] = {"device": "cuda"}
FORWARD = Bar("floor", 1 / 1.3)
BOTH = Bar("floor", 1 / 1.2), Bar("eager", 4.5)
SMALL = Bar("floor", 1 / 1.4, or_below=110e-6)
LAYOUTS: tuple[tuple[str, dict[str, Any]], ...] = (("", {}), ("-nhwc", NHWC), ("-bf16", BF16))

CASES = (
    *(case(f"resnet50_layer1-forward{tag}", LAYER1, FORWARD, backward=False, **options) for tag, options in LAYOUTS),
    *(case(f"resnet50_layer1{tag}", LAYER1, *BOTH, **options) for tag, options in LAYOUTS),
    case("resnet50_stem", (32, 64, 112, 112), SMALL),
    case("resnet50_layer4", (32, 2048, 7, 7), SMALL),
    case("resnet50_layer3-b2", (2, 512, 14, 14), SMALL),
    Case(
        name="moments/inversion_step-resnet50_64-b8",
        inputs=partial(images, (8, 3, 64, 64), 100),
        providers=providers.inversion_step(),
        oracle=step_oracle,
        reduced=512 * 9,
        flops=2
        * 2
        * 8
        * 4.1e9
        * (64 / 224) ** 2,  # 4.1 G multiply-adds per image at 224 px, and twice as many in backward
        bars=(Bar("without", 1 / 1.08),),
    ),
    Case(
        name="prior/tv-imagenet-b32",
        inputs=partial(images, (32, 3, 224, 224), 1),
        providers=providers.prior(),
        oracle=prior_oracle,
        reduced=32 * 3 * 224 * 224,
        flops=4 * 8 * 32 * 3 * 224 * 224,
        reads=2,
        bars=(Bar("eager", 5), Bar("compile", 2)),
    ),
    *(
        case(f"gpu-resnet50_layer1-b256{step}{tag}", (256, 256, 56, 56), bar, backward=not step, **GPU, **options)
        for step, bar in (("-forward", Bar(COPY, 0.85)), ("", Bar(COPY, 0.8)))
        for tag, options in (*LAYOUTS, ("-nhwc-bf16", {**NHWC, **BF16}))
    ),
    *(
        layers_case(
            f"gpu-resnet50-b128{tag}", resnet50_shapes(128, 224), Bar("eager", 5), Bar("compile", 1.5), **GPU, **o
        )
        for tag, o in (("", {}), ("-bf16", BF16))
    ),
)

LAYER = (128, 256, 14, 14)  # of ResNet-50, the most frequent one
COUNTED = (
    Case(
        name="moments/batch_norm-resnet50_layer3-b128",
        inputs=partial(normalised, LAYER),
        providers=providers.batch_norm(),
        oracle=normalised_oracle,
        reduced=128 * 14 * 14,
        flops=10 * 128 * 256 * 14 * 14,
        reads=4,  # x twice; y is written and its gradient read, which are as large
        dtype=torch.bfloat16,
    ),
    next(case for case in CASES if case.name == "prior/tv-imagenet-b32"),
)
"""Cases whose work on a GPU is counted and whose time there is not measured."""
