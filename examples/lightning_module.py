"""fastkd in PyTorch Lightning: a module that trains the student and excludes the teacher from the checkpoints.

pip install 'fastkd[examples]'
python examples/lightning_module.py
"""

from typing import Any

import digits
import gain
import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastkd import capture
from fastkd.losses import ManifoldLoss

LAYERS = [0, -1]  # the first and the last block, of student and teacher


class Distillation(lightning.LightningModule):
    def __init__(self, student: nn.Module, teacher: nn.Module, weight: float = 1.0) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False).eval()  # Lightning does not change the mode of a module
        self.manifold, self.weight = ManifoldLoss(), weight
        self.strict_loading = False  # checkpoints contain only the student

    def forward_both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the student's logits and the manifold loss of a batch."""
        with capture.tokens(self.student, LAYERS) as s, capture.tokens(self.teacher, LAYERS) as t:
            logits = self.student(images)
            with torch.no_grad():
                self.teacher(images)
            return logits, self.manifold(list(s), list(t))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        images, labels = batch
        logits, manifold = self.forward_both(images)
        self.log("train/manifold", manifold)
        return nn.functional.cross_entropy(logits, labels) + self.weight * manifold

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        images, labels = batch
        logits, manifold = self.forward_both(images)
        self.log_dict({"val/manifold": manifold, "val/top1": (logits.argmax(1) == labels).float().mean()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=2e-3)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: value for key, value in state.items() if not key.startswith("teacher.")}


def main(epochs: int = 3) -> tuple[float, float]:
    """Distil. Return the held-out manifold loss before and after."""
    lightning.seed_everything(0, verbose=False)
    train, held_out = digits.load()
    teacher = digits.teacher()
    module = Distillation(digits.vit(embed_dim=32, depth=2, num_heads=2), teacher)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    validation = DataLoader(held_out, batch_size=128)
    (before,) = trainer.validate(module, validation, verbose=False)
    trainer.fit(module, DataLoader(train, batch_size=32, shuffle=True))
    (after,) = trainer.validate(module, validation, verbose=False)
    losses = before["val/manifold"], after["val/manifold"]
    print(f"held-out manifold loss {losses[0]:.5f} -> {losses[1]:.5f}, top-1 {after['val/top1']:.1%}")
    gain.manifold()
    return losses


if __name__ == "__main__":
    main()
