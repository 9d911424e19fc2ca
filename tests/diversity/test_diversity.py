"""Intra-divergence: our formulation of DearKD's diversity term."""

import pytest
import torch

import fastkd
from fastkd import reference
from fastkd.losses import IntraDivergenceLoss
from fastkd.testing import DEVICE, assert_matches_oracle, loss_and_gradients

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MARGINS = {"spread_margin": 1.3, "boundary_margin": 0.2}


def on(module, labels, **margins):
    return lambda x: module.intra_divergence_loss(x, labels, **(MARGINS | margins))


def batch(B=24, D=33, classes=5, spread=1.0):
    """Features around a centre per class; class 4 has a single image, the last one."""
    labels = torch.arange(B) % (classes - 1)
    labels[-1] = classes - 1
    return torch.randn(classes, D)[labels] + spread * torch.randn(B, D), labels


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
def test_oracle(dtype, layout):
    x, labels = batch()
    x = x.to(dtype)
    x = x.T.contiguous().T if layout == "columns" else x
    oracle = loss_and_gradients(on(reference, labels), (x.double(),))
    eager = loss_and_gradients(on(reference, labels), (x,))
    actual = loss_and_gradients(on(fastkd, labels), (x,))
    for what, a, e, o in zip(("loss", "dfeatures"), actual, eager, oracle, strict=True):
        assert_matches_oracle(a, e, o, x.numel(), what)


@pytest.mark.parametrize("margins", [{"spread_margin": 0.5}, {"boundary_margin": 0.0}, {"boundary_margin": 2.0}])
def test_margins(margins):
    x, labels = batch()
    x = x.double()
    torch.testing.assert_close(
        loss_and_gradients(on(fastkd, labels, **margins), (x,)),
        loss_and_gradients(on(reference, labels, **margins), (x,)),
    )


def test_gradcheck_of_the_spread():
    """The hinge holds its neighbours still, so only the first part is a derivative of the value."""
    x, labels = batch(B=9, D=4, classes=3)
    x = x.double().requires_grad_()
    labels[:] = labels[0]
    assert torch.autograd.gradcheck(on(fastkd, labels), (x,))


@pytest.mark.parametrize("B", [12, 40])  # from 26 on PyTorch's own distances are of that form
def test_near_duplicates_keep_their_distance(B):
    """Images of a class 1e-5 apart: 2 - 2 <z, z'> in float32 would see them as one."""
    x, labels = batch(B=B, classes=3)
    x = torch.nn.functional.normalize(torch.randn(2, 33))[labels % 2] + 1e-5 * torch.randn(B, 33)
    actual = loss_and_gradients(on(fastkd, labels, boundary_margin=0.0), (x,))
    oracle = loss_and_gradients(on(reference, labels, boundary_margin=0.0), (x.double(),))
    torch.testing.assert_close(actual[0].double(), oracle[0], rtol=1e-2, atol=0)
    assert (actual[1].double() - oracle[1]).norm() < 0.05 * oracle[1].norm()


def test_exact_duplicates_get_no_gradient_from_each_other():
    x = torch.randn(1, 8).expand(4, 8).contiguous()
    loss, dx = loss_and_gradients(on(fastkd, torch.zeros(4, dtype=torch.long)), (x,))
    assert loss == 0
    assert not dx.any()


def test_batches_without_a_pair_or_another_class():
    x = torch.randn(5, 8)
    loss, dx = loss_and_gradients(on(fastkd, torch.arange(5)), (x,))
    assert loss == 0
    assert not dx.any()
    loss, dx = loss_and_gradients(on(fastkd, torch.zeros(1, dtype=torch.long)), (x[:1],))
    assert loss == 0
    assert not dx.any()
    one_class = torch.zeros(5, dtype=torch.long)
    torch.testing.assert_close(
        loss_and_gradients(on(fastkd, one_class), (x,)), loss_and_gradients(on(reference, one_class), (x,))
    )


def test_zero_features():
    x, labels = batch()
    x[0] = 0
    loss, dx = loss_and_gradients(on(fastkd, labels), (x,))
    expected = loss_and_gradients(on(reference, labels), (x,))
    torch.testing.assert_close((loss, dx), expected)
    assert not dx[0].any()


def test_nan_goes_through():
    x, labels = batch()
    x[1, 2] = torch.nan
    assert on(fastkd, labels)(x).isnan()


def test_properties():
    x, labels = batch()
    loss = on(fastkd, labels)(x)
    order = torch.randperm(len(x))
    rotation = torch.linalg.qr(torch.randn(33, 33))[0]
    torch.testing.assert_close(on(fastkd, labels[order])(x[order]), loss)
    torch.testing.assert_close(on(fastkd, labels)(x @ rotation), loss)
    torch.testing.assert_close(on(fastkd, labels.to(torch.int32) + 7)(3 * x), loss)
    assert torch.equal(IntraDivergenceLoss(**MARGINS)(x, labels), loss)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_gpu_without_synchronising():
    x, labels = batch()
    expected = loss_and_gradients(on(fastkd, labels), (x,))
    x, labels = x.cuda(), labels.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = loss_and_gradients(on(fastkd, labels), (x,))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close([y.cpu() for y in actual], list(expected))


X, Y = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: on(fastkd, Y)(X[0]), ValueError, r"features must have shape \(B, D\)"),
        (lambda: on(fastkd, Y)(X.long()), TypeError, "features must be float64"),
        (lambda: on(fastkd, Y)(X[:, :0]), ValueError, "features must not be empty"),
        (lambda: on(fastkd, Y[:3])(X), ValueError, r"labels must have shape \(4,\), got \(3,\)"),
        (lambda: on(fastkd, Y.float())(X), TypeError, "labels must be an integer tensor, got torch.float32"),
        (lambda: on(fastkd, [0, 0, 1, 1])(X), TypeError, "labels must be an integer tensor, got list"),
        (lambda: on(fastkd, Y, spread_margin=-1.0)(X), ValueError, "spread_margin must be a finite number >= 0"),
        (lambda: on(fastkd, Y, boundary_margin=float("nan"))(X), ValueError, "boundary_margin must be a finite"),
        (lambda: on(fastkd, Y, backend="native")(X), RuntimeError, "no kernel of its own"),
        (lambda: IntraDivergenceLoss(spread_margin=-1, boundary_margin=0), ValueError, "spread_margin"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_ambient_backend_does_not_matter():
    with fastkd.backend("triton"):
        assert on(fastkd, Y)(X).isfinite()
