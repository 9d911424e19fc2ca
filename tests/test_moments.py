"""batch_moments on every backend, and bn_stat_loss."""

import golden
import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import reference
from fastkd.eager import _common
from fastkd.ops._dispatch import INTERPRETED
from fastkd.testing import (
    DEVICE,
    assert_matches_oracle,
    backends,
    loss_and_gradients,
    poisoned_allocations,
    relative_difference,
    strided,
)

BACKENDS = backends("moments_fwd")
# One element; one channel; 7x7 and 14x14 maps; one past a block of 2048 positions; many channels; (B, C) and (B, C, N).
SHAPES = [
    (1, 1, 1, 1),
    (3, 1, 5, 5),
    (2, 70, 7, 7),
    (4, 33, 14, 14),
    (2, 3, 41, 50),
    (3, 300, 3),
    (5, 9),
    (2, 3, 4, 5, 6),
]
if INTERPRETED:  # a program takes milliseconds there
    SHAPES = [(1, 1, 1, 1), (2, 5, 7, 7), (2, 70, 3), (2, 3, 41, 50)]
# bfloat16 is left to GPUs by the interpreted kernels: the interpreter truncates float32 to it.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


def activations(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (2 * torch.randn(shape, device=DEVICE) + 1).to(dtype)


def check(x: Tensor, dims: str, backend: str) -> None:
    """Hold the moments and their gradient to the oracle rule, under random incoming gradients of both."""
    with poisoned_allocations():
        mean, _ = fastkd.batch_moments(x, dims=dims, backend=backend)
    incoming = torch.randn(2, *mean.shape, device=DEVICE, dtype=torch.float64)

    def run(function: object, x: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        moments = function(x)
        (dx,) = torch.autograd.grad(moments, x, [g.to(m) for g, m in zip(incoming, moments, strict=True)])
        return (*(m.detach() for m in moments), dx)

    with poisoned_allocations():
        actual = run(lambda x: fastkd.batch_moments(x, dims=dims, backend=backend), x)
    oracle = run(lambda x: reference.batch_moments(x, dims=dims), x.double())
    eager = run(lambda x: reference.batch_moments(x, dims=dims), x)
    assert actual[2].stride() == torch.empty_like(x).stride()
    for name, a, e, o in zip(("mean", "var", "dx"), actual, (*eager[:2], eager[2].to(x.dtype)), oracle, strict=True):
        assert_matches_oracle(a, e, o, x.numel() // mean.numel(), name)


@pytest.mark.parametrize("layout", ["contiguous", "channels", "permuted", "sliced", "offset"])
@pytest.mark.parametrize("dims", ["batch", "image"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_oracle(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], dims: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_common, "CHUNK", 3000)  # several pieces and a tail at these sizes
    check(strided(activations(shape, dtype), layout), dims, backend)


@pytest.mark.parametrize("dims", ["batch", "image"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_other_position_and_expanded(backend: str, dims: str) -> None:
    x = activations((3, 5, 9, 8, 6), torch.float32)
    check(x[:, :, ::2, 1:, ::3], dims, backend)  # three position dimensions that cannot be folded to two
    check(x[:, :, ::2, 0, ::3], dims, backend)
    check(activations((3, 1, 6, 6), torch.float32).expand(3, 4, 6, 6), dims, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mean_far_above_the_spread(backend: str) -> None:
    x = torch.randn(4, 6, 30, 30, dtype=torch.float64).to(DEVICE) * 1e-2 + 1e2
    x = x.float()
    x[:, 1, 0, 0] = 0  # a first element that is no guide to the mean
    for layout in ("contiguous", "channels"):
        _, var = fastkd.batch_moments(strided(x, layout), backend=backend)
        _, expected = reference.batch_moments(x.double())
        assert ((var - expected) / expected).abs().max() < 1e-4


@pytest.mark.parametrize("layout", ["contiguous", "channels", "sliced"])
@pytest.mark.parametrize("dims", ["batch", "image"])
@pytest.mark.parametrize("shape", [(3, 4, 5, 5), (4, 3, 40, 50), (9, 20, 3, 3)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_element(backend: str, shape: tuple[int, ...], dims: str, layout: str) -> None:
    """Makes its channel's mean infinite, not NaN, wherever it stands. Other channels are whole."""
    infinity = float("inf")
    for values in ((infinity,), (-infinity,), (float("nan"),), (infinity, infinity), (infinity, -infinity)):
        for position in (0, shape[2] * shape[3] // 2, -1):
            x = activations(shape, torch.float32)
            for image, value in zip((1, -1), values, strict=False):
                x[image, 1].view(-1)[position] = value
            x = strided(x, layout)
            expected = reference.batch_moments(x, dims=dims)
            for a, e in zip(fastkd.batch_moments(x, dims=dims, backend=backend), expected, strict=True):
                torch.testing.assert_close(a, e, equal_nan=True)
            if dims == "batch":
                zeros, ones = torch.zeros(shape[1], device=DEVICE), torch.ones(shape[1], device=DEVICE)
                _, *moments = fastkd.batch_norm_moments(x, zeros, ones, backend=backend)
                torch.testing.assert_close(moments, list(expected), equal_nan=True)


@pytest.mark.parametrize("backend", backends("moments_fwd", torch.float64))
def test_gradcheck(backend: str) -> None:
    x = activations((2, 3, 4, 5), torch.float64).requires_grad_()
    for dims in ("batch", "image"):
        assert torch.autograd.gradcheck(lambda x, d=dims: fastkd.batch_moments(x, dims=d, backend=backend), (x,))
        assert torch.autograd.gradcheck(lambda x, d=dims: reference.batch_moments(x, dims=d), (x,))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bits_whatever_the_threads(threads: int) -> None:
    x = activations((8, 16, 40, 40), torch.float32)
    expected = fastkd.batch_moments(x)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = fastkd.batch_moments(x)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def layers(sizes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], ...]:
    inputs = [activations(size, dtype) for size in sizes]
    means = [torch.randn(x.shape[1], device=DEVICE) for x in inputs]
    return inputs, means, [torch.rand(x.shape[1], device=DEVICE) + 0.5 for x in inputs]


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("distance", ["l2", "mse", "image"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bn_stat_loss_matches_oracle(backend: str, dtype: torch.dtype, distance: str, momentum: float | None) -> None:
    inputs, means, variances = layers([(4, 3, 9, 9), (4, 16, 5, 5), (4, 70, 3, 3)], dtype)
    ema = None if momentum is None else ([m + 0.1 for m in means], [v + 0.1 for v in variances])
    options = {"distance": distance, "layer_weights": [10.0, 1.0, 0.5], "momentum": momentum}

    def promoted(x: list[Tensor]) -> list[Tensor]:
        return [v.double() for v in x]

    actual = loss_and_gradients(
        lambda *x: fastkd.bn_stat_loss(x, means, variances, ema=ema, backend=backend, **options), inputs
    )
    eager = loss_and_gradients(lambda *x: reference.bn_stat_loss(x, means, variances, ema=ema, **options), inputs)
    oracle = loss_and_gradients(
        lambda *x: reference.bn_stat_loss(
            x, promoted(means), promoted(variances), ema=ema and tuple(map(promoted, ema)), **options
        ),
        promoted(inputs),
    )
    for i, (a, e, o) in enumerate(zip(actual, eager, oracle, strict=True)):
        assert_matches_oracle(a, e, o, 324, "loss" if i == 0 else f"dinputs[{i - 1}]")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", golden.cases("bn_stat_deepinversion"), ids=golden.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_deepinversion(backend: str, case: golden.Case, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and backend not in backends("moments_fwd", torch.float64):
        pytest.skip("this backend has no float64")
    x = {k: v.to(DEVICE, dtype) for k, v in golden.load(case).items()}
    count = sum(k.startswith("in.act") for k in x)
    actual = loss_and_gradients(
        lambda *inputs: fastkd.bn_stat_loss(
            inputs,
            [x[f"in.running_mean{i}"] for i in range(count)],
            [x[f"in.running_var{i}"] for i in range(count)],
            layer_weights=[case["params"]["first_bn_multiplier"], *[1.0] * (count - 1)],
            backend=backend,
        ),
        [x[f"in.act{i}"] for i in range(count)],
    )
    assert relative_difference(actual[0], x["loss"]) <= golden.tolerance(case, dtype, "loss")
    for i, grad in enumerate(actual[1:]):
        assert relative_difference(grad, x[f"grad.act{i}"]) <= golden.tolerance(case, dtype, "grad")


@pytest.mark.parametrize("distance", ["l2", "mse", "image"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_distance_has_gradient_zero(backend: str, distance: str) -> None:
    x = torch.tensor([-1.0, 1.0], device=DEVICE).repeat(2, 3, 8).view(2, 3, 4, 4)
    mean, var = fastkd.batch_moments(x, backend=backend)
    if distance == "image":
        var = var * 16 / 15
    loss, grad = loss_and_gradients(
        lambda x: fastkd.bn_stat_loss([x], [mean], [var], distance=distance, backend=backend), [x]
    )
    assert loss <= 1e-12
    assert grad.isfinite().all()
    if distance == "l2":
        assert (grad == 0).all()


def test_float16_with_a_grad_scaler() -> None:
    inputs, means, variances = layers([(4, 16, 14, 14)], torch.float16)
    function = fastkd.bn_stat_loss
    _, grad = loss_and_gradients(lambda x: function([x], means, variances), inputs, 65536.0)
    _, oracle = loss_and_gradients(
        lambda x: reference.bn_stat_loss([x], [means[0].double()], [variances[0].double()]),
        [inputs[0].double()],
        65536.0,
    )
    assert ((grad - oracle).norm() / oracle.norm()).item() < 1e-3


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        ([1.0], {}, TypeError, "x must be a tensor"),
        (torch.ones(2, 3, dtype=torch.int32), {}, TypeError, "x must be float64"),
        (torch.ones(3), {}, ValueError, r"x must have shape \(B, C, ...\)"),
        (torch.ones(2, 0, 4), {}, ValueError, "x must not be empty"),
        (torch.ones(2, 3), {"dims": "all"}, ValueError, "dims must be one of 'batch', 'image'"),
        (torch.ones(2, 3), {"backend": "cpp"}, ValueError, "backend must be one of"),
    ],
    ids=lambda x: None if isinstance(x, Tensor) else str(x)[:40],
)
def test_bad_moments_input(x: object, options: dict[str, str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastkd.batch_moments(x, **options)


ONE = [torch.ones(4, 3, 2, 2)], [torch.zeros(3)], [torch.ones(3)]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], [], []), {}, "at least one layer"),
        (([torch.ones(1, 3)], *ONE[1:]), {}, "at least 2 elements per channel"),
        (([torch.ones(4, 3, 1, 1)], *ONE[1:]), {"distance": "image"}, "at least 2 elements per channel and image"),
        ((ONE[0], [], ONE[2]), {}, "running_means must have one tensor per layer"),
        ((ONE[0], ONE[1], [torch.ones(4)]), {}, r"running_vars\[0\] must have the 3 channels"),
        ((ONE[0], [torch.zeros(3, requires_grad=True)], ONE[2]), {}, "detach it"),
        (ONE, {"distance": "l1"}, "distance must be one of"),
        (ONE, {"layer_weights": [1.0, 2.0]}, "one number per layer"),
        (ONE, {"layer_weights": [-1.0]}, r"layer_weights\[0\] must be a finite number >= 0"),
        (ONE, {"momentum": 0.9}, "momentum and ema go together"),
        (ONE, {"momentum": 1.0, "ema": ONE[1:]}, "momentum must be below 1"),
    ],
    ids=lambda x: str(list(x)) if isinstance(x, dict) else None,
)
def test_bad_layers(arguments: tuple[list[Tensor], ...], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastkd.bn_stat_loss(*arguments, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_keeps_the_strides_it_promises(backend: str) -> None:
    """Three positions that cannot be folded to two: what torch.compile believes of the gradient is what it gets."""
    x = torch.randn(2, 3, 6, 5, 4, device=DEVICE).permute(0, 1, 4, 3, 2)
    mean, var = fastkd.batch_moments(x, backend=backend)
    op = "moments_bwd" if backend == "native" else f"moments_bwd_{backend}"
    torch.library.opcheck(getattr(torch.ops.fastkd, op).default, (mean, var, [x], mean, False))
    check(x, "batch", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_goes_through(backend: str) -> None:
    x = activations((4, 3, 5, 5), torch.float32)
    x[1, 1, 2, 2] = float("nan")
    mean, var = fastkd.batch_moments(x, backend=backend)
    assert mean.isnan().tolist() == var.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("layout", ["contiguous", "channels", "sliced", "offset"])
@pytest.mark.parametrize("shape", [(3, 5, 7, 7), (4, 70, 2, 2), (2, 33, 3), (2, 3, 41, 50)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_norm_moments_match_the_oracle(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], layout: str
) -> None:
    x, C = strided(activations(shape, dtype), layout), shape[1]
    running = torch.randn(C, device=DEVICE), torch.rand(C, device=DEVICE) + 0.5
    affine = torch.randn(C, device=DEVICE), torch.randn(C, device=DEVICE)
    incoming = [
        torch.randn(s, device=DEVICE).to(t) for s, t in ((shape, dtype), (C, torch.float32), (C, torch.float32))
    ]

    def run(function: object, *inputs: Tensor) -> tuple[Tensor, ...]:
        x, *rest = inputs
        x = x.detach().requires_grad_()
        outputs = function(x, *rest)
        (dx,) = torch.autograd.grad(outputs, x, [g.to(o) for g, o in zip(incoming, outputs, strict=True)])
        return (*(o.detach() for o in outputs), dx)

    inputs = (x, *running, *affine)
    with poisoned_allocations():
        actual = run(lambda *a: fastkd.batch_norm_moments(*a, backend=backend), *inputs)
    oracle = run(reference.batch_norm_moments, *(v.double() for v in inputs))
    eager = run(reference.batch_norm_moments, *inputs)
    for name, a, e, o in zip(("y", "mean", "var", "dx"), actual, eager, oracle, strict=True):
        assert_matches_oracle(a, e, o, x.numel() // C, name)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor"),
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "x must be float64"),
        ({"x": torch.ones(3)}, ValueError, r"x must have shape \(B, C, ...\)"),
        ({"x": torch.ones(0, 3)}, ValueError, "x must not be empty"),
        ({"running_mean": torch.ones(4)}, ValueError, "running_mean must have the 3 channels of x, got 4"),
        ({"running_var": torch.ones(3, 1)}, ValueError, r"running_var must have shape \(C,\)"),
        ({"running_var": torch.ones(3, requires_grad=True)}, ValueError, "running_var is a constant here"),
        ({"running_var": torch.ones(3, device="meta")}, ValueError, "running_var must be on the device of x"),
        ({"weight": torch.ones(2)}, ValueError, "weight must have the 3 channels of x, got 2"),
        ({"bias": torch.ones(3, dtype=torch.int32)}, TypeError, "bias must be float64"),
        ({"eps": 0.0}, ValueError, "eps must be a finite number > 0"),
        ({"eps": "1e-5"}, TypeError, "eps must be a Python number"),
        ({"backend": "cpp"}, ValueError, "backend must be one of"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_bad_batch_norm_input(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    good = {"x": torch.ones(2, 3, 4), "running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    with pytest.raises(error, match=message):
        fastkd.batch_norm_moments(**(good | arguments))


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "weight and bias", "bias alone"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_norm_gives_the_gradients_that_are_wanted(backend: str, wanted: str) -> None:
    """Also where the weight is missing, so that the bias is another input of the recorded node."""
    x, running = activations((3, 5, 4, 4), torch.float32), (torch.randn(5, device=DEVICE), torch.ones(5, device=DEVICE))
    weight, bias = torch.randn(5, device=DEVICE), torch.randn(5, device=DEVICE)
    leaves = [v.requires_grad_() for name, v in (("x", x), ("weight", weight), ("bias", bias)) if name in wanted]
    inputs = (x, *running, None if wanted == "bias alone" else weight, bias)
    incoming = torch.randn(3, 5, 4, 4, device=DEVICE)
    y, *_ = fastkd.batch_norm_moments(*inputs, backend=backend)
    expected, *_ = reference.batch_norm_moments(*inputs)
    for a, e in zip(*(torch.autograd.grad(v, leaves, incoming) for v in (y, expected)), strict=True):
        assert relative_difference(a, e) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_variance_below_zero(backend: str) -> None:
    """The mean of 13 equal elements can be an ulp off, which leaves sums that cancel."""
    x = torch.tensor([0.1, 1 / 3, 1e4 + 0.3, 3.3e-7], device=DEVICE)[:, None].expand(3, 4, 13).contiguous()
    for dims in ("batch", "image"):
        _, var = fastkd.batch_moments(x, dims=dims, backend=backend)
        assert (var >= 0).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels"])
@pytest.mark.parametrize("positions", [16, 900])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])  # float32 has no such numbers
def test_a_mean_whose_square_overflows(backend: str, positions: int, layout: str) -> None:
    x = strided(torch.full((40, 6, positions, 1), 1e160, dtype=torch.float64, device=DEVICE), layout)
    mean, var = fastkd.batch_moments(x, backend=backend)
    assert torch.allclose(mean, torch.full_like(mean, 1e160))
    assert ((var >= 0) & (var.sqrt() < 1e146)).all()


@pytest.mark.parametrize("shape", [(17, 5, 15, 1), (1, 2, 1, 63)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_weight_and_bias_whatever_the_layouts(backend: str, shape: tuple[int, ...]) -> None:
    """PyTorch's own sums are wrong for such planes of one row or column where dy lies otherwise than x."""
    B, C, H, W = shape
    x, running = activations(shape, torch.float32), (torch.randn(C, device=DEVICE), torch.ones(C, device=DEVICE))
    leaves = [torch.randn(C, device=DEVICE, requires_grad=True) for _ in range(2)]
    incoming = torch.randn(B, W, H, C, device=DEVICE).transpose(1, 3)
    y, *_ = fastkd.batch_norm_moments(x, *running, *leaves, backend=backend)
    expected, *_ = reference.batch_norm_moments(x, *running, *leaves)
    for a, e in zip(*(torch.autograd.grad(v, leaves, incoming) for v in (y, expected)), strict=True):
        assert relative_difference(a, e) < 1e-5
