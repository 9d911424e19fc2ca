"""Reads from a kernel in Triton's GPU dialect (TTGIR) how its matrix products are dealt to warps."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

# %c = op %a, %b, %acc ... : types of operands -> tensor<64x64xf32, #layout>
_PRODUCT = re.compile(r"^\s*(%[\w#:]+) = (?:ttng\.warp_group_dot|tt\.dot) %[\w#]+, %[\w#]+, (%[\w#]+).*? : (.*)$")
# In tensor memory, where a product has no layout: the third operand is what it is added to.
_TENSOR_MEMORY = re.compile(r"ttng\.tc_gen5_mma .*? : (!ttg\.memdesc<.*)$")
_CONVERSION = re.compile(
    r"(%[\w#]+) = ttg\.convert_layout %[\w#]+ : tensor<(\S+?), (.*?)> -> tensor<\S+?, (.*?)>(?: loc.*)?$"
)
_LAYOUT = re.compile(r"^(#\w+) = #ttg\.(\w+)<\{(.*)\}>$", re.MULTILINE)


@dataclass(frozen=True)
class Layout:
    """How the elements of a tensor lie in a block: per dimension, what all its warps hold without repetition."""

    kind: str
    warps: tuple[int, ...]
    held: tuple[int, ...]
    instruction: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        return self.kind in ("nvidia_mma", "amd_mfma", "amd_wmma")


@dataclass
class Products:
    """The matrix products of a kernel.

    instructions: shapes of the matrix instructions. duplicated: products that several warps compute, each all of it.
    converted: sums of products that go through shared memory in a loop. plain: products of 8 and 16 bits by scalar
    instructions. repeats: how often a product is computed, by its shape, where that is more than once.
    """

    instructions: set[str] = field(default_factory=set)
    duplicated: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)
    repeats: dict[str, int] = field(default_factory=dict)


def _layouts(code: str) -> Iterator[tuple[str, Layout]]:
    for name, kind, text in _LAYOUT.findall(code):
        sizes = {
            key: tuple(int(n) for n in values.split(",")) for key, values in re.findall(r"(\w+) = \[([\d, ]+)\]", text)
        }
        warps = sizes.get("warpsPerCTA", ())
        instruction = sizes.get("instrShape", ())
        one = instruction[:2] or sizes.get("threadsPerWarp", ())
        yield name, Layout(kind, warps, tuple(w * n for w, n in zip(warps, one, strict=False)), instruction)


def products(code: str) -> Products:
    """Return what the products of a kernel are, from its text in TTGIR."""
    layouts = dict(_layouts(code))
    found = Products()
    loops: list[int] = []  # indentation of those that a line is in
    conversions: dict[str, tuple[str, bool]] = {}
    added_to: set[str] = set()
    for line in code.splitlines():
        indent = len(line) - len(line.lstrip())
        if loops and line.strip().startswith("}") and indent == loops[-1]:
            loops.pop()
        if re.search(r"= scf\.(for|while) |^\s*scf\.(for|while) ", line):
            loops.append(indent)
        if match := _PRODUCT.match(line):
            _, accumulator, types = match.groups()
            operands, _, result = types.rpartition(" -> ")
            shape_text, layout_name = re.findall(r"tensor<([\dx]+)x[fi]\w+, (#\w+)>", result)[0]
            shape = tuple(int(n) for n in shape_text.split("x"))
            layout = layouts[layout_name]
            added_to.add(accumulator)
            if layout.is_matrix:
                found.instructions.add("x".join(map(str, layout.instruction)))
            elif re.search(r"x(bf16|f16|i8)\b", operands):
                found.plain.append(shape_text)
            if prod(shape) < prod(layout.held) or any(h > n for h, n in zip(layout.held, shape, strict=True)):
                found.duplicated.append(f"{shape_text} by {'x'.join(map(str, layout.warps))} warps")
                found.repeats[shape_text] = prod(-(-h // n) for h, n in zip(layout.held, shape, strict=True))
        elif match := _TENSOR_MEMORY.search(line):
            shape_text = re.findall(r"memdesc<([\dx]+)x[fi]32", match[1])
            found.instructions |= set(shape_text)
        elif (match := _CONVERSION.search(line)) and re.search("[fi]32", match[2]):
            name, shape_text, before, after = match.groups()
            a, b = (layouts.get(x) for x in (before, after))
            moves = a is not None and b is not None and (a.kind, a.warps) != (b.kind, b.warps)
            conversions[name] = (f"{shape_text} from {before} to {after}", bool(loops) and moves)
    found.converted = [text for name, (text, moves) in conversions.items() if moves and name in added_to]
    return found
