"""Data and networks of the examples: scikit-learn's handwritten digits, and networks trained on them in seconds.

In your own project, replace the data by a folder and the teacher by a checkpoint.
"""

from typing import Any

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def load() -> tuple[TensorDataset, TensorDataset]:
    """Return training and held-out images (1, 8, 8) in [-1, 1] with their labels, half of the dataset each."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    return TensorDataset(images[::2], labels[::2]), TensorDataset(images[1::2], labels[1::2])


def vit(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    """Return a timm transformer of 16 patches; the options are embed_dim, depth and num_heads."""
    return timm.create_model(name, img_size=8, patch_size=2, in_chans=1, num_classes=10, **options)


def fit(model: nn.Module, data: TensorDataset, *, epochs: int, lr: float = 1e-3) -> nn.Module:
    """Train a teacher with cross-entropy and return it in eval mode, frozen."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    for _ in range(epochs):
        for images, labels in DataLoader(data, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    images, labels = data.tensors
    return (model.eval()(images).argmax(1) == labels).double().mean().item()
