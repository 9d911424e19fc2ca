"""fastkd in mmengine: a distiller in its registry, whose networks and losses a config chooses.

pip install 'fastkd[examples]'
python examples/mmengine_registry.py
"""

from typing import Any

import digits
import gain
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastkd import capture
from fastkd.losses import ManifoldLoss, SoftTargetLoss

# As in a file that Config.fromfile reads.
CONFIG = Config(
    {
        "model": {
            "type": "FastKDDistiller",
            "student": {"type": "DigitsViT", "embed_dim": 32, "depth": 2, "num_heads": 2},
            "teacher": {"type": "DigitsViT", "embed_dim": 64, "depth": 3, "num_heads": 4},
            "layers": [0, -1],
            "token_loss": {"type": "FastKDManifoldLoss", "num_samples": 192},
            "logit_loss": {"type": "FastKDSoftTargetLoss", "temperature": 3.0},
            "weights": {"tokens": 1.0, "logits": 0.1},
        }
    }
)

MODELS.register_module("DigitsViT", module=digits.vit)
MODELS.register_module("FastKDManifoldLoss", module=ManifoldLoss)
MODELS.register_module("FastKDSoftTargetLoss", module=SoftTargetLoss)


@MODELS.register_module()
class FastKDDistiller(nn.Module):
    """A student and a frozen teacher built from their configs. forward returns a dict of losses, as in mmengine."""

    def __init__(
        self,
        student: dict[str, Any],
        teacher: dict[str, Any],
        layers: list[int],
        token_loss: dict[str, Any],
        logit_loss: dict[str, Any],
        weights: dict[str, float],
    ) -> None:
        super().__init__()
        self.student, self.teacher = MODELS.build(student), MODELS.build(teacher).requires_grad_(False)
        self.token_loss, self.logit_loss = MODELS.build(token_loss), MODELS.build(logit_loss)
        self.layers, self.weights = layers, weights

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.teacher.eval()
        with capture.tokens(self.student, self.layers) as s, capture.tokens(self.teacher, self.layers) as t:
            logits = self.student(images)
            with torch.no_grad():
                targets = self.teacher(images)
        return {
            "loss_cls": nn.functional.cross_entropy(logits, labels),
            "loss_tokens": self.weights["tokens"] * self.token_loss(list(s), list(t)),
            "loss_logits": self.weights["logits"] * self.logit_loss(logits, targets),
        }


def main(epochs: int = 3) -> tuple[float, float]:
    """Distil as configured. Return the held-out manifold loss before and after."""
    torch.manual_seed(0)
    train, held_out = digits.load()
    model = MODELS.build(CONFIG.model)
    digits.fit(model.teacher.requires_grad_(True), train, epochs=3)

    def distance() -> float:
        with torch.no_grad():
            return model.eval()(*held_out.tensors)["loss_tokens"].item()

    before = distance()
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=2e-3)
    for _ in range(epochs):
        model.train()
        for images, labels in DataLoader(train, batch_size=32, shuffle=True):
            losses = model(images, labels)
            optimizer.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            optimizer.step()
    gain.manifold()
    return digits.summary("manifold loss", before, distance(), model.student, held_out)


if __name__ == "__main__":
    main()
