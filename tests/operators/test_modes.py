"""Every function and module in every mode of people's loops: the results of a plain call, or a refusal that names a way
out. docs/robustness.md shows what the exhaustive run found.
"""

import json
import os
import re
from pathlib import Path

import pytest
import torch

import fastkd
from fastkd import compat
from tests._support.calls import CALLS, Call, runs
from tests._support.dropins import DROPINS
from tests._support.modes import MODES, WAYS_OUT

FIRST = {call.function: str(call) for call in reversed(CALLS)}  # the first call of each function
COMPILED = ("torch.compile", "compiled, dynamic", "torch.export")
MAY_BE_REFUSED = ("batched gradients", "second derivative", "vmap", "torch.func.grad", "forward mode")
# PyTorch's own refusals: of a torch.autograd.Function or an operator without such a derivative.
OWN = r"must implement the jvp function|forward AD .* has not been implemented"


def check(call: Call, backend: str, mode: str) -> str:
    """Return "same", or "refused" where the call says so and names a way out."""
    refusal: Exception | None = None
    with fastkd.backend(backend):
        try:
            MODES[mode](call)
        except (RuntimeError, NotImplementedError) as error:
            refusal = error
    if refusal is None:
        return "same"
    assert not isinstance(refusal, torch._dynamo.exc.TorchDynamoException), refusal
    assert re.search(f"{WAYS_OUT}|{OWN}", str(refusal)), refusal
    return "refused"


def chosen(call: Call, backend: str, mode: str) -> bool:
    """What `make test` runs: one call of each function; test_contract.py and test_shapes.py compile the functions."""
    return str(call) == FIRST.get(call.function) and (
        mode not in COMPILED or (call.module is not None and (backend, mode) == ("auto", "compiled, dynamic"))
    )


CELLS = [(call, backend, mode) for call, backend in runs([*CALLS, *DROPINS]) if backend != "triton" for mode in MODES]


@pytest.mark.parametrize(
    ("call", "backend", "mode"),
    [pytest.param(*cell, marks=() if chosen(*cell) else pytest.mark.exhaustive) for cell in CELLS],
    ids=str,
)
def test_a_mode_gives_the_same_results_or_is_refused(call: Call, backend: str, mode: str) -> None:
    outcome = check(call, backend, mode)
    assert outcome == "same" or mode in MAY_BE_REFUSED
    # docs/generate.py reads these lines, a cell each, from benchmarks/results/modes.jsonl.
    if out := os.getenv("FASTKD_MODES"):
        with Path(out).open("a") as file:
            print(json.dumps([call.function, backend, mode, outcome]), file=file)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in MAY_BE_REFUSED])
def test_nothing_that_a_loop_does_is_refused(mode: str) -> None:
    for call in CALLS:
        if str(call) == FIRST[call.function] and mode not in COMPILED:
            assert check(call, "auto", mode) == "same", call


def test_every_dropin_has_a_call() -> None:
    """All but the hook of a model, of which tests/modules/test_compat.py makes a loop, and a registration."""
    others = {"DeepInversionFeatureHook", "register_cls_kd"}
    assert {call.function for call in DROPINS} == {f"compat.{name}" for name in {*compat.__all__} - others}
