r"""
Attention maps, with fused attention left on
============================================

MiniLM and CIKD compare attention maps. A fused attention never forms the map, so the
usual way is to switch it off and to hold (B, H, N, N) numbers of both networks.
``attention_loss`` takes queries and keys instead and never forms the map either.
"""

import digits
import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from fastkd import attention_loss, capture

torch.manual_seed(0)
train, held_out = digits.load()
teacher = digits.teacher()  # 4 heads
student = digits.vit(embed_dim=32, depth=2, num_heads=2)
print(
    "fused attention:",
    student.blocks[-1].attn.fused_attn,
    teacher.blocks[-1].attn.fused_attn,
)

# %%
# ``capture.qkv`` gives queries, keys and the scale that the layer used. The networks
# have different numbers of heads, so their mean maps are compared.


def distance(images):
    with capture.qkv(student, [-1]) as s, capture.qkv(teacher, [-1]) as t:
        logits = student(images)
        with torch.no_grad():
            teacher(images)
    scales = {"scale_student": s[0].scale, "scale_teacher": t[0].scale}
    return logits, attention_loss(
        s[0].q, s[0].k, t[0].q, t[0].k, heads="mean", **scales
    )


# %%
# The picture needs the maps themselves, which are computed here for one digit alone.


def class_row(network):
    with capture.qkv(network.eval(), [-1]) as records, torch.no_grad():
        network(held_out.tensors[0][:1])
    record = records[0]
    attended = (
        (record.q @ record.k.mT * record.scale).softmax(-1).mean(1)
    )  # the mean of the heads
    return attended[0, 0, 1:].reshape(4, 4)  # what the class token looks at


before = class_row(student)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
losses = []
for _ in range(2):
    student.train()
    for images, labels in DataLoader(train, batch_size=32, shuffle=True):
        logits, attention = distance(images)
        loss = cross_entropy(logits, labels) + attention
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(attention.item())
print(f"divergence of the maps: {losses[0]:.4f} at first, {losses[-1]:.4f} at last")

# %%
# The class token of the distilled student looks where the teacher's does.

figure, axes = plt.subplots(1, 4, figsize=(9, 2.6), layout="constrained")
axes[0].imshow(held_out.tensors[0][0, 0], cmap="gray")
maps = {
    "teacher": class_row(teacher),
    "student, untrained": before,
    "student, distilled": class_row(student),
}
for axis, (title, map_) in zip(axes[1:], maps.items(), strict=True):
    axis.imshow(map_, cmap="viridis")
    axis.set_title(title)
for axis in axes:
    axis.set_axis_off()
figure.show()
