"""Measure the time of a loss within a training step, forward and backward, without extra passes."""

import time
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

Moment = float | torch.cuda.Event


class LossClock:
    """A clock that adds up the time from `start` to `stop` and the time of the matching part of backward.

    In backward, tensor hooks measure from the arrival of the loss's gradient to the arrival of the last input's
    gradient. Autograd runs the newest ready node first and the loss is the newest part of the graph, so nothing else
    runs in between. On CUDA the times are events on the stream, which `total` reads; no step waits for them.
    """

    def __init__(self) -> None:
        self._spans: list[tuple[Moment, Moment]] = []
        self._cuda = False

    def start(self, inputs: Iterable[Tensor]) -> list[Tensor]:
        """Start the clock and return views of the loss's inputs, which must be used in their place."""
        views = [x.view_as(x) for x in inputs]
        self._cuda = views[0].is_cuda
        self._pending = sum(view.requires_grad for view in views)
        for view in views:
            if view.requires_grad:
                view.register_hook(self._input_reached)
        self._began = self._now()
        return views

    def stop(self, loss: Tensor) -> None:
        self._spans.append((self._began, self._now()))
        if loss.requires_grad:
            loss.register_hook(self._loss_reached)

    def total(self) -> float:
        """Return the seconds added up since the last call of total."""
        if self._cuda:
            torch.cuda.synchronize()
        spans, self._spans = self._spans, []
        return sum(_seconds(began, ended) for began, ended in spans)

    def _loss_reached(self, _: Tensor) -> None:
        self._began = self._now()

    def _input_reached(self, _: Tensor) -> None:
        self._pending -= 1
        if self._pending == 0:
            self._spans.append((self._began, self._now()))

    def _now(self) -> Moment:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(began: Moment, ended: Moment) -> float:
    if isinstance(began, torch.cuda.Event):
        return began.elapsed_time(cast(torch.cuda.Event, ended)) / 1000
    return cast(float, ended) - began
