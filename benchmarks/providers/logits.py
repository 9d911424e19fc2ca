"""Providers of the logit losses: the papers' code, other libraries that have the same loss, and fastkd."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from benchmarks.case import Provider, in_pytorch

T = 4.0  # temperature


def _float(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the dtype in which autocast computes softmax and its logarithm."""
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def soft_target(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = _float(student, teacher)
    log_p, log_q = F.log_softmax(student / T, -1), F.log_softmax(teacher / T, -1)
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean") * T**2


def torchdistill_soft_target(student: Tensor, teacher: Tensor) -> Tensor:
    """The soft part of torchdistill.losses.mid_level.KDLoss."""
    from torchdistill.losses.mid_level import KDLoss

    student, teacher = _float(student, teacher)
    loss = KDLoss("head", "output", "head", "output", temperature=T, alpha=0.0)
    result: Tensor = loss({"head": {"output": student}}, {"head": {"output": teacher}}) * T**2
    return result


def liger_soft_target(student: Tensor, teacher: Tensor) -> Tensor:
    """Liger-Kernel's KL divergence of log-probabilities, a Triton kernel."""
    from liger_kernel.transformers import LigerKLDIVLoss

    student, teacher = _float(student, teacher)
    log_p, log_q = F.log_softmax(student / T, -1), F.log_softmax(teacher / T, -1)
    result: Tensor = LigerKLDIVLoss(reduction="batchmean", log_target=True)(log_p, log_q) * T**2
    return result


def dkd(student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
    """mdistiller's form: masks over all classes; the target's logit is lowered by 1000 to exclude it."""
    student, teacher = _float(student, teacher)
    mask = F.one_hot(label, student.shape[1]).to(student.dtype)

    def binary(z: Tensor) -> Tensor:
        p = F.softmax(z / T, -1)
        return torch.stack([(p * mask).sum(1), (p * (1 - mask)).sum(1)], 1)

    target = F.kl_div(binary(student).log(), binary(teacher), reduction="batchmean")
    log_p = F.log_softmax(student / T - 1000 * mask, -1)
    others = F.kl_div(log_p, F.softmax(teacher / T - 1000 * mask, -1), reduction="batchmean")
    return T**2 * (target + 8 * others)


def nkd(student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
    """The paper's form: the other classes' logits are gathered by a mask."""
    student, teacher = _float(student, teacher)
    B, C = student.shape
    target = label[:, None]
    of_target = F.softmax(teacher, -1).gather(1, target) * F.log_softmax(student, -1).gather(1, target)
    mask = torch.ones_like(student, dtype=torch.bool).scatter(1, target, False)
    others_s, others_t = (x[mask].view(B, C - 1) / T for x in (student, teacher))
    others = F.softmax(others_t, -1) * F.log_softmax(others_s, -1)
    return -(of_target.sum() + 1.5 * T**2 * others.sum()) / B


def _with(eager: Callable[..., Tensor], ours: Callable[..., Tensor], **others: Provider) -> dict[str, Provider]:
    return {**in_pytorch(eager), **others, "fastkd": Provider(ours)}


LOSSES: dict[str, dict[str, Any]] = {
    "soft_target": {"temperature": T},
    "dkd": {"alpha": 1.0, "beta": 8.0, "temperature": T},
    "nkd": {"gamma": 1.5, "temperature": T},
}


def logits(loss: str, device: str) -> dict[str, Provider]:
    ours: Callable[..., Tensor] = partial(getattr(fastkd, f"{loss}_loss"), **LOSSES[loss])
    if loss != "soft_target":
        return _with({"dkd": dkd, "nkd": nkd}[loss], ours)
    others = {"torchdistill": Provider(torchdistill_soft_target)}
    if device == "cuda":
        others["Liger-Kernel"] = Provider(liger_soft_target)
    return _with(soft_target, ours, **others)
