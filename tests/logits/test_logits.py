"""Losses of logits: soft targets, DKD, NKD and the competition of ADI."""

import inspect

import pytest
import torch
import torch.nn.functional as F

import fastkd
from fastkd import reference
from fastkd.losses import DKDLoss, NKDLoss, SoftTargetLoss
from fastkd.ops._dispatch import INTERPRETED, call
from fastkd.testing import (
    DEVICE,
    assert_matches_oracle,
    backends,
    loss_and_gradients,
    relative_difference,
)
from tests._support import golden
from tests._support.floats import dtypes
from tests._support.splits import THREADS, around, lowered, threads

# Two classes; less than a vector; one past a power of two; ImageNet's; more than a kernel takes at once.
SHAPES = [(1, 2), (3, 10), (5, 257), (2, 1000), (2, 4099)]
LOSSES = {  # name -> (options, takes a label, differentiates the teacher)
    "soft_target_loss": ({"temperature": 2.0}, False, False),
    "dkd_loss": ({"alpha": 1.0, "beta": 4.0, "temperature": 2.0}, True, False),
    "nkd_loss": ({"gamma": 1.5, "temperature": 3.0}, True, False),
    "competition_loss": ({}, False, True),
}
losses = pytest.mark.parametrize("name", LOSSES)
DIVERGENCES = ["soft_target_loss", "dkd_loss", "nkd_loss"]
divergences = pytest.mark.parametrize(
    ("name", "backend"), [(name, backend) for name in DIVERGENCES for backend in backends("softmax_kl")]
)
everywhere = pytest.mark.parametrize(
    ("name", "backend"), [(name, backend) for name in LOSSES for backend in backends("softmax_kl")]
)


def skip_unless_runs(backend, *dtypes):
    if any(backend not in backends("softmax_kl", dtype) for dtype in dtypes):
        pytest.skip(f"{backend} does not take {dtypes}")


def bound(module, name, label, **overrides):
    """The loss as a function of (student, teacher)."""
    options, labelled, _ = LOSSES[name]
    args = (label,) if labelled else ()
    return lambda s, t: getattr(module, name)(s, t, *args, **(options | overrides))


def gradients(module, name, s, t, label, incoming=1.0, **overrides):
    f = bound(module, name, label, **overrides)
    if LOSSES[name][2]:
        return loss_and_gradients(f, (s, t), incoming)
    return loss_and_gradients(lambda s: f(s, t), (s,), incoming)


def logits(shape, dtype=torch.float32, scale=3.0):
    B, C = shape
    s, t = (scale * torch.randn((2, *shape), device=DEVICE)).to(dtype).unbind()
    return s, t, torch.randint(C, (B,), device=DEVICE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@dtypes
@everywhere
def test_oracle(name, backend, dtype, shape):
    skip_unless_runs(backend, dtype)
    s, t, label = logits(shape, dtype)
    oracle = gradients(reference, name, s.double(), t.double(), label)
    eager = gradients(reference, name, s, t, label)
    dense = gradients(fastkd, name, s, t, label, backend=backend)
    strided = gradients(fastkd, name, s.T.contiguous().T, t.repeat_interleave(2, 1)[:, ::2], label, backend=backend)
    for actual in (dense, strided):
        for what, a, e, o in zip(("loss", "dstudent", "dteacher"), actual, eager, oracle, strict=False):
            assert_matches_oracle(a, e, o, s.numel(), f"{name} {what}")


def check(name, backend, s, t, label, **options):
    oracle = gradients(reference, name, s.double(), t.double(), label, **options)
    eager = gradients(reference, name, s, t, label, **options)
    actual = gradients(fastkd, name, s, t, label, backend=backend, **options)
    for what, a, e, o in zip(("loss", "dstudent", "dteacher")[: len(oracle)], actual, eager, oracle, strict=True):
        assert_matches_oracle(a, e, o, s.numel(), f"{name} {what}")


@pytest.mark.parametrize("temperature", [0.5, 4.0])
@divergences
def test_several_blocks_of_rows_or_classes(name, backend, temperature, monkeypatch):
    """Each block with a larger maximum than those before it, or a smaller one."""
    monkeypatch.setattr("fastkd.eager.logits.CHUNK", 40)  # two rows, and a tail of one
    if backend == "triton":
        from fastkd_kernels import logits as kernels

        monkeypatch.setattr(kernels, "BLOCKS", ((8, 4), (16, 4)))
    for classes in (7, 8, 9, 16, 17, 20, 50) if not INTERPRETED else (8, 17, 50):
        s, t, label = logits((5, classes))
        rising = torch.linspace(0, 6, classes, device=DEVICE)
        check(name, backend, s + rising, t - rising, label, temperature=temperature)


@pytest.mark.parametrize("count", THREADS)
@losses
def test_rows_of_several_threads(name, count):
    """Each in memory of its own; the same bits on any number of threads."""
    with lowered(logits_grain=64):
        for classes in (31, 64, 65, 1000):
            s, t, label = logits((16, classes))
            with threads(1):
                expected = gradients(fastkd, name, s, t, label)
            with threads(count):
                check(name, "auto", s, t, label)
                for _ in range(5):
                    assert all(map(torch.equal, gradients(fastkd, name, s, t, label), expected))


@pytest.mark.parametrize("size", around(4))
def test_sizes_around_the_grain(size):
    with lowered(logits_grain=4), threads(3):
        for name in LOSSES:
            check(name, "auto", *logits((5, size + 1)))


@pytest.mark.parametrize("name", ["dkd_loss", "nkd_loss"])
@pytest.mark.parametrize("backend", backends("softmax_kl"))
def test_labels_that_are_not_adjacent(backend, name):
    s, t, _ = logits((4, 9))
    both = torch.tensor([[1, 8], [0, 7], [5, 6], [3, 2]], device=DEVICE)
    for label in (both[:, 0], both[:, 1]):
        check(name, backend, s, t, label)


@divergences
def test_gradients_of_a_row_cancel(name, backend):
    """Also near a match, where the rounding of a sum of exponentials is as large as they are."""
    s, _, label = logits((8, 300))
    t = s + 1e-5 * torch.randn_like(s)
    _, ds = gradients(fastkd, name, s, t, label, backend=backend)
    eps = torch.finfo(torch.float32).eps
    assert (ds.double().sum(-1).abs() <= eps * ds.double().abs().sum(-1)).all()


@pytest.mark.parametrize("backend", backends("softmax_kl"))
@pytest.mark.parametrize("apart", [0.3, 0.36, 0.41, 0.45])
def test_two_classes_half_a_unit_apart(backend, apart):
    """log(p/q) is about 1/2 for one of them, where e^x - 1 changes its form: no other class hides an error there."""
    t = torch.tensor([[apart, -apart]], device=DEVICE)
    for sign in (1, -1):
        check("soft_target_loss", backend, torch.zeros_like(t), sign * t, None, temperature=1.0)


@pytest.mark.parametrize("backend", backends("softmax_kl"))
@pytest.mark.parametrize("leads", [(40.0, 42.0), (60.0, 39.0), (12.0, 80.0)], ids=str)
def test_a_target_that_is_all_but_certain(backend, leads):
    """What the others have is then all that counts: 1 - q is lost even in float64 unless it is formed by itself."""
    s, t = torch.zeros(2, 3, 2, device=DEVICE).unbind()
    s[:, 0], t[:, 0] = leads
    loss = fastkd.dkd_loss(s, t, 0, alpha=1.0, beta=0.0, temperature=1.0, backend=backend)
    p, q = (torch.tensor(lead, dtype=torch.float64) for lead in leads)
    expected = q.sigmoid() * (F.logsigmoid(q) - F.logsigmoid(p)) + (-q).sigmoid() * (
        F.logsigmoid(-q) - F.logsigmoid(-p)
    )
    eager = expected.float()
    assert_matches_oracle(loss.cpu(), eager, expected, 1, "loss")


@pytest.mark.parametrize("backend", backends("softmax_kl"))
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
def test_soft_target_reductions(backend, reduction):
    s, t, _ = logits((3, 10))
    weights = torch.tensor([1.0, -2.0, 0.5], device=DEVICE) if reduction == "none" else 1.0

    def weighted(f, **options):
        return loss_and_gradients(
            lambda s: (weights * f(s, t, temperature=4.0, reduction=reduction, **options)).sum(), (s,)
        )

    expected, actual = weighted(reference.soft_target_loss), weighted(fastkd.soft_target_loss, backend=backend)
    torch.testing.assert_close(actual, expected)
    rows = fastkd.soft_target_loss(s, t, temperature=4.0, reduction=reduction, backend=backend)
    assert rows.shape == ((3,) if reduction == "none" else ())


@everywhere
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(name, backend, reduction):
    """Of values of the images, each with a gradient of its own; the whole loss is what becomes of them."""
    if (name, reduction) == ("competition_loss", "sum"):
        with pytest.raises(ValueError, match="reduction must be one of 'mean', 'none', got 'sum'"):
            fastkd.competition_loss(S, S, reduction="sum")
        return
    s, t, label = logits((5, 10), scale=1.0)
    weights = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], device=DEVICE) if reduction == "none" else 1.0

    def weighted(module, s, t, **options):
        args = (label,) if LOSSES[name][1] else ()
        options |= LOSSES[name][0] | {"reduction": reduction}
        return loss_and_gradients(lambda s: (weights * getattr(module, name)(s, t, *args, **options)).sum(), (s,))

    oracle, eager = weighted(reference, s.double(), t.double()), weighted(reference, s, t)
    actual = weighted(fastkd, s, t, backend=backend)
    for what, a, e, o in zip(("loss", "dstudent"), actual, eager, oracle, strict=True):
        assert_matches_oracle(a, e, o, s.numel(), f"{name} {what}")

    rows = bound(fastkd, name, label, reduction="none", backend=backend)(s, t)
    whole = bound(fastkd, name, label, reduction=reduction, backend=backend)(s, t)
    assert rows.shape == (5,) and whole.shape == (rows if reduction == "none" else rows[0]).shape
    reduced = {"mean": rows.mean(), "sum": rows.sum(), "none": rows}[reduction]
    if name == "soft_target_loss" and reduction == "mean":
        reduced = reduced / 10  # classes, as DeiT's code divides
    assert_matches_oracle(whole, reduced, reduced.double(), 5, name)


@pytest.mark.parametrize("module", [SoftTargetLoss, DKDLoss, NKDLoss], ids=lambda module: module.__name__)
def test_functions_have_the_defaults_of_their_modules(module):
    function = {SoftTargetLoss: "soft_target_loss", DKDLoss: "dkd_loss", NKDLoss: "nkd_loss"}[module]
    options = inspect.signature(module).parameters
    for of in (fastkd, reference):
        defaults = inspect.signature(getattr(of, function)).parameters
        assert {name: defaults[name].default for name in options} == {name: p.default for name, p in options.items()}


@everywhere
@pytest.mark.parametrize("teacher", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_mixed_dtypes(name, backend, teacher):
    skip_unless_runs(backend, teacher)
    s, t, label = logits((3, 10))
    s, t = s.half(), t.to(teacher)
    actual = gradients(fastkd, name, s, t, label, backend=backend)
    torch.testing.assert_close(actual[0], gradients(reference, name, s.to(teacher), t, label)[0])
    assert actual[0].dtype == teacher
    assert actual[1].dtype == torch.float16


@everywhere
def test_gradcheck(name, backend):
    skip_unless_runs(backend, torch.float64)
    s, t, label = logits((4, 7), torch.float64, scale=1.0)
    s.requires_grad_()
    t.requires_grad_(LOSSES[name][2])
    assert torch.autograd.gradcheck(bound(fastkd, name, label, backend=backend), (s, t))


@divergences
def test_near_convergence(name, backend):
    """float32 keeps digits that the textbook form loses: logits 1e-3 apart."""
    s, _, label = logits((16, 100))
    t = s + 1e-3 * torch.randn_like(s)
    loss, ds = gradients(fastkd, name, s, t, label, backend=backend)
    oracle = gradients(reference, name, s.double(), t.double(), label)
    assert relative_difference(loss, oracle[0]) < 5e-5
    assert relative_difference(ds, oracle[1]) < 5e-4


@divergences
@pytest.mark.parametrize("offsets", [(1e4, 0.0), (0.0, 1e4), (1e4, 2e4), (-1e4, 1e4), (300.0, -7.0)], ids=str)
def test_rows_far_apart(name, backend, offsets):
    """Softmax does not see where a row lies: all digits that the logits have there count, near a match as well."""
    s, t, label = logits((8, 50))
    s, t = s + offsets[0], t + offsets[1]
    oracle, eager = (gradients(reference, name, s.to(d), t.to(d), label) for d in (torch.float64, s.dtype))
    actual = gradients(fastkd, name, s, t, label, backend=backend)
    for what, a, e, o in zip(("loss", "dstudent"), actual, eager, oracle, strict=True):
        assert_matches_oracle(a, e, o, s.numel(), f"{name} {what}")
    t = s - offsets[0] + offsets[1] + 1e-2 * torch.randn_like(s)
    loss, ds = gradients(fastkd, name, s, t, label, temperature=3.0, backend=backend)
    oracle = gradients(reference, name, s.double(), t.double(), label, temperature=3.0)
    assert relative_difference(loss, oracle[0]) < 5e-5
    assert relative_difference(ds, oracle[1]) < 5e-4


@pytest.mark.parametrize("backend", backends("softmax_kl"))
def test_nkd_rounds_the_sum_of_its_gradients_once(backend: str) -> None:
    student, teacher = (torch.randn(7, 5, device=DEVICE).bfloat16() for _ in range(2))
    label = torch.arange(7, device=DEVICE) % 5
    (gradient,), (wide,) = (
        loss_and_gradients(lambda s: fastkd.nkd_loss(s, teacher, label, temperature=4.0, backend=backend), [s])[1:]
        for s in (student, student.float())
    )
    assert torch.equal(gradient, wide.bfloat16())


@pytest.mark.parametrize("backend", backends("softmax_kl"))
@pytest.mark.parametrize("name", ["soft_target_loss", "dkd_loss"])  # nkd_loss is a cross-entropy
def test_match_is_zero(name, backend):
    s, _, label = logits((5, 30))
    loss, ds = gradients(fastkd, name, s, s.clone(), label, backend=backend)
    assert loss == 0
    assert (ds == 0).all()


@pytest.mark.parametrize("scale", [1e3, 1e4])
@everywhere
def test_extreme_logits(name, backend, scale):
    s, t, label = logits((6, 12), scale=scale)
    actual = gradients(fastkd, name, s, t, label, temperature=0.5, backend=backend)
    oracle = gradients(reference, name, s.double(), t.double(), label, temperature=0.5)
    for a, o in zip(actual, oracle, strict=True):
        assert relative_difference(a, o) < 1e-5


@pytest.mark.parametrize("backend", backends("softmax_kl"))
def test_dkd_beyond_a_lead_of_1000(backend):
    """The code's target logit, lowered by 1000, would still win here."""
    s, t, _ = logits((4, 6))
    s[:, 2] += 5000
    t[:, 2] += 3000
    loss, ds = gradients(fastkd, "dkd_loss", s, t, 2, backend=backend)
    oracle = gradients(reference, "dkd_loss", s.double(), t.double(), 2)
    assert relative_difference(loss, oracle[0]) < 1e-5
    assert relative_difference(ds, oracle[1]) < 1e-5


@pytest.mark.parametrize(("name", "backend"), [(n, b) for n in DIVERGENCES for b in backends("softmax_kl")])
def test_classes_switched_off(name, backend):
    """A class of logit -inf on both sides is as good as absent; on the student's alone it costs infinitely much."""
    s, t, label = logits((4, 8))
    off_s, off_t = (torch.cat([x, x.new_full((4, 1), -torch.inf)], 1) for x in (s, t))
    loss, ds = gradients(fastkd, name, s, t, label, backend=backend)
    off_loss, off_ds = gradients(fastkd, name, off_s, off_t, label, backend=backend)
    torch.testing.assert_close(off_loss, loss)
    torch.testing.assert_close(off_ds, torch.nn.functional.pad(ds, (0, 1)))
    assert bound(fastkd, name, label, backend=backend)(off_s, torch.nn.functional.pad(t, (0, 1))) == torch.inf


@pytest.mark.parametrize("backend", backends("competition"))
def test_competition_near_a_match(backend):
    """J is a small difference of logarithms, and so is the gradient, where no probability is clamped: what is lost is
    what the difference of the rounded probabilities has lost. The textbook form has no digit left at 1e-3."""
    eps = torch.finfo(torch.float32).eps
    s = torch.randn(4, 5, device=DEVICE)
    match, gradient = loss_and_gradients(
        lambda s: fastkd.competition_loss(s, s.detach(), reduction="none", backend=backend).sum(), (s,)
    )
    assert match == 4 and not gradient.any()
    for apart in (1e-2, 1e-3):
        t = s + apart * torch.randn_like(s)
        _, ds = loss_and_gradients(lambda s, t=t: fastkd.competition_loss(s, t, backend=backend), (s,))
        _, oracle = loss_and_gradients(lambda s, t=t: reference.competition_loss(s, t.double()), (s.double(),))
        assert relative_difference(ds.double(), oracle) < 4 * eps / apart


@everywhere
def test_nan_goes_through(name, backend):
    s, t, label = logits((3, 5))
    s[1, 2] = torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32)  # its low bits are set
    loss, ds, *_ = gradients(fastkd, name, s, t, label, backend=backend)
    assert loss.isnan()
    assert ds[1].isnan().any()


@pytest.mark.parametrize("nobody", ["student", "teacher", "both"])
@pytest.mark.parametrize("name", ["dkd_loss", "nkd_loss"])
@pytest.mark.parametrize("backend", backends("softmax_kl"))
def test_nan_is_no_class_switched_off(backend, name, nobody):
    """All other classes are NaN, or some and the rest switched off, where no other term is NaN for it."""
    nan, never = torch.nan, -torch.inf
    options = {"alpha": 0.0} if name == "dkd_loss" else {}
    other = [never if nobody == "student" else 0.3, 0.4, -0.7]
    for row in ([0.3, nan, nan], [0.3, nan, never]):
        both = [row if nobody in (who, "both") else other for who in ("student", "teacher")]
        s, t = torch.tensor(both, device=DEVICE)[:, None]
        loss, ds = gradients(fastkd, name, s, t, 0, backend=backend, **options)
        assert loss.isnan() and ds.isnan().any()


@pytest.mark.skipif("native" not in backends("nkd"), reason="no compiled extension")
@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_operators_of_no_logits(shape):
    """The public functions refuse them; an operator called by its name must not end the process."""
    x, label = torch.empty(shape), torch.zeros(shape[0], dtype=torch.int64)
    rows, ds = call("native", "nkd", x, x, label, 1.0, 1.0, True)
    assert not rows.any() and len(rows) == len(x) and ds.shape == shape
    rows, ds, dt = call("native", "competition", x, x, 3.0, [True, True])
    assert not rows.any() and len(rows) == len(x) and ds.shape == dt.shape == shape


@pytest.mark.parametrize("backend", backends("nkd"))
def test_nan_at_a_target_without_other_classes(backend):
    s, t = torch.tensor([[[torch.nan, -torch.inf, -torch.inf]], [[0.3, 0.4, -0.7]]], device=DEVICE)
    loss, ds = gradients(fastkd, "nkd_loss", s, t, 0, backend=backend)
    assert loss.isnan() and ds.isnan().all()


@pytest.mark.parametrize("backend", backends("softmax_kl"))
def test_rows_are_weighted_before_they_are_added_up(backend):
    s, t = ([[1e32, 0.0, 0.0]] * 4, [[0.0, 1e32, 0.0]] * 4)
    s, t = torch.tensor(s, device=DEVICE), torch.tensor(t, device=DEVICE)
    loss = fastkd.dkd_loss(s, t, 2, temperature=1e-6, alpha=0.0, beta=1.0, backend=backend)
    assert loss.item() == pytest.approx(1e26, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@losses
def test_gpu_without_synchronising(name):
    s, t, label = logits((8, 33))
    expected = gradients(fastkd, name, s.cpu(), t.cpu(), label.cpu())
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = gradients(fastkd, name, s, t, label)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close([x.cpu() for x in actual], list(expected))


@pytest.mark.parametrize(("name", "changes"), [("soft_target_loss", 3), ("competition_loss", 12)])
def test_temperature_may_change_under_compile(name, changes):
    """It is a symbol of the competition's graph; the others compile again, as often as PyTorch allows."""
    torch._dynamo.reset()

    def f(s, t, temperature):
        return getattr(fastkd, name)(s, t, temperature=temperature)

    s, t, _ = logits((4, 9))
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for temperature in (1.0 + 0.5 * i for i in range(changes)):
        expected, actual = (loss_and_gradients(lambda s, g=g, T=temperature: g(s, t, T), (s,)) for g in (f, compiled))
        torch.testing.assert_close(actual, expected)


def test_labels():
    s, t, label = logits((4, 9))
    options = {"gamma": 1.0, "temperature": 1.0}
    expected = fastkd.nkd_loss(s, t, label, **options)
    mixed = 0.7 * torch.nn.functional.one_hot(label, 9) + 0.3 / 9
    assert fastkd.nkd_loss(s, t, mixed, **options) == expected
    assert fastkd.nkd_loss(s, t, label.to(torch.uint8), **options) == expected
    assert fastkd.nkd_loss(s, t, 3, **options) == fastkd.nkd_loss(s, t, torch.full((4,), 3), **options)


S = torch.randn(3, 4)
Y = torch.tensor([0, 1, 2])
DKD = LOSSES["dkd_loss"][0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastkd.soft_target_loss([1.0], S, temperature=1.0), TypeError, "student must be a tensor"),
        (lambda: fastkd.soft_target_loss(S, S.long(), temperature=1.0), TypeError, "teacher must be float64"),
        (lambda: fastkd.soft_target_loss(S[0], S, temperature=1.0), ValueError, r"student must have shape \(B, C\)"),
        (lambda: fastkd.soft_target_loss(S, S[:, :3], temperature=1.0), ValueError, "same shape"),
        (lambda: fastkd.soft_target_loss(S[:0], S[:0], temperature=1.0), ValueError, "must not be empty"),
        (lambda: fastkd.soft_target_loss(S, S.to("meta"), temperature=1.0), ValueError, "device of student"),
        (lambda: fastkd.soft_target_loss(S, S, temperature=0.0), ValueError, "temperature must be a finite number > 0"),
        (lambda: fastkd.soft_target_loss(S, S, temperature="1"), TypeError, "temperature must be a Python number"),
        (lambda: fastkd.soft_target_loss(S, S, temperature=1.0, reduction="sums"), ValueError, "reduction must be"),
        (lambda: fastkd.soft_target_loss(S, S.clone().requires_grad_(), temperature=1.0), ValueError, "detach it"),
        (lambda: fastkd.soft_target_loss(S, S, temperature=1.0, backend="cuda"), ValueError, "backend must be"),
        (lambda: fastkd.dkd_loss(S, S, Y, reduction="batchmean"), ValueError, "reduction must be one of 'mean', 'sum'"),
        (lambda: fastkd.dkd_loss(S, S, 4, **DKD), ValueError, r"label must lie in \[0, C = 4\), got 4"),
        (lambda: fastkd.dkd_loss(S, S, -1, **DKD), ValueError, r"label must lie in \[0, C = 4\), got -1"),
        (lambda: fastkd.dkd_loss(S, S, True, **DKD), TypeError, "label must be an integer tensor or an int"),
        (lambda: fastkd.dkd_loss(S, S, Y + 2, **DKD), RuntimeError, r"label must lie in \[0, C = 4\)"),
        (lambda: fastkd.dkd_loss(S, S, Y - 1, **DKD), RuntimeError, r"label must lie in \[0, C = 4\)"),
        (lambda: fastkd.dkd_loss(S, S, Y.float(), **DKD), TypeError, "label must be an integer tensor"),
        (lambda: fastkd.dkd_loss(S, S, S.softmax(-1), **DKD), TypeError, "label must be an integer tensor"),
        (lambda: fastkd.dkd_loss(S, S, Y[:2], **DKD), ValueError, r"label must have shape \(3,\), got \(2,\)"),
        (lambda: fastkd.dkd_loss(S[:, :1], S[:, :1], Y, **DKD), ValueError, "at least 2 classes"),
        (lambda: fastkd.dkd_loss(S, S, Y, **DKD | {"beta": -1.0}), ValueError, "beta must be a finite number >= 0"),
        (lambda: fastkd.dkd_loss(S, S.clone().requires_grad_(), Y, **DKD), ValueError, "detach it"),
        (lambda: fastkd.nkd_loss(S, S, S[:2], gamma=1.0, temperature=1.0), TypeError, "label must be an integer"),
        (lambda: fastkd.nkd_loss(S, S, Y[:2], gamma=1.0, temperature=1.0), ValueError, r"\(3,\) or \(3, 4\)"),
        (lambda: fastkd.nkd_loss(S, S, Y, gamma=-1.0, temperature=1.0), ValueError, "gamma must be"),
        (lambda: fastkd.competition_loss(S, S[:2]), ValueError, "student_logits and teacher_logits must have the same"),
        (lambda: fastkd.competition_loss(S, S, temperature=-1), ValueError, "temperature must be"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def close(actual, expected, case, dtype, what):
    assert relative_difference(actual.double(), expected) <= golden.tolerance(case, dtype, what)


both = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@both
@pytest.mark.parametrize("case", golden.cases("kd"), ids=golden.name)
def test_golden_kd(case, dtype):
    data, T = golden.load(case), case["params"]["T"]
    s, t = data["in.logits_student"].to(dtype), data["in.logits_teacher"].to(dtype)
    reduction = "mean" if "(B*C)" in case["params"]["variant"] else "batchmean"

    def f(s):
        loss = fastkd.soft_target_loss(s, t, temperature=T, reduction=reduction)
        if "cross-entropy" not in case["params"]["variant"]:
            return loss
        log_q = (t / T).log_softmax(-1)
        return case["params"]["alpha"] * (loss - T**2 * (log_q.exp() * log_q).sum() / len(s))

    loss, ds = loss_and_gradients(f, (s,))
    close(loss, data["loss"], case, dtype, "loss")
    close(ds, data["grad.logits_student"], case, dtype, "grad")


@both
@pytest.mark.parametrize("case", golden.cases("dkd", "nkd"), ids=golden.name)
def test_golden_decoupled(case, dtype):
    data, params = golden.load(case), case["params"]
    s, t = data["in.logits_student"].to(dtype), data["in.logits_teacher"].to(dtype)
    if case["op"] == "dkd":

        def f(s, alpha=params["alpha"], beta=params["beta"]):
            return fastkd.dkd_loss(s, t, data["in.label"], alpha=alpha, beta=beta, temperature=params["T"])

        close(f(s, 1.0, 0.0), data["loss.tckd"], case, dtype, "loss")
        close(f(s, 0.0, 1.0), data["loss.nckd"], case, dtype, "loss")
    else:

        def f(s, gamma=params["gamma"]):
            return fastkd.nkd_loss(s, t, data["in.label"], gamma=gamma, temperature=params["temp"])

        close(f(s, 0.0), data["loss.target"], case, dtype, "loss")
    loss, ds = loss_and_gradients(f, (s,))
    close(loss, data["loss"], case, dtype, "loss")
    close(ds, data["grad.logits_student"], case, dtype, "grad")


@both
@pytest.mark.parametrize("case", golden.cases("adi_js"), ids=golden.name)
def test_golden_competition(case, dtype):
    data = golden.load(case)
    s, t = data["in.logits_student"].to(dtype), data["in.logits_teacher"].to(dtype)

    def f(s, t):
        s = s.detach() + 0 * s if case["params"]["detach_student"] else s
        return fastkd.competition_loss(s, t, temperature=case["params"]["T"])

    loss, ds, dt = loss_and_gradients(f, (s, t))
    close(loss, data["loss"], case, dtype, "loss")
    close(ds, data["grad.logits_student"], case, dtype, "grad")
    close(dt, data["grad.logits_teacher"], case, dtype, "grad")
    if "edge" in case:  # J > 1
        assert loss == 0
        assert not ds.any()
        assert not dt.any()
