"""Measure the parts of a training step, with fused losses and with eager maps: python -m benchmarks profile.

The step has the forward passes of a DeiT-Ti student and a DeiT-S teacher, the manifold loss of four layers, the
attention loss of the last layer, the backward pass and the optimiser.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

import fastkd
from benchmarks import report
from benchmarks.providers.relation import manifold_by_maps
from fastkd import capture
from fastkd.losses import ManifoldLoss

LAYERS = [2, 5, 8, 11]
PARTS = ("student", "teacher", "loss", "backward", "optimizer")
Tokens = list[Tensor]


def fused(s: Tokens, t: Tokens, q: list[Tensor]) -> Tensor:
    manifold = ManifoldLoss()(s, t)
    assert isinstance(manifold, Tensor)
    return manifold + fastkd.attention_loss(q[0], q[1], q[2], q[3], heads="mean")


def eager(s: Tokens, t: Tokens, q: list[Tensor]) -> Tensor:
    """Return the same losses, computed with maps; different numbers of heads are averaged."""
    p_s, p_t = ((x @ y.mT * x.shape[-1] ** -0.5).softmax(-1).mean(1) for x, y in ((q[0], q[1]), (q[2], q[3])))
    attention = torch.nn.functional.kl_div(p_s.log(), p_t, reduction="sum") / p_s[..., 0].numel()
    return manifold_by_maps(s, t) + attention


def training_step(loss: Callable[..., Tensor], batch: int, device: str) -> Callable[[], None]:
    import timm

    torch.manual_seed(0)
    student, teacher = (
        timm.create_model(name, num_classes=10).to(device)
        for name in ("deit_tiny_patch16_224", "deit_small_patch16_224")
    )
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    images = torch.randn(batch, 3, 224, 224, device=device)
    labels = torch.randint(10, (batch,), device=device)
    autocast = partial(torch.autocast, device, torch.bfloat16, enabled=device == "cuda")

    def step() -> None:
        with (
            capture.tokens(student, LAYERS) as s,
            capture.tokens(teacher, LAYERS) as t,
            capture.qkv(student, LAYERS[-1:]) as q_s,
            capture.qkv(teacher, LAYERS[-1:]) as q_t,
            autocast(),
        ):
            with record_function("student"):
                logits = student(images)
            with record_function("teacher"), torch.no_grad():
                teacher(images)
            with record_function("loss"):
                qk = [q_s[0].q, q_s[0].k, q_t[0].q, q_t[0].k]
                total = torch.nn.functional.cross_entropy(logits, labels) + loss(list(s), list(t), qk)
        with record_function("backward"):
            total.backward()
        with record_function("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    return step


def measure(
    name: str, loss: Callable[..., Tensor], batch: int, device: str, steps: int, trace: Path | None
) -> list[dict[str, Any]]:
    """Return the seconds of each part of a step on host and device, and the device's peak memory."""
    step = training_step(loss, batch, device)
    for _ in range(2):
        step()
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    if trace is not None:
        trace.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(trace / f"{name}.json.gz"))
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    events = {event.key: event for event in found.key_averages()}
    return [
        {
            "losses": name,
            "part": part,
            "host": events[part].cpu_time_total / steps / 1e6,
            "device": events[part].device_time_total / steps / 1e6 if on_gpu else None,
            "peak": peak,
        }
        for part in PARTS
    ]


def main(argv: list[str]) -> int:
    """Print the parts of both steps."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks profile", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="images per step; default: 128 on a GPU, 8 on a CPU")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--trace", type=Path, metavar="DIR", help="folder for traces that chrome://tracing can open")
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="file for the results, or folder for profile-<machine>.json"
    )
    args = parser.parse_args(argv)
    batch = args.batch or (128 if args.device == "cuda" else 8)
    head, rows = report.header(args.device), []
    print(report.title(head), f"{'losses':<10}{'part':<12}{'host ms':>10}{'device ms':>11}", sep="\n", flush=True)
    for name, loss in (("fused", fused), ("eager", eager)):
        for row in measure(name, loss, batch, args.device, args.steps, args.trace):
            rows.append(row)
            device = "-" if row["device"] is None else f"{row['device'] * 1e3:.2f}"
            print(f"{row['losses']:<10}{row['part']:<12}{row['host'] * 1e3:>10.2f}{device:>11}", flush=True)
    if args.json:
        print(f"written to {report.write(args.json, head, {'batch': batch, 'parts': rows}, 'profile-')}")
    return 0
