"""Data and networks of the examples: scikit-learn's handwritten digits, and networks trained on them in seconds.

In your own project, replace the data by a folder and the teacher by a checkpoint.
"""

from functools import cache
from typing import Any

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def load() -> tuple[TensorDataset, TensorDataset]:
    """Return images (1, 8, 8) in [-1, 1] with labels: half of the dataset to train on, and a quarter held out."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    return TensorDataset(images[::2], labels[::2]), TensorDataset(images[1::4], labels[1::4])


def vit(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    """Return a timm transformer of 16 patches; the options are embed_dim, depth, num_heads and others of timm's."""
    return timm.create_model(name, **{"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, **options})


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


@cache
def teacher() -> nn.Module:
    """Return a trained transformer of width 64 with 3 blocks and 4 heads, frozen."""
    return fit(vit(embed_dim=64, depth=3, num_heads=4), load()[0], epochs=3)


def cnn(width: int) -> nn.Sequential:
    """Return three convolutions with batch norm and a linear classifier."""
    layers: list[nn.Module] = []
    channels = 1
    for out, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
        layers += [nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    images, labels = data.tensors
    return (model.eval()(images).argmax(1) == labels).double().mean().item()


def summary(name: str, before: float, after: float, model: nn.Module, held_out: TensorDataset) -> tuple[float, float]:
    """Print a loss on held-out images before and after training, and the accuracy. Return both losses."""
    print(f"held-out {name} {before:.5f} -> {after:.5f}, top-1 {accuracy(model, held_out):.1%}")
    return before, after
