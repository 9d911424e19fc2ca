"""Elements more than 2^31 apart: one dimension of every tensor in turn has a stride of 2^30."""

import mmap
import sys
from collections.abc import Callable
from typing import Any

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


PLANE = 2**30  # elements; of a call with as many rows
MAP_NORESERVE = 0x4000  # of Linux; Python's mmap names it since 3.13


def spread(planes: Tensor) -> Tensor:
    """The same planes, each PLANE elements after the one before."""
    memory = mmap.mmap(-1, 4 * PLANE * len(planes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=torch.float32).as_strided(planes.shape, (PLANE, *planes.stride()[1:]))


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


@pytest.mark.skipif(not INTERPRETED, reason="a GPU's memory is not virtual")
@pytest.mark.skipif(sys.platform != "linux", reason="maps memory as Linux does")
@pytest.mark.parametrize("heads", ["match", "mean"])
@pytest.mark.parametrize("backend", ["triton"])
def test_statistics_of_many_rows(backend: str, heads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiples of their number are offsets past 2^31 where there are 2^29 rows, of which three are looked at here."""
    from fastkd_kernels import attention

    launch = attention._Problem.launch
    spreads: dict[int, Tensor] = {}

    def far(problem: Any, kernel: Any, grid: Any, tile: Any, **arguments: Any) -> None:
        for name in arguments.keys() & {"stats_ptr", "stats_t_ptr"}:
            near = arguments[name]
            arguments[name] = spreads.setdefault(near.data_ptr(), spread(near))
            kept.append(near)  # else its address would be another's
        names = ("rows_total", "rows_s", "rows_t")
        launch(problem, kernel, grid, tile, **arguments | {name: PLANE for name in names if name in kernel.arg_names})

    kept: list[Tensor] = []
    shape = (1, 2, 3, 4)
    q, k, bias, tq, tk = (torch.randn(shape if n != 2 else (1, 2, 3, 3)) for n in range(5))

    def call(*inputs: Tensor) -> Tensor:
        q, k, bias = inputs
        loss = fastkd.attention_loss
        return loss(q, k, tq, tk, bias_student=bias, heads=heads, divergence="js", backend=backend)

    near = run(call, [q, k, bias], 3)
    monkeypatch.setattr(attention._Problem, "launch", far)
    for a, b in zip(run(call, [q, k, bias], 3), near, strict=True):
        assert torch.equal(a, b)
    assert spreads
