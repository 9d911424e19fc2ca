"""Each method's training with fused losses is its training with eager ones: the curves differ by rounding alone."""

import pytest
import torch

pytest.importorskip("timm", reason="the trainer needs timm")

import fastkd
from fastkd._extension import HAS_NATIVE
from fastkd.train.tasks import TASKS, create_task
from tests.train.test_tasks import IMAGES, SIZE, TARGETS, student_of, teacher_of

METHODS = [name for name in TASKS if name not in ("none", "hard")]


def curve(name: str, backend: str, steps: int) -> torch.Tensor:
    """The losses of training in float64, in which rounding stays small over the steps, on images that change."""
    task = create_task(name, student_of(name).double(), teacher_of(name).double(), img_size=SIZE).double().train()
    optimizer = torch.optim.AdamW(task.trainable_parameters, 1e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    with fastkd.backend(backend):
        for step in range(steps):
            torch.manual_seed(step)  # the same masks and rows
            images = IMAGES.double() + 0.3 * torch.randn(IMAGES.shape, generator=generator, dtype=torch.float64)
            loss = task(images, TARGETS)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.skipif(not HAS_NATIVE, reason="compares the extension with PyTorch")
@pytest.mark.parametrize(
    ("name", "steps"),
    [("manifold", 20), ("cikd", 20), ("dkd", 20)]
    + [pytest.param(name, 300, marks=pytest.mark.exhaustive) for name in METHODS],
)
def test_the_curve_is_that_of_eager_losses(name: str, steps: int) -> None:
    fused, eager = curve(name, "native", steps), curve(name, "eager", steps)
    assert not torch.equal(fused, eager) or name in ("vitkd", "dearkd")  # those have no kernel of their own
    assert fused[-1] < fused[0]
    assert ((fused - eager).abs() / eager).max() < 1e-6
