"""Tensors whose memory ends where a page begins that cannot be read or written, or begins where such a page ends.

`python -m tests._support.guards BACKEND` makes every call of calls.py on such tensors, of every dtype and in every
layout, and prints each before it starts: one that goes past its inputs ends the process.
"""

import ctypes
import itertools
import mmap
import os
import sys

import torch
from torch import Tensor

import fastkd
from tests._support.calls import LAYOUTS, runs

PAGE = mmap.PAGESIZE
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def guarded(x: Tensor, at_end: bool = True) -> Tensor:
    """The values of x in its strides, on a CPU, with a guard page right after its last element or before its first."""
    span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    size = span * x.element_size()
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (address, address + (pages + 1) * PAGE):
        if libc.mprotect(ctypes.c_void_p(guard), PAGE, 0) != 0:  # PROT_NONE
            raise OSError(ctypes.get_errno(), "mprotect")
    first = (pages + 1) * PAGE - size if at_end else PAGE
    flat = torch.frombuffer(memory, dtype=x.dtype, count=span, offset=first)
    flat.copy_(x.as_strided((span,), (1,)))  # what lies between its elements too
    return flat.as_strided(x.shape, x.stride(), 0)


def is_guarded() -> bool:
    """Return whether a process that reads past such a tensor ends; it is a fork of this one."""
    x = guarded(torch.ones(3))
    if (child := os.fork()) == 0:
        ctypes.string_at(x.data_ptr(), 13)
        os._exit(0)
    return ctypes.string_at(x.data_ptr(), 12) != b"" and os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main(backend: str) -> None:
    if not is_guarded():
        sys.exit("a guard page was read")
    layouts = {"contiguous": Tensor.contiguous} | LAYOUTS
    calls = [call for call, name in runs() if name == backend]
    made = 0
    for call, dtype in itertools.product(calls, DTYPES):
        if backend == "triton" and dtype == torch.float64:
            continue
        for (name, layout), at_end in itertools.product(layouts.items(), {True, dtype != torch.float32}):
            print(call, dtype, name, "end" if at_end else "start", file=sys.stderr)
            inputs = call.to(dtype).mapped(lambda x, f=layout, end=at_end: guarded(f(x), end))
            with fastkd.backend(backend):
                inputs.loss_and_gradients()
            made += 1
    print(made, "calls stayed within their inputs")


if __name__ == "__main__":
    main(sys.argv[1])
