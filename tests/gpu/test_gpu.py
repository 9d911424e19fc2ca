"""On a GPU: every public function runs inside a CUDA graph, and none waits for the device."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastkd
from tests._support.cases import CASES, Case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(params=["auto", "eager", "triton"], autouse=True)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with fastkd.backend(request.param):
        yield


def step(case: Case, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    loss = case.scalar(*inputs)
    return loss, *torch.autograd.grad(loss, inputs)


def runs(case: Case, inputs: list[Tensor]) -> None:
    """Warm up, or skip where the named backend has no kernel for the case."""
    try:
        step(case, inputs)
    except RuntimeError as error:
        if "cannot run here" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_synchronises(case: Case, dtype: torch.dtype) -> None:
    inputs = [x.requires_grad_() for x in case.inputs(dtype)]
    runs(case, inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(case, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_captured_in_a_graph(case: Case, dtype: torch.dtype) -> None:
    """The graph, replayed on other inputs, gives what a call on those gives, to the bit."""
    inputs = [x.requires_grad_() for x in case.inputs(dtype)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            runs(case, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(case, inputs)

    others = [torch.randn_like(x) + 0.2 for x in inputs]
    with torch.no_grad():
        for x, other in zip(inputs, others, strict=True):
            x.copy_(other)
    graph.replay()
    expected = step(case, [x.requires_grad_() for x in others])
    for got, want in zip(captured, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
