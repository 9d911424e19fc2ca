"""Elements more than 2^31 apart: one dimension of every tensor in turn has a stride of 2^30."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.ops._dispatch import INTERPRETED
from fastkd.testing import DEVICE, assert_matches_oracle, backends

Shapes = tuple[tuple[int, ...], ...]

# name: (shapes of the inputs, how many of them have gradients, call)
CALLS: dict[str, tuple[Shapes, int, Callable[..., Tensor]]] = {
    "relation": (((3, 3, 4), (3, 3, 5)), 1, lambda s, t: fastkd.relation_loss(s, t)),
    "relation inter": (((3, 3, 4), (3, 3, 5)), 1, lambda s, t: fastkd.relation_loss(s, t, scope="inter")),
    "relation gram": (
        ((3, 3, 4), (3, 3, 5)),
        1,
        lambda s, t: fastkd.relation_loss(s, t, scope="batch", algorithm="gram"),
    ),
    "manifold": (
        ((3, 3, 4), (3, 3, 5)),
        1,
        lambda s, t: fastkd.manifold_loss(s, t, index=torch.tensor([0, 8, 4], device=DEVICE)),
    ),
    "attention": (
        ((3, 3, 3, 4), (3, 3, 3, 4), (3, 3, 3, 3), (3, 3, 3, 5), (3, 3, 3, 5)),
        3,
        lambda q, k, bias, tq, tk: fastkd.attention_loss(q, k, tq, tk, bias_student=bias),
    ),
    "attention mean": (
        ((3, 3, 3, 4), (3, 3, 3, 4), (3, 3, 3, 3), (3, 3, 3, 5), (3, 3, 3, 5)),
        3,
        lambda q, k, bias, tq, tk: fastkd.attention_loss(q, k, tq, tk, bias_student=bias, heads="mean"),
    ),
    "moments": (((3, 3, 3, 3),), 1, lambda x: torch.cat(fastkd.batch_moments(x)).sum()),
    "image moments": (
        ((3, 3, 3, 3),),
        1,
        lambda x: torch.cat(fastkd.batch_moments(x, dims="image")).sum(),
    ),
    "batch norm": (
        ((3, 3, 3, 3), (3,), (3,), (3,), (3,)),
        3,
        lambda x, weight, bias, mean, var: torch.cat(
            [
                y.to(torch.promote_types(y.dtype, torch.float32)).flatten()
                for y in fastkd.batch_norm_moments(x, mean, var.abs(), weight, bias)
            ]
        ).sum(),
    ),
    "prior": (((3, 3, 3, 3),), 1, lambda x: fastkd.image_prior(x, tv_l1=0.5, tv_l2=0.1, l2=0.2)),
    "logits": (
        ((3, 3), (3, 3)),
        1,
        lambda s, t: fastkd.dkd_loss(s, t, torch.arange(3, device=DEVICE), alpha=1.0, beta=4.0, temperature=2.0),
    ),
}


def sparse(x: Tensor, dim: int) -> Tensor:
    """x with a stride of 2^30 along a dimension of 3. Only the pages that hold elements are ever touched."""
    strides = list(x[(slice(None),) * dim + (0,)].contiguous().stride())
    strides.insert(dim, 2**30)
    reach = sum(stride * (size - 1) for stride, size in zip(strides, x.shape, strict=True)) + 1
    memory = torch.empty_permuted((reach,), (0,), dtype=x.dtype, device=x.device)  # which no test fills with NaN
    return memory.as_strided(x.shape, strides).copy_(x)


def run(call: Callable[..., Tensor], inputs: list[Tensor], count: int) -> tuple[Tensor, ...]:
    """Return the loss and the gradients of the first inputs, which are used where they are in memory."""
    inputs = [x.detach().requires_grad_(i < count) for i, x in enumerate(inputs)]
    loss = call(*inputs)
    return loss.detach(), *torch.autograd.grad(loss, inputs[:count])


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", backends("relation_fwd"))
def test_elements_far_apart(backend: str, name: str) -> None:
    shapes, count, call = CALLS[name]
    inputs = [torch.randn(shape, device=DEVICE).to(torch.float16) for shape in shapes]
    with fastkd.backend("eager"):
        eager, oracle = run(call, inputs, count), run(call, [x.double() for x in inputs], count)
    for number, x in enumerate(inputs):
        dims = [d for d in range(x.ndim) if x.shape[d] == 3]
        is_slow = INTERPRETED and name.startswith("attention")  # there one dimension of each input has to do
        for dim in [dims[number % len(dims)]] if is_slow else dims:
            far = sparse(x, dim)
            assert far.stride(dim) * (far.shape[dim] - 1) >= 2**31
            with fastkd.backend(backend):
                actual = run(call, [*inputs[:number], far, *inputs[number + 1 :]], count)
            for result, (a, e, o) in enumerate(zip(actual, eager, oracle, strict=True)):
                assert_matches_oracle(a, e, o, x.numel(), f"result {result} with input {number} sparse in {dim}")
