"""Watch what a module computes and recognise attention in it: fused, or a softmax of a product of queries and keys.

While the module runs, only references are kept: the operands of the attention, and the operations that were applied to
its scores, as a chain of tuples (operation, the chain before it, operands). `_replay.py` reads the chain later. No
tensor is copied, and of the scores and maps nothing outlives the module. torch.compile traces all of this.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastkd.capture._hooks import Slot, State

Node = tuple[Any, ...]

_PRODUCTS = ("matmul", "__matmul__", "bmm")
_TIMES = ("mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply")
_OVER = ("div", "__truediv__", "div_", "__itruediv__", "true_divide", "divide")
_PLUS = ("add", "__add__", "__radd__", "add_", "__iadd__")
_MINUS = ("sub", "__sub__", "sub_", "__isub__", "subtract")
_FILL = ("masked_fill", "masked_fill_")
_SAME = ("to", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone")
_RESHAPES = ("view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten")
_TURNS = ("transpose", "swapaxes", "permute", "__get__", "movedim")
_MASKED = -1e4  # a score that is filled with less is one of a hidden key
_KEPT = 4  # tensors that are followed at a time


class Watch(TorchFunctionMode):
    """Recorder of the attention in a module's run; `slot` receives it, or the reason why there is none."""

    def __init__(self, slot: Slot, state: State, heads: int | None) -> None:
        self.slot = slot
        self.heads = heads
        self.state = state
        self.is_on = False
        self.shape: tuple[int, ...] = ()
        self.found: tuple[Node, ...] = ()
        self.reason = ""
        self.followed: list[tuple[Tensor, Node]] = []

    def start(self, shape: tuple[int, ...] = ()) -> None:
        self.found = ()
        self.reason = "runs no attention that capture knows: scaled_dot_product_attention, or softmax(q k^T)"
        self.shape = shape  # of the module's input
        if not self.is_on:
            self.is_on = True
            self.__enter__()

    def stop(self) -> None:
        self.followed = []
        self.found = ()
        if self.is_on:
            self.is_on = False
            self.__exit__(None, None, None)

    def finish(self) -> None:
        """Stop after a whole run."""
        if self.is_on and len(self.found) not in (1, self.heads):
            name, runs = self.slot.name, len(self.found)
            self.slot.refuse(several(name, runs) if runs else f"{name!r} {self.reason}")
        self.stop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            self._found(("sdpa", *_sdpa_arguments(*args, **kwargs)))
            return func(*args, **kwargs)
        if name == "multi_head_attention_forward":
            self._found(("mha", args, kwargs))
            return func(*args, **kwargs)
        output = func(*args, **kwargs)
        if name == "__setitem__":
            self._set_item(*args)
        elif isinstance(output, Tensor):
            self._see(name, args, kwargs, output)
        return output

    def _found(self, attention: tuple[Any, ...]) -> None:
        self.followed = []
        self.found = (*self.found, attention)
        self.slot.put((self.found, self.shape, torch.is_grad_enabled()), self.state)

    def _see(self, name: str, args: Any, kwargs: Any, output: Tensor) -> None:
        if name in _PRODUCTS and len(args) == 2:
            self._product(args[0], args[1], output)
        elif name == "einsum":
            self._einsum(args, output)
        elif name == "baddbmm" and len(args) == 3:
            scores = ("times", ("scores", _leaf(args[1]), _leaf(args[2])), kwargs.get("alpha", 1))
            added = args[0] if kwargs.get("beta", 1) == 1 else args[0] * kwargs["beta"]
            self._follow(output, ("plus", scores, added))
        elif name == "where" and len(args) == 3 and self._node(args[1]) is not None:
            self._advance(args[1], output, ("keep", self._node(args[1]), args[0], args[2]))
        else:
            self._applied(name, args, kwargs, output)

    def _applied(self, name: str, args: Any, kwargs: Any, output: Tensor) -> None:
        """See an operation on one followed tensor, or the scaling of a tensor that may be queries or keys."""
        x: Any = args[0] if args else None
        y: Any = args[1] if len(args) > 1 else None
        node, other = self._node(x), self._node(y)
        is_number = isinstance(y, (int, float))
        if other is not None and (node is None or _root(node) == "leaf") and (name in _TIMES or name in _PLUS):
            node, x, y = other, y, x
        if node is None:
            if name == "softmax":
                self.reason = "takes a softmax of something that is no product of queries and keys"
            elif is_number and isinstance(x, Tensor) and x.dim() > 2 and (name in _TIMES or name in _OVER):
                self._follow(output, _by_number(name, ("leaf", x), y))
            return
        root = _root(node)
        if name == "__getitem__" and root == "scores":
            self._follow(output, ("part", node, y))  # its whole is followed on
            return
        if name == "softmax" and root == "scores" and torch.compiler.is_compiling():
            node = self._assigned(node)
        after = _next(name, node, root, x, y, args, kwargs)
        if after[0] == "other" != node[0]:
            self._follow(output, after)  # it may be beside the way: the maximum that is subtracted from scores
        else:
            self._advance(x, output, after)

    def _product(self, left: Tensor, right: Tensor, output: Tensor) -> None:
        first, second = self._node(left), self._node(right)
        if first is not None and _root(first) == "map":
            self._applied_to_values(first, right, is_left=True)
        elif second is not None and _root(second) == "map":
            self._applied_to_values(second, left, is_left=False)
        elif left.dim() > 2 and right.dim() > 2:
            self._advance(right, output, ("scores", first or _leaf(left), second or _leaf(right)))
            self._drop(left)

    def _applied_to_values(self, node: Node, values: Tensor, is_left: bool) -> None:
        """See a map times its values, or the transposed values times the transposed map."""
        is_turned = False
        while node[0] == "turned":
            is_turned, node = not is_turned, node[1]
        if node[0] == "other":
            self.reason = f"changes its map after the softmax (by {node[2]}), so q and k alone do not make it"
        elif is_turned == is_left:
            self.reason = "applies its map along the queries, not the keys"
        elif _other(node[1]):
            self.reason = (
                f"changes its scores before the softmax (by {_other(node[1])}), so q and k do not make its map"
            )
        else:
            self._found(("map", node[1], values if is_left else values.transpose(-2, -1)))

    def _einsum(self, args: Any, output: Tensor) -> None:
        operands: Any = args[1:] if len(args) == 3 else args[1] if len(args) == 2 else ()
        if len(operands) != 2 or "." in args[0] or "->" not in args[0]:
            return
        inputs, result = args[0].replace(" ", "").split("->")
        a, b = inputs.split(",")
        for x, y, left, right in ((operands[0], operands[1], a, b), (operands[1], operands[0], b, a)):
            node = self._node(x)
            node = None if node is None or _root(node) != "map" else node
            shared = [c for c in left if c in right and c in result]
            inner = [c for c in left if c in right and c not in result]
            rows = [c for c in left if c not in right]
            columns = [c for c in right if c not in left]
            if len(inner) != 1 or len(rows) != 1 or len(columns) != 1 or not shared:
                continue
            order = [right.index(c) for c in (*shared, inner[0], columns[0])]
            if node is not None and left == "".join((*shared, rows[0], inner[0])):
                self._applied_to_values(node, y.permute(order), is_left=True)
                return
            if result == "".join((*shared, rows[0], columns[0])) and self._node(y) is None:
                x_order = [left.index(c) for c in (*shared, rows[0], inner[0])]
                q = ("leaf", x.permute(x_order)) if self._node(x) is None else None
                if q is None and x_order == list(range(len(x_order))):
                    q = self._node(x)
                if q is not None:
                    self._advance(x, output, ("scores", q, ("leaf", y.permute(order))))
                    return

    def _set_item(self, whole: Tensor, index: Any, value: Any) -> None:
        node, part = self._node(whole), self._node(value)
        if node is not None:
            made = ("other", node, "an assignment") if part is None else ("put", node, index, part)
            self._advance(value, whole, made)

    def _assigned(self, whole: Node) -> Node:
        """Return scores with the part of them that was taken and changed, for torch.compile hides its assignment."""
        for _, node in self.followed:
            if node[0] != "part" and _part(node) is not None:
                return ("put", whole, _part(node), node)
        return whole

    def _node(self, x: Any) -> Node | None:
        if isinstance(x, Tensor):
            for tensor, node in self.followed:
                if tensor is x:
                    return node
        return None

    def _follow(self, output: Tensor, node: Node) -> None:
        others = [entry for entry in self.followed if entry[0] is not output]
        self.followed = [*others[-_KEPT + 1 :], (output, node)]

    def _advance(self, before: Any, output: Tensor, node: Node) -> None:
        """Follow the output in the place of the tensor it was made of, which can then be freed."""
        self._drop(before)
        self._follow(output, node)

    def _drop(self, x: Any) -> None:
        self.followed = [entry for entry in self.followed if entry[0] is not x]


def _next(name: str, node: Node, root: str, x: Tensor, y: Any, args: Any, kwargs: Any) -> Node:
    """Return the chain after an operation on the followed tensor x; y is the other operand."""
    if name in _SAME or (node[0] == "other" and name != "softmax"):
        return node
    if root == "map":
        if name in _RESHAPES or name in ("dropout", "dropout_"):
            return node
        return ("turned", node) if name in _TURNS and _swaps_last(name, x, args[1:]) else ("other", node, name)
    if (name in _TIMES or name in _OVER) and isinstance(y, (int, float)):
        return _by_number(name, node, y)
    if name in _RESHAPES:
        return ("view", node, name, args[1:], kwargs)
    if root == "scores":
        return _scored(name, node, x, y, args, kwargs)
    if name in _TURNS:  # of the properties only T and mT are tensors
        return (
            ("view", node, "transpose", (-2, -1), {}) if name == "__get__" else ("view", node, name, args[1:], kwargs)
        )
    return ("other", node, name)


def _scored(name: str, node: Node, x: Tensor, y: Any, args: Any, kwargs: Any) -> Node:
    """Return the chain after an operation on scores."""
    if name == "softmax":
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        return ("map", node) if dim in (-1, x.dim() - 1) else ("map", ("other", node, "a softmax over queries"))
    if isinstance(y, Tensor) and (name in _TIMES or name in _OVER) and (y.dim() == 0 or y.shape[-1] == 1):
        return ("times" if name in _TIMES else "over", node, y)
    if (name in _PLUS or name in _MINUS) and "alpha" not in kwargs:
        return ("plus" if name in _PLUS else "minus", node, y)
    if name in _FILL and isinstance(args[2], (int, float)) and args[2] <= _MASKED:
        return ("fill", node, y, args[2])
    return ("other", node, name)


def _swaps_last(name: str, x: Tensor, dims: Any) -> bool:
    """Return whether an operation on x swaps its last two dimensions."""
    n = x.dim()
    if name == "__get__":
        return True
    if name == "permute":
        dims = dims[0] if len(dims) == 1 else dims
        return [d % n for d in dims] == [*range(n - 2), n - 1, n - 2]
    return name in ("transpose", "swapaxes") and sorted(d % n for d in dims) == [n - 2, n - 1]


def several(name: str, runs: int) -> str:
    return f"{name!r} runs {runs} attentions in one pass, whose maps are not heads of one"


def _by_number(name: str, node: Node, number: float) -> Node:
    return ("times" if name in _TIMES else "over", node, number)


def _leaf(x: Tensor) -> Node:
    return ("leaf", x)


def _root(node: Node) -> str:
    """Return what a chain began with: "leaf", "scores" or "map"."""
    while node[0] not in ("leaf", "scores", "map"):
        node = node[1]
    return str(node[0])


def _part(node: Node) -> Any:
    """Return the index of the part of the scores that a chain is about, None for all of them."""
    while node[0] not in ("leaf", "scores", "map", "put"):
        if node[0] == "part":
            return node[2]
        node = node[1]
    return None


def _other(node: Node) -> str:
    """Return the operation in a chain of scores that cannot be expressed by a scale and a bias, or ""."""
    while node[0] not in ("leaf", "scores"):
        if node[0] == "other":
            return str(node[2])
        if node[0] == "put" and _other(node[3]):
            return _other(node[3])
        node = node[1]
    return ""


def _sdpa_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Any, ...]:
    return query, key, value, attn_mask, is_causal, scale
