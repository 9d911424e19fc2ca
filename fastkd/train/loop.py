"""One network in training: its stages, its steps, top-1. One rule: a step is a function of seed, epoch and step."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import accumulate, chain, islice
from typing import Any, cast

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import TrainingTask
from timm.utils import ModelEmaV3, accuracy, dispatch_clip_grad, distribute_bn, unwrap_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from fastkd import capture

from . import DataError, DivergedError
from .checkpoint import Tensors, load_optimizer, load_weights, optimizer_state, weights_of, whole
from .clock import LossClock
from .data import Images, Loader, seed_all
from .ranks import ALONE, Ranks
from .settings import Settings, Stage

AMP_DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOOK_EVERY = 20  # steps between looks at the loss where they wait for the device
SHOW_EVERY = 0.5  # seconds between changes of the progress bar's text
Row = dict[str, Any]
Batch = tuple[Tensor, Tensor]


class Trainee:
    """A network with all that trains it: stages, timm's loaders, optimiser, schedule, average.

    Args:
        label: what the progress bar calls it.
        network: the module that is trained and evaluated.
        stages: what follows what, without None.
        create_task: the task of a stage; its scalars besides the loss are logged.
        loaders: of each stage's training images.
        val_loader: of the validation images.
        num_classes: of mixed labels.
        clock: the one the tasks wind, if they have a distillation loss.
        teacher_logits: those of the images of these indices, where they are known.
        told: names of unreadable images that the user has seen, by a dictionary that the networks of a run share.
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
        teacher_logits: Callable[[list[int]], Tensor] | None = None,
        told: dict[str, None] | None = None,
    ) -> None:
        self.label, self.network, self.stages, self.create_task = label, network, stages, create_task
        self.loaders, self.val_loader = loaders, val_loader
        self.settings, self.device, self.ranks, self.clock = settings, device, ranks, clock
        self.teacher_logits = teacher_logits
        self.told = {} if told is None else told
        self.epochs = sum(stage.epochs for stage in stages)
        self.before = [0, *accumulate(self.steps(epoch) for epoch in range(self.epochs))]
        self.mixup = mixup(settings, num_classes)
        self.erasing = RandomErasing(settings.erase, mode="pixel", device=device) if settings.erase > 0 else None
        self.autocast = torch.autocast(device.type, AMP_DTYPES[settings.amp], enabled=settings.amp != "none")
        self.ema = None if ema is None else ModelEmaV3(network, decay=ema, use_warmup=True)
        self.stage = self.epoch = -1
        self.wish: Callable[[], int] = lambda: 0
        self.wished = 0  # the largest of what the ranks wished at the last look
        self.record = Record(device, ranks)

    def steps(self, epoch: int) -> int:
        """Of that epoch; `before` has those of all epochs before it."""
        return -(-len(self.loaders[self.at(epoch)[0]]) // self.settings.accumulate)

    def begin(self, stage: int, *, distribute: bool = True) -> None:
        """Makes the task, the optimiser and the schedule of that stage."""
        self.stage, now = stage, self.stages[stage]
        seed_all(self.settings.seed, -1, stage)
        self.network.requires_grad_(True)
        self.task = self.create_task(self.network, now)
        if distribute and self.settings.shard:
            cast(Any, self.network).reshard()  # the task has tried its layers
            shard_beside(self._trained(), self.network)
        if distribute and self.settings.compile:
            # Else what was compiled for another task, or for none, serves this one too, without its hooks.
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
        """The steps of an epoch from `start` on; yields how many are done after each.

        Order and augmentation are the same for each network with the same seed. What this rank wishes goes out with
        its losses; `wished` is what all ranks then know.

        Raises:
            DivergedError: a loss that is not finite; on CPU before it reaches the weights.
            DataError: more unreadable images than the settings allow.
        """
        self.epoch, self.wish = epoch, wish
        stage, own_epoch = self.at(epoch)
        if stage != self.stage:
            self.begin(stage)
        self.task.train()
        if hasattr(self.task, "set_epoch"):
            self.task.set_epoch(own_epoch)
        self.record.began = time.perf_counter()
        steps = self.steps(epoch)
        batches = self.loaders[stage].epoch(epoch, start * self.settings.accumulate)
        for step in range(start, steps):
            group = list(islice(batches, self.settings.accumulate))
            if not group:
                raise DataError(f"the training images end at step {step + 1} of {steps} in epoch {epoch + 1}")
            if self.scheduler is not None:
                self.scheduler.step_update(own_epoch * steps + step)
            self._step(epoch, step, group)
            bar.update()
            if self.record.shown + SHOW_EVERY < time.perf_counter() and self.record.seen == self.record.steps:
                self.record.show(bar, self)
            yield step + 1
        self.record.send(wish())
        self._look(epoch, [])
        self._check_images()

    def row(self, epoch: int) -> Row:
        """The log's row: means of the loss and its parts, top-1, seconds with data loading, those in the loss."""
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
            "loss_seconds": record.loss_seconds,
            "steps": record.steps,
        }
        if self.ranks.world > 1:
            distribute_bn(self.network, self.ranks.world, reduce=False)
        row["top1"] = self.evaluate()
        if self.ema is not None:
            row["top1_ema"] = self.evaluate(self.ema.module)
        self.record = Record(self.device, self.ranks)
        return row

    def evaluate(self, network: nn.Module | None = None) -> float:
        """Top-1 on the validation images, in percent, over all ranks."""
        network = self.network if network is None else network
        loader_ranks = ALONE if self.settings.shard else self.ranks
        return evaluate(network, self.val_loader, self.autocast, loader_ranks)

    def state(self) -> tuple[dict[str, Tensors], dict[str, Any]]:
        """(weights by name, the rest): with these load_state goes on as if nothing had been."""
        if self.stage < 0:
            return {}, {"stage": -1}
        if self.record.steps:  # else it waits for its turn
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
        """The network and what its task trains beside it."""
        module: nn.Module = unwrap_model(self.task.get_trainable_module())
        return module

    def _step(self, epoch: int, step: int, group: list[Batch]) -> None:
        looks = self.device.type == "cpu" or (step + 1) % LOOK_EVERY == 0
        seed_all(self.settings.seed, epoch, step, self.ranks.rank)
        group = [self._mixed(images, targets) for images, targets in group]
        self.optimizer.zero_grad()
        for number, (images, targets) in enumerate(group):
            known: dict[str, Tensor] = {}
            if self.teacher_logits is not None:
                batches = self.loaders[self.stage].batches
                assert batches is not None
                indices = batches.indices(epoch, step * self.settings.accumulate + number)
                known["teacher_logits"] = self.teacher_logits(indices)
            last = number + 1 == len(group)
            with nullcontext() if last else self.task.no_sync():
                with self.autocast:
                    result = self.task(images, targets, **known)
                self.record.add(result, step, len(group))
                if last and looks:
                    self.record.send(self.wish())  # it arrives while backward runs
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

    def _mixed(self, images: Tensor, targets: Tensor) -> Batch:
        if self.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.erasing is not None:
            images = self.erasing(images)
        return (images, targets) if self.mixup is None else self.mixup(images, targets)

    def _look(self, epoch: int, group: list[Batch]) -> None:
        """Brings the loss to the host; stops where it is not finite, and says where that began."""
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
        """The first layer whose weights, or else whose output on the step's own batch, are not finite."""
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
                + ", ".join([*found][:10])
            )
            error.teller = 0
            raise error
        if self.ranks.rank == 0:
            for name in found:
                if name not in self.told:
                    tqdm.write(f"skipped {name}, which cannot be read")
        self.told.update(found)


class Record:
    """What an epoch adds up, on the device until looked at."""

    def __init__(self, device: torch.device, ranks: Ranks) -> None:
        self.device, self.ranks = device, ranks
        self.sums: dict[str, float] = {}
        self.steps = 0  # done
        self.seen = 0  # and brought to the host
        self.seconds = self.loss_seconds = self.shown = 0.0
        self.began = time.perf_counter()
        self.wished = 0
        self._pending: dict[int, Tensor] = {}  # step -> its loss and parts
        self._sent: Callable[[], Tensor] | None = None  # on its way
        self._names: list[str] = []

    def add(self, result: dict[str, Any], step: int, parts: int) -> None:
        """A forward pass, one of `parts` of the step."""
        scalars = {name: x for name, x in result.items() if name != "output"}
        self._names = list(scalars)
        values = torch.stack([x.detach().float().reshape(()) for x in scalars.values()]) / parts
        if step in self._pending:
            self._pending[step] += values
        else:
            self._pending[step] = values
            self.steps += 1

    def send(self, wish: int) -> None:
        """Starts to tell all ranks what is pending, and a number that this one wishes."""
        if self._pending:
            values = torch.cat(list(self._pending.values()))
            self._sent = self.ranks.start_gather(torch.cat([values, values.new_tensor([wish])]))

    def look(self) -> tuple[int, dict[str, float]] | None:
        """Brings what is pending to the host, as means over ranks; (step, its parts) of the first not finite."""
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

    def show(self, bar: tqdm, trainee: Trainee) -> None:
        self.stop(trainee.clock)
        batch_size = cast(int, trainee.stages[trainee.stage].batch_size)
        images = self.steps * trainee.settings.accumulate * batch_size * self.ranks.world
        parts = [f"{name} {value / self.steps:.4g}" for name, value in self.sums.items()]
        share = [] if trainee.clock is None else [f"in loss {self.loss_seconds / self.seconds:.1%}"]
        bar.set_postfix_str(", ".join([*parts, f"{images / self.seconds:.0f} images/s", *share]), refresh=False)
        self.shown = time.perf_counter()

    def stop(self, clock: LossClock | None) -> None:
        """Adds up the time so far."""
        now = time.perf_counter()
        self.seconds += now - self.began
        self.began = now
        if clock is not None:
            self.loss_seconds += clock.total()

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("sums", "steps", "seen", "seconds", "loss_seconds")}

    def load(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def not_finite(network: nn.Module) -> str | None:
    """The first parameter that holds NaN or infinity."""
    for name, x in network.named_parameters():
        if not bool(torch.isfinite(whole(x) if isinstance(x, DTensor) else x.detach()).all()):
            return name
    return None


def shard(network: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Spreads the network's weights over the ranks by FSDP2, a group for each of its blocks."""
    mesh = init_device_mesh(device.type, (ranks.world,))
    for name in capture.block_names(network):
        fully_shard(network.get_submodule(name), mesh=mesh)
    fully_shard(network, mesh=mesh)


def shard_beside(module: nn.Module, network: nn.Module) -> None:
    """The same for what a task trains beside the network, in a group of its own."""
    mesh = next(network.parameters()).device_mesh  # type: ignore[attr-defined]
    for child in module.children():
        if child is not network and any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh)


@torch.no_grad()
def evaluate(network: nn.Module, loader: Any, context: Any, ranks: Ranks = ALONE) -> float:
    """Top-1 in percent over all images of the loader."""
    network.eval()
    right, count = None, 0
    for images, targets in loader:
        with context:
            logits = network(images)
        rows = accuracy(logits.float(), targets)[0] * len(targets)
        right = rows if right is None else right + rows
        count += len(targets)
    # A rank may have had no image at all.
    device = next(network.parameters()).device
    totals = torch.tensor([0.0, count], dtype=torch.float64, device=device)
    if right is not None:
        totals[0] = right
    hits, images_seen = ranks.sum(totals).tolist()
    if not images_seen:
        raise DataError("--data: there is no validation image to be read")
    return hits / images_seen


def mixup(settings: Settings, num_classes: int) -> Mixup | None:
    if settings.mixup <= 0 and settings.cutmix <= 0:
        return None
    return Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=num_classes)


def criterion(mixed: bool, smoothing: float) -> nn.Module:
    """timm's cross-entropy for the targets that mixup makes or leaves."""
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    if mixed:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()
