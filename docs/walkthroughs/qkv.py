r"""
MiniLMv2 and TinyMIM: relations of queries, keys and values
===========================================================

MiniLMv2 cuts queries, keys and values into as many *relation heads* as you like,
whatever the heads of the networks are, and compares the softmax of their products.
TinyMIM and CIKD take other pairs: q with k, and v with v.
"""

import digits
import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from fastkd import capture, qkv_relation_loss

torch.manual_seed(0)
train, held_out = digits.load()
teacher = digits.teacher()  # 4 heads of 16 channels
student = digits.vit(embed_dim=32, depth=2, num_heads=2)

# %%
# timm computes q, k and v in one layer. Its output is captured and cut into three, each
# (B, N, D) with the class token.


def projections(network):
    return capture.tokens(
        network, [f"blocks.{len(network.blocks) - 1}.attn.qkv"], prefix="keep"
    )


def distances(images):
    with projections(student) as s, projections(teacher) as t:
        logits = student(images)
        with torch.no_grad():
            teacher(images)
    pairs = tuple(s[0].chunk(3, dim=-1)), tuple(t[0].chunk(3, dim=-1))
    names = {"MiniLMv2": ("qq", "kk", "vv"), "TinyMIM": ("qk", "vv")}
    return logits, {
        n: qkv_relation_loss(*pairs, relation_heads=8, relations=r)
        for n, r in names.items()
    }


# %%
# Train with MiniLMv2's relations and watch both. TinyMIM's share the values alone, so
# they follow only so far.

optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
curves = {"MiniLMv2": [], "TinyMIM": []}
for _ in range(2):
    student.train()
    for images, labels in DataLoader(train, batch_size=32, shuffle=True):
        logits, found = distances(images)
        loss = cross_entropy(logits, labels) + found["MiniLMv2"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, value in found.items():
            curves[name].append(value.item())
for name, values in curves.items():
    print(f"{name}: {values[0]:.4f} at first, {values[-1]:.4f} at last")

# %%
figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
for name, values in curves.items():
    axis.semilogy(values, label=name)
axis.set_xlabel("step")
axis.set_ylabel("relation loss")
axis.legend(frameon=False)
figure.show()
