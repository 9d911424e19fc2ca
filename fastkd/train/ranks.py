"""Processes of a run: one, or those that torchrun started. Only the first one writes files."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd import distributed

from . import DataError, InterruptedRun, RunError

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


class Stop:
    """Handler that turns Ctrl-C and SIGTERM into a request to stop after the step; a second Ctrl-C stops at once."""

    def __init__(self, own: Ranks) -> None:
        self.ranks, self.signal = own, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self, wished: int) -> bool:
        """Return whether the run ends here. Several ranks use the signal that all know from the last exchange."""
        known = self.signal if self.ranks.world == 1 else wished
        self.signal = known or self.signal
        return known != 0

    def leave(self, out: Path) -> None:
        raise InterruptedRun(f"interrupted; go on with: fastkd train --resume {out}", 128 + self.signal)

    def _heard(self, number: int, _: FrameType | None) -> None:
        # torchrun forwards a signal that the terminal has already sent to all of its processes.
        if number == signal.SIGINT and self.signal == signal.SIGINT and self.ranks.world == 1:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def lost(own: Ranks, out: Path) -> Iterator[None]:
    """Turn the error of a message to a process that has ended into an error of one line."""
    try:
        yield
    except RuntimeError as error:  # gloo raises no class of its own
        text = " ".join(str(error).split())
        known = isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "Connection", "NCCL"))
        if own.world == 1 or isinstance(error, RunError) or not known:
            raise
        raise DataError(
            f"another process of this run has ended, or cannot be reached ({text[:120]}); "
            f"go on from the last checkpoint with: fastkd train --resume {out}"
        ) from error


def leave(together: bool = False) -> None:
    """End the group. `together`: all ranks call this, and wait, since torchrun stops the others when one ends."""
    if dist.is_available() and dist.is_initialized():
        if together:
            dist.barrier()
        dist.destroy_process_group()
