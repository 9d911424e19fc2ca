"""The same tensor given twice, such as a layer that is matched with two of the teacher's, plain and compiled."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.losses import ManifoldLoss
from fastkd.testing import DEVICE, loss_and_gradients, relative_difference
from tests._support.calls import positive, randn

T, MEAN, VAR = randn(3, 6, 8, seed=1), randn(6, seed=2), positive(6, seed=3)
INDEX = torch.tensor([0, 4, 7], device=DEVICE)
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "attention_loss": lambda x: fastkd.attention_loss(x[:, None], x[:, None], T[:, None], T[:, None]),
    "attention_loss, one bias": lambda x: fastkd.attention_loss(
        *[x[:, None]] * 2, *[T[:, None]] * 2, bias_student=MEAN, bias_teacher=MEAN
    ),
    "qkv_relation_loss": lambda x: fastkd.qkv_relation_loss((x, x, x), (T, T, T), relation_heads=2),
    "relation_loss, itself": lambda x: fastkd.relation_loss(x, x.detach()) + x.sum(),
    "manifold_loss": lambda x: fastkd.manifold_loss([x, x], [T, T], index=INDEX),
    "ManifoldLoss": lambda x: ManifoldLoss()([x, x, x], [T, T, T[..., :5]], indices=[INDEX, INDEX, INDEX]),
    "bn_stat_loss": lambda x: fastkd.bn_stat_loss([x, x], [MEAN, MEAN], [VAR, VAR]),
    "batch_norm_moments": lambda x: fastkd.batch_norm_moments(x, VAR, VAR, VAR, VAR)[0].square().sum(),
    "soft_target_loss": lambda x: fastkd.soft_target_loss(x[0], x[0].detach()) + x.sum(),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_same_tensor_twice(name: str) -> None:
    call, x = CALLS[name], randn(3, 6, 8)
    expected = loss_and_gradients(call, (x,))
    with fastkd.backend("eager"):
        eager = loss_and_gradients(call, (x,))
    torch._dynamo.reset()
    compiled = loss_and_gradients(torch.compile(call, fullgraph=True, backend="aot_eager"), (x,))
    for a, b, c in zip(expected, eager, compiled, strict=True):
        assert relative_difference(a, b) < 1e-5
        assert relative_difference(c, a) < 1e-5
