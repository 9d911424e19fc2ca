"""What the host does for a launch, in numbers that no other load of the machine changes: the arguments that are bound,
and the functions that are called before. docs/kernels/work.md has the times."""

import gc
import os
import sys
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="no Triton here: its launches are counted")

if os.getenv("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the binder in this process", allow_module_level=True)

from triton.runtime.jit import JITFunction

import fastkd
from benchmarks.dry_driver import recorded
from tests._support.aot import LARGE, run
from tests._support.cases import Case

CASES = {str(case): case for case in LARGE}


def leaves(argument: Any) -> int:
    return sum(map(leaves, argument)) if isinstance(argument, tuple) else 1


def counts(case: Case) -> list[tuple[int, int]]:
    """Return, of each launch of a call that was made before, the functions called since the launch before, and the
    arguments that it binds."""
    number, found = 0, []

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal number
        number += event in ("call", "c_call")

    def launch(function: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        nonlocal number
        found.append((number, leaves(args) + len(kwargs)))
        number = 0

    with fastkd.backend("triton"), recorded("sm_90") as launches:
        run(case, torch.bfloat16)
        calls = [call.again() for call in dict.fromkeys(launch.call for launch in launches) if call is not None]
        with mock.patch.object(JITFunction, "run", launch):
            for call in calls:
                before = len(found)
                call()
                del found[before:]
                number = 0
                sys.setprofile(note)
                try:
                    call()
                finally:
                    sys.setprofile(None)
    return found


@pytest.mark.parametrize(
    ("case", "functions", "arguments"),
    [
        ("relation_loss-deit", 28, 55),
        ("relation_loss-long", 26, 45),
        ("manifold_loss-deit", 50, 85),
        ("attention_loss-deit", 64, 62),
        ("attention_loss-causal", 48, 75),
        ("batch_moments-resnet", 26, 45),
        ("image_prior-224", 22, 30),
        ("soft_target_loss-1000", 22, 20),
    ],
)
def test_a_launch_takes_little_python(case: str, functions: int, arguments: int) -> None:
    """On average of a call's launches, and at most."""
    found = counts(CASES[case])
    called, bound = zip(*found, strict=True)
    assert sum(called) <= functions * len(found) and max(bound) <= arguments, found


def test_what_is_kept_of_a_launch_holds_no_tensor() -> None:
    seen: list[weakref.ref[Tensor]] = []
    with fastkd.backend("triton"), recorded("sm_90"):
        for case in ("relation_loss-narrow", "attention_loss-one key", "batch_moments-columns"):
            inputs = [torch.empty(shape, requires_grad=True) for shape in CASES[case].shapes]
            result = CASES[case].call(*inputs)
            results = result if isinstance(result, tuple) else (result,)
            torch.autograd.grad(results, inputs, [torch.empty_like(x) for x in results])
            seen += map(weakref.ref, (*inputs, *results))
            del inputs, result, results
    gc.collect()
    assert seen and not any(x() is not None for x in seen)


def test_what_is_kept_of_a_launch_is_that_of_the_card() -> None:
    """One process may have cards of several kinds."""
    grids: dict[int, dict[str, tuple[int, ...]]] = {}
    for multiprocessors in (132, 1):
        with fastkd.backend("triton"), recorded("sm_90", multiprocessors) as launches:
            for case in ("batch_moments-resnet", "image_prior-224", "relation_loss-deit"):
                run(CASES[case], torch.bfloat16)
        grids[multiprocessors] = {launch.kernel.name: launch.grid for launch in launches}
    many, one = grids[132], grids[1]
    cut = {"moments_partial", "moments_bwd", "prior_fwd", "prior_bwd", "relation_group"}
    assert {name.strip("_").removesuffix("_kernel") for name in many if many[name] != one[name]} >= cut
