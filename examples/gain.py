"""Measure what a fused loss gains over its textbook form: time and memory of forward and backward.

Every example ends with it, on tokens of the size that its loss meets in real training.
"""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd

PROC = Path("/proc/self")
ROUNDS, IMAGES = 3, 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def gram_maps(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the patch-relation loss of (B, N, D) tokens as the papers' codes write it, holding both maps."""
    s, t = (F.normalize(x, dim=-1) for x in (student, teacher))
    return F.mse_loss(s @ s.mT, t @ t.mT)


def manifold_maps(student: Tensor, teacher: Tensor, samples: int = 192) -> Tensor:
    """Return the manifold loss of one layer, holding the maps of its three terms."""
    index = torch.randperm(student.shape[0] * student.shape[1])[:samples]
    sampled = (x.flatten(0, 1)[index][None] for x in (student, teacher))
    across = (x.transpose(0, 1) for x in (student, teacher))
    return 4.0 * gram_maps(student, teacher) + 0.1 * gram_maps(*across) + 0.2 * gram_maps(*sampled)


def attention_maps(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
    """Return the divergence of the maps of (B, H, N, d) queries and keys, holding both maps."""
    log_s, log_t = ((q @ k.mT * q.shape[-1] ** -0.5).log_softmax(-1) for q, k in ((q_s, k_s), (q_t, k_t)))
    return F.kl_div(log_s, log_t, reduction="sum", log_target=True) / log_s[..., 0].numel()


def moments_copied(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Return the BatchNorm statistic loss of an activation as DeepInversion's hook computes it, on a copy."""
    rows = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1)
    return (var - rows.var(1, unbiased=False)).norm() + (mean - rows.mean(1)).norm()


def report(
    name: str, fused: Callable[..., Any], textbook: Callable[..., Tensor], inputs: Callable[[int], Sequence[Tensor]]
) -> None:
    """Print the medians of interleaved rounds, and the peak memory above the inputs, of both forms.

    Args:
        name: what is measured; the number of images is added.
        fused, textbook: two forms of a loss.
        inputs: makes the inputs for a number of images; those that require a gradient get one.
    """
    forms = {"fused": fused, "textbook": textbook}
    few, many = inputs(1), inputs(IMAGES)
    for loss in forms.values():
        _step(loss, few)  # loads what is loaded once
    # Before the rounds: fastkd keeps memory for its next gradient, which a later step would not take anew.
    mb = {form: _peak(partial(_step, loss, many)) for form, loss in forms.items()}
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    for _ in range(ROUNDS):
        for form, loss in forms.items():
            start = time.perf_counter()
            _step(loss, many)
            seconds[form].append(time.perf_counter() - start)
    ms = {form: 1e3 * statistics.median(found) for form, found in seconds.items()}
    memory = "" if None in mb.values() else f", {mb['fused']:.0f} MB instead of {mb['textbook']:.0f}"
    ratio = f"{ms['textbook'] / ms['fused']:.1f} times faster"
    print(f"{name}, {IMAGES} images: {ms['fused']:.1f} ms instead of {ms['textbook']:.1f} ({ratio}){memory}")


def manifold() -> None:
    """Print what the manifold loss gains."""
    report("manifold loss of DeiT-Ti and DeiT-S", fastkd.manifold_loss, manifold_maps, tokens)


def _step(loss: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    torch.autograd.grad(loss(*inputs), [x for x in inputs if x.requires_grad])
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _peak(step: Callable[[], object]) -> float | None:
    """Return the megabytes that a step needs at most above what is held before it; None where nothing tells."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not (PROC / "clear_refs").exists():
        return None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # otherwise the step would reuse memory that is freed but still counted
    (PROC / "clear_refs").write_text("5")  # VmHWM, the peak, starts again at VmRSS
    before = _resident("VmRSS")
    step()
    return (_resident("VmHWM") - before) / 1024


def _resident(key: str) -> int:
    lines = (PROC / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def tokens(images: int) -> list[Tensor]:
    """Return random tokens of DeiT-Ti and DeiT-S for images of 224 pixels; the first require a gradient."""
    student = torch.randn(images, 196, 192, device=DEVICE, requires_grad=True)
    return [student, torch.randn(images, 196, 384, device=DEVICE)]


def queries_and_keys(images: int) -> list[Tensor]:
    """Return random q and k of two DeiT-S for images of 224 pixels; the student's require a gradient."""
    return [torch.randn(images, 6, 197, 64, device=DEVICE, requires_grad=i < 2) for i in range(4)]


def activation(images: int) -> list[Tensor]:
    """Return a random activation of ResNet-50's first stage, which requires a gradient, and running statistics."""
    x = torch.randn(images, 256, 56, 56, device=DEVICE, requires_grad=True)
    return [x, torch.zeros(256, device=DEVICE), torch.ones(256, device=DEVICE)]
