"""Every operator fastkd registers, on one page: schema and fake.

`<op>` has native implementations (csrc/, keys CPU and CUDA), `<op>_triton` those of kernels/, `<op>_eager` those of
eager/. The three share a schema and a fake, so tracing needs none of them installed.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkd._precision import accumulator, stored_gradient

STEMS: dict[str, str] = {}  # operator -> stem: the file that holds it in eager/, kernels/ and csrc/

# The interpreter runs Triton kernels on CPU tensors.
_TRITON_KEY = "CPU" if os.getenv("TRITON_INTERPRET") == "1" else "CUDA"


def _register(stem: str, op: str, schema: str, fake: Callable[..., Any]) -> None:
    STEMS[op] = stem

    def eager(*args: Any) -> Any:
        # Autocast would round the chunks' products; an operator's maths stays in its accumulation dtype.
        with torch.autocast(args[0].device.type, enabled=False):
            return getattr(importlib.import_module(f"fastkd.eager.{stem}"), op)(*args)

    def triton(*args: Any) -> Any:
        return getattr(importlib.import_module(f"fastkd_kernels.{stem}"), op)(*args)

    for name in (op, f"{op}_eager", f"{op}_triton"):
        torch.library.define(f"fastkd::{name}", schema)
        torch.library.register_fake(f"fastkd::{name}", fake)
    torch.library.impl(f"fastkd::{op}_eager", "CompositeExplicitAutograd", eager)
    torch.library.impl(f"fastkd::{op}_triton", _TRITON_KEY, triton)


def _relation_fwd(
    student: Tensor,
    teacher: Tensor,
    scope: str,
    normalize: bool,
    rectify: str,
    eps: float,
    algorithm: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    loss = student.new_empty((), dtype=accumulator(student, teacher))
    return loss, student.new_empty(student.shape if with_grad else (0,), dtype=stored_gradient(student))


_register(
    "relation",
    "relation_fwd",
    "(Tensor student, Tensor teacher, str scope, bool normalize, str rectify, float eps, str algorithm, bool with_grad)"
    " -> (Tensor loss, Tensor dstudent)",
    _relation_fwd,
)


def _moments_fwd(x: Tensor, per_image: bool) -> tuple[Tensor, Tensor]:
    shape = x.shape[:2] if per_image else x.shape[1:2]
    return x.new_empty(shape, dtype=accumulator(x)), x.new_empty(shape, dtype=accumulator(x))


def _moments_bwd(dmean: Tensor, dvar: Tensor, x: Tensor, mean: Tensor, per_image: bool) -> Tensor:
    return torch.empty_like(x)


_register("moments", "moments_fwd", "(Tensor x, bool per_image) -> (Tensor mean, Tensor var)", _moments_fwd)
_register(
    "moments",
    "moments_bwd",
    "(Tensor dmean, Tensor dvar, Tensor x, Tensor mean, bool per_image) -> Tensor dx",
    _moments_bwd,
)
