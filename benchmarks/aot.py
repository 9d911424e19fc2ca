"""Compiler report on every GPU kernel, and the work that the cases make a GPU do: python -m benchmarks aot.

No GPU is needed: Triton's configurations are compiled for each architecture, CUDA kernels are read from a built
extension. A kernel fails if it spills, needs more shared memory than a block can have, or multiplies 16-bit matrices
without a matrix instruction. Occupancy is only reported: kernels that use warp groups are expected to run at 12%.
"""

import argparse
import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from benchmarks import report
from benchmarks.case import Case
from benchmarks.cases import CASES
from benchmarks.products import products

if TYPE_CHECKING:
    from benchmarks.dry_driver import Specialisation  # needs Triton

ROOT = Path(__file__).parent.parent
MOST_SPILLED = 64  # bytes per thread, outside the innermost loops
TENSOR_MEMORY = 512  # columns of a block, where there are any


class Card(NamedTuple):
    """Peak rates of a GPU, from the maker's data sheet: bytes/s of memory, FLOP/s without sparsity."""

    name: str
    bandwidth: float
    matrix16: float
    float32: float


CARDS = (
    Card("A100 80GB SXM", 2.039e12, 312e12, 19.5e12),
    Card("H100 SXM", 3.35e12, 989e12, 67e12),
    Card("H200 SXM", 4.8e12, 989e12, 67e12),
    Card("B200", 8.0e12, 2250e12, 75e12),
    Card("MI300X", 5.3e12, 1307e12, 163.4e12),
)


class Unit(NamedTuple):
    """Limits of a multiprocessor: registers and their granularity per warp, warps, blocks, and bytes of shared memory.

    A block takes `reserved` bytes of shared memory more than it requests; the last field is the most it may request.
    """

    registers: int
    granularity: int
    warps: int
    blocks: int
    shared: int
    reserved: int
    shared_block: int
    lanes: int


UNITS = {
    # What is compiled for sm_80 also runs on consumer cards (compute capability 8.6 to 12.x), whose blocks have 99 KB.
    "sm_80": Unit(65_536, 256, 64, 32, 167_936, 1024, 101_376, 32),
    "sm_90": Unit(65_536, 256, 64, 32, 233_472, 1024, 232_448, 32),
    "sm_100": Unit(65_536, 256, 64, 32, 233_472, 1024, 232_448, 32),
    "gfx942": Unit(4 * 512 * 64, 8 * 64, 32, 32, 65_536, 0, 65_536, 64),  # four SIMDs of eight waves
}

THREADS = 256  # kThreads of every file in csrc/cuda

MATRIX = {
    "HGMMA": "wgmma",
    "IGMMA": "wgmma",
    "HMMA": "mma",
    "IMMA": "mma",
    "UTCHMMA": "tcgen05",
    "UTCIMMA": "tcgen05",
    "DMMA": "mma float64",
    "v_mfma": "mfma",
}
"""Matrix instructions by the name they have in machine code."""


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel.

    registers: number per thread. stack: bytes per thread. shared: bytes per block.
    spills: loads and stores of spilled registers; looped: those in innermost loops.
    occupancy: share of the warps that a multiprocessor can hold. matrix: the matrix instruction; products: its number.
    loads: instructions that read global memory; wide: those that read 16 bytes per lane, or a tile.
    copies: those that write to shared memory while the warps go on. barriers: instructions that wait for all warps.
    multiplies16: the source has a product of 16-bit or 8-bit matrices. shapes: of matrix instructions, or of products
    in tensor memory, of which tensor_memory columns are used. duplicated, converted, plain: as Products has them.
    """

    stem: str
    kernel: str
    target: str
    types: str
    options: str
    threads: int
    registers: int
    stack: int
    spills: int
    looped: int
    shared: int
    occupancy: float
    matrix: str
    products: int
    loads: int
    wide: int
    copies: int
    barriers: int
    multiplies16: bool
    tensor_memory: int = 0
    shapes: str = ""
    duplicated: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        found = []
        most = UNITS[self.target].shared_block
        if self.looped and "double" not in self.types:  # float64 is used for checks, not for training
            found.append(f"{self.looped} spilled registers move in an innermost loop")
        if self.spills and self.stack > MOST_SPILLED:
            found.append(f"{self.stack} bytes a thread spilled, {MOST_SPILLED} are allowed")
        if self.shared > most:
            found.append(f"{self.shared} bytes of shared memory, a block can have {most}")
        if (self.multiplies16 and not self.matrix and not self.shapes) or self.plain:
            found.append(f"narrow matrices multiplied without a matrix instruction {' '.join(self.plain)}".strip())
        if self.tensor_memory > TENSOR_MEMORY:
            found.append(f"{self.tensor_memory} columns of tensor memory, a block can have {TENSOR_MEMORY}")
        found += [f"product duplicated: {product}" for product in self.duplicated]
        found += [f"sum moved through shared memory in a loop: {moved}" for moved in self.converted]
        return found

    def __str__(self) -> str:
        return f"{self.target} {self.kernel} {self.types} {self.options}".strip()


def blocks(target: str, registers: int, shared: int, threads: int) -> int:
    """Return the number of blocks that a multiprocessor holds at once."""
    unit = UNITS[target]
    warps = -(-threads // unit.lanes)
    of_warp = -(-max(registers, 1) * unit.lanes // unit.granularity) * unit.granularity
    by_registers = unit.registers // of_warp // warps
    by_shared = unit.shared // (shared + unit.reserved) if shared + unit.reserved else unit.blocks
    return min(by_registers, by_shared, unit.warps // warps, unit.blocks)


def occupancy(target: str, registers: int, shared: int, threads: int) -> float:
    """Return the share of a multiprocessor's warps that can be resident at once."""
    unit = UNITS[target]
    return blocks(target, registers, shared, threads) * -(-threads // unit.lanes) / unit.warps


@cache
def _cuobjdump() -> str:
    """Return the path of cuobjdump, from Triton's package or, without it, from PATH."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return "cuobjdump"
    return str(Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump")


def _dump(path: Path, *options: str) -> str:
    command = [_cuobjdump(), *options, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _nvidia(code: str) -> dict[str, Any]:
    """Return the counted instructions of SASS."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(.*?);", code)
    names = [name for _, name, _ in lines]
    at = [(int(address, 16), name.split(".")[0], operands) for address, name, operands in lines]
    back = [
        (int(to, 16), here)
        for here, name, operands in at
        if name == "BRA"
        for to in re.findall(r"0x([0-9a-f]+)", operands)[-1:]
        if int(to, 16) < here
    ]
    inner = [(a, b) for a, b in back if not any((c, d) != (a, b) and a <= c and d <= b for c, d in back)]
    spills = [here for here, name, _ in at if name in ("LDL", "STL")]
    loads = [n for n in names if re.match(r"(LDG|LDGSTS)\.|UTMALDG|UBLKCP", n)]
    matrix = [n.split(".")[0] for n in names if n.split(".")[0] in MATRIX]
    return {
        "spills": len(spills),
        "looped": sum(any(a <= here < b for a, b in inner) for here in spills),
        "matrix": MATRIX[matrix[0]] if matrix else "",
        "products": len(matrix),
        "loads": len(loads),
        "wide": sum(".128" in n or n.startswith("U") for n in loads),
        "copies": sum(not n.startswith("LDG.") for n in loads),
        "barriers": sum(n.startswith("BAR.") for n in names),
    }


def _amd(code: str) -> dict[str, Any]:
    """Return the counted instructions of amdgcn assembly, and the registers from its metadata."""
    loads = re.findall(r"\b(?:global|buffer)_load_(\w+)", code)
    products = len(re.findall(r"\bv_mfma\w*", code))

    def count(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", code)
        return int(found[1]) if found else 0

    return {
        "registers": count("vgpr_count"),
        "stack": count("private_segment_fixed_size"),
        "spills": count("vgpr_spill_count"),
        "looped": 0,
        "matrix": MATRIX["v_mfma"] if products else "",
        "products": products,
        "loads": len(loads),
        "wide": sum(name.startswith("dwordx4") for name in loads),
        "copies": sum(name.startswith("lds_") for name in loads),
        "barriers": len(re.findall(r"\bs_barrier\b", code)),
    }


def _usage(text: str) -> tuple[int, int, int]:
    """Return registers, bytes of stack and bytes of static shared memory."""
    registers, stack, shared = (int(x) for x in re.findall(r"(?:REG|STACK|SHARED):(\d+)", text)[:3])
    return registers, stack, shared


def inspect(kernel: "Specialisation", is_brief: bool = False) -> Kernel:
    """Compile a Triton kernel and return the report on it. A brief one counts no instructions where nothing spills:
    disassembling takes as long as compiling."""
    compiled, target = kernel.compile(), kernel.target
    asm, meta, shared = compiled.asm, compiled.metadata, compiled.metadata.shared
    if target.startswith("sm"):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(asm["cubin"])
            file.flush()
            registers, stack, _ = _usage(_dump(Path(file.name), "-res-usage"))
            code = "" if is_brief and not stack else _dump(Path(file.name), "-sass")
            found = {"registers": registers, "stack": stack, **_nvidia(code)}
    else:
        found = _amd(asm["amdgcn"])
    threads = meta.num_warps * UNITS[target].lanes
    # Only the tensors of the formula have names of one letter; all others are float32 intermediates.
    types = kernel.types(r"[a-z](_[st])?_ptrs?|student|teacher|network")
    shown = {p.name: kernel.constexprs[p.name] for p in kernel.function.params if p.is_constexpr}
    shown |= {"num_warps": meta.num_warps, "num_stages": meta.num_stages}
    matrices = products(asm["ttgir"])
    return Kernel(
        stem=kernel.function.fn.__module__.rpartition(".")[2].strip("_").split("_")[0],
        kernel=kernel.name.strip("_").removesuffix("_kernel"),
        target=target,
        types="/".join(types) or "fp32",
        options=", ".join(f"{k}={v}" for k, v in shown.items()),
        threads=threads,
        shared=shared,
        occupancy=occupancy(target, found["registers"], shared, threads),
        tensor_memory=getattr(meta, "tmem_size", 0) or 0,
        multiplies16=bool(re.search(r"tt\.dot\w* .*: tensor<\w+x(bf16|f16|i8)>", asm["ttir"])),
        shapes=" ".join(sorted(matrices.instructions)),
        duplicated=matrices.duplicated,
        converted=matrices.converted,
        plain=matrices.plain,
        **found,
    )


def _recorded() -> Any:
    """Return the module tests/_support/aot.py, which has the calls whose launches are compiled."""
    return importlib.import_module("tests._support.aot")


def _compile(of: str, number: int) -> Kernel:
    chosen, others = _recorded().cover(of)
    return inspect([*chosen, *others][number])


def triton_kernels(jobs: int, is_all: bool) -> Iterator[Kernel]:
    """Yield reports on what make test compiles, or on all that the calls launch."""
    recorded = _recorded()
    many = {of: [len(kernels) for kernels in recorded.cover(of)] for of in (*recorded.STEMS, "rest")}
    todo = [(of, number) for of, (few, others) in many.items() for number in range(few + others * is_all)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_compile, *zip(*todo, strict=True))


def _demangle(names: list[str]) -> list[str]:
    """Return the name and the template arguments of each kernel."""
    try:
        run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    except OSError:
        return names
    return [
        re.sub(r"\(anonymous namespace\)::|fastkd::|^void ", "", line.split(">(")[0])
        for line in run.stdout.splitlines()
    ]


@cache
def _bodies(extension: Path, target: str) -> dict[str, str]:
    """Return the machine code of each kernel, by its mangled name."""
    code = _dump(extension, "-sass", "-arch", target)
    return dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", code, re.DOTALL))


def cuda_kernels(extension: Path) -> Iterator[Kernel]:
    """Yield reports on the kernels of the compiled extension, by architecture."""
    for unit in _dump(extension, "-res-usage").split("Fatbin elf code:")[1:]:
        target = "sm_" + re.findall(r"arch = sm_(\d+)", unit)[0]
        usages = dict(re.findall(r"Function (\S+):\n\s*(REG:.*)", unit))
        bodies = _bodies(extension, target)
        for (name, usage), readable in zip(usages.items(), _demangle(list(usages)), strict=True):
            if target not in UNITS or "fastkd" not in name:
                continue
            registers, stack, shared = _usage(usage)
            kernel, _, types = readable.partition("<")
            yield Kernel(
                stem={"bn": "moments"}.get(first := kernel.split("_")[0], first),
                kernel=f"{kernel.removesuffix('_kernel')} (CUDA)",
                target=target,
                types=types,
                options="",
                threads=THREADS,
                registers=registers,
                stack=stack,
                shared=shared,
                occupancy=occupancy(target, registers, shared, THREADS),
                multiplies16=False,
                **_nvidia(bodies.get(name, "")),
            )


def rooflines() -> list[dict[str, Any]]:
    """Return a lower bound in seconds for each case on each GPU: its bytes or its operations at the peak rate.

    The longer of the two counts. Operations on 16-bit inputs have the rate of the matrix units, float32 the plain one.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    def row(case: Case) -> dict[str, Any]:
        with FakeTensorMode():
            moved = case.bytes(case.inputs("cpu", case.dtype))
        row: dict[str, Any] = {"case": case.name, "dtype": str(case.dtype).removeprefix("torch.")}
        row |= {"bytes": moved, "flops": case.flops}
        for card in CARDS:
            rate = card.float32 if case.dtype == torch.float32 else card.matrix16
            row[card.name] = max(moved / card.bandwidth, case.flops / rate)
        return row

    return [row(case) for case in CASES if case.device == "cuda"]


def main(argv: list[str]) -> int:
    """Print the kernels that fail. Return status 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks aot", description=__doc__)
    parser.add_argument(
        "--extension", type=Path, help="path of a fastkd/_C*.so built with CUDA, whose kernels are read too"
    )
    parser.add_argument("--no-triton", action="store_true", help="only the extension's kernels")
    parser.add_argument(
        "--all", action="store_true", help="every recorded kernel, not the part that make test compiles"
    )
    parser.add_argument("--only-work", action="store_true", help="only the counts of the cases' work")
    parser.add_argument("--work", type=Path, metavar="PATH", help="file for the counts; the docs show work.json")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="number of parallel compilations")
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="file for the results; the docs show benchmarks/results/aot.json"
    )
    args = parser.parse_args(argv)
    if find_spec("triton") is None:
        parser.error("triton is not installed: it compiles the kernels")
    if not args.no_triton:
        counted = list(importlib.import_module("benchmarks.counts").rows(args.jobs))
        if args.work:
            print(f"written to {report.write(args.work, report.header('cpu'), {'work': counted})}")
        if args.only_work:
            return 0
    kernels: list[Kernel] = []
    for kernel in () if args.no_triton else triton_kernels(args.jobs, args.all):
        kernels.append(kernel)
        for problem in kernel.problems():
            print(f"{kernel}: {problem}", flush=True)
    if args.extension is not None:
        read = list(cuda_kernels(args.extension))
        if not read:
            parser.error(f"{args.extension} holds no CUDA kernels: FORCE_CUDA=1 builds them")
        kernels += read
        print(*(f"{kernel}: {problem}" for kernel in read for problem in kernel.problems()), sep="\n")
    bad = sum(bool(kernel.problems()) for kernel in kernels)
    for target, matrix in product(UNITS, dict.fromkeys(MATRIX.values())):
        if count := sum(k.target == target and k.matrix == matrix for k in kernels):
            print(f"{target}: {count} kernels use {matrix}")
    print(f"{len(kernels)} kernels compiled, {bad} with problems")
    if args.json:
        rows = [{k: "; ".join(v) if isinstance(v, list) else v for k, v in asdict(one).items()} for one in kernels]
        body = {"kernels": rows, "rooflines": rooflines()}
        print(f"written to {report.write(args.json, report.header('cpu'), body)}")
    return int(bad > 0)
