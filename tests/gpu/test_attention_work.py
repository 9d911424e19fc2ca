"""The table of counted work in docs/kernels/attention.md is what the kernels and the formulas say."""

import os
import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton here: its kernels are lowered where it is")

if os.getenv("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)

from benchmarks import work
from benchmarks.cases import CASES

PAGE = Path(__file__).parents[2] / "docs/kernels/attention.md"
NAMES = {"vit_b-b256": (256 * 12, 197), "vit_l_dinov2_518-b32": (32 * 16, 1370), "vit_l_1024-b8": (8 * 16, 4097)}
SHOWN = {(f"attention/gpu-{name}"): shape for name, shape in NAMES.items()}
# Products and exponentials per score.
FORMULAS = {"floor": (4, 2), "two-pass KL": (10, 8), "two SDPA calls": (16, 5)}


def table() -> dict[str, list[str]]:
    rows = re.search(r"<!-- work: .*?-->\n(.*?)<!-- /work -->", PAGE.read_text(), re.DOTALL)[1].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {name: values for name, *values in cells}


def shown(flops: float, exponentials: float) -> str:
    return f"{flops / 1e9:.0f} GF, {exponentials:.1e}".replace("e+0", "e").replace("e+", "e")


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name: str) -> None:
    products, exponentials = FORMULAS[name]
    scores = [heads * n * n for heads, n in SHOWN.values()]
    assert table()[name] == [shown(products * 2 * 64 * s, exponentials * s) for s in scores]


@pytest.mark.exhaustive
def test_kernels() -> None:
    counts = [work.count(case, "sm_90")[0] for case in CASES if case.name in SHOWN]
    assert table()["fastkd"] == [shown(c.flops["16-bit"], c.exponentials) for c in counts]


@pytest.mark.exhaustive
def test_the_compiled_form() -> None:
    from benchmarks import official  # loads Inductor, which takes seconds

    forms = [official.compiled(case) for case in CASES if case.name in SHOWN]
    assert table()["official form, compiled"] == [shown(c.flops["16-bit"], c.exponentials) for c in forms]
