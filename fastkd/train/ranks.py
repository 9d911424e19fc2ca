"""The processes of a run: one, or those that torchrun started. Only the first one writes."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Ranks(NamedTuple):
    rank: int = 0
    world: int = 1

    @property
    def group(self) -> Any:
        """For the losses that span images; None: this process alone."""
        return dist.group.WORLD if self.world > 1 else None

    def mean(self, x: Tensor) -> Tensor:
        """The mean over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(x)
            x /= self.world
        return x

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def first(self, work: Callable[[], T]) -> T:
        """What `work` gives on the first rank, or raises there, on every rank."""
        if self.world == 1:
            return work()
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told[0] = work()
            except Exception as error:  # whatever it is, the others wait
                told[1] = error
        dist.broadcast_object_list(told)
        if told[1] is not None:
            raise told[1]
        return told[0]

    def found(self, value: str | None) -> str | None:
        """The first rank's that has one."""
        if self.world == 1:
            return value
        told: list[str | None] = [None] * self.world
        dist.all_gather_object(told, value)
        return next((x for x in told if x is not None), None)


ALONE = Ranks()


def join(device: torch.device) -> tuple[Ranks, torch.device]:
    """Joins the processes that torchrun started; each gets a GPU of its own.

    timm's init_distributed_device also takes a Slurm job's variables for ranks, whatever started this process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks(), device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size()), device


def leave() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
