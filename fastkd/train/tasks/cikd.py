"""CIKD's first stage: the student's attention maps imitate the teacher's, of q with k and of v with v."""

import math
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastkd import capture
from fastkd import functional as F
from fastkd.capture import QKV
from fastkd.train import InputError
from fastkd.train.models import probe

from .base import FeatureLoss, Layers, Parts
from .layers import LayersTask, Networks

# (width, depth) of the teacher -> its block, counted from 1, that the student's last block imitates in the code.
_LAST = {(384, 12): 11, (768, 12): 8, (1024, 24): 18}


class _CIKDFeatures(FeatureLoss):
    name = "cikd"
    inside = True

    def __init__(self, student_layers: list[str], teacher_layers: list[str], heads: list[int]) -> None:
        super().__init__(student_layers, teacher_layers)
        self.heads = heads

    def watch(self, model: nn.Module, layers: Layers) -> Any:
        return capture.qkv(model, layers)

    def forward(self, students: list[QKV], teachers: list[QKV]) -> tuple[Tensor, Parts]:
        terms: dict[str, list[Tensor]] = {"qk": [], "vv": []}
        for s, t, heads in zip(students, teachers, self.heads, strict=True):
            s, t = _split(s, heads), _split(t, heads)
            terms["qk"].append(
                F.attention_loss(
                    s.q,
                    s.k,
                    t.q,
                    t.k,
                    scale_student=s.scale,
                    scale_teacher=t.scale,
                    bias_student=s.bias,
                    bias_teacher=t.bias,
                )
            )
            terms["vv"].append(F.attention_loss(s.v, s.v, t.v, t.v, scale_student=s.scale, scale_teacher=t.scale))
        parts = {name: torch.stack(values).sum() for name, values in terms.items()}
        return parts["qk"] + parts["vv"], parts


class CIKDTask(LayersTask):
    """First stage of CIKD, attention locality imitation; the second is the task "dkd".

        L = Σ_l mean KL( softmax(Q Kᵀ d^-1/2)_teacher ‖ student ) + the same of V Vᵀ,  over images, heads and queries

    All weights are 1 and, as in the official code, labels are not used. The end of the student's last block, its final
    norm and its head are therefore not trained (if compiled, they get zero gradients, so weight decay still acts).
    Class tokens are compared too.

    The code builds the first and the last student block with the teacher's number of heads. Here the q, k, v of these
    blocks are re-split into that many heads (our reading, as in MiniLMv2), so the student remains a timm model.

    Args:
        student_layers: the first and the last block.
        teacher_layers: the first and the code's block of ViT-Small (11th), Base (8th), Large (18th); of another
            teacher, our choice, the one after two thirds of its depth.
        relation_heads: of the maps; None for the teacher's, or the next smaller number that divides both widths.
        common: as DistillationTask; by default task_weight=0.
    """

    defaults: ClassVar[dict[str, Any]] = {"task_weight": 0.0}

    def __init__(
        self, student: nn.Module, teacher: nn.Module, *, relation_heads: int | None = None, **common: Any
    ) -> None:
        super().__init__(student, teacher, partial(_matched_heads, relation_heads=relation_heads), **common)


def _matched_heads(nets: Networks, relation_heads: int | None) -> _CIKDFeatures:
    student, teacher, student_layers, teacher_layers, size = nets
    student_layers = [0, -1] if student_layers is None else student_layers
    teacher_layers = _patient(teacher) if teacher_layers is None else teacher_layers
    own = probe("student", student, student_layers, size, capture.qkv)
    theirs = probe("teacher", teacher, teacher_layers, size, capture.qkv)
    if len(own) != len(theirs):
        raise InputError(f"--student-layers and --teacher-layers must pair up, got {len(own)} and {len(theirs)}")
    heads = []
    for (s_name, s), (t_name, t) in zip(own, theirs, strict=True):
        heads.append(_relation_heads(s, t) if relation_heads is None else relation_heads)
        _check_heads("student", s_name, s, heads[-1])
        _check_heads("teacher", t_name, t, heads[-1])
        if (s.q.shape[0], s.q.shape[2]) != (t.q.shape[0], t.q.shape[2]):
            raise InputError(
                "--teacher-layers: attention maps of student and teacher must agree in windows and tokens, class "
                f"tokens included, got {_described(s_name, s)} in the student, {_described(t_name, t)} in the "
                "teacher; maps are not interpolated, name layers that agree"
            )
    return _CIKDFeatures([name for name, _ in own], [name for name, _ in theirs], heads)


def _patient(teacher: Any) -> list[int]:
    depth = len(capture.attention_layers(teacher))
    return [0, _LAST.get((getattr(teacher, "embed_dim", 0), depth), -(-2 * depth // 3)) - 1]


def _relation_heads(s: QKV, t: QKV) -> int:
    """Return the teacher's number of heads, or the next smaller one that divides the widths of both."""
    widths = math.gcd(*(x.q.shape[1] * x.q.shape[3] for x in (s, t)))
    return max(heads for heads in range(1, t.q.shape[1] + 1) if widths % heads == 0)


def _check_heads(role: str, name: str, x: QKV, heads: int) -> None:
    own, width = x.q.shape[1], x.q.shape[1] * x.q.shape[3]
    if own != heads and x.bias is not None:
        raise InputError(
            f"--{role}-layers: {name} has a bias for each of its {own} heads, which cannot be cut into {heads}; "
            "take networks with as many heads"
        )
    if width % heads:
        raise InputError(f"relation_heads: {heads} do not divide the width {width} of the {role}'s {name}")


def _split(x: QKV, heads: int) -> QKV:
    """Return a view of the same width, re-split into some number of heads, with their scale d^-1/2."""
    if x.q.shape[1] == heads:
        return x
    q, k, v = (y.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2) for y in (x.q, x.k, x.v))
    return QKV(q, k, v, q.shape[3] ** -0.5, None, x.is_causal)


def _described(name: str, x: QKV) -> str:
    windows = f"{x.q.shape[0]} windows of " if x.q.shape[0] > 1 else ""
    return f"{name} ({windows}{x.q.shape[2]} tokens)"
