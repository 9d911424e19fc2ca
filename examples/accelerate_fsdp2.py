"""fastkd with Accelerate and FSDP2: two processes share the student's weights, and relate the images of both.

python examples/accelerate_fsdp2.py          two processes on a CPU
accelerate launch examples/accelerate_fsdp2.py   one process per GPU
"""

import os

import digits
import gain
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.utils import FullyShardedDataParallelPlugin, set_seed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from fastkd import capture
from fastkd.losses import ManifoldLoss

LAYERS = [0, -1]  # the first and the last block, of student and teacher


def forward(student: nn.Module, teacher: nn.Module, images: Tensor, manifold: ManifoldLoss) -> tuple[Tensor, Tensor]:
    """Return the student's logits and the manifold loss of the batches of all processes."""
    with capture.tokens(student, LAYERS) as s, capture.tokens(teacher, LAYERS) as t:
        logits = student(images)
        with torch.no_grad():
            teacher(images)
        return logits, manifold(list(s), list(t))


def shard(accelerator: Accelerator, student: nn.Module) -> nn.Module:
    """Spread the student's weights over the processes, a group for each block."""
    if accelerator.is_fsdp2:
        return accelerator.prepare_model(student)
    mesh = init_device_mesh("cpu", (accelerator.num_processes,))  # Accelerate makes these calls on GPUs alone
    for block in student.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh)
    fully_shard(student, mesh=mesh)
    return student


def train(epochs: int) -> None:
    """Distil in one of the processes, and print the held-out manifold loss before and after in the first."""
    set_seed(0)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
    )
    accelerator = Accelerator(fsdp_plugin=plugin)
    data, held_out = digits.load()
    teacher = digits.teacher().to(accelerator.device)
    student = shard(accelerator, digits.vit(embed_dim=32, depth=2, num_heads=2))
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    optimizer, loader = accelerator.prepare(optimizer, DataLoader(data, batch_size=16, shuffle=True, drop_last=True))
    manifold = ManifoldLoss(process_group=torch.distributed.group.WORLD)

    def distance() -> float:
        with torch.no_grad():  # each process has the same images, so theirs count twice
            return forward(student.eval(), teacher, held_out.tensors[0].to(accelerator.device), manifold)[1].item()

    before = distance()
    for _ in range(epochs):
        student.train()
        for images, labels in loader:
            logits, loss = forward(student, teacher, images, manifold)
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(logits, labels) + loss)
            optimizer.step()
    after = distance()
    if accelerator.is_main_process:
        print(f"held-out manifold loss {before:.5f} -> {after:.5f} in {accelerator.num_processes} processes")
        gain.manifold()
    accelerator.end_training()


def main(epochs: int = 3) -> None:
    if "LOCAL_RANK" in os.environ:
        train(epochs)
    else:
        debug_launcher(train, (epochs,), num_processes=2)


if __name__ == "__main__":
    main()
