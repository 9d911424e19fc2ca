"""Sums over the steps of an epoch: losses, time, and the progress bar's text."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .clock import LossClock
from .ranks import Ranks

SHOW_EVERY = 0.5  # seconds between changes of the progress bar's text


class Record:
    """The sums of an epoch, kept on the device until `look` reads them."""

    def __init__(self, device: torch.device, ranks: Ranks) -> None:
        self.device, self.ranks = device, ranks
        self.sums: dict[str, float] = {}
        self.steps = 0  # done
        self.seen = 0  # and brought to the host
        self.seconds = self.data_seconds = self.loss_seconds = self.shown = 0.0
        self.began = time.perf_counter()
        self.wished = 0
        self._pending: dict[int, Tensor] = {}  # step -> its loss and parts
        self._sent: Callable[[], Tensor] | None = None  # on its way
        self._names: list[str] = []

    def add(self, result: dict[str, Any], step: int, parts: int) -> None:
        """Add a forward pass, one of `parts` of the step."""
        scalars = {name: x for name, x in result.items() if name != "output"}
        self._names = list(scalars)
        values = torch.stack([x.detach().float().reshape(()) for x in scalars.values()]) / parts
        if step in self._pending:
            self._pending[step] += values
        else:
            self._pending[step] = values
            self.steps += 1

    def send(self, wish: int) -> None:
        """Start sending all ranks the pending losses and this rank's stop request."""
        if self._pending:
            values = torch.cat(list(self._pending.values()))
            self._sent = self.ranks.start_gather(torch.cat([values, values.new_tensor([wish])]))

    def look(self) -> tuple[int, dict[str, float]] | None:
        """Bring pending losses to the host as means over ranks. Return (step, parts) of the first one not finite."""
        if not self._pending:
            return None
        if self._sent is None:
            self.send(0)
        assert self._sent is not None
        *columns, wishes = zip(*self._sent().tolist(), strict=True)
        means = [sum(of_ranks) / len(of_ranks) for of_ranks in columns]
        steps, width = list(self._pending), len(self._names)
        self._pending, self._sent, self.wished = {}, None, int(max(wishes))
        for number, step in enumerate(steps):
            values = means[number * width : (number + 1) * width]
            if not all(map(math.isfinite, values)):
                return step, dict(zip(self._names, values, strict=True))
            for name, value in zip(self._names, values, strict=True):
                self.sums[name] = self.sums.get(name, 0.0) + value
        self.seen += len(steps)
        return None

    def progress(self, images_per_step: int, left: int, clock: LossClock | None) -> str:
        """Return the epoch's mean losses, images per second over all ranks, shares of the time, and the time left."""
        self.stop(clock)
        images = self.steps * images_per_step * self.ranks.world
        parts = [f"{name} {value / self.steps:.4g}" for name, value in self.sums.items()]
        parts += [f"{images / self.seconds:.0f} images/s", f"loading {self.data_seconds / self.seconds:.0%}"]
        parts += [] if clock is None else [f"in loss {self.loss_seconds / self.seconds:.1%}"]
        if self.device.type == "cuda":
            parts.append(f"{torch.cuda.max_memory_allocated(self.device) / 1e9:.1f} GB")
        self.shown = time.perf_counter()
        return ", ".join([*parts, f"epoch ends in {tqdm.format_interval(left * self.seconds / self.steps)}"])

    def stop(self, clock: LossClock | None) -> None:
        """Add the time since the last stop."""
        now = time.perf_counter()
        self.seconds += now - self.began
        self.began = now
        if clock is not None:
            self.loss_seconds += clock.total()

    def state(self) -> dict[str, Any]:
        return {
            name: getattr(self, name) for name in ("sums", "steps", "seen", "seconds", "data_seconds", "loss_seconds")
        }

    def load(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
