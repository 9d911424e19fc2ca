"""fastkd in a plain PyTorch loop: a small ViT learns how the patches of a larger one relate.

python examples/pytorch_loop.py
"""

import digits
import gain
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastkd import capture
from fastkd.losses import ManifoldLoss, SoftTargetLoss

LAYERS = [0, -1]  # the first and the last block, of student and teacher


def forward(student: nn.Module, teacher: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the student's logits, the manifold loss and the soft-target loss of a batch."""
    with capture.tokens(student, LAYERS) as s, capture.tokens(teacher, LAYERS) as t:
        logits = student(images)
        with torch.no_grad():
            targets = teacher(images)
        return logits, ManifoldLoss()(list(s), list(t)), SoftTargetLoss(temperature=3.0)(logits, targets)


def main(epochs: int = 3, weight: float = 1.0) -> tuple[float, float]:
    """Distil with the manifold loss times `weight`. Return its held-out values before and after."""
    torch.manual_seed(0)
    train, held_out = digits.load()
    teacher = digits.teacher()
    student = digits.vit(embed_dim=32, depth=2, num_heads=2)

    def relations() -> float:
        with torch.no_grad():
            return forward(student.eval(), teacher, held_out.tensors[0])[1].item()

    before = relations()
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    for _ in range(epochs):
        student.train()
        for images, labels in DataLoader(train, batch_size=32, shuffle=True):
            logits, manifold, soft = forward(student, teacher, images)
            loss = nn.functional.cross_entropy(logits, labels) + weight * manifold + 0.1 * soft
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    gain.manifold()
    return digits.summary("manifold loss", before, relations(), student, held_out)


if __name__ == "__main__":
    main()
