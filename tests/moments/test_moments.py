"""batch_moments on every backend, and bn_stat_loss."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import reference
from fastkd.eager import _common
from fastkd.ops import _dispatch
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
from tests._support import golden
from tests._support.pairs import in_pairs
from tests._support.splits import THREADS, around, built, lowered, threads

BACKENDS = backends("moments_fwd")
# One element; one channel; 7x7 and 14x14 maps; one past a block of 2048 positions; many channels; (B, C) and (B, C, N);
# images enough for a GPU to take each position of an odd plane by itself.
SHAPES = [
    (1, 1, 1, 1),
    (3, 1, 5, 5),
    (2, 70, 7, 7),
    (4, 33, 14, 14),
    (2, 3, 41, 50),
    (3, 300, 3),
    (5, 9),
    (2, 3, 4, 5, 6),
    (33, 5, 3, 3),
]
if INTERPRETED:  # a program takes milliseconds there
    SHAPES = [(1, 1, 1, 1), (2, 5, 7, 7), (2, 70, 3), (2, 3, 41, 50), (33, 5, 3, 3)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


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


def check_batch_norm(
    x: Tensor, dy: Tensor, backend: str, statistics: list[Tensor] | None = None, eps: float = 1e-5
) -> None:
    """Hold y, its moments and their joint gradient to the oracle rule, under dy as it lies in memory."""
    C = x.shape[1]
    if statistics is None:
        statistics = [torch.randn(C, device=DEVICE) + k for k in range(4)]
        statistics[1] = statistics[1].abs() + 0.5
    of_moments = torch.randn(2, C, device=DEVICE).unbind()

    def run(function: object, x: Tensor, dy: Tensor, *statistics: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        outputs = function(x, *statistics, eps=eps)
        (dx,) = torch.autograd.grad(outputs, x, [dy, *(g.to(outputs[1]) for g in of_moments)])
        return (*(o.detach() for o in outputs), dx)

    inputs = (x, dy, *statistics)
    with poisoned_allocations():
        actual = run(lambda *a, **o: fastkd.batch_norm_moments(*a, **o, backend=backend), *inputs)
    oracle = run(reference.batch_norm_moments, *(v.double() for v in inputs))
    eager = run(reference.batch_norm_moments, x, dy, *(v.float() for v in statistics))
    for name, a, e, o in zip(("y", "mean", "var", "dx"), actual, eager, oracle, strict=True):
        assert_matches_oracle(a, e, o, x.numel() // C, name)


LAYOUTS = ["contiguous", "channels", "permuted", "sliced", "offset"]


@in_pairs({"shape": SHAPES, "layout": LAYOUTS, "dtype": DTYPES, "dims": ["batch", "image"]})
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_oracle(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], dims: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_common, "CHUNK", 3000)  # several pieces and a tail at these sizes
    check(strided(activations(shape, dtype), layout), dims, backend)


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dims", ["batch", "image"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_combination_matches_oracle(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], dims: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_common, "CHUNK", 3000)
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


INFINITY = float("inf")


@in_pairs(
    {
        "shape": [(3, 16, 5, 5), (4, 16, 40, 50), (9, 16, 3, 3)],
        "layout": ["contiguous", "channels", "sliced"],
        "dims": ["batch", "image"],
    }
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_element(backend: str, shape: tuple[int, ...], dims: str, layout: str) -> None:
    """Makes its channel's mean infinite, not NaN, wherever it lies. The other channels, here the last, are whole."""
    kinds = ((INFINITY,), (-INFINITY,), (float("nan"),), (INFINITY, INFINITY), (INFINITY, -INFINITY))
    x = activations(shape, torch.float32)
    for channel in range(15):
        position = (0, shape[2] * shape[3] // 2, -1)[channel % 3]
        for image, value in zip((1, -1), kinds[channel // 3], strict=False):
            x[image, channel].view(-1)[position] = value
    x = strided(x, layout)
    expected = reference.batch_moments(x, dims=dims)
    for a, e in zip(fastkd.batch_moments(x, dims=dims, backend=backend), expected, strict=True):
        torch.testing.assert_close(a, e, equal_nan=True)
    if dims == "batch":
        zeros, ones = torch.zeros(16, device=DEVICE), torch.ones(16, device=DEVICE)
        _, *moments = fastkd.batch_norm_moments(x, zeros, ones, backend=backend)
        torch.testing.assert_close(moments, list(expected), equal_nan=True)


@pytest.mark.parametrize("backend", backends("moments_fwd", torch.float64))
def test_gradcheck(backend: str) -> None:
    x = activations((2, 3, 4, 5), torch.float64).requires_grad_()
    for dims in ("batch", "image"):
        assert torch.autograd.gradcheck(lambda x, d=dims: fastkd.batch_moments(x, dims=d, backend=backend), (x,))
        assert torch.autograd.gradcheck(lambda x, d=dims: reference.batch_moments(x, dims=d), (x,))


@pytest.mark.parametrize("count", THREADS[1:])
def test_same_bits_whatever_the_threads(count: int) -> None:
    x = activations((8, 16, 40, 40), torch.float32)
    for layout in ("contiguous", "channels"):
        y = strided(x, layout)
        expected = fastkd.batch_moments(y)
        with threads(count):
            actual = fastkd.batch_moments(y)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


# Threshold -> (the size it is lowered to, a shape in which n stands where it matters, what else makes it matter).
# A plane of more positions than moments_small is a row.
ROWS = {"moments_small": 1, "moments_grain": 1}
SPLITS: dict[str, tuple[int, Callable[[int], tuple[int, ...]], dict[str, int]]] = {
    "moments_block": (8, lambda n: (2, 3, n), ROWS),
    "moments_part": (8, lambda n: (n, 3, 5), ROWS | {"moments_rows": 2}),
    "moments_rows": (4, lambda n: (1, 5, n), ROWS | {"moments_part": 2}),
    "moments_images": (4, lambda n: (n, 3, 5), {"moments_grain": 1}),
    "moments_columns": (8, lambda n: (3, n, 2), {"moments_grain": 1}),
    "moments_small": (4, lambda n: (3, 4, n), {"moments_grain": 1}),
    "moments_group": (3, lambda n: (2, n, 5), ROWS),
    "moments_span": (16, lambda n: (2, 9, n), ROWS),
    "moments_few_units": (2, lambda n: (3, n, 20), ROWS | {"moments_unit": 1, "moments_part": 8}),
    "moments_unit": (20, lambda n: (2, 7, n), ROWS | {"moments_few_units": 1 << 20}),
    "moments_units": (32, lambda n: (n, 5, 9), ROWS | {"moments_part": 1, "moments_rows": 1}),
    "moments_grain": (4, lambda n: (3, n, 25), {}),
    "moments_run": (8, lambda n: (3, n, 2), {"moments_grain": 1}),
    "moments_hot": (4 * 3 * 9 * 5, lambda n: (3, 5, n // 60 + 1), {}),
    "moments_cuda_loads": (1, lambda n: (2, 3, 1036 * n), {"moments_cuda_waves": 40}),  # split off a vector's end
    "moments_cuda_waves": (1, lambda n: (1, 2, 2056 * n), {"moments_cuda_loads": 1}),
}
HERE = [name for name in SPLITS if name in built("moments")]
OVER = 33 * 256 + 5  # elements that make more pieces than a warp has threads


def spread(x: Tensor, layout: str) -> Tensor:
    """strided, and: every other position ("alternate"), rows further apart than a vector's length divides ("gaps")."""
    if layout == "alternate":
        return x.repeat_interleave(2, -1)[..., ::2]
    if layout == "gaps":
        return torch.cat([x, x[..., :1]], -1)[..., :-1]
    return strided(x, layout)


AROUND = (
    in_pairs(
        {
            "name": HERE,
            "count": THREADS,
            "layout": ["contiguous", "channels", "alternate", "offset", "gaps"],
            "dims": ["batch", "image"],
            "dtype": [torch.float32, torch.float16],
        }
    )
    if HERE
    else pytest.mark.skip(reason="needs the compiled extension")
)


@AROUND
def test_sizes_around_a_native_threshold(name: str, count: int, layout: str, dims: str, dtype: torch.dtype) -> None:
    size, shape, others = SPLITS[name]
    with lowered(**(others | {name: size})), threads(count):
        for n in around(size):
            x = spread(activations(shape(n), dtype), layout)
            check(x, dims, "native")
            check_batch_norm(x, spread(torch.randn_like(x), "contiguous" if layout == "channels" else layout), "native")


# Planes of odd sizes, whose memory CUDA reads in runs: several tiles of them, the last one short; a plane of several
# runs; images apart; the first channel left out, so that images start between vectors, and the first element.
@in_pairs(
    {
        "shape": [(3, 5, 7, 7)] if INTERPRETED else [(5, 90, 7, 7), (2, 3, 47, 47), (9, 8, 15, 15)],
        "start": ["whole", "channel", "image", "element"],
        "dims": ["batch", "image"],
        "dtype": DTYPES,
    }
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_of_odd_planes(backend: str, shape: tuple[int, ...], start: str, dims: str, dtype: torch.dtype) -> None:
    B, C, h, w = shape
    if start == "element":
        x = activations((B * C * h * w + 1,), dtype)[1:].view(shape)
    elif start == "image":
        x = activations((B, 2, C, h, w), dtype)[:, 1]
    else:
        x = activations((B, C + (start == "channel"), h, w), dtype)[:, -C:]
    with lowered(moments_cuda_loads=1, moments_cuda_waves=2):
        check(x, dims, backend)
        check_batch_norm(x, torch.randn_like(x), backend)


@pytest.mark.parametrize("dims", ["batch", "image"])
@pytest.mark.parametrize("backend", backends("moments_fwd", torch.float64))
def test_runs_of_odd_planes_in_float64(backend: str, dims: str) -> None:
    for shape in ((2, 7, 7, 9), (2, 3, 31, 35)):
        check(activations(shape, torch.float64)[:, 1:], dims, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_pieces_than_a_warp_merges_at_once(backend: str) -> None:
    with lowered(moments_cuda_loads=1, moments_cuda_waves=40, moments_part=64, moments_rows=1):
        check(activations((1, 1, OVER), torch.float32), "batch", backend)


@in_pairs(
    {
        "dy": ["expanded", "alternate", "offset", "gaps", "channels", "contiguous"],
        "layout": ["contiguous", "channels", "gaps"],
        "shape": [(2, 8, 8, 4), (2, 8, 8, 16), (3, 4, 64, 48)][: 2 if INTERPRETED else 3],
        "dtype": DTYPES,
    }
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_other_strides_than_the_input(
    backend: str, shape: tuple[int, ...], layout: str, dy: str, dtype: torch.dtype
) -> None:
    x = spread(activations(shape, dtype), layout)
    g = torch.randn(shape, device=DEVICE).to(dtype)
    check_batch_norm(x, g[:1, :, :1, :1].expand(shape) if dy == "expanded" else spread(g, dy), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_incoming_gradients_and_statistics_of_any_stride(backend: str) -> None:
    x = activations((3, 6, 5, 5), torch.float32)
    for dims in ("batch", "image"):
        (dx,) = loss_and_gradients(lambda x, d=dims: sum(fastkd.batch_moments(x, dims=d, backend=backend)).sum(), [x])[
            1:
        ]
        (expected,) = loss_and_gradients(lambda x, d=dims: sum(reference.batch_moments(x, dims=d)).sum(), [x])[1:]
        (oracle,) = loss_and_gradients(lambda x, d=dims: sum(reference.batch_moments(x, dims=d)).sum(), [x.double()])[
            1:
        ]
        assert_matches_oracle(dx, expected, oracle, 75, dims)
    statistics = torch.rand(6, 4, device=DEVICE).unbind(1)  # neighbours are 4 apart
    check_batch_norm(x, torch.randn_like(x), backend, statistics)
    check_batch_norm(x, torch.randn_like(x), backend, [v.double() for v in statistics])


@pytest.mark.parametrize("eps", [1e-3, 0.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_where_it_is_all_there_is(backend: str, eps: float) -> None:
    """Channels whose running variance is 0 are divided by the root of eps, in every gradient too."""
    x = activations((3, 5, 4, 4), torch.float32)
    mean, weight, bias = torch.randn(3, 5, device=DEVICE).unbind()
    statistics = [mean, torch.tensor([0.0, 1e-4, 0.0, 1e-3, 2.0], device=DEVICE), weight, bias]
    check_batch_norm(x, torch.randn_like(x), backend, statistics, eps)
    leaves = [weight.requires_grad_(), bias.requires_grad_()]
    incoming = torch.randn_like(x)
    y, *_ = fastkd.batch_norm_moments(x, *statistics, eps=eps, backend=backend)
    wide = [v.detach().double().requires_grad_(v.requires_grad) for v in (x, *statistics)]
    for name, a, e, o in zip(
        ("dweight", "dbias"),
        torch.autograd.grad(y, leaves, incoming),
        torch.autograd.grad(reference.batch_norm_moments(x, *statistics, eps=eps)[0], leaves, incoming),
        torch.autograd.grad(reference.batch_norm_moments(*wide, eps=eps)[0], wide[3:], incoming.double()),
        strict=True,
    ):
        assert_matches_oracle(a, e, o, 48, name)


@pytest.mark.parametrize("width", [1, 2, 5, 17])
@pytest.mark.parametrize("layout", ["contiguous", "channels"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pivot_that_is_no_guide(backend: str, layout: str, width: int) -> None:
    """The first row of all, of which a pivot is the mean, lies 10,000 spreads off."""
    total = 300 if INTERPRETED else 1200
    x = torch.randn(total // width, 2, width, 1, device=DEVICE)
    x[0] += 1e4
    with lowered(moments_small=1, moments_part=1 << 20):
        mean, var = fastkd.batch_moments(strided(x, layout), backend=backend)
    for name, a, e, o in zip(
        ("mean", "var"), (mean, var), reference.batch_moments(x), reference.batch_moments(x.double()), strict=True
    ):
        assert_matches_oracle(a, e, o, total, name)


def layers(sizes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], ...]:
    inputs = [activations(size, dtype) for size in sizes]
    means = [torch.randn(x.shape[1], device=DEVICE) for x in inputs]
    return inputs, means, [torch.rand(x.shape[1], device=DEVICE) + 0.5 for x in inputs]


@in_pairs({"distance": ["l2", "mse", "image"], "dtype": DTYPES, "momentum": [None, 0.9]})
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


@pytest.mark.parametrize("distance", ["l2", "mse"])
@pytest.mark.parametrize("equal", ["mean", "var"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_of_two_distances_is_zero(backend: str, equal: str, distance: str) -> None:
    """Its gradient is 0, and the other's is not touched by that."""
    mean, var, other = torch.rand(3, 5, device=DEVICE).unbind()
    targets = (mean, other) if equal == "mean" else (other, var)
    x = torch.randn(4, 5, device=DEVICE)

    def on(module: object, dtype: torch.dtype, **options: str) -> tuple[Tensor, ...]:
        def distance_of(m: Tensor, v: Tensor) -> Tensor:
            (M, V), moments = (t.to(dtype) for t in targets), [(m, v)]
            if module is fastkd:
                return fastkd.bn_stat_loss([x], [M], [V], distance=distance, moments=moments, **options)
            of = (lambda d: d.norm()) if distance == "l2" else (lambda d: d.square().mean())
            return of(m - M) + of(v - V)

        return loss_and_gradients(distance_of, [mean.to(dtype), var.to(dtype)])

    actual = on(fastkd, torch.float32, backend=backend)
    for name, a, e, o in zip(
        ("loss", "dmean", "dvar"), actual, on(reference, torch.float32), on(reference, torch.float64), strict=True
    ):
        assert_matches_oracle(a, e, o, 5, name)
    assert (actual[1 if equal == "mean" else 2] == 0).all()
    assert (actual[2 if equal == "mean" else 1] != 0).all()


def distance_of(moments: list[tuple[Tensor, Tensor]], backend: str, **options: object) -> tuple[Tensor, ...]:
    """bn_stat_loss of given moments against statistics 0, and its gradients: the means', then the variances'."""
    n, zeros = len(moments), [torch.zeros_like(m) for m, _ in moments]
    inputs = [torch.ones(4, len(m), device=DEVICE) for m, _ in moments]

    def loss(*given: Tensor) -> Tensor:
        pairs = list(zip(given[:n], given[n:], strict=True))
        return fastkd.bn_stat_loss(inputs, zeros, zeros, moments=pairs, backend=backend, **options)

    return loss_and_gradients(loss, [*(m for m, _ in moments), *(v for _, v in moments)])


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "native"])
def test_small_terms_beside_a_large_one(backend: str) -> None:
    """Sums of a layer and of layers are in double: 2^24 + 1 + 1 + ... in float32 would stay 2^24."""
    one, zero = torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    loss, *_ = distance_of([(2.0**24 * one, zero), *[(one, zero)] * 64], backend)
    assert loss == 2**24 + 64
    loss, *_ = distance_of(
        [(torch.cat([4096 * one, one.repeat(640)]), torch.zeros(641, device=DEVICE))], backend, distance="mse"
    )
    assert loss == torch.tensor((2**24 + 640) / 641)


@pytest.mark.parametrize("distance", ["l2", "mse", "image"])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_layers_than_a_launch_takes(
    backend: str, size: int, distance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And more channels than a block of them, in the interpreted kernels."""
    if backend == "triton":
        from fastkd_kernels import moments

        monkeypatch.setattr(moments, "DISTANCE_BLOCK", 1 << size.bit_length())  # a power of 2
    inputs, means, variances = layers([(3, 1 + 2 * i, 2 + i) for i in range(7)])
    inputs[3] = inputs[3].repeat_interleave(2, 2)[..., ::2]

    def run(module: object, dtype: torch.dtype, **options: str) -> tuple[Tensor, ...]:
        stats = [[v.to(dtype) for v in which] for which in (means, variances)]
        return loss_and_gradients(
            lambda *x: module.bn_stat_loss(x, *stats, distance=distance, **options), [x.to(dtype) for x in inputs]
        )

    with lowered(moments_cuda_layers=size, moments_cuda_targets=size):
        actual = run(fastkd, torch.float32, backend=backend)
    eager, oracle = run(reference, torch.float32), run(reference, torch.float64)
    for i, (a, e, o) in enumerate(zip(actual, eager, oracle, strict=True)):
        assert_matches_oracle(a, e, o, 60, "loss" if i == 0 else f"dinputs[{i - 1}]")


@pytest.mark.parametrize("distance", ["l2", "image"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_many_layers_as_take_two_whole_launches(backend: str, distance: str) -> None:
    """More than 96, the moments of which a launch of CUDA forms; layers of several shapes and memory layouts."""
    count = 20 if INTERPRETED else 200
    inputs, means, variances = layers([(2, 1 + i % 3, 3, 4 + i % 2) for i in range(count)])
    inputs = [strided(x, ("contiguous", "channels", "offset")[i % 3]) for i, x in enumerate(inputs)]

    def run(module: object, dtype: torch.dtype, **options: str) -> tuple[Tensor, Tensor]:
        stats = [[v.to(dtype) for v in which] for which in (means, variances)]
        loss, *gradients = loss_and_gradients(
            lambda *x: module.bn_stat_loss(x, *stats, distance=distance, **options), [x.to(dtype) for x in inputs]
        )
        return loss, torch.cat([g.flatten() for g in gradients])

    actual = run(fastkd, torch.float32, backend=backend)
    eager, oracle = run(reference, torch.float32), run(reference, torch.float64)
    for name, a, e, o in zip(("loss", "dinputs"), actual, eager, oracle, strict=True):
        assert_matches_oracle(a, e, o, 30 * count, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_spreads_as_small_as_the_constant_beside_them(backend: str) -> None:
    """ "image" adds 1e-6 to both variances before it takes their roots."""
    x = 1e-4 * torch.randn(2, 3, 5, 5, device=DEVICE)
    means, variances = [torch.zeros(3, device=DEVICE)], [torch.tensor([0.0, 1e-7, 1e-5], device=DEVICE)]

    def run(module: object, dtype: torch.dtype, **options: str) -> tuple[Tensor, ...]:
        stats = [[v.to(dtype) for v in which] for which in (means, variances)]
        return loss_and_gradients(
            lambda x: module.bn_stat_loss([x], *stats, distance="image", **options), [x.to(dtype)]
        )

    actual = run(fastkd, torch.float32, backend=backend)
    for name, a, e, o in zip(
        ("loss", "dx"), actual, run(reference, torch.float32), run(reference, torch.float64), strict=True
    ):
        assert_matches_oracle(a, e, o, 50, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_of_several_dtypes_in_any_order(backend: str) -> None:
    sizes = [(4, 3, 5), (4, 2, 7), (4, 5, 3), (4, 2, 2)]
    inputs, means, variances = layers(sizes)
    halves = [x.half() if i % 2 == 0 else x for i, x in enumerate(inputs)]  # those of the first dtype are not adjacent
    weights = [1.0, 20.0, 300.0, 4000.0]
    run = lambda module, inputs, **options: loss_and_gradients(  # noqa: E731
        lambda *x: module.bn_stat_loss(x, means, variances, layer_weights=weights, **options), inputs
    )
    actual = run(fastkd, halves, backend=backend)
    for i, (a, e) in enumerate(zip(actual, run(fastkd, [x.float() for x in halves], backend="eager"), strict=True)):
        torch.testing.assert_close(a, e.to(a.dtype), msg=lambda text, i=i: f"{i}: {text}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_momentum_of_moments_that_are_given(backend: str) -> None:
    """(1 - m) of the gradient reaches them, as it reaches inputs."""
    inputs, means, variances = layers([(4, 3, 5), (4, 2, 7)])
    options = {"momentum": 0.75, "ema": ([m + 0.1 for m in means], [v + 0.1 for v in variances]), "backend": backend}

    def with_moments(*x: Tensor) -> Tensor:
        moments = [fastkd.batch_moments(v, backend=backend) for v in x]
        return fastkd.bn_stat_loss(x, means, variances, moments=moments, **options)

    actual = loss_and_gradients(with_moments, inputs)
    expected = loss_and_gradients(lambda *x: fastkd.bn_stat_loss(x, means, variances, **options), inputs)
    torch.testing.assert_close(actual, expected)


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


@in_pairs(
    {
        "layout": ["contiguous", "channels", "sliced", "offset"],
        "shape": [(3, 5, 7, 7), (4, 70, 2, 2), (2, 33, 3), (2, 3, 41, 50), (33, 5, 3, 3)],
        "dtype": DTYPES,
    }
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_norm_moments_match_the_oracle(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], layout: str
) -> None:
    x = strided(activations(shape, dtype), layout)
    check_batch_norm(x, torch.randn(shape, device=DEVICE).to(dtype), backend)


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


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_without_elements_have_no_moments(backend: str, per_image: bool) -> None:
    """NaN, as torch.var_mean has them; the layers around them have their own."""
    shapes = [(2, 4, 3, 3), (2, 3, 0, 3), (2, 5, 3, 3), (0, 6, 3, 3), (2, 2, 3, 3)]
    inputs = [activations(shape, torch.float32) for shape in shapes]
    with poisoned_allocations():
        actual = _dispatch.call(backend, "moments_fwd", inputs, per_image)
    for moment, name in zip(actual, ("mean", "var"), strict=True):
        first = 0
        for x in inputs:
            groups = x.shape[1] * (x.shape[0] if per_image else 1)
            own, first = moment[first : first + groups], first + groups
            if x.numel() == 0:
                assert own.isnan().all()
                continue
            oracle, eager = (
                reference.batch_moments(x.to(dtype), dims="image" if per_image else "batch")[name == "var"].flatten()
                for dtype in (torch.float64, torch.float32)
            )
            assert_matches_oracle(own, eager, oracle, x.numel() // groups, name)
        assert first == len(moment)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_norm_of_nothing_has_no_moments(backend: str) -> None:
    x, statistics = torch.ones(0, 3, 4, device=DEVICE), torch.ones(3, device=DEVICE)
    y, mean, var = _dispatch.call(backend, "batch_norm_fwd", x, statistics, statistics, None, None, 1e-5)
    assert y.shape == x.shape and mean.isnan().all() and var.isnan().all()
