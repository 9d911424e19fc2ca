r"""
Manifold distillation: how patches relate
=========================================

The manifold loss of Hao et al. (2022) makes the patches of a student relate to each
other as the teacher's do: within an image, between images at one position, and among a
sample of all patches. The networks may differ in width, because only cosines are
compared. The formula is on :doc:`the loss's page </losses/manifold>`.
"""

import digits
import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from fastkd import capture
from fastkd.losses import ManifoldLoss

torch.manual_seed(0)
train, held_out = digits.load()
teacher = digits.teacher()  # a vision transformer of width 64 with 3 blocks
student = digits.vit(embed_dim=32, depth=2, num_heads=2)
images = held_out.tensors[0][:32]

# %%
# ``capture.tokens`` collects the output of blocks, by number or by name. The class
# token is left out, since the loss relates patches. Negative numbers count from the
# last block, so ``-1`` pairs networks of different depth.

with (
    capture.tokens(student, [-1]) as s,
    capture.tokens(teacher, [-1]) as t,
    torch.no_grad(),
):
    student(images), teacher(images)
print("student", tuple(s[0].shape), "teacher", tuple(t[0].shape))

# %%
# The loss comes with its three terms if you ask for them. They are what you would log.

manifold = ManifoldLoss()
loss, (intra, inter, random) = manifold(list(s), list(t), return_terms=True)
print(f"{loss:.3f}: intra {intra:.4f}, inter {inter:.4f}, random {random:.4f}")


# %%
# These are the maps of one digit: entry (i, j) is the cosine of patches i and j of the
# 4 x 4 grid.


def relations(network):
    with capture.tokens(network.eval(), [-1]) as tokens, torch.no_grad():
        network(images)
    x = torch.nn.functional.normalize(tokens[0][3], dim=-1)
    return x @ x.mT


before = relations(student)

# %%
# Then train the student on the labels and on the teacher's relations.

optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
for _ in range(2):
    student.train()
    for batch, labels in DataLoader(train, batch_size=32, shuffle=True):
        with (
            capture.tokens(student, [0, -1]) as s,
            capture.tokens(teacher, [0, -1]) as t,
        ):
            logits = student(batch)
            with torch.no_grad():
                teacher(batch)
            loss = cross_entropy(logits, labels) + manifold(list(s), list(t))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
with (
    capture.tokens(student.eval(), [-1]) as s,
    capture.tokens(teacher, [-1]) as t,
    torch.no_grad(),
):
    student(images), teacher(images)
print(f"loss of the same images: {manifold(list(s), list(t)):.3f}")

# %%
# The student's map has come closer to the teacher's, although its tokens have half the
# width.

figure, axes = plt.subplots(1, 4, figsize=(9, 2.6), layout="constrained")
axes[0].imshow(images[3, 0], cmap="gray")
for axis, title, map_ in zip(
    axes[1:],
    ("teacher", "student, untrained", "student, distilled"),
    (relations(teacher), before, relations(student)),
    strict=True,
):
    axis.imshow(map_, vmin=-1, vmax=1, cmap="coolwarm")
    axis.set_title(title)
for axis in axes:
    axis.set_axis_off()
figure.show()
