"""The parts of a benchmark: a case, the providers that compute it, and the bars (goals) of fastkd."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Result = Tensor | tuple[Tensor, ...]

COPY, MATMUL = "copy", "matmul"
"""Rivals of every case: its bytes at the rate of a clone, its operations at that of a matrix product."""

ALLOWANCE = "allowance"
"""Rival of every case with an `allowance`: that much memory."""

MB = 2**20

TUNED = "max-autotune-no-cudagraphs"
"""The mode of torch.compile that tries several kernels for each product."""


class Inputs(NamedTuple):
    """Arguments of a provider: the tensors that receive gradients, then the others."""

    leaves: tuple[Tensor, ...]
    constants: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Args:
        call: (*leaves, *constants) -> tensor or tensors, or None if there is nothing to differentiate.
        compiled: whether it runs through torch.compile; a string names the mode.
        thorough: whether it takes long to compile and runs only with --thorough.
        prepare: function applied to each floating-point input beforehand, untimed: another dtype, fewer images.
        gated: whether it must agree with the oracle. A floor, which does not compute the case, is not gated.
    """

    call: Callable[..., Result | None]
    compiled: bool | str = False
    thorough: bool = False
    prepare: Callable[[Tensor], Tensor] | None = None
    gated: bool = True


def in_pytorch(eager: Callable[..., Result], *, tuned: bool = True) -> dict[str, Provider]:
    """Return the rivals that a plain form of a loss makes: plain, compiled, and compiled with several kernels tried."""
    providers = {"eager": Provider(eager), "compile": Provider(eager, compiled=True)}
    return providers | ({"compile tuned": Provider(eager, compiled=TUNED, thorough=True)} if tuned else {})


class Bar(NamedTuple):
    """A goal of fastkd: the ratio of a rival's figure to fastkd's must be `at_least` this number.

    rival: a provider, "others" (the best of all gated ones), COPY, MATMUL or ALLOWANCE.
    what: the figure. "error" is the gradient's error, also of a rival that fails the gate.
    or_below: seconds (or bytes) of fastkd that satisfy the bar whatever the ratio.
    """

    rival: str
    at_least: float
    what: Literal["time", "memory", "error"] = "time"
    or_below: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """A loss on shapes of a real model.

    Args:
        name: "<stem>/<what>-<model>...", unique.
        inputs: (device, dtype) -> Inputs, the same values at every call.
        providers: by name; the first is the yardstick of the accuracy gate.
        oracle: float64 terms whose sum is the result, each differentiated and freed before the next is formed.
        reduced: number of terms in the sum that leads to one element.
        flops: operations that the algorithm needs, forward and, if it runs, backward.
        reads: number of times the leaves must be read; constants are read once, gradients written once.
        allowance: (bytes of the gradients) -> peak extra bytes that fastkd may use.
        backward: whether to differentiate; otherwise the case runs under no_grad.
    """

    name: str
    inputs: Callable[[str, torch.dtype], Inputs]
    providers: Mapping[str, Provider]
    oracle: Callable[..., Iterable[Result]]
    reduced: int
    flops: float
    reads: int = 1
    bars: tuple[Bar, ...] = ()
    allowance: Callable[[int], float] | None = None
    backward: bool = True
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return self.name

    def gradient_bytes(self, inputs: Inputs) -> int:
        return sum(x.nbytes for x in inputs.leaves) if self.backward else 0

    def bytes(self, inputs: Inputs) -> int:
        """Bytes that must be read and written."""
        read = self.reads * sum(x.nbytes for x in inputs.leaves) + sum(x.nbytes for x in inputs.constants)
        return read + self.gradient_bytes(inputs)


def as_tuple(result: Result) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def incoming(results: tuple[Tensor, ...]) -> list[Tensor]:
    """Return an incoming gradient for each result: 1 for a scalar, unequal values for the elements of a vector."""
    return [
        torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype, device=x.device).view_as(x) if x.ndim else torch.ones_like(x)
        for x in results
    ]


@dataclass
class Step:
    """A call of a provider that is ready to be timed: it returns results and gradients."""

    call: Callable[..., Result | None]
    inputs: Inputs
    backward: bool
    incoming: list[Tensor] | None = None

    @classmethod
    def of(cls, provider: Provider, inputs: Inputs, backward: bool) -> "Step":
        """Prepare the inputs and wrap the provider in torch.compile, which compiles at the first call."""
        prepare = provider.prepare

        def ready(x: Tensor) -> Tensor:
            return prepare(x) if prepare is not None and x.is_floating_point() else x

        leaves = tuple(ready(x).detach().requires_grad_(backward) for x in inputs.leaves)
        mode = provider.compiled if isinstance(provider.compiled, str) else None
        call = torch.compile(provider.call, dynamic=False, mode=mode) if provider.compiled else provider.call
        return cls(call, Inputs(leaves, tuple(map(ready, inputs.constants))), backward)

    def __call__(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        with torch.set_grad_enabled(self.backward):
            result = self.call(*self.inputs.leaves, *self.inputs.constants)
            if result is None:
                return (), ()
            results = as_tuple(result)
            if not self.backward:
                return results, ()
            if self.incoming is None:
                self.incoming = incoming(results)
            return results, torch.autograd.grad(results, self.inputs.leaves, self.incoming)


def oracle(case: Case, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    """Return results and gradients in float64, from the same inputs as the providers'."""
    wide: list[Any] = [x.double() if x.is_floating_point() else x for x in (*inputs.leaves, *inputs.constants)]
    leaves = [x.requires_grad_(case.backward) for x in wide[: len(inputs.leaves)]]
    total: list[Tensor] = []
    for term in case.oracle(*wide):
        results = as_tuple(term)
        if case.backward:
            torch.autograd.backward(results, incoming(results))
        total = [x.detach() + (total[i] if total else 0) for i, x in enumerate(results)]
    return total, [x.grad for x in leaves if x.grad is not None]


def mean_over_groups(function: Callable[..., Tensor], *tensors: Tensor, entries: int) -> Iterable[Tensor]:
    """Split a loss that is a mean over dimension 0 into terms whose maps, of `entries` per group, take 256 MB."""
    groups = len(tensors[0])
    step = max(1, 2**25 // entries)
    for i in range(0, groups, step):
        chunk = [x[i : i + step] for x in tensors]
        yield function(*chunk) * (len(chunk[0]) / groups)
