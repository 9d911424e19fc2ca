"""Measure what capture costs in a training step, and list what it captures of each family of models.

python -m benchmarks capture                 print
python -m benchmarks capture --json PATH     and write
"""

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import report
from benchmarks.families import FAMILIES, row
from fastkd import capture

MODELS = {"ViT-S": "vit_small_patch16_224", "Swin-T": "swin_tiny_patch4_window7_224"}
BATCH, ROUNDS = 2, 7


def step(model: nn.Module, images: Tensor, is_captured: bool) -> None:
    """Run forward and backward, with every attention layer captured or without."""
    layers = list(range(len(capture.attention_layers(model))))
    with capture.qkv(model, layers) if is_captured else nullcontext() as records:
        loss = model(images).square().mean()
    loss.backward()
    model.zero_grad()
    del records


def peak(model: nn.Module, images: Tensor, is_captured: bool) -> int:
    """Return the most bytes that a step holds above those held before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(model, images, is_captured)
    held = most = 0
    results: Any = profiler.profiler
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def cost() -> list[dict[str, Any]]:
    """Return one row for each model, fused and unfused: seconds and peak bytes of a step without and with capture."""
    rows = []
    for name, entry in MODELS.items():
        for fused in (True, False):
            model = timm.create_model(entry, pretrained=False)
            for module in model.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = fused
            images = torch.randn(BATCH, 3, 224, 224)
            step(model, images, is_captured=True)
            seconds: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(ROUNDS):
                for is_captured in (False, True):
                    begin = time.perf_counter()
                    step(model, images, is_captured)
                    seconds[is_captured].append(time.perf_counter() - begin)
            ratios = [b / a for a, b in zip(seconds[False], seconds[True], strict=True)]
            rows.append(
                {
                    "model": name,
                    "fused": fused,
                    "layers": len(capture.attention_layers(model)),
                    "seconds": [statistics.median(seconds[False]), statistics.median(seconds[True])],
                    "ratio": statistics.median(ratios),
                    "peak": [peak(model, images, False), peak(model, images, True)],
                }
            )
    return rows


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks capture", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="file for the results")
    args = parser.parse_args(argv)
    rows = cost()
    for found in rows:
        a, b = found["seconds"]
        kind = "fused" if found["fused"] else "unfused"
        memory = " and ".join(f"{n / 2**20:.1f} MB" for n in found["peak"])
        print(f"{found['model']}, {kind}: {a * 1e3:.0f} and {b * 1e3:.0f} ms ({found['ratio']:.3f}), {memory}")
    families = [row(family) for family in FAMILIES]
    for found in families:
        print(f"{found['family']}: {found['captured']} of {sum(found['layers'].values())} layers {found['refused']}")
    if args.json is not None:
        contents = {"header": report.header("cpu"), "batch": BATCH, "cost": rows, "families": families}
        args.json.write_text(json.dumps(contents, indent=1) + "\n")
        print(f"written to {args.json}")
    return 0
