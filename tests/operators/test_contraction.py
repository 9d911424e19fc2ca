"""Kernels under a compiler that contracts products with the sums that follow them: a b + c rounded once.

The interpreter rounds each operation. A GPU's compiler contracts where it likes, and in two kernels differently.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.ops._dispatch import INTERPRETED
from fastkd.testing import loss_and_gradients

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="patches the interpreter")


@contextmanager
def contracted() -> Iterator[None]:
    """A product whose very result is added or subtracted enters the sum unrounded."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_fmul

    def product(builder: Any, lhs: Any, rhs: Any) -> Any:
        result = multiply(builder, lhs, rhs)
        if result.data.dtype == np.float32:
            result.exact = lhs.data.astype(np.float64) * rhs.data.astype(np.float64)
        return result

    def total(sign: int) -> Any:
        def of(builder: Any, lhs: Any, rhs: Any) -> Any:
            a, b = getattr(lhs, "exact", lhs.data), rhs.data
            if not hasattr(lhs, "exact"):
                b = getattr(rhs, "exact", b)
            return TensorHandle((a + sign * b).astype(lhs.data.dtype), lhs.dtype.scalar)

        return of

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_fmul", product)
        patch.setattr(InterpreterBuilder, "create_fadd", total(1))
        patch.setattr(InterpreterBuilder, "create_fsub", total(-1))
        yield


@pytest.mark.parametrize("rectify", ["none", "both"])
@pytest.mark.parametrize("backend", ["triton"])
def test_equal_networks_have_equal_maps(backend: str, rectify: str) -> None:
    student = torch.randn(1, 33, 24)
    with contracted():
        loss, gradient = loss_and_gradients(
            lambda s: fastkd.relation_loss(s, student, rectify=rectify, algorithm="tile", backend=backend), [student]
        )
    assert loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize("backend", ["triton"])
def test_a_row_finds_its_likeliest_key(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel compares scores with the maxima that another one found: they have equal bits in both."""
    from fastkd_kernels import attention

    launch = attention._Problem.launch
    stats: list[Tensor] = []

    def one_is_contracted(problem: Any, kernel: Any, *args: Any, **arguments: Any) -> None:
        if kernel.fn.__name__ == "_attention_stats_kernel":
            launch(problem, kernel, *args, **arguments)
            return
        stats.append(arguments["stats_ptr"])
        with contracted():
            launch(problem, kernel, *args, **arguments)

    monkeypatch.setattr(attention._Problem, "launch", one_is_contracted)
    q, k, tq, tk = (6 * torch.randn(1, 2, 9, 16) for _ in range(4))  # rows that are nearly all one key
    bias = torch.randn(1, 2, 9, 9)  # whose largest is seldom that key: it alone would be 0 in every kernel

    loss_and_gradients(
        lambda q, k, b: fastkd.attention_loss(
            q, k, tq, tk, bias_student=b, divergence="js", heads="mean", backend=backend
        ),
        [q, k, bias],
    )
    assert (stats[-1][3] != 0).all()  # that key's part in the gradient
