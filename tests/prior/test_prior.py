"""Image priors: total variation in four directions and the image norm."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd import reference
from fastkd.eager import prior
from fastkd.ops._dispatch import INTERPRETED, call
from fastkd.testing import (
    DEVICE,
    assert_matches_oracle,
    backends,
    loss_and_gradients,
    relative_difference,
    strided,
)
from tests._support import golden
from tests._support.floats import FLOATS, dtypes
from tests._support.pairs import in_pairs
from tests._support.splits import THREADS, around, built, lowered, threads

# (2, 2) the least with a diagonal; odd and unequal sides; more channels than images; one past a power of two.
SHAPES = [(1, 1, 2, 2), (3, 3, 8, 8), (2, 3, 5, 9), (1, 7, 33, 17), (5, 3, 65, 129)]
if INTERPRETED:  # a program takes milliseconds there
    SHAPES = [(1, 1, 2, 2), (2, 1, 5, 9), (1, 1, 6, 260)]
ALL = {"tv_l1": 0.7, "tv_l2": 0.3, "l2": 0.2}
OPTIONS = [ALL, ALL | {"l2_per_image": False}, {"tv_l1": 1.0}, {"tv_l2": 1.0}, {"l2": 1.0}]
available = pytest.mark.parametrize("backend", backends("prior_fwd"))


def skip_unless_runs(backend, dtype):
    if backend not in backends("prior_fwd", dtype):
        pytest.skip(f"{backend} does not take {dtype}")


def check(x, backend, options, reduced=None):
    """Hold the loss and its gradient to the oracle rule."""
    oracle = loss_and_gradients(lambda x: reference.image_prior(x, **options), (x.double(),))
    eager = loss_and_gradients(lambda x: reference.image_prior(x, **options), (x,))
    actual = loss_and_gradients(lambda x: fastkd.image_prior(x, backend=backend, **options), (x,))
    for what, a, e, o in zip(("loss", "dimages"), actual, eager, oracle, strict=True):
        assert_matches_oracle(a, e, o, reduced or x.numel(), what)


LAYOUTS = ["contiguous", "permuted", "sliced", "channels", "offset"]


@in_pairs({"layout": LAYOUTS, "shape": SHAPES, "dtype": FLOATS, "l2_per_image": [True, False]})
@available
def test_oracle(backend, dtype, l2_per_image, shape, layout):
    skip_unless_runs(backend, dtype)
    x = torch.randn(shape, device=DEVICE).to(dtype)
    check(strided(x, layout), backend, ALL | {"l2_per_image": l2_per_image})


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS[:2], ids=["per image", "per batch"])
@dtypes
@available
def test_oracle_in_every_combination(backend, dtype, options, shape, layout):
    skip_unless_runs(backend, dtype)
    check(strided(torch.randn(shape, device=DEVICE).to(dtype), layout), backend, options)


# Threshold -> (the size it is lowered to, an image in which n is the size that counts).
SPLITS = {
    "prior_grain": (18, lambda n: (2, 3, n // 6, 6)),  # bands of 3 rows, of 2 and 1 beside whole ones
    "prior_part": (4, lambda n: (1, 2, n, 5)),
    "prior_cuda_waves": (1, lambda n: (1, 1, 3 * n, 5)),  # of 3 multiprocessors where CUDA is emulated
    "prior_cuda_bands": (3, lambda n: (1, 1, n, 300)),
}
HERE = [name for name in SPLITS if name in built("prior")]


AROUND = (
    in_pairs(
        {
            "name": HERE,
            "count": THREADS,
            "layout": ["contiguous", "permuted", "sliced", "channels", "alternate"],
            "dtype": [torch.float32, torch.float16],
            "l2_per_image": [True, False],
        }
    )
    if HERE
    else pytest.mark.skip(reason="needs the compiled extension")
)


@AROUND
def test_bands_of_rows_around_a_native_threshold(name, count, layout, dtype, l2_per_image):
    size, shape = SPLITS[name]
    with lowered(**{name: size}), threads(count):
        for n in (12, *around(size), 42, 66):
            x = torch.randn(shape(n), device=DEVICE).to(dtype)
            x = x.repeat_interleave(2, -1)[..., ::2] if layout == "alternate" else strided(x, layout)
            check(x, "native", ALL | {"l2_per_image": l2_per_image})


@pytest.mark.parametrize("shape", [(1, 1, 9, 5), (1, 2, 13, 4), (2, 1, 33, 3)], ids=str)
@available
def test_bands_of_several_blocks(backend, shape, monkeypatch):
    """Of rows, and blocks of columns with a tail."""
    monkeypatch.setattr("fastkd.eager._common.CHUNK", 40)
    if backend == "triton":
        from fastkd_kernels import prior as kernels

        monkeypatch.setattr(kernels, "BLOCKS", {"BLOCK_H": 2, "BLOCK_W": 4, "num_warps": 4})
    with lowered(prior_grain=20, prior_part=2):
        check(torch.randn(shape, device=DEVICE), backend, ALL)


@pytest.mark.skipif("prior_grain" not in built("prior"), reason="needs the compiled extension for CPUs")
@pytest.mark.parametrize("count", THREADS[1:])
def test_planes_of_several_threads(count):
    """Each thread converts rows in memory of its own; the same bits on any number of threads."""

    def run(x):
        return loss_and_gradients(lambda x: fastkd.image_prior(x, **ALL, backend="native"), (x,))

    x = torch.randn(9, 3, 60, 256).half()
    with lowered(prior_grain=2048):
        with threads(1):
            expected = run(x)
        with threads(count):
            for _ in range(10):
                assert all(map(torch.equal, run(x), expected))


@available
def test_a_direction_without_variation(backend):
    """Stripes: three norms and one that is 0, whose gradient is 0 too."""
    for x in (torch.randn(2, 3, 1, 7).expand(2, 3, 5, 7), torch.randn(2, 3, 7, 1).expand(2, 3, 7, 5)):
        x = x.contiguous().to(DEVICE)
        check(x, backend, ALL)
        check(torch.cat([0 * x[:1], x[1:]]), backend, ALL)  # and an image whose own norm is 0


@pytest.mark.skipif("prior_part" not in built("prior"), reason="needs the compiled extension for CPUs")
def test_small_differences_below_large_ones():
    """Of 8 rows float32 sums, of the rest double: 2^24 + 1 + 1 + ... would else stay 2^24."""
    x = torch.zeros(1, 1, 2048, 65)
    x[..., ::2] = 1
    x[..., 0, ::2] = 2**24
    tv_l1, _, _ = torch.ops.fastkd.prior_fwd.default(x)
    assert_matches_oracle(
        tv_l1[:1], x.diff(dim=-1).abs().mean()[None], x.double().diff(dim=-1).abs().mean()[None], 8, "rows"
    )


@pytest.mark.parametrize("chunk", [1, 100, 500])
def test_eager_chunks(monkeypatch, chunk):
    """One plane at a time, some channels of an image, some images."""
    x = torch.randn(5, 3, 7, 9, device=DEVICE)
    expected = loss_and_gradients(lambda x: fastkd.image_prior(x, **ALL, backend="eager"), (x,))
    monkeypatch.setattr("fastkd.eager._common.CHUNK", chunk)
    actual = loss_and_gradients(lambda x: fastkd.image_prior(x, **ALL, backend="eager"), (x,))
    torch.testing.assert_close(actual, expected)


def test_eager_holds_one_chunk(monkeypatch):
    """No temporary outgrows a chunk in float32; the gradient is the only tensor of the images' size."""
    chunk = 3 * 32 * 32
    monkeypatch.setattr("fastkd.eager._common.CHUNK", chunk)
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(
                x.untyped_storage() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)
            )
            return out

    x = torch.randn(8, 3, 32, 32, device=DEVICE).half()
    with Watch():
        tv_l1, tv_l2, norms = prior.prior_fwd(x)
        dimages = prior.prior_bwd(tv_l1, tv_l2, norms, x, tv_l2, norms)
    known = {x.data_ptr(), dimages.data_ptr()}
    assert max(s.nbytes() for s in made if s.data_ptr() not in known) <= 4 * chunk


@pytest.mark.parametrize("p", [1, 2])
@available
def test_total_variation(backend, p):
    x = torch.randn(2, 3, 6, 7, device=DEVICE)
    oracle = loss_and_gradients(lambda x: reference.total_variation(x, p=p), (x.double(),))
    eager = loss_and_gradients(lambda x: reference.total_variation(x, p=p), (x,))
    actual = loss_and_gradients(lambda x: fastkd.total_variation(x, p=p, backend=backend), (x,))
    for what, a, e, o in zip(("loss", "dimages"), actual, eager, oracle, strict=True):
        assert_matches_oracle(a, e, o, x.numel(), what)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", backends("prior_fwd", torch.float64))
def test_gradcheck(backend, options):
    x = torch.randn(2, 2, 4, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fastkd.image_prior(x, backend=backend, **options), (x,))


@dtypes
@available
def test_constant_images_have_no_variation(backend, dtype):
    skip_unless_runs(backend, dtype)
    x = torch.full((2, 3, 5, 6), 0.3, dtype=dtype, device=DEVICE)
    for p in (1, 2):
        loss, dx = loss_and_gradients(lambda x, p=p: fastkd.total_variation(x, p=p, backend=backend), (x,))
        assert loss == 0
        assert not dx.any()
    for per_image in (True, False):
        loss, dx = loss_and_gradients(
            lambda x, q=per_image: fastkd.image_prior(x, **ALL, l2_per_image=q, backend=backend), (0 * x,)
        )
        assert loss == 0
        assert not dx.any()


@available
def test_norm_alone_takes_any_size(backend):
    x = torch.randn(3, 2, 1, 5, device=DEVICE)
    expected = loss_and_gradients(lambda x: 2 * x.flatten(1).norm(dim=1).mean(), (x,))
    actual = loss_and_gradients(lambda x: fastkd.image_prior(x, l2=2.0, backend=backend), (x,))
    torch.testing.assert_close(actual, expected)


X = torch.randn(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastkd.total_variation(X, p=3), ValueError, "p must be 1 or 2, got 3"),
        (lambda: fastkd.total_variation(X[0], p=1), ValueError, r"images must have shape \(B, C, H, W\)"),
        (lambda: fastkd.total_variation(X[:0], p=1), ValueError, "images must not be empty"),
        (lambda: fastkd.total_variation(X.long(), p=1), TypeError, "images must be float64"),
        (lambda: fastkd.total_variation(X[..., :1], p=1), ValueError, "at least 2 rows and 2 columns"),
        (lambda: fastkd.image_prior(X[:, :, :1], tv_l2=1.0), ValueError, "at least 2 rows and 2 columns"),
        (lambda: fastkd.image_prior(None), TypeError, "images must be a tensor"),
        (lambda: fastkd.image_prior(X, l2=-1.0), ValueError, "l2 must be a finite number >= 0"),
        (lambda: fastkd.image_prior(X, tv_l1=torch.ones(())), TypeError, "tv_l1 must be a Python number"),
        (lambda: fastkd.image_prior(X, tv_l1=1.0, backend="gpu"), ValueError, "backend must be one of"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("weights", [(0.7, 0.3, 0.2), (1.0, 0.0, 0.5), (0.0, 2.0, 0.0), (0.0, 0.0, 1.0)], ids=str)
@pytest.mark.parametrize("backend", backends("prior_loss"))
def test_loss_of_what_the_images_were_reduced_to(backend, weights, per_image):
    """Its sum and slopes, from views, with norms of 0 and below the least normal number. A term of weight 0 does not
    count, even if it is infinite."""
    tv_l1, tv_l2 = (x.to(DEVICE) for x in torch.tensor([[3.0, 1.0, 4.0, 1.5], [2.0, 6.0, 5.0, 0.5]]))
    norms = torch.tensor([3.0, 0.0, 0.0, 0.0, 4.0, 0.0, 1e-40, 0.0], device=DEVICE)[::2]
    for of_term, term in zip(weights, (tv_l1, tv_l2), strict=False):
        if of_term == 0:
            term[2] = float("inf")
    loss, slopes = call(backend, "prior_loss", tv_l1, tv_l2, norms, *weights, per_image)
    of_norms = (3.0 + 4.0) / 4 if per_image else 5.0
    of_each = [0.25] * 4 if per_image else [0.6, 0.0, 0.8, 0.0]
    terms = zip(weights, (9.5, 13.5, of_norms), strict=True)
    assert loss.shape == () and loss.item() == pytest.approx(sum(w * term for w, term in terms), rel=1e-6)
    expected = [weights[0]] * 4 + [weights[1]] * 4 + [weights[2] * x for x in of_each]
    assert slopes.tolist() == pytest.approx(expected, rel=1e-6, abs=0)


@pytest.mark.parametrize("backend", backends("prior_loss"))
def test_no_term_of_infinite_norms(backend):
    terms = torch.ones(4, device=DEVICE)
    norms = torch.tensor([1.0, float("inf")], device=DEVICE)
    for of_norms, is_nan in ((norms, True), (norms[:1], False)):
        loss, slopes = call(backend, "prior_loss", terms, terms, of_norms, 0.0, 0.0, 0.0, True)
        assert loss.isnan() == is_nan and not slopes.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", golden.cases("image_prior"), ids=golden.name)
@available
def test_golden(backend, case, dtype):
    skip_unless_runs(backend, dtype)
    data = golden.load(case)
    parts = {
        "tv_l1": lambda x: fastkd.total_variation(x, p=1, backend=backend),
        "tv_l2": lambda x: fastkd.total_variation(x, p=2, backend=backend),
        "l2_per_image": lambda x: fastkd.image_prior(x, l2=1.0, backend=backend),
        "l2_batch": lambda x: fastkd.image_prior(x, l2=1.0, l2_per_image=False, backend=backend),
    }
    images = data["in.images"].to(DEVICE, dtype)
    for part, f in (
        parts.items() if not INTERPRETED else ()
    ):  # the sum of all suffices where a program takes milliseconds
        loss, dx = (x.double().cpu() for x in loss_and_gradients(f, (images,)))
        assert relative_difference(loss, data[f"loss.{part}"]) <= golden.tolerance(case, dtype, "loss")
        assert relative_difference(dx, data[f"grad.{part}.images"]) <= golden.tolerance(case, dtype, "grad")
    loss, dx = loss_and_gradients(
        lambda x: fastkd.image_prior(x, tv_l1=1.0, tv_l2=1.0, l2=1.0, backend=backend) + parts["l2_batch"](x), (images,)
    )
    assert relative_difference(loss.double().cpu(), data["loss"]) <= golden.tolerance(case, dtype, "loss")
    assert relative_difference(dx.double().cpu(), data["grad.images"]) <= golden.tolerance(case, dtype, "grad")
