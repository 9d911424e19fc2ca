"""Processes of a run: one, or those that torchrun started. Only the first one writes files."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd import distributed

from . import RunError

T = TypeVar("T")


class Ranks(NamedTuple):
    rank: int = 0
    world: int = 1

    @property
    def group(self) -> Any:
        """Return the process group for losses that relate images, or None for a single process."""
        return dist.group.WORLD if self.world > 1 else None

    def start_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """Start sending x to every rank. Return a function that waits and returns all ranks' tensors (ranks, ...)."""
        if self.world == 1:
            return lambda: x[None]
        wait = distributed.start_gather(x[None], [1] * self.world, self.group)
        return lambda: torch.cat(wait())

    def sum(self, x: Tensor) -> Tensor:
        """Sum x over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def first(self, work: Callable[[], T]) -> T:
        """Run `work` on the first rank and return its result, or raise its error, on every rank."""
        if self.world == 1:
            return work()
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told[0] = work()
            except Exception as error:  # any error must be sent, since the others wait
                told[1] = error
        dist.broadcast_object_list(told)
        if told[1] is not None:
            told[1].teller = 0
            raise told[1]
        return told[0]

    def together(self, work: Callable[[], T]) -> T:
        """Run `work`, which must not communicate, on this rank. An error on one rank is raised on all."""
        if self.world == 1:
            return work()
        done: list[T] = []
        mine: RunError | None = None
        try:
            done.append(work())
        except RunError as error:
            mine = error
        for rank, failed in enumerate(self.each(mine)):
            if failed is not None:
                failed.teller = rank
                raise failed
        return done[0]

    def each(self, value: T) -> list[T]:
        """Return every rank's object, in the order of the ranks."""
        if self.world == 1:
            return [value]
        told: list[Any] = [None] * self.world
        dist.all_gather_object(told, value)
        return told

    def found(self, value: str | None) -> str | None:
        """Return the object of the first rank that has one."""
        return next((x for x in self.each(value) if x is not None), None)


ALONE = Ranks()


def mean_at_once(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Communication hook of DistributedDataParallel for small gradients, which all ranks send to all in one round.

    gloo's all-reduce passes pieces around a ring, and spends most of its time waiting.
    """
    gradients = bucket.buffer()
    world = dist.get_world_size(group)
    first, *others = distributed.start_gather(gradients, [len(gradients)] * world, group)()
    mean = first / world
    for other in others:  # summed in the order of the ranks, so that all get the same bits
        mean.add_(other, alpha=1 / world)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(mean)
    return done


def join(device: torch.device, workers: int = 0) -> tuple[Ranks, torch.device]:
    """Join the processes that torchrun started, unless already done; each gets its own GPU.

    timm's init_distributed_device would also read ranks from a Slurm job's variables, whatever started this process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks(), device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        keep_to_own_cores(workers)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size()), device


def keep_to_own_cores(workers: int) -> None:
    """Bind each process of a machine to its share of the cores, if its threads and loader workers fit there.

    Cores that the user has chosen are kept. Without this, gloo's threads wake up on cores where another process
    computes, and that process waits for their messages.
    """
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local_world == 1 or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // local_world
    if len(cores) == os.cpu_count() and torch.get_num_threads() + workers <= share:
        first = int(os.environ["LOCAL_RANK"]) * share
        os.sched_setaffinity(0, cores[first : first + share])  # inherited by threads that start later


def leave(together: bool = False) -> None:
    """End the group. `together`: all ranks call this, and wait, since torchrun stops the others when one ends."""
    if dist.is_available() and dist.is_initialized():
        if together:
            dist.barrier()
        dist.destroy_process_group()
