"""Writes into tensors as torch.compile sees them while it traces. It shows assignments (`x[i] = y`) to no mode.

Imported while torch.compile traces, for it imports its compiler.
"""

import operator
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.comptime import comptime

_answer: list[Any] = [None]  # of the question asked last, while tracing


def version(x: Tensor) -> tuple[str, int]:
    """Return the graph that is traced, and a number that grows with each write into the memory of x in it: by 2 with
    an assignment of a tensor, which has a node and a version.
    """
    comptime(_look_at_version)
    return _traced_graph(), int(_traced_answer())


def is_put_back(whole: Tensor, part: Tensor) -> bool:
    """Return whether the latest assignment into `whole` puts `part` where it was taken from."""
    comptime(_look_at_assignment)
    return bool(_traced_answer())


@torch.compiler.assume_constant_result
def _traced_answer() -> Any:
    return _answer[0]


@torch.compiler.assume_constant_result
def _traced_graph() -> str:
    return str(torch._guards.CompileContext.current_compile_id())


def _look_at_version(context: Any) -> None:
    x = context.get_local("x").as_fake()
    memory = x.untyped_storage()._cdata
    # Versions do not count an assignment through .data, nor before torch 2.14 one of a number.
    targets = [n.args[0].meta["example_value"] for n in context.graph().nodes if n.target is operator.setitem]
    assignments = sum(target.untyped_storage()._cdata == memory for target in targets)
    _answer[0] = assignments + (0 if x.is_inference() else x._version)


def _look_at_assignment(context: Any) -> None:
    whole, part = (context.get_local(name).as_fake() for name in ("whole", "part"))

    def holds(node: Any, x: Tensor) -> bool:
        return isinstance(node, torch.fx.Node) and node.meta.get("example_value") is x

    latest = [n for n in context.graph().nodes if n.target is operator.setitem and holds(n.args[0], whole)][-1:]
    _answer[0] = False
    for _, place, value in (node.args for node in latest):
        taken, waiting = [], [value] if holds(value, part) else []
        while waiting:
            node = waiting.pop()
            if node.target is operator.getitem and holds(node.args[0], whole):
                taken.append(node.args[1])
            else:
                waiting += [n for n in node.all_input_nodes if not holds(n, whole)]
        _answer[0] = taken == [place]
