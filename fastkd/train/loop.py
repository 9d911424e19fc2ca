"""One network in training: an epoch of steps, top-1 on the validation images. One rule: steps wait for no number."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import TrainingTask
from timm.utils import accuracy, dispatch_clip_grad, random_seed
from torch import Tensor, nn
from tqdm import tqdm

from . import DivergedError
from .clock import LossClock

AMP_DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHECK_EVERY = 50  # steps between looks at the loss, which on a GPU wait for it
Row = dict[str, Any]


class Trainee:
    """A network with all that trains it: task, timm's loaders, optimiser and schedule.

    Args:
        label: what the progress bar calls it.
        network: the module that is trained and evaluated.
        task: gives the loss; its further scalars are logged.
        loaders: training and validation.
        clock: the one the task winds, if it has a distillation loss.
    """

    def __init__(
        self,
        label: str,
        network: nn.Module,
        task: TrainingTask,
        loaders: tuple[Any, Any],
        *,
        epochs: int,
        warmup_epochs: int,
        lr: float,
        weight_decay: float,
        opt: str,
        sched: str,
        clip_grad: float | None,
        mixup: Mixup | None,
        amp: str,
        seed: int,
        device: torch.device,
        clock: LossClock | None = None,
    ) -> None:
        self.label, self.network, self.task, self.epochs = label, network, task, epochs
        self.loader, self.val_loader = loaders
        self.clip_grad, self.mixup, self.seed, self.device, self.clock = clip_grad, mixup, seed, device, clock
        self.optimizer = create_optimizer_v2(network, opt=opt, lr=lr, weight_decay=weight_decay)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched=sched,
            num_epochs=max(epochs, 1),
            warmup_epochs=max(0, min(warmup_epochs, epochs - 1)),
            warmup_lr=lr / 100,
            step_on_epochs=False,
            updates_per_epoch=len(self.loader),
        )
        self.autocast = torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "none")
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def train_epoch(self, epoch: int, bar: tqdm) -> Row:
        """One pass over the images, the same order and augmentation for each network with the same seed.

        Returns the log's row: means of the loss and its parts, seconds of the whole pass with its data loading, and
        of these the seconds spent in the distillation loss.

        Raises:
            DivergedError: a loss that is not finite.
        """
        random_seed((self.seed * 100_003 + epoch) % 2**32)
        self.task.train()
        if self.scheduler is not None:
            self.scheduler.step_update(epoch * len(self.loader))
        sums: dict[str, Tensor] = {}
        began = time.perf_counter()
        for step, (images, targets) in enumerate(self.loader):
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            parts = self._step(images, targets)
            for name, value in parts.items():
                sums[name] = sums[name] + value if name in sums else value
            if (step + 1) % CHECK_EVERY == 0:
                self._check_finite(sums, epoch, step)
            if self.scheduler is not None:
                self.scheduler.step_update(epoch * len(self.loader) + step + 1)
            bar.update()
        means = self._check_finite(sums, epoch, step)
        loss_seconds = self.clock.total() if self.clock is not None else 0.0
        return {
            "network": self.label,
            "epoch": epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            **{name: value / (step + 1) for name, value in means.items()},
            "seconds": time.perf_counter() - began,
            "loss_seconds": loss_seconds,
            "steps": step + 1,
        }

    def _step(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        with self.autocast:
            result = self.task(images, targets)
        self.optimizer.zero_grad()
        self.scaler.scale(result["loss"]).backward()
        if self.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.network.parameters(), self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return {name: value.detach() for name, value in result.items() if name != "output"}

    def _check_finite(self, sums: dict[str, Tensor], epoch: int, step: int) -> dict[str, float]:
        values = {name: float(value) for name, value in sums.items()}
        if not all(math.isfinite(value) for value in values.values()):
            parts = ", ".join(f"{name} {value:g}" for name, value in values.items())
            raise DivergedError(
                f"the loss of {self.label} is not finite by epoch {epoch + 1}, step {step + 1}: {parts}"
            )
        return values

    def evaluate(self) -> float:
        """Top-1 on the validation images, in percent."""
        return evaluate(self.network, self.val_loader, self.autocast)


@torch.no_grad()
def evaluate(network: nn.Module, loader: Any, context: Any) -> float:
    """Top-1 in percent over all images of the loader."""
    network.eval()
    right, count = torch.zeros(()), 0
    for images, targets in loader:
        with context:
            logits = network(images)
        right = right.to(logits.device) + accuracy(logits, targets)[0] * len(targets)
        count += len(targets)
    return float(right) / count


def criterion(mixup: bool, smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    """timm's cross-entropy for the targets that mixup makes or leaves."""
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    if mixup:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()
