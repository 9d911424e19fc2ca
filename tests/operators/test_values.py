"""Values at the ends of the number range: huge, subnormal, infinite and NaN tensors, sure networks, extreme options."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import reference
from fastkd.testing import DEVICE, assert_matches_oracle, backends, loss_and_gradients
from tests._support.calls import Call, runs

NEVER = -torch.inf
HUGE, TINY, NO_NUMBERS = (1e18, 1e30, 1e37), (0.0, 1e-20, 1e-38, 1e-42), (torch.inf, NEVER, torch.nan)


def each_run(triton: Callable[[Call], bool]) -> pytest.MarkDecorator:
    """Every call with every backend; the interpreter takes its time and runs some."""
    chosen = [(call, name) for call, name in runs() if name != "triton" or triton(call)]
    return pytest.mark.parametrize(("call", "backend"), chosen, ids=str)


def changed(call: Call, path: str, value: float, whole: bool) -> Call:
    """The call with a tensor of that size, or with one such element."""

    def change(x: Tensor) -> Tensor:
        if whole:
            return x * value if value not in NO_NUMBERS[:2] and value == value else torch.full_like(x, value)
        x = x.clone()
        x.view(-1)[3 % x.numel()] = value
        return x

    return call.with_leaf(path, change)


def run(call: Call, backend: str, incoming: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    with fastkd.backend(backend):
        return call.values_and_gradients(incoming)


def check_values(call: Call, backend: str, values: Iterable[tuple[float, bool]]) -> None:
    """No value raises; tiny ones, subnormal or not, leave all results finite; one that makes a result of the float64
    oracle infinite or NaN does so here."""
    for path, x in call.leaves():
        for value, whole in values if x.is_floating_point() else ():
            inputs = changed(call, path, value, whole)
            values_here, gradients = run(inputs, backend)
            if value in TINY:
                assert all(v.isfinite().all() for v in (*values_here, *gradients)), f"{path} {value}"
                continue
            oracle, _ = run(inputs.to(torch.float64), "auto" if call.op is None else "eager")
            for actual, expected in zip(values_here, oracle, strict=True):
                missed = actual.isfinite() & ~expected.to(actual.dtype).isfinite()
                assert not missed.any(), f"{path} {value}: {actual} where it is {expected}"


@each_run(triton=lambda call: call.option in ("p2", "l2", "kl", "batchmean"))
def test_tensors_of_any_size(call: Call, backend: str) -> None:
    check_values(call, backend, [(1e30, True), (1e-42, True), (torch.inf, False), (torch.nan, False)])


@pytest.mark.exhaustive
@each_run(triton=lambda _: True)
def test_tensors_of_every_size(call: Call, backend: str) -> None:
    check_values(call, backend, list(itertools.product((*HUGE, *TINY, *NO_NUMBERS), (True, False))))


@each_run(triton=lambda call: call.option == "p2" or "2x2" in call.option)
@pytest.mark.parametrize("incoming", [1.0, 65536.0])
def test_gradients_of_subnormal_students(call: Call, backend: str, incoming: float) -> None:
    """Scaled by a GradScaler as well: 65536 / ‖x‖ leaves float32 sooner than 1 / ‖x‖ does."""
    for size, name in itertools.product((1e-37, 1e-40, 1e-44), call.students):
        inputs = call
        for path, _ in call.leaves():
            if path.startswith(f"['{name}']"):
                inputs = inputs.with_leaf(path, lambda x, size=size: x * size)
        _, gradients = run(inputs, backend, incoming)
        assert all(g.isfinite().all() for g in gradients), f"{name} {size}"


def test_differences_of_features_that_are_subnormal() -> None:
    features = torch.tensor([[1.0, 1e-42], [1.0, 0.0], [0.0, 1.0], [1e-44, 1.0]], device=DEVICE)
    labels = torch.tensor([0, 0, 1, 1], device=DEVICE)
    _, gradient = loss_and_gradients(
        lambda x: fastkd.intra_divergence_loss(x, labels, spread_margin=2.0, boundary_margin=3.0), (features,), 65536.0
    )
    assert gradient.isfinite().all()


# A network that is sure of class 0 or 1, the others at -inf, so low that their probability underflows, or just low.
PLAIN = torch.tensor([0.3, -0.2, 0.5, 0.1])
ROWS = {"plain": PLAIN, "lead of 60": PLAIN + torch.tensor([60.0, 0, 0, 0]), "lag of 60": PLAIN - torch.eye(4)[0] * 60}
ROWS |= {
    f"sure of {sure}, others {low:g}": torch.full((4,), low).index_fill(0, torch.tensor([sure]), 1.0)
    for low in (NEVER, -1e4, -80.0)
    for sure in (0, 1)
}
ROWS |= {f"without {off}": PLAIN.index_fill(0, torch.tensor([off]), NEVER) for off in (0, 1)}
LOGITS = {"soft_target_loss": {}, "dkd_loss": {"beta": 4.0}, "nkd_loss": {}, "competition_loss": {}}


@pytest.mark.parametrize(("name", "backend"), [(n, b) for n in LOGITS for b in backends("softmax_kl")])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_networks_that_are_sure_of_a_class(name: str, backend: str, temperature: float) -> None:
    """Every pair of such rows, of student and teacher, with the sure class as label and another; each is an image, so
    that no infinite loss of one hides another's."""
    students, teachers = (
        torch.stack(x).to(DEVICE) for x in zip(*itertools.product(ROWS.values(), repeat=2), strict=True)
    )
    labels = (torch.zeros(len(students), dtype=torch.int64, device=DEVICE),) if name in ("dkd_loss", "nkd_loss") else ()
    options = LOGITS[name] | {"temperature": temperature, "reduction": "none"}

    def rows(module: Any, s: Tensor, t: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        s = s.clone().requires_grad_()
        losses = getattr(module, name)(s, t, *labels, **options, **more)
        return losses.detach(), torch.autograd.grad(losses, s, torch.ones_like(losses))[0]

    oracle = rows(reference, students.double(), teachers.double())
    actual = rows(fastkd, students, teachers, backend=backend)
    assert not any(x.isnan().any() for x in (*oracle, *actual))
    assert actual[1].isfinite().all()
    assert torch.equal(actual[0].isinf(), oracle[0].isinf())
    is_finite = ~oracle[0].isinf()
    eager = rows(reference, students, teachers)
    for what, a, e, o in zip(("loss", "dstudent"), actual, eager, oracle, strict=True):
        assert_matches_oracle(a[is_finite], e[is_finite], o[is_finite], 4, f"{name} {what}")
    assert_matches_oracle(actual[1], eager[1], oracle[1], 4, f"{name} dstudent")


@pytest.mark.parametrize("backend", backends("softmax_kl"))
def test_a_weight_of_0_leaves_an_infinite_term_out(backend: str) -> None:
    s, t = ROWS["without 1"][None].to(DEVICE), ROWS["plain"][None].to(DEVICE)
    for weights in ({"alpha": 1.0, "beta": 0.0}, {"alpha": 0.0, "beta": 1.0}):
        for label in (0, 1):
            loss, gradient = loss_and_gradients(
                lambda s, w=weights, y=label: fastkd.dkd_loss(s, t, y, **w, backend=backend), (s,)
            )
            # The class that the student lacks is the label, of which the first term speaks, or one of the others.
            assert loss.isinf() == (weights["alpha"] == label) and gradient.isfinite().all()
    sure = ROWS["sure of 1, others -inf"][None].to(DEVICE)
    assert fastkd.nkd_loss(sure, t, 1, gamma=0.0).isfinite() and fastkd.nkd_loss(sure, t, 1).isinf()


def test_a_prior_of_weight_0_may_be_infinite() -> None:
    images = torch.full((1, 1, 2, 2), 1e30, device=DEVICE)
    images[0, 0, 0, 0] = -1e30
    with fastkd.backend("eager"):
        loss, gradient = loss_and_gradients(lambda x: fastkd.image_prior(x, tv_l1=1.0), (images,))
    assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("network", ["student", "teacher"])
@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "js", "ce", "mse"])
@pytest.mark.parametrize("backend", backends("attention_fwd"))
def test_rows_without_a_key_in_one_network(backend: str, divergence: str, network: str) -> None:
    """The reference's gradient is finite there too, as what the tests compare with has to be."""
    torch.manual_seed(0)
    maps = [torch.randn(1, 2, 3, 4, device=DEVICE) for _ in range(4)]
    bias = torch.zeros(1, 1, 3, 3, device=DEVICE)
    bias[:, :, 1] = NEVER

    def results(module: Any, dtype: torch.dtype, **options: Any) -> tuple[Tensor, ...]:
        q, k, *teacher = (x.to(dtype) for x in maps)
        options |= {f"bias_{network}": bias.to(dtype), "divergence": divergence, "reduction": "none"}
        rows = [0, 2] if network == "student" else [0, 1, 2]  # a student without keys costs infinitely much
        return loss_and_gradients(
            lambda q, k: module.attention_loss(q, k, *teacher, **options)[:, :, rows].sum(), (q, k)
        )

    oracle, eager = results(reference, torch.float64), results(reference, torch.float32)
    actual = results(fastkd, torch.float32, backend=backend)
    for what, a, e, o in zip(("loss", "dq", "dk"), actual, eager, oracle, strict=True):
        assert_matches_oracle(a, e, o, 12, f"{divergence} {what}")
