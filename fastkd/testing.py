"""Comparison with an oracle, and inputs of tests."""

import contextlib
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch
from torch import Tensor

from fastkd.ops import _dispatch


def relative_difference(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|: how golden values are compared (absolute where b is all zeros)."""
    scale = b.abs().max().item()
    return (a.to(b) - b).abs().max().item() / (scale or 1.0)


def accumulator_eps(x: Tensor) -> float:
    """Return the relative error that a bound allows each operation behind x, in the type that its sums are taken in.

    On a GPU it is twice that of float32: matrix units truncate where others round, and approximate exponentials and
    divisions are 2 units in the last place off (docs/numerics.md).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)  # 16-bit results too are summed in float32
    return torch.finfo(dtype).eps * (2 if x.device.type == "cuda" and dtype == torch.float32 else 1)


def assert_matches_oracle(actual: Tensor, eager: Tensor, oracle: Tensor, reduced: int, name: str) -> None:
    """Bound the error of actual by that of eager, both measured against a float64 oracle.

        row-max error <= 2 (eager + eps(dtype) + sqrt(reduced) eps(accumulator))      a wrong element
        relative L2   <= 2 (eager + sqrt(reduced) eps(accumulator))                   a small bias

    In float64 the reference is the oracle itself, whose error cannot be told: 1e-12 stands for it.

    Args:
        actual: the result under test.
        eager: the reference computed in the dtype of the test.
        oracle: the reference computed in float64 from the same (already rounded) inputs.
        reduced: number of terms in the sum that leads to one element.
        name: name of the value in the message.
    """
    assert actual.dtype == eager.dtype and oracle.dtype == torch.float64, f"{name}: {actual.dtype} vs {eager.dtype}"
    assert actual.shape == oracle.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    assert actual.isfinite().all(), f"{name}: non-finite values"
    eps = torch.finfo(actual.dtype).eps
    eps_sum = reduced**0.5 * accumulator_eps(actual)
    tiny = torch.finfo(torch.float32).tiny
    scale = oracle.abs().amax(-1, keepdim=True) if oracle.ndim else oracle.abs()

    def errors(x: Tensor) -> tuple[float, float]:
        d = (x.double() - oracle).abs()
        return (d / scale.clamp_min(tiny)).max().item(), (d.norm() / oracle.norm().clamp_min(tiny)).item()

    (a_max, a_l2), (e_max, e_l2) = errors(actual), errors(eager)
    if actual.dtype == torch.float64:
        e_max, e_l2 = max(e_max, 1e-12), max(e_l2, 1e-12)
    assert a_max <= 2 * (e_max + eps + eps_sum), f"{name}: max error {a_max:.2e}, eager {e_max:.2e}"
    assert a_l2 <= 2 * (e_l2 + eps_sum), f"{name}: L2 error {a_l2:.2e}, eager {e_l2:.2e}"


def loss_and_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], incoming: float = 1.0
) -> tuple[Tensor, ...]:
    """(loss, gradient of each input) for fresh leaves with the values and strides of `inputs`, allocations poisoned."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with poisoned_allocations():
        loss = function(*leaves)
        return loss.detach(), *torch.autograd.grad(loss, leaves, torch.full_like(loss, incoming))


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Make torch.empty and related functions return NaN, so that an element that is never written is found."""

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*args: object, **kwargs: object) -> Tensor:
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return allocated

    with (
        mock.patch.object(torch, "empty", poison(torch.empty)),
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
        mock.patch.object(torch, "empty_strided", poison(torch.empty_strided)),
        mock.patch.object(Tensor, "new_empty", poison(Tensor.new_empty)),
    ):
        yield


@contextlib.contextmanager
def thresholds(**values: int) -> Iterator[None]:
    """Lower sizes at which native kernels split their work: `thresholds(relation_strip_rows=2)` sets
    "relation.strip_rows". The first underscore stands for the dot.

    Raises:
        KeyError: no kernel has a threshold of that name.
    """
    _C = importlib.import_module("fastkd._C")  # only called where the extension is built

    names = {name.replace("_", ".", 1): value for name, value in values.items()}
    before = _C.thresholds()
    try:
        for name, value in names.items():
            _C.set_threshold(name, value)
        yield
    finally:
        for name in names.keys() & before.keys():
            _C.set_threshold(name, before[name])


DEVICE = "cuda" if torch.cuda.is_available() and not _dispatch.INTERPRETED else "cpu"


def backends(op: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """Return the backends that can run an operator on DEVICE in this process."""
    return [name for name in ("eager", "native", "triton") if _dispatch.why_not(op, name, DEVICE, dtype) is None]


def strided(x: Tensor, layout: str) -> Tensor:
    """The values of x in other strides: "contiguous", "permuted" (first two dimensions swapped in memory), "sliced"
    (the tail of a longer second dimension), "offset" (dense, an element past an aligned address) or "channels" (second
    dimension innermost)."""
    if layout == "permuted":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        return torch.cat([x[:, :1], x], 1)[:, 1:]
    if layout == "offset":
        return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    if layout == "channels":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    return x.contiguous()


def peak_extra_memory(setup: str, warm_up: str, run: str) -> int:
    """Bytes by which the resident memory of a fresh single-threaded process grows at most while `run` runs.

    setup makes the inputs; warm_up does the same on small ones, so that libraries are loaded before the count.
    """
    program = f"""
import torch, fastkd
torch.set_num_threads(1)
def kilobytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
{setup}
{warm_up}
open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
before = kilobytes("VmRSS")
{run}
print(kilobytes("VmHWM") - before)
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return 1024 * int(out.stdout)
