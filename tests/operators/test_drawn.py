"""Properties that hold for any call: errors are bounded, results finite, refusals name the argument. `make fuzz` draws
twenty thousand."""

import contextlib
import os
from dataclasses import replace
from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import fastkd
from fastkd import reference
from fastkd._extension import HAS_NATIVE
from fastkd.testing import assert_matches_oracle
from tests._support import drawn
from tests._support.calls import Call, outcome

EXAMPLES = int(os.getenv("FASTKD_EXAMPLES", "150"))  # of each test
drawing = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
backends = st.sampled_from(["eager", "native"] if HAS_NATIVE else ["eager"])


def results(module: Any, call: Call, dtype: torch.dtype | None = None) -> list[Tensor]:
    """(values, gradients of the students) of the function of that module, flattened."""
    if dtype is not None:
        call = call.to(dtype)
    leaves: list[Tensor] = []

    def required(x: Tensor) -> Tensor:
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    students = {name: tree_map_only(Tensor, required, call.arguments[name]) for name in call.students}
    constants = {name: value for name, value in call.constants.items() if module is fastkd or name != "algorithm"}
    values = tree_leaves(getattr(module, call.function)(**(call.arguments | constants | students)))
    loss = sum(
        (v.double() * torch.linspace(0.5, 1.5, v.numel(), dtype=torch.float64, device=v.device).view_as(v)).sum()
        for v in values
    )
    found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [*(v.detach() for v in values), *found]


def noise(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with other values of the same sizes; those that may not be negative are not."""
    return {
        name: tree_map_only(
            Tensor,
            lambda x, name=name: (
                (torch.rand if "var" in name or name == "ema" else torch.randn)(x.shape).to(x)
                * (x.double().square().mean().sqrt().to(x) if x.abs().max() > 0 else 1.0)
                if x.is_floating_point()
                else x
            ),
            value,
        )
        for name, value in arguments.items()
    }


def a_rounding_apart(x: Tensor) -> Tensor:
    return x * (1 + torch.finfo(x.dtype).eps * torch.randn_like(x)) if x.is_floating_point() else x


def eager_results(call: Call) -> list[Tensor]:
    """The float64 results plus the largest rounding errors of the reference among inputs a rounding apart: on a few
    numbers the error of one run may be 0 by chance."""
    torch.manual_seed(0)
    worst: list[Tensor] | None = None
    for _ in range(4):
        near = call.mapped(a_rounding_apart)
        oracle, eager = results(reference, near, torch.float64), results(reference, near)
        errors = [(e - o).abs() for e, o in zip(eager, oracle, strict=True)]
        worst = errors if worst is None else [torch.maximum(a, b) for a, b in zip(worst, errors, strict=True)]
    oracle = results(reference, call, torch.float64)
    return [(o + w).to(e) for o, w, e in zip(oracle, worst, eager, strict=True)]


@drawing
@given(drawn.calls(), backends)
def test_errors_are_bounded(call: Call, backend: str) -> None:
    assume(all(x.dtype != torch.float64 for _, x in call.leaves()))  # the oracle's own
    with fastkd.backend(backend):
        actual = results(fastkd, call)
    oracle, eager = results(reference, call, torch.float64), eager_results(call)
    reduced = sum(x.numel() for _, x in call.leaves())
    typical = results(reference, replace(call, arguments=noise(call.arguments)), torch.float64)
    assume(all(t.abs().max() > 1e-20 for t in typical))
    assert all(a.dtype == e.dtype for a, e in zip(actual, eager, strict=True))
    for number, (a, e, o, t) in enumerate(zip(actual, eager, oracle, typical, strict=True)):
        # What is 0 in exact arithmetic is measured by the result of noise of the same size; a loss of probabilities by
        # the logarithms that it is a difference of.
        size = t.abs().max().to(a.dtype).view(1)
        if number == 0 and call.op in ("attention_fwd", "softmax_kl"):
            rows = call.leaves()[0][1][..., 0].numel() if call.constants.get("reduction") == "sum" else 1
            size = size.clamp_min(rows)
        joined = [torch.cat([x.flatten(), size.to(x)]) for x in (a, e, o)]
        if joined[1].isfinite().all():
            assert_matches_oracle(*joined, reduced, f"result {number}")


@drawing
@given(drawn.calls(drawn.ORDINARY + drawn.EXTREME), backends)
def test_results_are_finite_where_those_of_the_reference_are(call: Call, backend: str) -> None:
    with fastkd.backend(backend):
        actual = results(fastkd, call)
    oracle, eager = results(reference, call, torch.float64), results(reference, call)
    assume(all(e.isfinite().all() for e in eager))
    for number, (a, e, o) in enumerate(zip(actual, eager, oracle, strict=True)):
        fits = (o.abs() < torch.finfo(a.dtype).max / 1e4) & e.isfinite()
        assert a[fits].isfinite().all(), f"result {number}: {a} where it is {e}, in float64 {o}"


def without_one(x: Tensor, dim: int) -> Tensor:
    return x.narrow(dim % max(x.ndim, 1), 0, x.shape[dim % x.ndim] - 1) if x.ndim else x


BROKEN = {
    "one shorter": without_one,
    "empty": lambda x, dim: x.narrow(dim % x.ndim, 0, 0) if x.ndim else x,
    "a dimension more": lambda x, dim: x.unsqueeze(dim % (x.ndim + 1)),
    "a dimension less": lambda x, dim: x.select(dim % x.ndim, 0) if x.ndim and x.numel() else x,
    "integers": lambda x, dim: x.int(),
    "complex": lambda x, dim: x.cfloat(),
    "booleans": lambda x, dim: x > 0,
    "float8": lambda x, dim: x.to(torch.float8_e4m3fn),
    "sparse": lambda x, dim: x.to_sparse(),
    "on another device": lambda x, dim: x.to("meta"),
    "a number": lambda x, dim: 3.0,
    "None": lambda x, dim: None,
    "a list": lambda x, dim: x.tolist(),
    "swapped": lambda x, dim: x.transpose(dim % x.ndim, 0) if x.ndim else x,
}


@drawing
@given(drawn.calls(), backends, st.sampled_from(list(BROKEN)), st.integers(0, 4), st.data())
def test_refusals_name_the_argument(call: Call, backend: str, broken: str, dim: int, data: st.DataObject) -> None:
    """A changed tensor may still be a valid one; what is refused is a TypeError or ValueError with its name."""
    path = data.draw(st.sampled_from([path for path, _ in call.leaves()]), label="path")
    call = call.with_leaf(path, lambda x: BROKEN[broken](x, dim))
    unavailable = contextlib.suppress(RuntimeError) if broken == "on another device" else contextlib.nullcontext()
    with fastkd.backend(backend), unavailable:  # there is no native operator there
        outcome(call)
