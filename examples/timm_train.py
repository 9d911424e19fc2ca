"""timm's train script with a method of fastkd: its loop as a task sees it, on digits.

    python examples/timm_train.py

In train.py itself, `patch train.py < examples/timm_train.patch` adds the four lines that make the task.
"""

import digits
import gain
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad
from torch.utils.data import DataLoader, TensorDataset

from fastkd.train.tasks import create_task


def train_one_epoch(task: TrainingTask, loader: DataLoader, optimizer: torch.optim.Optimizer) -> None:
    """Train as train.py does: the task returns the loss, and knows what is clipped and averaged."""
    task.train()
    for images, labels in loader:
        result = task(images, labels)
        optimizer.zero_grad()
        result["loss"].backward()
        dispatch_clip_grad(task.get_clip_parameters(), value=1.0)
        optimizer.step()
        task.update_ema()


def main(epochs: int = 3) -> tuple[float, float]:
    """Distil. Return the held-out manifold loss before and after."""
    torch.manual_seed(0)
    # train.py's images have three channels.
    train, held_out = (TensorDataset(x.expand(-1, 3, -1, -1), y) for x, y in (d.tensors for d in digits.load()))
    teacher = digits.fit(digits.vit(in_chans=3, embed_dim=64, depth=3, num_heads=4), train, epochs=3)
    model = digits.vit(in_chans=3, embed_dim=32, depth=2, num_heads=2)
    task = create_task("manifold", model, teacher, student_layers=[0, -1], teacher_layers=[0, -1], img_size=8)
    task.setup_ema(decay=0.9)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=2e-3)
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=epochs)

    def distance() -> float:
        with torch.no_grad():
            return task.eval()(*held_out.tensors)["manifold_loss"].item()

    before = distance()
    for epoch in range(epochs):
        train_one_epoch(task, DataLoader(train, batch_size=32, shuffle=True), optimizer)
        scheduler.step(epoch + 1)
    gain.manifold()
    return digits.summary("manifold loss", before, distance(), task.network, held_out)


if __name__ == "__main__":
    main()
