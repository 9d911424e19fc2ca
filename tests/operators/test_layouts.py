"""Every tensor of every call in every layout: views, expanded, transposed, channels-last, and at the end of a page."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

import fastkd
from fastkd.ops._dispatch import INTERPRETED
from fastkd.testing import DEVICE, assert_matches_oracle, backends
from tests._support.calls import CALLS, LAYOUTS, Call, runs
from tests._support.cases import OperatorCalls

each_run = pytest.mark.parametrize(
    ("call", "backend"), [(call, name) for call, name in runs() if name != "triton"], ids=str
)
OPERATORS = sorted({call.op for call in CALLS if call.op is not None})


def assert_same(actual: list[Tensor], dense: list[Tensor], oracle: list[Tensor], reduced: int, name: str) -> None:
    """All results together, so that what is 0 in exact arithmetic is measured by what is not."""
    joined = [torch.cat([x.flatten() for x in results]) for results in (actual, dense, oracle)]
    assert_matches_oracle(*joined, reduced, name)


def compare(call: Call, laid_out: Call, backend: str, name: str) -> None:
    """Compare a call with that on contiguous copies of its tensors, of which the error is known."""
    with fastkd.backend("eager"):
        oracle = call.to(torch.float64).loss_and_gradients()
    with fastkd.backend(backend):
        dense, actual = call.loss_and_gradients(), laid_out.loss_and_gradients()
    assert_same(actual, dense, oracle, max(x.numel() for _, x in call.leaves()), f"{call} {name}")


@each_run
def test_all_tensors_of_a_call(call: Call, backend: str) -> None:
    for name, layout in LAYOUTS.items():
        compare(call.mapped(lambda x, f=layout: f(x).contiguous()), call.mapped(layout), backend, name)


@pytest.mark.exhaustive
@each_run
def test_each_tensor_of_a_call(call: Call, backend: str) -> None:
    for path, _ in call.leaves():
        for name, layout in LAYOUTS.items():
            dense = call.with_leaf(path, lambda x, f=layout: f(x).contiguous())
            compare(dense, call.with_leaf(path, layout), backend, f"{path} {name}")


def operators() -> list[tuple[str, str, tuple[Any, ...]]]:
    """(call, operator, arguments) of every operator that the calls run, forward and backward."""
    found = []
    for call in CALLS:
        with fastkd.backend("eager"), OperatorCalls() as recorder:
            call.loss_and_gradients()
        for op, args in recorder.calls:
            detached = tree_map_only(Tensor, lambda x: x.detach().contiguous(), args)
            found.append((str(call), op._schema.name.removeprefix("fastkd::").removesuffix("_eager"), detached))
    return found


def run(op: str, backend: str, args: tuple[Any, ...]) -> list[Tensor]:
    results = getattr(torch.ops.fastkd, op if backend == "native" else f"{op}_{backend}").default(*args)
    return [x for x in tree_leaves(results) if x.numel() > 0]


def check_operator(op: str, backend: str, dense: tuple[Any, ...], laid_out: tuple[Any, ...], name: str) -> None:
    wide = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, dense)
    results = run(op, backend, laid_out), run(op, backend, dense), run(op, "eager", wide)
    if all(map(torch.equal, *results[:2])):
        return
    reduced = max(x.numel() for x in tree_leaves(dense) if isinstance(x, Tensor))
    assert_same(*results, reduced, f"{op} {name}")


def check_tensors_of_operators(backend: str, of_call: Callable[[int], list[str]], together: bool) -> None:
    """Check operators in the layouts that `of_call` names for each of their calls."""
    for number, (name, op, args) in enumerate(operators()):
        if backend not in backends(op):
            continue
        leaves, spec = tree_flatten(args)
        tensors = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.ndim > 0]
        for layout_name in of_call(number):
            layout = LAYOUTS[layout_name]
            for changed in [tensors] if together else [[i] for i in tensors]:
                views = [layout(x) if i in changed else x for i, x in enumerate(leaves)]
                copies = [x.contiguous() if isinstance(x, Tensor) else x for x in views]
                dense, laid_out = tree_unflatten(copies, spec), tree_unflatten(views, spec)
                check_operator(op, backend, dense, laid_out, f"of {name}, argument {changed}, {layout_name}")


@pytest.mark.parametrize("backend", [name for name in ("native", "triton") if name in backends("moments_fwd")])
def test_every_tensor_of_an_operator(backend: str) -> None:
    """Those of backward too: gradients that come in, and what forward has saved."""
    names = list(LAYOUTS)
    if backend == "native":
        check_tensors_of_operators(backend, lambda _: names, together=False)
    else:  # the interpreter takes its time: one layout for every other call, of all its tensors
        check_tensors_of_operators(backend, lambda i: [names[i // 2 % len(names)]] * (i % 2 == 0), together=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", [name for name in ["triton"] if name in backends("moments_fwd")])
def test_every_tensor_of_an_operator_in_every_layout(backend: str) -> None:
    check_tensors_of_operators(backend, lambda _: list(LAYOUTS), together=False)


@pytest.mark.skipif(DEVICE != "cpu", reason="guard pages are those of a CPU's memory")
@pytest.mark.skipif(sys.platform != "linux", reason="guard pages are made by mprotect")
@pytest.mark.parametrize("backend", [name for name in backends("moments_fwd") if name != "eager"])
def test_no_call_goes_past_its_inputs(backend: str) -> None:
    if backend == "triton" and INTERPRETED:
        pytest.skip("the interpreter checks the addresses of every test")
    env = os.environ | {"PYTHONPATH": str(Path(fastkd.__file__).parents[1])}
    command = [sys.executable, "-X", "faulthandler", "-m", "tests._support.guards", backend]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert int(ended.stdout.split()[0]) > 100
