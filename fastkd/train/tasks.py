"""One timm.task.TrainingTask per distillation method; each works in timm's loop or any other."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from fastkd import capture
from fastkd.losses import ManifoldLoss

from .clock import LossClock

Layers = Sequence[int | str]


class ManifoldTask(TrainingTask):
    """Classification plus fine-grained manifold distillation: Hao et al. 2022 (arXiv:2107.01378).

        L = task_weight * criterion(logits, target) + manifold_weight * ManifoldLoss(student tokens, teacher tokens)

    The input is normalised for the student; the teacher gets it in its own normalisation, as in timm's tasks. The
    teacher is frozen and stays in eval mode, whatever mode the task is put in.

    Args:
        student: the model to train, (B, 3, H, W) -> (B, classes).
        teacher: any timm model with as many patches or map cells at the named layers as the student has tokens.
        student_layers, teacher_layers: matched layers, as many of one as of the other; as fastkd.capture.tokens.
        criterion: loss of (logits, target); cross-entropy by default.
        loss: a ManifoldLoss with other than the paper's weights.
        task_weight, manifold_weight: factors of the two parts.
        clock: measures the time spent in the manifold loss.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        student_layers: Layers,
        teacher_layers: Layers,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        loss: ManifoldLoss | None = None,
        task_weight: float = 1.0,
        manifold_weight: float = 1.0,
        clock: LossClock | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        if len(student_layers) != len(teacher_layers):
            raise ValueError(
                f"student_layers and teacher_layers must match one to one, "
                f"got {len(student_layers)} and {len(teacher_layers)}"
            )
        self.trainable_module = student
        self.teacher = teacher.requires_grad_(False).eval()
        self.student_layers, self.teacher_layers = list(student_layers), list(teacher_layers)
        self.criterion = nn.CrossEntropyLoss() if criterion is None else criterion
        self.loss = ManifoldLoss() if loss is None else loss
        self.task_weight, self.manifold_weight, self.clock = task_weight, manifold_weight, clock
        scale, shift = renormalisation(student, teacher)
        self.same_normalisation = bool((scale == 1).all() and (shift == 0).all())
        self.register_buffer("scale", scale.to(self.device, self.dtype), persistent=False)
        self.register_buffer("shift", shift.to(self.device, self.dtype), persistent=False)

    def train(self, mode: bool = True) -> "ManifoldTask":
        super().train(mode)
        self.teacher.eval()
        return self

    def prepare_distributed(self, device_ids: list[int] | None = None, **ddp_kwargs: Any) -> "ManifoldTask":
        """Wrap the student in DistributedDataParallel; the teacher, being frozen, stays as it is."""
        self.trainable_module = nn.parallel.DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:  # noqa: A002  timm's name
        """Returns loss and output (logits), and for logging task_loss, manifold_loss, intra, inter, random."""
        with (
            capture.tokens(self.trainable_module, self.student_layers) as student_tokens,
            capture.tokens(self.teacher, self.teacher_layers) as teacher_tokens,
        ):
            logits = self.trainable_module(input)
            with torch.no_grad():
                self.teacher(input if self.same_normalisation else input * self.scale + self.shift)
            students, teachers = list(student_tokens), list(teacher_tokens)
        task_loss = self.criterion(logits, target)
        if self.clock is not None:
            students = self.clock.start(students)
        manifold_loss, terms = self.loss(students, teachers, return_terms=True)
        if self.clock is not None:
            self.clock.stop(manifold_loss)
        return {
            "loss": self.task_weight * task_loss + self.manifold_weight * manifold_loss,
            "output": logits,
            "task_loss": task_loss.detach(),
            "manifold_loss": manifold_loss.detach(),
            "intra": terms[0].detach(),
            "inter": terms[1].detach(),
            "random": terms[2].detach(),
        }


def renormalisation(student: nn.Module, teacher: nn.Module) -> tuple[Tensor, Tensor]:
    """(scale, shift), each (1, 3, 1, 1): x * scale + shift takes the student's normalisation to the teacher's."""
    student_cfg, teacher_cfg = (unwrap_model(model).pretrained_cfg for model in (student, teacher))
    mean_s, std_s, mean_t, std_t = (
        torch.tensor(cfg[key], dtype=torch.float64).view(1, -1, 1, 1)
        for cfg in (student_cfg, teacher_cfg)
        for key in ("mean", "std")
    )
    return std_s / std_t, (mean_s - mean_t) / std_t
