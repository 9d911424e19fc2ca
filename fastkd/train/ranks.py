"""The processes of a run: one, or those that torchrun started. Only the first one writes."""

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
        """For the losses that span images; None: this process alone."""
        return dist.group.WORLD if self.world > 1 else None

    def start_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """Sends x to every rank; what it returns waits for all of them, (ranks, ...)."""
        if self.world == 1:
            return lambda: x[None]
        wait = distributed.start_gather(x[None], [1] * self.world, self.group)
        return lambda: torch.cat(wait())

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
            told[1].teller = 0
            raise told[1]
        return told[0]

    def together(self, work: Callable[[], T]) -> T:
        """What `work`, which waits for no other rank, gives on this one; what fails on one rank is raised on all."""
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
        """Every rank's, in their order."""
        if self.world == 1:
            return [value]
        told: list[Any] = [None] * self.world
        dist.all_gather_object(told, value)
        return told

    def found(self, value: str | None) -> str | None:
        """The first rank's that has one."""
        return next((x for x in self.each(value) if x is not None), None)


ALONE = Ranks()


def mean_at_once(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """A communication hook of DistributedDataParallel for gradients that all ranks can send to all in one round.

    gloo's all-reduce goes round a ring, in pieces, and waits for most of its time.
    """
    gradients = bucket.buffer()
    world = dist.get_world_size(group)
    first, *others = distributed.start_gather(gradients, [len(gradients)] * world, group)()
    mean = first / world
    for other in others:  # in the order of the ranks: the same bits everywhere
        mean.add_(other, alpha=1 / world)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(mean)
    return done


def join(device: torch.device, workers: int = 0) -> tuple[Ranks, torch.device]:
    """Joins the processes that torchrun started, if this one has not; each gets a GPU of its own.

    timm's init_distributed_device also takes a Slurm job's variables for ranks, whatever started this process.
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
    """Gives each process of a machine its share of the cores if its threads and those of its loaders' workers fit in
    there, and nobody chose others.

    Else gloo's threads wake up on cores where another process computes, and that one waits for what they bring.
    """
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local_world == 1 or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // local_world
    if len(cores) == os.cpu_count() and torch.get_num_threads() + workers <= share:
        first = int(os.environ["LOCAL_RANK"]) * share
        os.sched_setaffinity(0, cores[first : first + share])  # threads started from here on inherit it


def leave(together: bool = False) -> None:
    """Ends the group; `together` where all come here: torchrun stops the others when the first process ends."""
    if dist.is_available() and dist.is_initialized():
        if together:
            dist.barrier()
        dist.destroy_process_group()
