r"""
Gram anchoring: keep good patch features
========================================

Long training on a global task improves the class token and degrades the patch features,
on which segmentation and detection rely. DINOv3 anchors the similarities of the patches
of an image (their Gram matrix) to those of an early copy of the student. The copy may
see larger images; its token grid is then resized to the student's.
"""

import copy

import digits
import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import fastkd
from fastkd import capture
from fastkd.compat import GramLoss
from fastkd.functional import resize_tokens

torch.manual_seed(0)
train, held_out = digits.load()
start = digits.vit(
    "vit_small_patch16_dinov3",
    embed_dim=48,
    depth=2,
    num_heads=2,
    dynamic_img_size=True,
)
start = digits.fit(start, train, epochs=4)  # the early copy, frozen

# %%
# The Gram teacher sees the images at twice the size, so it has 8 x 8 tokens where the
# student has 4 x 4.


def targets(images):
    large = torch.nn.functional.interpolate(images, scale_factor=2.0, mode="bicubic")
    with capture.tokens(start, [-1]) as t, torch.no_grad():
        start(large)
    return resize_tokens(t[0], 4)


print(tuple(targets(held_out.tensors[0][:8]).shape))

# %%
# ``GramLoss`` has the name and the arguments of DINOv3's own.

gram = GramLoss(apply_norm=True, remove_neg=False)


def continue_training(weight):
    torch.manual_seed(1)
    student, drift = copy.deepcopy(start).requires_grad_(True), []
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for _ in range(2):
        for images, labels in DataLoader(train, batch_size=64, shuffle=True):
            with capture.tokens(student.train(), [-1]) as s:
                logits = student(images)
            distance = gram(s[0], targets(images), img_level=True)
            loss = cross_entropy(logits, labels) + weight * distance
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            drift.append(distance.item())
    return student, drift


curves = {f"weight {weight:g}": continue_training(weight) for weight in (0.0, 2.0)}
for name, (_, drift) in curves.items():
    print(f"{name}: Gram loss of the last batch {drift[-1]:.4f}")

# %%
# The copy sees larger images, so the distance is not 0 at the start. Anchored, the
# student takes on the relations that the copy has at the larger size; left alone, it
# does not.

figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
for name, (_, drift) in curves.items():
    axis.plot(drift, label=name)
axis.set_xlabel("step")
axis.set_ylabel("Gram loss to the early copy")
axis.legend(frameon=False)
figure.show()

# %%
# The drop-in and ``relation_loss`` are the same computation.

s, t = torch.randn(2, 16, 48), torch.randn(2, 16, 48)
print(gram(s, t, img_level=True).item(), fastkd.relation_loss(s, t).item())
