"""DeepInversion with one changed import: make images from a classifier and the statistics in its batch norms.

python examples/deepinversion_hook.py
"""

import digits
import gain
import torch
from torch import Tensor, nn

from fastkd import bn_stat_loss, image_prior

# from deepinversion import DeepInversionFeatureHook
from fastkd.compat import DeepInversionFeatureHook

FIRST_BN_MULTIPLIER = 10.0


def statistics(hooks: list[DeepInversionFeatureHook]) -> Tensor:
    """Return the distance of the batch's statistics to the stored ones, summed over all layers."""
    rescale = [FIRST_BN_MULTIPLIER] + [1.0] * (len(hooks) - 1)
    return sum((hook.r_feature * scale for hook, scale in zip(hooks, rescale, strict=True)), torch.zeros(()))


def layer_statistics(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Return the distance of one layer, as a hook computes it."""
    return bn_stat_loss([x], [mean], [var])


def main(iterations: int = 100, images_per_class: int = 6) -> tuple[float, float]:
    """Synthesise digits. Return the batch-norm distance of the noise and of the images."""
    torch.manual_seed(0)
    train, held_out = digits.load()
    teacher, witness = (digits.fit(digits.cnn(width), train, epochs=4) for width in (16, 24))
    print(f"top-1 on held-out digits: {digits.accuracy(teacher, held_out):.1%}")

    hooks = [DeepInversionFeatureHook(module) for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]
    labels = torch.arange(10).repeat(images_per_class)
    images = torch.randn(len(labels), 1, 8, 8, requires_grad=True)
    optimizer = torch.optim.Adam([images], lr=0.1)
    distances = []
    for _ in range(iterations):
        optimizer.zero_grad()
        logits = teacher(images)
        distance = statistics(hooks)
        prior = image_prior(images, tv_l2=1e-4, l2=1e-5)
        loss = nn.functional.cross_entropy(logits, labels) + 0.1 * distance + prior
        loss.backward()
        optimizer.step()
        distances.append(distance.item())
    for hook in hooks:
        hook.close()
    recognised = (witness(images).argmax(1) == labels).float().mean()
    print(f"batch-norm distance {distances[0]:.5f} -> {distances[-1]:.5f}, another network recognises {recognised:.1%}")
    gain.report("statistics of ResNet-50's first stage", layer_statistics, gain.moments_copied, gain.activation)
    return distances[0], distances[-1]


if __name__ == "__main__":
    main()
