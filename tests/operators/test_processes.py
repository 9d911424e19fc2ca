"""Operators called by eight threads at once, and in a process forked after they ran."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.testing import backends
from tests._support.calls import CALLS, Call
from tests._support.splits import threads

# Modules are built once, because their parameters are drawn from a generator that threads share.
MADE = [replace(call, module=partial(lambda made: made, call.target())) if call.module else call for call in CALLS]
BACKENDS = [name for name in backends("relation_fwd") if name != "triton"]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_eight_threads_at_once_have_the_bits_of_one(backend: str, count: int) -> None:
    """Each thread makes every call, each in another order, beside `count` threads of the operators' own."""
    with threads(count), fastkd.backend(backend):
        expected = [call.loss_and_gradients() for call in MADE]

        def different(first: int) -> list[Call]:
            torch.set_num_threads(count)  # a number that each thread has for itself
            order = [*range(first, len(MADE)), *range(first)]
            return [MADE[i] for i in order if not equal(MADE[i].loss_and_gradients(), expected[i])]

        with ThreadPoolExecutor(8) as pool:
            for found in pool.map(different, range(0, len(MADE), len(MADE) // 8 + 1)):
                assert not found


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_the_bits_of_its_parent(tmp_path: Path) -> None:
    """On one thread, as workers of data loaders are: OpenMP's threads do not survive a fork."""
    expected = [call.loss_and_gradients() for call in MADE]
    out = tmp_path / "results"
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            out.write_bytes(pickle.dumps([[x.numpy() for x in call.loss_and_gradients()] for call in MADE]))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    for call, own, forked in zip(MADE, expected, pickle.loads(out.read_bytes()), strict=True):
        assert equal(own, [torch.from_numpy(x) for x in forked]), call
