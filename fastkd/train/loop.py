"""Training of one network: stages, steps, top-1. One rule: a step depends only on seed, epoch and step number."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import accumulate, chain, islice
from typing import Any, cast

import torch
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import TrainingTask
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn, unwrap_model
from torch import Tensor, nn
from tqdm import tqdm

from . import DataError, DivergedError
from .checkpoint import Tensors, load_optimizer, load_weights, optimizer_state, weights_of
from .clock import LossClock
from .data import Images, Loader, listed, seed_all
from .data.folders import printable
from .evaluate import evaluate, not_finite
from .ranks import ALONE, Ranks
from .record import SHOW_EVERY, Record
from .settings import Settings, Stage
from .sharding import keep_whole, shard_beside
from .targets import mixup

AMP_DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ESTIMATE_AFTER = 20  # steps after which the time of an epoch is printed
LOOK_EVERY = 20  # steps between checks of the loss on devices where a check has to wait
Row = dict[str, Any]
Batch = tuple[Tensor, Tensor]


class Trainee:
    """A network and everything that trains it: stages, timm's loaders, optimiser, schedule, weight average.

    Args:
        label: name in the progress bar.
        network: the module that is trained and evaluated.
        stages: the stages in their order, without None.
        create_task: function that makes the task of a stage; the task's other scalars are logged with its loss.
        loaders: loader of the training images of each stage.
        val_loader: loader of the validation images.
        num_classes: number of classes of mixed labels.
        clock: clock that the tasks use, if they have a distillation loss.
        cached: function from an epoch and image indices to cached keyword arguments of the task.
        told: names of unreadable images already reported, in a dictionary that the networks of a run share.
    """

    def __init__(
        self,
        label: str,
        network: nn.Module,
        stages: tuple[Stage, ...],
        create_task: Callable[[nn.Module, Stage], TrainingTask],
        loaders: tuple[Loader, ...],
        val_loader: Loader,
        settings: Settings,
        *,
        num_classes: int,
        device: torch.device,
        ranks: Ranks = ALONE,
        ema: float | None = None,
        clock: LossClock | None = None,
        cached: Callable[[int, list[int]], dict[str, Any]] | None = None,
        told: dict[str, None] | None = None,
    ) -> None:
        self.label, self.network, self.stages, self.create_task = label, network, stages, create_task
        self.loaders, self.val_loader = loaders, val_loader
        self.settings, self.device, self.ranks, self.clock = settings, device, ranks, clock
        self.cached = cached
        self.told = {} if told is None else told
        self.epochs = sum(stage.epochs for stage in stages)
        self.before = [0, *accumulate(self.steps(epoch) for epoch in range(self.epochs))]
        self.mixup = mixup(settings, num_classes)
        self.erasing = RandomErasing(settings.erase, mode="pixel", device=device) if settings.erase > 0 else None
        self.autocast = torch.autocast(device.type, AMP_DTYPES[settings.amp], enabled=settings.amp != "none")
        self.ema = None if ema is None else ModelEmaV3(network, decay=ema, use_warmup=True)
        self.stage = self.epoch = -1
        self.wish: Callable[[], int] = lambda: 0
        self.estimated = False  # whether the time of an epoch has been printed
        self.wished = 0  # the largest of what the ranks wished at the last look
        self.record = Record(device, ranks)

    def steps(self, epoch: int) -> int:
        """Return the number of steps of an epoch; `before` has that of all earlier epochs."""
        return -(-len(self.loaders[self.at(epoch)[0]]) // self.settings.accumulate)

    def begin(self, stage: int, *, distribute: bool = True) -> None:
        """Create the task, the optimiser and the schedule of a stage."""
        self.stage, now = stage, self.stages[stage]
        seed_all(self.settings.seed, -1, stage)
        self.network.requires_grad_(True)
        self.task = self.create_task(self.network, now)
        if distribute and self.settings.shard:
            cast(Any, self.network).reshard()  # the task has run a blank image through its layers
            shard_beside(self._trained(), self.network)
            features: Any = self._trained().features
            keep_whole(self.network, features is not None and features.inside)
        if distribute and self.settings.compile:
            # Otherwise code compiled for another task, or for none, would be reused without this task's hooks.
            torch._dynamo.config.skip_nnmodule_hook_guards = False
            self.task.compile()
        module = self.task.get_trainable_module()
        options = {"layer_decay": now.layer_decay, **(now.opt_args or {})}
        self.optimizer = create_optimizer_v2(module, opt=now.opt, lr=now.lr, weight_decay=now.weight_decay, **options)
        assert now.lr is not None and now.warmup_epochs is not None and now.min_lr is not None
        warmup_lr = now.lr / 100 if self.settings.warmup_lr is None else self.settings.warmup_lr
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched=now.sched,
            num_epochs=max(now.epochs, 1),
            warmup_epochs=max(0, min(now.warmup_epochs, now.epochs - 1)),
            warmup_lr=warmup_lr,
            min_lr=now.min_lr,
            step_on_epochs=False,
            updates_per_epoch=-(-len(self.loaders[stage]) // self.settings.accumulate),
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.settings.amp == "fp16")
        if distribute and self.ranks.world > 1 and not self.settings.shard:
            self.task.prepare_distributed(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def at(self, epoch: int) -> tuple[int, int]:
        """(stage, epoch within it)."""
        for number, stage in enumerate(self.stages):
            if epoch < stage.epochs:
                return number, epoch
            epoch -= stage.epochs
        raise IndexError(f"{self.label} has no epoch {epoch}")

    def train_epoch(self, epoch: int, bar: tqdm, start: int = 0, wish: Callable[[], int] = lambda: 0) -> Iterator[int]:
        """Run the steps of an epoch from `start` on and yield the number of finished steps after each.

        Order and augmentation are the same for each network with the same seed. Each rank sends its stop request with
        its losses; `wished` is the maximum over ranks.

        Raises:
            DivergedError: the loss is not finite; on a CPU it is raised before the weights are updated.
            DataError: more unreadable images than the settings allow.
        """
        self.epoch, self.wish = epoch, wish
        stage, own_epoch = self.at(epoch)
        if stage != self.stage:
            self.begin(stage)
        self.task.train()
        if hasattr(self.task, "set_epoch"):
            self.task.set_epoch(own_epoch)
        self.record.began = self.record.shown = time.perf_counter()
        steps = self.steps(epoch)
        batches = self.loaders[stage].epoch(epoch, start * self.settings.accumulate)
        for step in range(start, steps):
            waiting = time.perf_counter()
            group = list(islice(batches, self.settings.accumulate))
            self.record.data_seconds += time.perf_counter() - waiting
            if not group:
                raise DataError(f"the training images end at step {step + 1} of {steps} in epoch {epoch + 1}")
            if self.scheduler is not None:
                self.scheduler.step_update(own_epoch * steps + step)
            self._step(epoch, step, group)
            bar.update()
            if self.ranks.rank == 0 and self.record.seen == self.record.steps:
                self._show(bar, step + 1, steps)
            yield step + 1
        self.record.send(wish())
        self._look(epoch, [])
        self._check_images()

    def row(self, epoch: int) -> Row:
        """Return a row of the log: means of the loss and its parts, top-1, seconds with data, seconds in the loss."""
        record, own_epoch = self.record, self.at(epoch)[1]
        if self.scheduler is not None:
            self.scheduler.step_update((own_epoch + 1) * self.steps(epoch))
        record.stop(self.clock)
        row = {
            "network": self.label,
            "epoch": epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            **{name: value / record.steps for name, value in record.sums.items()},
            "seconds": record.seconds,
            "data_seconds": record.data_seconds,
            "loss_seconds": record.loss_seconds,
            "steps": record.steps,
        }
        if self.ranks.world > 1:
            distribute_bn(self.network, self.ranks.world, reduce=False)
        row |= self.evaluate()
        if self.ema is not None:
            row |= {f"{name}_ema": value for name, value in self.evaluate(self.ema.module).items()}
        self.record = Record(self.device, self.ranks)
        return row

    def evaluate(self, network: nn.Module | None = None) -> dict[str, float]:
        """Return top-1, top-5 and loss on the validation images, over all ranks."""
        network = self.network if network is None else network
        loader_ranks = ALONE if self.settings.shard else self.ranks
        return evaluate(network, self.val_loader, self.autocast, loader_ranks)

    def state(self) -> tuple[dict[str, Tensors], dict[str, Any]]:
        """Return (weights by name, remaining state), from which load_state continues exactly."""
        if self.stage < 0:
            return {}, {"stage": -1}
        if self.record.steps:  # otherwise it is restored when its stage begins
            self._look(self.epoch, [])
            self.record.stop(self.clock)
        weights = {"weights": weights_of(self._trained())}
        if self.ema is not None:
            weights["ema"] = weights_of(self.ema.module)
        return weights, {
            "stage": self.stage,
            "optimizer": optimizer_state(self.optimizer),
            "scaler": self.scaler.state_dict(),
            "record": self.record.state(),
        }

    def load_state(self, weights: dict[str, Tensors], state: dict[str, Any]) -> None:
        if state["stage"] < 0:
            return
        self.begin(state["stage"])
        load_weights(self._trained(), weights["weights"])
        if self.ema is not None:
            load_weights(self.ema.module, weights["ema"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.record.load(state["record"])

    def _trained(self) -> nn.Module:
        """Return the network with the modules that its task trains."""
        module: nn.Module = unwrap_model(self.task.get_trainable_module())
        return module

    def _step(self, epoch: int, step: int, group: list[Batch]) -> None:
        looks = self.device.type == "cpu" or (step + 1) % LOOK_EVERY == 0
        seed_all(self.settings.seed, epoch, step, self.ranks.rank)
        group = [self._mixed(images, targets) for images, targets in group]
        self.optimizer.zero_grad()
        for number, (images, targets) in enumerate(group):
            known: dict[str, Any] = {}
            if self.cached is not None:
                batches = self.loaders[self.stage].batches
                assert batches is not None
                indices = batches.indices(epoch, step * self.settings.accumulate + number)
                known = self.cached(epoch, indices)
            last = number + 1 == len(group)
            with nullcontext() if last else self.task.no_sync():
                with self.autocast:
                    result = self.task(images, targets, **known)
                self.record.add(result, step, len(group))
                if last and looks:
                    self.record.send(self.wish())  # the message travels while backward runs
                self.scaler.scale(result["loss"] / len(group)).backward()
        if looks:
            self._look(epoch, group)
        if self.settings.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.task.get_clip_parameters(), self.settings.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.network, step=self.before[epoch] + step + 1)

    def _show(self, bar: tqdm, step: int, steps: int) -> None:
        """Write the progress beside the bar, or from time to time as a line; after 20 steps the time of an epoch."""
        every = self.settings.log_every if bar.disable else SHOW_EVERY
        if every and self.record.shown + every < time.perf_counter():
            images_per_step = self.settings.accumulate * cast(int, self.stages[self.stage].batch_size)
            text = self.record.progress(images_per_step, steps - step, self.clock)
            if bar.disable:
                bar.write(f"{self.label:<17} epoch {self.epoch + 1:>3}/{self.epochs}  step {step}/{steps}  {text}")
                sys.stdout.flush()
            else:
                bar.set_postfix_str(text, refresh=False)
        if self.record.steps == ESTIMATE_AFTER and not self.estimated:
            self.record.stop(self.clock)
            self.estimated, each = True, self.record.seconds / ESTIMATE_AFTER
            times = [tqdm.format_interval(each * n) for n in (steps, self.before[-1] - self.before[self.epoch])]
            bar.write(
                f"{self.label:<17} an epoch takes about {times[0]}, the {self.epochs - self.epoch} left {times[1]}"
            )

    def _mixed(self, images: Tensor, targets: Tensor) -> Batch:
        if self.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.erasing is not None:
            images = self.erasing(images)
        return (images, targets) if self.mixup is None else self.mixup(images, targets)

    def _look(self, epoch: int, group: list[Batch]) -> None:
        """Bring the loss to the host. If it is not finite, raise an error that names the first layer concerned."""
        found = self.record.look()
        self.wished = self.record.wished
        if found is None:
            return
        step, values = found
        layer = self.ranks.found(self._diagnose(epoch, step, group))
        parts = ", ".join(f"{name} {value:g}" for name, value in values.items())
        where = f"; first not finite: {layer}" if layer else "; all layers are finite, the loss itself is not"
        raise DivergedError(
            f"the loss of {self.label} is not finite in epoch {epoch + 1}, step {step + 1}: {parts}{where}"
        )

    @torch.no_grad()
    def _diagnose(self, epoch: int, step: int, group: list[Batch]) -> str | None:
        """Return the first layer whose weights, or whose output on the step's batch, are not finite."""
        if (name := not_finite(self.network)) is not None:
            return f"the weights {name}"
        found: list[str] = []

        def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                if isinstance(output, Tensor) and not found and not bool(torch.isfinite(output).all()):
                    found.append(f"the output of {name}")

            return hook

        handles = [
            module.register_forward_hook(watch(name))
            for name, module in self.network.named_modules()
            if name and not any(module.children())
        ]
        try:
            seed_all(self.settings.seed, epoch, step, self.ranks.rank)
            for images, _ in group:
                with self.autocast:
                    self.network(images)
        finally:
            for handle in handles:
                handle.remove()
        return found[0] if found else None

    def _check_images(self) -> None:
        loaders = dict.fromkeys((*self.loaders, self.val_loader))
        own = [name for loader in loaders if isinstance(loader.images, Images) for name in loader.images.faults()]
        found = dict.fromkeys([*self.told, *chain.from_iterable(self.ranks.each(own))])
        if len(found) > self.settings.skip_images:
            error = DataError(
                f"{len(found)} images cannot be read, more than --skip-images {self.settings.skip_images}: "
                + listed(found, 10)
            )
            error.teller = 0
            raise error
        if self.ranks.rank == 0:
            for name in found:
                if name not in self.told:
                    tqdm.write(f"skipped {printable(name)}, which cannot be read")
        self.told.update(found)
