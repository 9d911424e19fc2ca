"""Many layers and many tokens in one call: right, and in as many operator calls as few of them take."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import reference
from fastkd.losses import ManifoldLoss
from fastkd.testing import DEVICE, backends, loss_and_gradients, relative_difference
from tests._support.cases import OperatorCalls

NOT_INTERPRETED = [name for name in backends("relation_fwd") if name != "triton"]
BACKENDS = pytest.mark.parametrize("backend", NOT_INTERPRETED)


def operator_calls(function: Any) -> Counter[str]:
    with OperatorCalls() as recorder:
        function()
    return Counter(op._schema.name for op, _ in recorder.calls)


@BACKENDS
def test_a_hundred_thousand_tokens(backend: str) -> None:
    """Σ_ij (s_i·s_j - t_i·t_j)² = ‖S^T S‖² + ‖T^T T‖² - 2 ‖S^T T‖² of normalised rows, in float64."""
    student, teacher = torch.randn(392, 256, 24, device=DEVICE), torch.randn(392, 256, 40, device=DEVICE)
    S, T = (torch.nn.functional.normalize(x.double().flatten(0, 1), dim=1) for x in (student, teacher))
    expected = sum(sign * (a.T @ b).square().sum() for a, b, sign in ((S, S, 1), (T, T, 1), (S, T, -2))) / len(S) ** 2
    gradient = 4 / len(S) ** 2 * (S @ (S.T @ S) - T @ (T.T @ S))
    gradient = (gradient - S * (S * gradient).sum(1, keepdim=True)) / student.double().flatten(0, 1).norm(dim=1)[
        :, None
    ]
    loss, actual = loss_and_gradients(
        lambda s: fastkd.relation_loss(s, teacher, scope="batch", backend=backend), [student]
    )
    assert relative_difference(loss, expected) < 1e-5
    assert relative_difference(actual.flatten(0, 1), gradient) < 1e-4


def test_a_hundred_thousand_tokens_take_grams() -> None:
    """As 1,000 do, in the same operators: no map of 10^10 elements is formed, and no strip of one."""
    calls = []
    for images in (4, 392):
        x, y = torch.randn(2, images, 256, 8, device=DEVICE)
        calls.append(operator_calls(lambda x=x, y=y: fastkd.relation_loss(x, y, scope="batch")))
    assert calls[0] == calls[1]


@BACKENDS
def test_64_layers_are_one_call(backend: str) -> None:
    students = [torch.randn(2, 5, 8 + i % 3, device=DEVICE, requires_grad=True) for i in range(64)]
    teachers = [torch.randn(2, 5, 6 + i % 5, device=DEVICE) for i in range(64)]
    index = torch.arange(6, device=DEVICE)
    module = ManifoldLoss(backend=backend)
    calls = operator_calls(lambda: module(students, teachers, index=index))
    assert calls.total() == operator_calls(lambda: module(students[:1], teachers[:1], index=index)).total()
    loss = module(students, teachers, index=index)
    expected = torch.stack(
        [reference.manifold_loss(s.double(), t.double(), index=index) for s, t in zip(students, teachers, strict=True)]
    ).mean()
    assert relative_difference(loss, expected) < 1e-5
    gradients, wanted = (torch.autograd.grad(x, students) for x in (loss, expected))
    assert all(relative_difference(a, b) < 1e-4 for a, b in zip(gradients, wanted, strict=True))


@BACKENDS
def test_a_thousand_layers_of_batch_norm_are_one_call(backend: str) -> None:
    inputs = [torch.randn(2, 1 + i % 4, 2, 1 + i % 3, device=DEVICE, requires_grad=True) for i in range(1000)]
    means = [torch.randn(x.shape[1], device=DEVICE) for x in inputs]
    variances = [torch.rand(x.shape[1], device=DEVICE) for x in inputs]

    def loss(count: int) -> Tensor:
        return fastkd.bn_stat_loss(inputs[:count], means[:count], variances[:count], backend=backend)

    assert operator_calls(lambda: loss(1000)).total() == operator_calls(lambda: loss(1)).total()
    expected = reference.bn_stat_loss([x.double() for x in inputs], means, variances)
    assert relative_difference(loss(1000), expected) < 1e-5
    gradients, wanted = (torch.autograd.grad(x, inputs) for x in (loss(1000), expected))
    assert max(relative_difference(a, b) for a, b in zip(gradients, wanted, strict=True)) < 1e-3
