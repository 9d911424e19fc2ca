"""Runs a kernel in Triton's machine-independent form (TTIR) without values, and counts what it does.

Only integers are computed, and of those only what decides: bounds of loops, conditions, masks, the tensor that a
pointer belongs to. Floating-point numbers and whatever is loaded are unknown. An unknown condition holds, and an
unknown mask lets every element pass. What nothing uses, the compiler has removed by then.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

_NAME = r"%[\w.]+(?:#\d+)?"
_OP = re.compile(r"^(?:(%[\w.]+)(?::(\d+))? = )?\"?([a-z_]+\.[\w.]+)\"?(.*)$")
_TYPE = re.compile(r"tensor<((?:\d+x)+)(!tt\.ptr<\w+>|\w+)>|(!tt\.ptr<\w+>|\b[if]\d+\b|\bbf16\b)")
_FOR = re.compile(rf"^ ({_NAME}) = ({_NAME}) to ({_NAME}) step ({_NAME})")
LIMIT = 64  # programs of a launch that are run; of more, so many at equal distances stand for all
_GOLDEN = 0.6180339887498949

# How 32-bit matrices are multiplied: by which unit, and how often.
_PRECISIONS = {"ieee": ("float32", 1), "tf32": ("tf32", 1), "tf32x3": ("tf32", 3)} | {
    f"bf16x{n}": ("16-bit", n) for n in (3, 6)
}

Value = Any  # an int, an array of ints or booleans, a Pointer, or None: unknown


class Pointer(NamedTuple):
    """An address in the tensor of this argument."""

    argument: str


class Type(NamedTuple):
    """A tensor's shape, () of one number, and the type of its elements."""

    shape: tuple[int, ...]
    element: str

    @property
    def bytes(self) -> int:
        """Return the bytes of an element, or of what an address points to."""
        return max(int(re.findall(r"\d+", self.element)[0]) // 8, 1)


@dataclass
class Op:
    """An operation: its results and operands by name, its text, the types that end it, and the blocks inside it.

    arguments: of a loop's block, its variable and what it carries along.
    """

    name: str
    results: list[str]
    operands: list[str]
    text: str
    types: list[Type]
    blocks: list[list[Op]] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)


@dataclass
class Counts:
    """The work of programs: bytes by argument, operations of products by (unit, shape of the result), exponentials."""

    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    flops: Counter[tuple[str, str]] = field(default_factory=Counter)
    exponentials: int = 0


def _types(text: str) -> list[Type]:
    return [
        Type(tuple(int(n) for n in shape.split("x")[:-1]), element or scalar)
        for shape, element, scalar in _TYPE.findall(text)
    ]


def _block(lines: Iterator[str]) -> tuple[list[Op], str]:
    """Return the operations of a block and the line that closes it."""
    block: list[Op] = []
    for line in lines:
        if line.startswith("}"):
            return block, line
        match = _OP.match(line)
        if match is None:
            continue
        result, several, name, text = match.groups()
        results = [] if result is None else [f"{result}#{i}" for i in range(int(several))] if several else [result]
        op = Op(name, results, re.findall(_NAME, text), text, _types(text.rpartition(" : ")[2]))
        if name == "scf.for":
            loop = _FOR.match(text)
            assert loop is not None, line
            carried = re.findall(rf"({_NAME}) = ({_NAME})", text)[1:]
            op.arguments = [loop[1], *(inner for inner, _ in carried)]
            op.operands = [loop[2], loop[3], loop[4], *(outer for _, outer in carried)]
        if text.endswith("{"):
            closed = "} else {"
            while closed == "} else {":
                inner, closed = _block(lines)
                op.blocks.append(inner)
            if name == "tt.reduce":
                op.types = _types(closed)
        block.append(op)
    return block, ""


def _quotient(a: Value, b: Value) -> Value:
    """a / b rounded towards 0, as machines do."""
    return np.sign(a) * np.sign(b) * (abs(a) // abs(b))


_INTEGERS: dict[str, Callable[[Value, Value], Value]] = {
    "arith.addi": operator.add,
    "arith.subi": operator.sub,
    "arith.muli": operator.mul,
    "arith.divsi": _quotient,
    "arith.remsi": lambda a, b: a - b * _quotient(a, b),
    "arith.minsi": np.minimum,
    "arith.maxsi": np.maximum,
    "arith.xori": operator.xor,
    "arith.ori": operator.or_,
    "arith.andi": operator.and_,
    **{f"arith.cmpi {name}": getattr(operator, name) for name in ("eq", "ne")},
    **{f"arith.cmpi s{name}": getattr(operator, name) for name in ("lt", "le", "gt", "ge")},
    **{f"arith.cmpi u{name}": getattr(operator, name) for name in ("lt", "le", "gt", "ge")},
}
_FIRST = {"tt.addptr", "arith.extsi", "arith.extui", "arith.trunci", "arith.index_cast", "tt.reshape", "tt.splat",
          "tt.broadcast", "tt.expand_dims", "tt.trans"}  # fmt: skip
"""Operations whose result is the first operand in another shape or type, or as far as it is known here."""


def _shaped(op: Op, value: Value) -> Value:
    """Return the first operand in the shape of the result. Pointers have none here."""
    if value is None or isinstance(value, Pointer) or op.name not in _SHAPED:
        return value
    return _SHAPED[op.name](op, value)


_SHAPED: dict[str, Callable[[Op, Value], Value]] = {
    "tt.splat": lambda op, value: np.broadcast_to(value, op.types[-1].shape),
    "tt.broadcast": lambda op, value: np.broadcast_to(value, op.types[-1].shape),
    "tt.expand_dims": lambda op, value: np.expand_dims(value, int(re.findall(r"axis = (\d+)", op.text)[0])),
    "tt.reshape": lambda op, value: np.reshape(value, op.types[-1].shape),
    "tt.trans": lambda op, value: np.transpose(
        value, [int(n) for n in re.findall(r"i32: ([\d, ]+)", op.text)[0].split(",")]
    ),
}


class Program:
    """A kernel, from its text and the names of its arguments, which Triton's versions print in several ways."""

    def __init__(self, text: str, names: Sequence[str]) -> None:
        lines = (re.sub(r" loc\(.*\)$", "", line.strip()) for line in text.splitlines())
        head = next(line for line in text.splitlines() if "tt.func" in line)
        printed = re.findall(r"(%[\w.]+): (!tt\.ptr<\w+>|\w+)", head)
        self.arguments = [(name, kind) for name, (_, kind) in zip(names, printed, strict=True)]
        self.printed = [name for name, _ in printed]
        while not next(lines).startswith("tt.func"):
            pass
        self.body, _ = _block(lines)
        self.needed: set[str] = set()
        while not self._mark(self.body):
            pass

    def _mark(self, block: list[Op]) -> bool:
        """Add to `needed` what decides, from the end to the beginning. Return whether nothing was new."""
        before = len(self.needed)
        for op in reversed(block):
            if op.name == "scf.for":
                inner = op.blocks[0]
                ends = inner[-1].operands if inner and inner[-1].name == "scf.yield" else []
                self.needed.update(op.operands[:3])
                for argument, start, end, result in zip(
                    op.arguments[1:], op.operands[3:], ends, op.results, strict=True
                ):
                    if argument in self.needed or result in self.needed:
                        self.needed.update((argument, start, end, result))
                self._mark(inner)
            elif op.name == "scf.if":
                self.needed.add(op.operands[0])
                for inner in op.blocks:
                    if op.results:
                        self.needed |= {
                            end for end, r in zip(inner[-1].operands, op.results, strict=True) if r in self.needed
                        }
                    self._mark(inner)
            elif op.name in ("tt.load", "tt.store"):
                self.needed.update(op.operands[:1], op.operands[1 + (op.name == "tt.store") :][:1])
            elif op.results and op.results[0] in self.needed:
                self.needed.update(op.operands[:1] if op.name in _FIRST else op.operands if _is_known(op) else [])
        return len(self.needed) == before

    def count(self, values: Mapping[str, Any], grid: tuple[int, ...]) -> Counts:
        """Return what the programs of a grid do, from the arguments that are whole numbers, by name.

        Of a large grid some programs stand for all.
        """
        x, y, z = (*grid, 1, 1)[:3]
        total = x * y * z
        run = min(total, LIMIT)
        # One program of each of equal parts, each at another place in its part.
        chosen = sorted({int((i + i * _GOLDEN % 1) * total / run) for i in range(run)}) if total > run else range(total)
        counts = Counts()
        start = {
            printed: Pointer(name) if "ptr" in kind else values.get(name)
            for printed, (name, kind) in zip(self.printed, self.arguments, strict=True)
        }
        for at in chosen:
            place = {"x": at % x, "y": at // x % y, "z": at // (x * y)}
            sizes = {"x": x, "y": y, "z": z}
            _Run(self.needed, place, sizes, counts).block(self.body, dict(start))
        times = total / len(chosen)
        for counter in (counts.read, counts.written, counts.flops):
            for key in counter:
                counter[key] = round(counter[key] * times)  # type: ignore[index]
        counts.exponentials = round(counts.exponentials * times)
        return counts


def _is_known(op: Op) -> bool:
    """Return whether the result follows from whole numbers."""
    name = _integer(op)
    return name in _INTEGERS or name in _FIRST or name == "arith.select"


def _integer(op: Op) -> str:
    return f"{op.name} {op.text.split(',')[0].strip()}" if op.name == "arith.cmpi" else op.name


@dataclass
class _Run:
    """A run of one program."""

    needed: set[str]
    place: dict[str, int]
    sizes: dict[str, int]
    counts: Counts

    def block(self, block: list[Op], known: dict[str, Value]) -> list[Value]:
        """Run operations, and return what the block yields."""
        for op in block:
            if op.name == "scf.for":
                self._loop(op, known)
            elif op.name == "scf.if":
                held = known[op.operands[0]]
                chosen = op.blocks[0] if held is None or held else (op.blocks[1:] or [[]])[0]
                known.update(zip(op.results, self.block(chosen, known), strict=False))
            elif op.name == "scf.yield":
                return [known.get(name) for name in op.operands]
            elif op.name in ("tt.load", "tt.store"):
                self._moved(op, known)
            elif op.name == "tt.dot":
                self._product(op)
            elif op.name in ("math.exp", "math.exp2"):
                self.counts.exponentials += int(np.prod(op.types[-1].shape))
            elif op.results and op.results[0] in self.needed:
                known[op.results[0]] = self._value(op, known)
        return []

    def _loop(self, op: Op, known: dict[str, Value]) -> None:
        begin, end, step, *carried = (known.get(name) for name in op.operands)
        for i in range(*(int(x) for x in (begin, end, step))):  # type: ignore[arg-type]
            known[op.arguments[0]] = i
            known.update(zip(op.arguments[1:], carried, strict=True))
            carried = self.block(op.blocks[0], known)
        known.update(zip(op.results, carried, strict=True))

    def _moved(self, op: Op, known: dict[str, Value]) -> None:
        pointer, *rest = op.operands
        mask = known.get(rest[op.name == "tt.store"]) if len(rest) > (op.name == "tt.store") else None
        type_ = op.types[-1]
        size = int(np.prod(type_.shape)) if mask is None else int(np.count_nonzero(mask))
        side = self.counts.read if op.name == "tt.load" else self.counts.written
        side[known[pointer].argument] += size * type_.bytes

    def _product(self, op: Op) -> None:
        a, _, result = op.types
        unit, times = {8: ("8-bit", 1), 16: ("16-bit", 1), 64: ("float64", 1)}.get(8 * a.bytes) or _PRECISIONS[
            (re.findall(r"inputPrecision = (\w+)", op.text) or ["ieee"])[0]
        ]
        shape = "x".join(map(str, result.shape))
        self.counts.flops[unit, shape] += 2 * times * int(np.prod(result.shape)) * a.shape[-1]

    def _value(self, op: Op, known: dict[str, Value]) -> Value:
        if op.name == "arith.constant":
            return _constant(op)
        if op.name == "tt.make_range":
            return np.arange(*sorted(int(n) for n in re.findall(r"= (\d+) : i32", op.text)))
        if op.name in ("tt.get_program_id", "tt.get_num_programs"):
            return (self.place if op.name == "tt.get_program_id" else self.sizes)[op.text.split()[0]]
        values = [known.get(name) for name in op.operands]
        if op.name in _FIRST:
            return _shaped(op, values[0])
        if op.name == "arith.select":
            held, a, b = values
            if held is None or a is None or b is None:
                return a if isinstance(a, Pointer) else None
            return (a if held else b) if np.ndim(held) == 0 else np.where(held, a, b)
        function = _INTEGERS.get(_integer(op))
        if function is None:
            return None
        if any(value is None for value in values):
            # Of a condition in two parts, the one that is known.
            both = op.name == "arith.andi" and op.types[-1].element == "i1"
            return next((value for value in values if value is not None), None) if both else None
        return function(*values)


def _constant(op: Op) -> Value:
    """Return a whole number or a flag; other constants are unknown."""
    type_ = op.types[-1] if op.types else Type((), "i1")
    text = re.findall(r"^ (?:dense<)?(-?\d+|true|false)(?:>| :|$)", op.text)
    if not text or type_.element[0] != "i":
        return None
    value = text[0] == "true" if text[0] in ("true", "false") else int(text[0])
    return np.full(type_.shape, value) if type_.shape else value
