"""Batch moments in one read, and the batch-norm statistic losses made of them."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastkd._precision import accumulator
from fastkd.ops import _checks as check
from fastkd.ops._autograd import distinct, refuse_batched, refuse_double_backward, refuse_transforms, savable
from fastkd.ops._dispatch import Backend, call, recorder, resolve

Dims = Literal["batch", "image"]
Distance = Literal["l2", "mse", "image"]
Moments = tuple[Tensor, Tensor]  # mean and variance; of several layers, end to end
Merge = Callable[[Moments], Moments]


class BnStatCall(NamedTuple):
    """One call of bn_stat_loss: its arguments, checked by check_bn_stat, and read by everything after."""

    inputs: Sequence[Tensor]  # per layer (B, C, ...)
    running_means: Sequence[Tensor]  # per layer (C,)
    running_vars: Sequence[Tensor]  # per layer (C,)
    distance: Distance
    layer_weights: Sequence[float] | None
    momentum: float | None
    ema: tuple[Sequence[Tensor], Sequence[Tensor]] | None  # means and variances, each per layer (C,)
    moments: Sequence[Moments] | None
    backend: Backend


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, impl: Backend, per_image: bool, function: str, *inputs: Tensor) -> Moments:
        mean, var = call(impl, "moments_fwd", inputs, per_image)
        ctx.save_for_backward(mean, *map(savable, inputs))
        ctx.impl, ctx.per_image, ctx.function = impl, per_image, function
        return mean, var

    @staticmethod
    def backward(ctx: Any, dmean: Tensor, dvar: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward(ctx.function)
        refuse_batched(ctx.function, dmean)
        mean, *inputs = ctx.saved_tensors
        return None, None, None, *call(ctx.impl, "moments_bwd", dmean, dvar, inputs, mean, ctx.per_image)


class _Distance(torch.autograd.Function):
    """Distance of the means and variances of all layers end to end; `about` are the operator's other arguments.

    The gradient goes to `moments`: the same values, end to end or layer by layer, means before variances.
    """

    @staticmethod
    def forward(
        ctx: Any,
        impl: Backend,
        about: tuple[Any, ...],
        mean: Tensor,
        var: Tensor,
        M: Tensor,
        V: Tensor,
        *moments: Tensor,
    ) -> Tensor:
        loss, dmean, dvar = call(impl, "bn_distance", mean, var, M, V, *about)
        ctx.save_for_backward(dmean, dvar)
        ctx.sizes = [v.shape[0] for v in moments[: len(moments) // 2]]
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("bn_stat_loss")
        gradients = [(d * dloss).split(ctx.sizes) for d in ctx.saved_tensors]
        return None, None, None, None, None, None, *gradients[0], *gradients[1]


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, impl: Backend, eps: float, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, var = call(impl, "batch_norm_fwd", *tensors, eps)
        x, running_mean, running_var, weight, _ = (None if t is None else savable(t) for t in tensors)
        ctx.save_for_backward(x, mean, running_mean, running_var, weight)
        ctx.impl, ctx.eps = impl, eps
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dmean: Tensor, dvar: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("batch_norm_moments")
        x, mean, running_mean, running_var, weight = ctx.saved_tensors
        _, _, with_dx, _, _, with_dweight, with_dbias = ctx.needs_input_grad
        dx = dweight = dbias = None
        if with_dx:
            dx = call(ctx.impl, "batch_norm_bwd", dy, dmean, dvar, x, mean, running_var, weight, ctx.eps)
        if with_dweight or with_dbias:
            # Gradients of weight and bias are rarely wanted, so PyTorch sums them in separate passes.
            # Contiguous, because PyTorch sums some planes of one row or column wrongly if dy and x differ in layout.
            acc = accumulator(x)
            wide = [v if v is None else v.to(acc).contiguous() for v in (dy, x, weight, running_mean, running_var)]
            _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
                *wide, None, None, False, ctx.eps, [False, with_dweight, with_dbias]
            )
            # Autograd casts them to the dtypes of weight and bias.
        return None, None, dx, None, None, dweight, dbias


def _moments(backend: Backend, per_image: bool, function: str, inputs: Sequence[Tensor]) -> Moments:
    if (native := recorder(backend, "moments_fwd", inputs[0])) is not None:
        moments: Moments = native(inputs, per_image)
        return moments
    refuse_transforms(function)
    return _Moments.apply(resolve(backend, "moments_fwd", inputs[0]), per_image, function, *distinct(*inputs))


def checked_batch_moments(x: Tensor, dims: Dims, backend: Backend) -> Moments:
    """Return batch_moments of this process's images."""
    check.tensor("x", x, range(2, 16), "(B, C, ...)")
    check.not_empty("x", x)
    check.one_of("dims", dims, ("batch", "image"))
    per_image = dims == "image"
    mean, var = _moments(backend, per_image, "batch_moments", [x])
    return (mean.view(x.shape[:2]), var.view(x.shape[:2])) if per_image else (mean, var)


def normalised_with_moments(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return batch_norm_moments without checks, which would take a fifth of a small layer's time."""
    if (native := recorder(backend, "batch_norm_fwd", x)) is not None:
        normalised: tuple[Tensor, Tensor, Tensor] = native(x, running_mean, running_var, weight, bias, eps)
        return normalised
    refuse_transforms("batch_norm_moments")
    impl = resolve(backend, "batch_norm_fwd", x)
    return _BatchNorm.apply(impl, eps, *distinct(x, running_mean, running_var, weight, bias))


def batch_norm_moments(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """An eval-mode batch norm and the batch moments of its input in one read and one write; backward joins both.

        y = weight (x - running_mean) / √(running_var + eps) + bias,   (mean, var) = batch_moments(x)
        dx = dy weight / √(running_var + eps) + dmean/M + 2 dvar (x - mean)/M

    Args:
        x: (B, C, ...), float64 | float32 | bfloat16 | float16, any strides. Differentiable.
        running_mean, running_var: (C,), of any floating-point dtype. Constants.
        weight, bias: (C,) or None. Differentiable.
        eps: > 0.
        backend: "auto", "eager", "native" or "triton".

    Returns:
        (y as x, mean (C,), biased var (C,)); moments in float32 (float64 for float64 input).

    Raises:
        TypeError: not floating-point tensors; eps is not a Python number.
        ValueError: fewer than 2 dimensions, an empty tensor, channels or devices that differ, eps <= 0, running
            statistics that require a gradient.
        RuntimeError: the named backend cannot run here; differentiated twice; under vmap or torch.func.
    """
    check.tensor("x", x, range(2, 16), "(B, C, ...)")
    check.not_empty("x", x)
    stats = {"running_mean": running_mean, "running_var": running_var}
    affine = {"weight": weight, "bias": bias}
    for name, v in (stats | {k: v for k, v in affine.items() if v is not None}).items():
        check.tensor(name, v, 1, "(C,)")
        if len(v) != x.shape[1]:
            raise ValueError(f"{name} must have the {x.shape[1]} channels of x, got {len(v)}")
    for name, v in stats.items():
        check.constant(name, v)
    check.same_device(x=x, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    check.number("eps", eps, low=0, open_low=True)
    return normalised_with_moments(x, running_mean, running_var, weight, bias, eps, backend)


def _elements(x: Tensor, distance: Distance) -> int:
    """Return the number of elements of x in one mean; raise if it is 0."""
    return x.numel() // (x.shape[0] * x.shape[1] if distance == "image" else x.shape[1])


def _check_layers(name: str, layers: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    check.sequence(name, layers, "tensors (C,), one per layer")
    if len(layers) != len(inputs):
        raise ValueError(f"{name} must have one tensor per layer, got {len(layers)} for {len(inputs)} inputs")
    for i, (v, x) in enumerate(zip(layers, inputs, strict=True)):
        check.tensor(f"{name}[{i}]", v, 1, "(C,)")
        if v.shape[0] != x.shape[1]:
            raise ValueError(f"{name}[{i}] must have the {x.shape[1]} channels of inputs[{i}], got {len(v)}")
        if v.device != x.device:
            check.same_device(**{f"inputs[{i}]": x, f"{name}[{i}]": v})
        check.constant(f"{name}[{i}]", v)


def _check_moments(moments: Sequence[Moments], inputs: Sequence[Tensor], distance: Distance) -> None:
    if distance == "image":
        raise ValueError('moments are those of a batch: use distance "l2" or "mse" with them, got "image"')
    check.sequence("moments", moments, "pairs (mean, var), one per layer")
    if len(moments) != len(inputs):
        raise ValueError(f"moments must have one pair per layer, got {len(moments)} for {len(inputs)} inputs")
    for i, (pair, x) in enumerate(zip(moments, inputs, strict=True)):
        check.pair(f"moments[{i}]", pair, "(mean, var)")
        for v in pair:
            check.tensor(f"moments[{i}]", v, 1, "(C,)")
            check.same_device(**{f"inputs[{i}]": x, f"moments[{i}]": v})
            if v.shape[0] != x.shape[1]:
                raise ValueError(f"moments[{i}] must have the {x.shape[1]} channels of its input, got {len(v)}")


def _check_weights(layer_weights: Sequence[float], layers: int) -> None:
    check.sequence("layer_weights", layer_weights, "numbers, one per layer")
    if len(layer_weights) != layers:
        raise ValueError(f"layer_weights must have one number per layer, got {len(layer_weights)} for {layers} inputs")
    for i, w in enumerate(layer_weights):
        check.number(f"layer_weights[{i}]", w, low=0)


def _check_inputs(inputs: Sequence[Tensor], distance: Distance, spans_ranks: bool) -> None:
    check.sequence("inputs", inputs, "tensors (B, C, ...), one per layer")
    if len(inputs) == 0:
        raise ValueError("inputs must hold at least one layer, got none")
    for i, x in enumerate(inputs):
        check.tensor(f"inputs[{i}]", x, range(2, 16), "(B, C, ...)")
        check.not_empty(f"inputs[{i}]", x)
        if x.device != inputs[0].device:
            check.same_device(**{"inputs[0]": inputs[0], f"inputs[{i}]": x})
        if _elements(x, distance) < (1 if spans_ranks and distance != "image" else 2):
            raise ValueError(
                f"inputs[{i}] must hold at least 2 elements per channel{' and image' if distance == 'image' else ''} "
                f"to have a variance, got {tuple(x.shape)}"
            )


def check_bn_stat(call: BnStatCall, spans_ranks: bool = False) -> None:
    """Check the arguments of bn_stat_loss."""
    inputs, running_means, running_vars, distance, layer_weights, momentum, ema, moments, _ = call
    check.one_of("distance", distance, ("l2", "mse", "image"))
    _check_inputs(inputs, distance, spans_ranks)
    _check_layers("running_means", running_means, inputs)
    _check_layers("running_vars", running_vars, inputs)
    if (momentum is None) != (ema is None):
        given = f"momentum={momentum!r} and ema of type {type(ema).__name__}"
        raise ValueError(f"momentum and ema go together: give both or neither, got {given}")
    if momentum is not None and ema is not None:
        check.number("momentum", momentum, low=0)
        if momentum >= 1:
            raise ValueError(f"momentum must be below 1, got {momentum}")
        check.pair("ema", ema, "(means, vars)")
        _check_layers("ema[0]", ema[0], inputs)
        _check_layers("ema[1]", ema[1], inputs)
    if moments is not None:
        _check_moments(moments, inputs, distance)
    if layer_weights is not None:
        _check_weights(layer_weights, len(inputs))
    refuse_transforms("bn_stat_loss")


def _moments_of(inputs: Sequence[Tensor], per_image: bool, backend: Backend) -> Moments:
    """Return the moments of all layers end to end, with one operator call for each dtype."""
    of_dtype: dict[torch.dtype, list[int]] = {}
    for i, x in enumerate(inputs):
        of_dtype.setdefault(x.dtype, []).append(i)
    found: dict[int, Moments] = {}
    for where in of_dtype.values():
        group = [inputs[i] for i in where]
        both = _moments(backend, per_image, "bn_stat_loss", group)
        if len(of_dtype) == 1:
            return both
        sizes = [x.shape[0] * x.shape[1] if per_image else x.shape[1] for x in group]
        found |= zip(where, zip(*(v.split(sizes) for v in both), strict=True), strict=True)
    acc = accumulator(*inputs)
    mean, var = (torch.cat([found[i][k].to(acc) for i in range(len(inputs))]) for k in range(2))
    return mean, var


def run_bn_stat(call: BnStatCall, merge: Merge | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return bn_stat_loss of checked arguments, and the compared means and variances of all layers end to end.

    merge turns the moments of this rank's images into those of all ranks' images.
    """
    inputs, running_means, running_vars, distance, layer_weights, momentum, ema, moments, backend = call
    per_image = distance == "image"
    rows = [x.shape[0] if per_image else 1 for x in inputs]
    as_they_are = moments is not None and merge is None and momentum is None
    by_layer: list[Tensor] = []
    if moments is None:
        mean, var = _moments_of(inputs, per_image, backend)
    else:
        acc = accumulator(*inputs)
        by_layer = [pair[k] for k in range(2) for pair in moments]
        by_layer = [v if v.dtype == acc else v.to(acc) for v in by_layer]
        # The gradient of what is compared as it is goes to the layers with no graph in between.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not as_they_are):
            mean, var = torch.cat(by_layer[: len(inputs)]), torch.cat(by_layer[len(inputs) :])
    if merge is not None:
        mean, var = merge((mean, var))
    if momentum is not None and ema is not None:
        mean, var = (
            v.lerp(torch.cat([e.repeat(n) for e, n in zip(average, rows, strict=True)]).to(v), momentum)
            for v, average in zip((mean, var), ema, strict=True)
        )
    channels = [x.shape[1] for x in inputs]
    counts = [_elements(x, distance) for x in inputs]
    weights = [1.0] * len(inputs) if layer_weights is None else [float(w) for w in layer_weights]
    M, V = torch.cat(list(running_means)), torch.cat(list(running_vars))
    impl = resolve(backend, "bn_distance", mean)
    compared = by_layer if as_they_are else (mean, var)
    about = (channels, rows, counts, weights, distance)
    loss = _Distance.apply(impl, about, mean.detach(), var.detach(), *distinct(M, V, *compared))
    return loss, mean, var
