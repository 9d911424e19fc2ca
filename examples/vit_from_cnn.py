"""A vision transformer learns from a CNN: the relations of the CNN's map, resized to the token grid, and its answers.

python examples/vit_from_cnn.py
"""

import digits
import gain
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastkd
from fastkd import capture
from fastkd.functional import resize_tokens

MAP, GRID = "5", 4  # the second ReLU of the CNN has a 4 x 4 map; the student's tokens are a 4 x 4 grid


def forward(student: nn.Module, cnn: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the student's logits, the relation loss and the soft-target loss of a batch."""
    with capture.tokens(student, [-1]) as s, capture.tokens(cnn, [MAP]) as t:
        logits = student(images)
        with torch.no_grad():
            targets = cnn(images)
    # Maps (B, C, h, w) are captured as tokens (B, h w, C). A map of another size is resized to the student's grid.
    relations = fastkd.relation_loss(s[0], resize_tokens(t[0], GRID))
    return logits, relations, fastkd.soft_target_loss(logits, targets, temperature=3.0)


def main(epochs: int = 3) -> tuple[float, float]:
    """Distil. Return the held-out relation loss before and after."""
    torch.manual_seed(0)
    train, held_out = digits.load()
    cnn = digits.fit(digits.cnn(16), train, epochs=3)
    student = digits.vit(embed_dim=32, depth=2, num_heads=2)

    def distance() -> float:
        with torch.no_grad():
            return forward(student.eval(), cnn, held_out.tensors[0])[1].item()

    before = distance()
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    for _ in range(epochs):
        student.train()
        for images, labels in DataLoader(train, batch_size=32, shuffle=True):
            logits, relations, soft = forward(student, cnn, images)
            loss = nn.functional.cross_entropy(logits, labels) + 4.0 * relations + 0.1 * soft
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    after = distance()
    top1 = [f"{digits.accuracy(network, held_out):.1%}" for network in (student, cnn)]
    print(f"held-out relation loss {before:.5f} -> {after:.5f}, top-1 {top1[0]} of the CNN's {top1[1]}")
    gain.report("relation loss of DeiT-Ti and a CNN", fastkd.relation_loss, gain.gram_maps, gain.tokens)
    return before, after


if __name__ == "__main__":
    main()
