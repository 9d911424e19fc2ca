r"""
ViTKD: mimic early layers, generate the last
============================================

Yang et al. (2022) found that shallow layers of a transformer can be imitated, and that
the last one is better *generated*: some of the student's tokens are masked, and a small
network makes the teacher's tokens of the rest.
"""

import digits
import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from fastkd import capture
from fastkd.losses import ViTKDLoss

torch.manual_seed(0)
train, held_out = digits.load()
teacher = digits.teacher()
student = digits.vit(embed_dim=32, depth=3, num_heads=2)

# %%
# The loss has parameters: two projectors for the early layers, a mask token and the
# generator. They are trained with the student and thrown away afterwards.

vitkd = ViTKDLoss(student_dim=32, teacher_dim=64)
print(sum(p.numel() for p in vitkd.parameters()), "parameters of the loss")
layers = ["blocks.0", "blocks.1", "norm"]


def distance(images):
    with capture.tokens(student, layers) as s, capture.tokens(teacher, layers) as t:
        logits = student(images)
        with torch.no_grad():
            teacher(images)
    stacked = [torch.stack([x[0], x[1]], dim=1) for x in (s, t)]  # (B, 2, N, D)
    return logits, *vitkd(stacked[0], stacked[1], s[2], t[2], return_terms=True)


# %%
parameters = [*student.parameters(), *vitkd.parameters()]
optimizer = torch.optim.AdamW(parameters, lr=1e-3)
curves = {"mimicking": [], "generation": []}
for _ in range(2):
    student.train()
    for images, labels in DataLoader(train, batch_size=32, shuffle=True):
        logits, loss, terms = distance(images)
        loss = loss + cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, value in zip(curves, terms, strict=True):
            curves[name].append(value.item())
for name, values in curves.items():
    print(f"{name}: {values[0]:.2f} at first, {values[-1]:.2f} at last")

# %%
figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
for name, values in curves.items():
    axis.semilogy(values, label=name)
axis.set_xlabel("step")
axis.legend(frameon=False)
figure.show()
