r"""
DearKD: a transformer learns early layers from a CNN
====================================================

In the first stage of DearKD (Chen et al. 2022), the first blocks of a vision
transformer imitate the early maps of a CNN, which gives it the CNN's sense of
neighbourhood when images are few. The paper has no code; the aligner is our reading.
"""

import digits
import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset

from fastkd import capture
from fastkd.losses import EarlyDistillationLoss

torch.manual_seed(0)
train, held_out = digits.load()
cnn = digits.fit(digits.cnn(16), train, epochs=4)
few = Subset(train, range(128))

# %%
# ``capture.tokens`` reads a CNN as well, each map (B, C, H, W) as tokens (B, H W, C).
# The loss takes maps.

layers = ["2", "5"]  # the first and the second ReLU
sides = [8, 4]


def early_maps(images):
    with capture.tokens(cnn, layers) as t, torch.no_grad():
        cnn(images)
    return [x.mT.unflatten(2, (side, side)) for x, side in zip(t, sides, strict=True)]


print([tuple(x.shape) for x in early_maps(held_out.tensors[0][:2])])


# %%
# An aligner per layer (LayerNorm, GELU, a linear layer and a resize) brings the tokens
# to the shape of the maps.


def train_student(weight):
    torch.manual_seed(1)
    student = digits.vit(embed_dim=32, depth=2, num_heads=2)
    early = EarlyDistillationLoss(student_dims=[32, 32], teacher_dims=[16, 32])
    optimizer = torch.optim.AdamW([*student.parameters(), *early.parameters()], lr=2e-3)
    losses = []
    for _ in range(8):
        student.train()
        for images, labels in DataLoader(few, batch_size=32, shuffle=True):
            with capture.tokens(student, [0, 1]) as s:
                logits = student(images)
            distance = early(list(s), early_maps(images))
            loss = cross_entropy(logits, labels) + weight * distance
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(distance.item())
    return digits.accuracy(student, held_out), losses


runs = {f"weight {weight:g}": train_student(weight) for weight in (0.0, 1.0)}
for name, (top1, _) in runs.items():
    print(f"{name}: top-1 on held-out digits {top1:.1%}")

# %%
figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
for name, (_, losses) in runs.items():
    axis.plot(losses, label=name)
axis.set_xlabel("step")
axis.set_ylabel("distance to the CNN's maps")
axis.legend(frameon=False)
figure.show()
