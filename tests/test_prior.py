"""Image priors: total variation in four directions and the image norm."""

import golden
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd import reference
from fastkd.eager import prior
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

# bfloat16 is left to GPUs by the interpreted kernels: the interpreter truncates float32 to it.
FLOATS = [torch.float64, torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
# (2, 2) the least with a diagonal; odd and unequal sides; more channels than images; one past a power of two.
SHAPES = [(1, 1, 2, 2), (3, 3, 8, 8), (2, 3, 5, 9), (1, 7, 33, 17), (5, 3, 65, 129)]
if INTERPRETED:  # a program takes milliseconds there
    SHAPES = [(1, 1, 2, 2), (2, 1, 5, 9), (1, 1, 6, 260)]
ALL = {"tv_l1": 0.7, "tv_l2": 0.3, "l2": 0.2}
OPTIONS = [ALL, ALL | {"l2_per_image": False}, {"tv_l1": 1.0}, {"tv_l2": 1.0}, {"l2": 1.0}]
available = pytest.mark.parametrize("backend", backends("prior_fwd"))
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])


def skip_unless_runs(backend, dtype):
    if backend not in backends("prior_fwd", dtype):
        pytest.skip(f"{backend} does not take {dtype}")


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced", "channels"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS[:2], ids=["per image", "per batch"])
@dtypes
@available
def test_oracle(backend, dtype, options, shape, layout):
    skip_unless_runs(backend, dtype)
    x = strided(torch.randn(shape, device=DEVICE).to(dtype), layout)
    oracle = loss_and_gradients(lambda x: reference.image_prior(x, **options), (x.double(),))
    eager = loss_and_gradients(lambda x: reference.image_prior(x, **options), (x,))
    with poisoned_allocations():
        actual = loss_and_gradients(lambda x: fastkd.image_prior(x, backend=backend, **options), (x,))
    for what, a, e, o in zip(("loss", "dimages"), actual, eager, oracle, strict=True):
        assert_matches_oracle(a, e, o, x.numel(), what)


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
    for part, f in parts.items():
        loss, dx = (x.double().cpu() for x in loss_and_gradients(f, (images,)))
        assert relative_difference(loss, data[f"loss.{part}"]) <= golden.tolerance(case, dtype, "loss")
        assert relative_difference(dx, data[f"grad.{part}.images"]) <= golden.tolerance(case, dtype, "grad")
    loss, dx = loss_and_gradients(
        lambda x: fastkd.image_prior(x, tv_l1=1.0, tv_l2=1.0, l2=1.0, backend=backend) + parts["l2_batch"](x), (images,)
    )
    assert relative_difference(loss.double().cpu(), data["loss"]) <= golden.tolerance(case, dtype, "loss")
    assert relative_difference(dx.double().cpu(), data["grad.images"]) <= golden.tolerance(case, dtype, "grad")
