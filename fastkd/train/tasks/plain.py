"""Tasks that compare no layers: classification, alone or with a loss between logits."""

from typing import Any, ClassVar

from torch import nn

from .base import DistillationTask


class PlainTask(DistillationTask):
    """Classification by labels, and by a teacher's logits if `logits` names a loss between them."""

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None, **common: Any) -> None:
        super().__init__(student, teacher, **(self.defaults | common))


class SoftTargetTask(PlainTask):
    """Soft targets: Hinton et al. 2015 (arXiv:1503.02531)."""

    defaults: ClassVar[dict[str, Any]] = {"logits": "soft"}


class HardTargetTask(PlainTask):
    """Hard distillation of DeiT: Touvron et al. 2021 (arXiv:2012.12877); half labels, half the teacher's decisions."""

    defaults: ClassVar[dict[str, Any]] = {"logits": "hard", "task_weight": 0.5, "logit_weight": 0.5}


class DKDTask(PlainTask):
    """Decoupled distillation: Zhao et al. 2022 (arXiv:2203.08679); second stage of CIKD."""

    defaults: ClassVar[dict[str, Any]] = {"logits": "dkd"}


class NKDTask(PlainTask):
    """Normalised distillation: Yang et al. 2023 (arXiv:2303.13005)."""

    defaults: ClassVar[dict[str, Any]] = {"logits": "nkd"}
