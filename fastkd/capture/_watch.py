"""Watch what a module computes and recognise attention in it: fused, or a softmax of a product of queries and keys.

While the module runs, only references are kept: the operands of the attention, and the operations that were applied to
its scores, as a chain of tuples (operation, the chain before it, operands). `_replay.py` reads the chain later. No
tensor is copied, and of the scores and maps nothing outlives the module. torch.compile traces all of this.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastkd.capture._hooks import Slot, State, Version, is_written, version

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
        self.followed: list[
            tuple[Tensor, Node, Version, int]
        ] = []  # with the version that the chain describes, and a key
        self.keys = 0
        self.held: tuple[tuple[Tensor, Version], ...] = ()

    def start(self, shape: tuple[int, ...] = ()) -> None:
        self.found = ()
        self.reason = "runs no attention that capture knows: scaled_dot_product_attention, or softmax(q k^T)"
        self.shape = shape  # of the module's input
        if not self.is_on:
            self.is_on = True
            self.__enter__()

    def stop(self) -> None:
        self.followed = []
        self.held = ()
        self.found = ()
        if self.is_on:
            self.is_on = False
            self.__exit__(None, None, None)

    def finish(self) -> None:
        """Stop after a whole run."""
        name, runs = self.slot.name, len(self.found)
        if self.is_on and runs not in (1, self.heads):
            self.slot.refuse(several(name, runs) if runs else f"{name!r} {self.reason}")
        elif torch.compiler.is_dynamo_compiling() and any(is_written(x, seen) for x, seen in self.held):
            # A traced graph returns what its tensors are at the end.
            self.slot.refuse(f"{name!r} overwrites an operand of its attention in place after it ran")
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
        for x in args[1] if name == "einsum" and isinstance(args[1], (list, tuple)) else args:
            self._check_version(x)
        output = func(*args, **kwargs)
        if name == "__setitem__":
            self._set_item(*args)
        elif isinstance(output, Tensor):
            self._see(name, args, kwargs, output)
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            self._check_aliases(name, args, kwargs)
        return output

    def _check_version(self, x: Any) -> None:
        """See a write into a followed tensor that was not shown: through a view, or an assignment in torch.compile."""
        if not isinstance(x, Tensor):
            return
        for tensor, node, seen, key in self.followed:
            if tensor is x and is_written(x, seen):
                part = self._part_put_back(x, seen)
                self._follow(
                    x, ("other", node, "an assignment") if part is None else ("put", node, part[1][2], part[0])
                )
                return
            if tensor is x:
                for y, data, then, _ in self.followed:  # .data has versions of its own
                    if data[0] == "other" and data[1][0] == "part" and data[1][3] == key and is_written(y, then):
                        self._follow(x, ("other", node, "an assignment"))
                return

    def _part_put_back(self, x: Tensor, seen: Version) -> tuple[Node, Node] | None:
        """Return the changed part that the only unseen assignment puts back into scores, and where it was taken."""
        if torch.compiler.is_dynamo_compiling() and version(x)[1] == seen[1] + 2:
            from fastkd.capture._traced import is_put_back

            for part, node, _, _ in self.followed:
                taken = _part(node)
                if taken is not None and node[0] != "part" and is_put_back(x, part):
                    return node, taken
        return None

    def _check_aliases(self, name: str, args: Any, kwargs: Any) -> None:
        """See a write into the memory of a followed tensor by its address: inference mode counts no versions."""
        x = kwargs.get("out", args[0] if args else None)
        is_write = "out" in kwargs or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if is_write and isinstance(x, Tensor):
            address = x.untyped_storage().data_ptr()
            for tensor, node, _, _ in self.followed:
                is_put = node[0] == "put" and node[3] is self._node(x)
                if tensor is not x and not is_put and tensor.untyped_storage().data_ptr() == address:
                    self._follow(tensor, ("other", node, "an assignment"))

    def _found(self, attention: tuple[Any, ...]) -> None:
        self.followed = []
        self.found = (*self.found, attention)
        held: list[tuple[Tensor, Version]] = []
        for one in self.found:
            _hold(one, held)
        self.slot.put((self.found, self.shape, torch.is_grad_enabled()), self.state, tuple(held))
        if torch.compiler.is_dynamo_compiling():
            self.held = tuple(held)

    def _see(self, name: str, args: Any, kwargs: Any, output: Tensor) -> None:
        if name in _PRODUCTS and len(args) == 2:
            self._product(args[0], args[1], output)
        elif name == "einsum":
            self._einsum(args, output)
        elif name == "baddbmm" and len(args) == 3:
            product = ("scores", _leaf(args[1]), _leaf(args[2]))
            scores = ("times", product, kwargs.get("alpha", 1))
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
            elif (
                is_number
                and isinstance(x, Tensor)
                and x.dim() > 2
                and x is not output
                and (name in _TIMES or name in _OVER)
            ):
                self._follow(output, _by_number(name, _leaf(x), y))
            return
        root = _root(node)
        if name == "__get__" and not _is_turned(x, output):
            name = "detach"  # .data
        if root == "scores" and (name == "__getitem__" or name == "detach"):  # the whole is followed on
            key = next(key for tensor, _, _, key in self.followed if tensor is x)
            part = ("part", node, y if name == "__getitem__" else ..., key)
            self._follow(output, part if name == "__getitem__" else ("other", part, name))
            return
        after = _next(name, node, root, x, y, args, kwargs)
        if output is x:
            self._write_through(node, after)
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
            self._advance(right, output, ("scores", _operand(left, first), _operand(right, second)))
            self._drop(left)

    def _write_through(self, node: Node, after: Node) -> None:
        """See a write into a view of followed scores in the scores as well."""
        part = _part(node)
        for tensor, whole, _, key in self.followed:
            if part is not None and part[3] == key and _is_view(part[2]):
                made = ("put", whole, part[2], after)
                self._follow(tensor, made)
                self._write_through(whole, made)
                return

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
            if result == "".join((*shared, rows[0], columns[0])):
                x_order = [left.index(c) for c in (*shared, rows[0], inner[0])]
                is_ordered = x_order == list(range(len(x_order)))
                q = _operand(x, self._node(x)) if is_ordered else _leaf(x.permute(x_order))
                self._advance(x, output, ("scores", q, _leaf(y.permute(order))))
                return

    def _set_item(self, whole: Tensor, index: Any, value: Any) -> None:
        node, part = self._node(whole), self._node(value)
        if node is None:
            return
        if node[0] == "put" and node[3] is part:  # `scores[i] += x` has changed the view already
            self._follow(whole, node)
            return
        taken = None if part is None else _part(part)
        is_back = taken is not None and taken[1] is node and _is_same(taken[2], index)  # Dynamo shows none
        made = ("put", node, index, part) if is_back else ("other", node, "an assignment")
        self._write_through(node, made)
        self._advance(value, whole, made)

    def _node(self, x: Any) -> Node | None:
        if isinstance(x, Tensor):
            for tensor, node, _, _ in self.followed:
                if tensor is x:
                    return node
        return None

    def _follow(self, output: Tensor, node: Node) -> None:
        others = [entry for entry in self.followed if entry[0] is not output]
        self.keys += 1
        self.followed = [*others[-_KEPT + 1 :], (output, node, version(output), self.keys)]

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
    return ("leaf", x, version(x))


def _operand(x: Tensor, node: Node | None) -> Node:
    """Return the chain of an operand of a product as far as it is a scale and a layout."""
    above = node
    while above is not None and above[0] in ("times", "over", "view"):
        above = above[1]
    return _leaf(x) if node is None or above is None or above[0] != "leaf" else node


def _hold(node: Any, held: list[tuple[Tensor, Version]]) -> None:
    """Collect the tensors of a chain with the versions that it describes."""
    if isinstance(node, Tensor):
        held.append((node, version(node)))
    elif isinstance(node, tuple) and len(node) == 3 and node[0] == "leaf":
        held.append((node[1], node[2]))
    elif isinstance(node, (tuple, list)):
        for item in node:
            _hold(item, held)
    elif isinstance(node, dict):
        for item in node.values():
            _hold(item, held)


def _is_turned(x: Tensor, output: Tensor) -> bool:
    """Return whether a property of x is its transpose (T, mT), and not its data."""
    return output.stride()[-2:] == x.stride()[-2:][::-1] and output.shape[-2:] == x.shape[-2:][::-1]


def _is_view(index: Any) -> bool:
    """Return whether an index gives a view."""
    return not any(isinstance(i, (Tensor, list, bool)) for i in (index if isinstance(index, tuple) else (index,)))


def _is_same(one: Any, other: Any) -> bool:
    """Return whether two indices are the same; a tensor is the same as itself."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(_is_same(x, y) for x, y in zip(one, other, strict=True))
    return one is other or (not (isinstance(one, Tensor) or isinstance(other, Tensor)) and bool(one == other))


def _root(node: Node) -> str:
    """Return what a chain began with: "leaf", "scores" or "map"."""
    while node[0] not in ("leaf", "scores", "map"):
        node = node[1]
    return str(node[0])


def _part(node: Node) -> Node | None:
    """Return where a chain takes the part of the scores that it is about, None if it is about all of them."""
    while node[0] not in ("leaf", "scores", "map", "put"):
        if node[0] == "part":
            return node
        node = node[1]
    return None


def _other(node: Node) -> str:
    """Return the operation in a chain of scores that cannot be expressed by a scale and a bias, or ""."""
    while node[0] not in ("leaf", "scores"):
        if node[0] == "other":
            return str(node[2])
        if node[0] == "put" and (_other(node[3]) or _is_scaled(node[3])):
            return _other(node[3]) or "the scale of a part"
        node = node[1]
    return ""


def _is_scaled(part: Node) -> bool:
    """Return whether a part of the scores was scaled since it was taken."""
    while part[0] != "part":
        if part[0] in ("times", "over"):
            return True
        part = part[1]
    return False


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
