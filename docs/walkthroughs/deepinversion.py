r"""
DeepInversion: images from a trained CNN alone
==============================================

The batch norms of a trained CNN remember the mean and the variance of real images.
Optimising the pixels of noise until the batch has these statistics, and until the CNN
assigns each image its class, gives images that a student can be distilled on, without
any data. ``fastkd invert`` does so at full size; this is its core.
"""

import digits
import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy

from fastkd import bn_stat_loss, capture, image_prior

torch.manual_seed(0)
train, held_out = digits.load()
network = digits.fit(digits.cnn(16), train, epochs=3)
print(f"top-1 of the CNN on held-out digits: {digits.accuracy(network, held_out):.1%}")

# %%
# ``capture.bn_inputs`` collects what enters the batch norms, and ``bn_stat_loss`` reads
# each of these activations once.

labels = torch.arange(10).repeat(4)
images = torch.randn(len(labels), 1, 8, 8, requires_grad=True)
optimizer = torch.optim.Adam([images], lr=0.1)
history, shown = [], [images.detach().clone()]
for step in range(120):
    with capture.bn_inputs(network) as bn:
        logits = network(images)
        statistics = bn_stat_loss(
            bn.inputs, bn.running_means, bn.running_vars, layer_weights=[10.0, 1.0, 1.0]
        )
    prior = image_prior(images, tv_l2=1e-4, l2=1e-5)
    loss = cross_entropy(logits, labels) + 0.1 * statistics + prior
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    history.append(statistics.item())
    if step in (9, 119):
        shown.append(images.detach().clone())
print(
    f"distance of the statistics: {history[0]:.2f} at first, {history[-1]:.2f} at last"
)

# %%
# Noise, ten steps, 120 steps: one image per class, and a real digit of the class below.

rows = [found[:10] for found in shown]
rows.append(
    torch.stack([train.tensors[0][train.tensors[1] == label][0] for label in range(10)])
)
figure, axes = plt.subplots(len(rows), 10, figsize=(8, 3.4), layout="constrained")
for line, row in zip(axes, rows, strict=True):
    for axis, image in zip(line, row, strict=True):
        axis.imshow(image[0], cmap="gray", vmin=-1, vmax=1)
        axis.set_axis_off()
figure.show()

# %%
# Another CNN, which never saw these images, recognises them.

witness = digits.fit(digits.cnn(24), train, epochs=3)
recognised = (witness(images).argmax(1) == labels).double().mean()
print(f"another CNN recognises {recognised:.1%}")
