"""The cases that a call on a GPU measures first."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.case import Case
from benchmarks.cases import CASES
from benchmarks.gpu.call import RIVALS

HEADLINE = {
    "manifold": "relation/gpu-manifold-deit_ti-8_layers-b256",
    "intra_512": "relation/gpu-intra-deit_s_512-b64",
    "attention_197": "attention/gpu-vit_b-b256",
    "moments": "moments/gpu-resnet50_layer1-b256-bf16",
    "intra_1024": "relation/gpu-intra-deit_s_1024-b16",
    "attention_4097": "attention/gpu-vit_l_1024-b8",
    "batch": "relation/gpu-batch-deit_ti-b128",
    "resnet50": "moments/gpu-resnet50-b128-bf16",
}
assert set(HEADLINE) == set(RIVALS)


def cases_of(names: Iterable[str]) -> list[Case]:
    """Return cases of GPUs by name."""
    by_name = {case.name: case for case in CASES if case.device == "cuda"}
    return [by_name[name] for name in names]
