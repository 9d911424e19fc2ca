"""Golden values of the official codes: which cases there are, their tensors and tolerances."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "golden"
Case = dict[str, Any]


def cases(*ops: str) -> list[Case]:
    """The manifest's entries of these operators; fails rather than returning none."""
    found = [case for case in json.loads((FOLDER / "manifest.json").read_text())["cases"] if case["op"] in ops]
    assert {case["op"] for case in found} == set(ops), f"no golden cases for {set(ops)}"
    return found


def name(case: Case) -> str:
    return f"{case['op']}-{case['case']}"


def load(case: Case) -> dict[str, Tensor]:
    """Every tensor of a case under its manifest name, floats in float64 (exact for float32 values)."""
    tensors = load_file(FOLDER / case["file"])
    return {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}


def tolerance(case: Case, dtype: torch.dtype, what: str) -> float:
    """Largest allowed relative difference; what is "loss" or "grad"."""
    if dtype == torch.float64:
        rederived = case["rederived_rel_diff"]
        return max(1e-10, 20 * (rederived["f64"] if isinstance(rederived, dict) else rederived))
    official = case.get("official_float32_rel_diff", {}).get(what, 0.0)
    return max(1e-5, 20 * official) if isinstance(official, float) else 1e-5
