"""DINOv3's Gram anchoring with one changed import: it preserves the relations of patches in long training.

    python examples/dinov3_gram.py

A DINOv3 network (with patch, class and register tokens and rotary embedding) continues training on a global task, once
freely and once with its patch tokens anchored to a frozen early copy of itself, the Gram teacher. The copy sees the
images at twice the size; its grid of tokens is resized to the student's.
"""

import copy
import math

import digits
import gain
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastkd import capture

# from dinov3.loss.gram_loss import GramLoss
from fastkd.compat import GramLoss
from fastkd.functional import resize_tokens


def forward(student: nn.Module, gram_teacher: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the student's logits and the Gram loss of a batch."""
    with capture.tokens(student, [-1]) as s, capture.tokens(gram_teacher, [-1]) as t:
        logits = student(images)
        with torch.no_grad():
            gram_teacher(F.interpolate(images, scale_factor=2.0, mode="bicubic"))
        targets = resize_tokens(t[0], math.isqrt(s[0].shape[1]))
        return logits, GramLoss(apply_norm=True, remove_neg=False)(s[0], targets, img_level=True)


def drift(start: nn.Module, train: TensorDataset, held_out: TensorDataset, epochs: int, weight: float) -> float:
    """Train a copy of `start` and return the held-out Gram loss between the two."""
    torch.manual_seed(1)
    student = copy.deepcopy(start).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for _ in range(epochs):
        for images, labels in DataLoader(train, batch_size=32, shuffle=True):
            logits, gram = forward(student, start, images)
            loss = nn.functional.cross_entropy(logits, labels) + weight * gram
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        distance = forward(student.eval(), start, held_out.tensors[0])[1].item()
    print(f"weight {weight}: top-1 {digits.accuracy(student, held_out):.1%}, held-out Gram loss {distance:.5f}")
    return distance


def main(epochs: int = 3, weight: float = 2.0) -> tuple[float, float]:
    """Train freely and anchored. Return both held-out Gram losses to the Gram teacher."""
    torch.manual_seed(0)
    train, held_out = digits.load()
    size = {"embed_dim": 48, "depth": 2, "num_heads": 2}
    network = digits.vit("vit_small_patch16_dinov3", **size, dynamic_img_size=True)
    start = digits.fit(network, train, epochs=3)
    free, anchored = (drift(start, train, held_out, epochs, w) for w in (0.0, weight))
    print(f"held-out Gram loss {free:.5f} -> {anchored:.5f}")
    gain.report("GramLoss of DeiT-Ti and DeiT-S", GramLoss(), gain.gram_maps, gain.tokens)
    return free, anchored


if __name__ == "__main__":
    main()
