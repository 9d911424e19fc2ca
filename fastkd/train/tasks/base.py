"""Base of all tasks: the frozen teacher in its own normalisation, one trainable module, the weights of the losses."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain, islice
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
from timm.models import group_parameters
from timm.task import TrainingTask
from timm.utils import ModelEmaV3, unwrap_model
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fastkd import capture, distributed
from fastkd.train import InputError
from fastkd.train.clock import LossClock

from .logits import LogitLoss

Layers = Sequence[int | str]
Criterion = Callable[[Tensor, Tensor], Tensor]
Parts = dict[str, Tensor]
ROLES = ("student", "teacher")


class FeatureLoss(nn.Module):
    """A loss between layers of the two networks. Its parameters are trained and checkpointed, not exported.

    name: the name of the loss among the parts of the step.
    inside: whether it compares values from inside of blocks.
    """

    name: str
    inside = False

    def __init__(self, student_layers: Sequence[str], teacher_layers: Sequence[str]) -> None:
        super().__init__()
        self.student_layers, self.teacher_layers = list(student_layers), list(teacher_layers)

    def watch(self, model: nn.Module, layers: Layers) -> AbstractContextManager[Iterable[Any]]:
        """Return a context manager that captures the layers' values for forward."""
        return capture.tokens(model, layers)

    def forward(self, students: list[Any], teachers: list[Any]) -> tuple[Tensor, Parts]:
        """Return the loss and its parts by name, from the values captured in both networks."""
        raise NotImplementedError


class Several(FeatureLoss):
    """The weighted sum of losses between layers, each with its own layers and captured values."""

    name = "layers"

    def __init__(self, parts: Sequence[tuple[FeatureLoss, float]]) -> None:
        losses = [loss for loss, _ in parts]
        super().__init__(*([x for loss in losses for x in getattr(loss, f"{role}_layers")] for role in ROLES))
        self.losses, self.weights = nn.ModuleList(losses), [weight for _, weight in parts]
        self.inside = any(loss.inside for loss in losses)

    @contextmanager
    def watch(self, model: nn.Module, layers: Layers) -> Iterator[Iterable[Any]]:
        names = iter(layers)
        with ExitStack() as stack:
            own = [stack.enter_context(x.watch(model, list(islice(names, len(x.student_layers))))) for x in self._parts]
            yield chain.from_iterable(own)

    def forward(self, students: list[Any], teachers: list[Any]) -> tuple[Tensor, Parts]:
        total, parts, of_students, of_teachers = 0.0, Parts(), iter(students), iter(teachers)
        for loss, weight in zip(self._parts, self.weights, strict=True):
            count = len(loss.student_layers)
            value, terms = loss(list(islice(of_students, count)), list(islice(of_teachers, count)))
            total, parts = total + weight * value, parts | {f"{loss.name}_loss": value} | terms
        return cast(Tensor, total), parts

    @property
    def _parts(self) -> list[FeatureLoss]:
        return cast(list[FeatureLoss], list(self.losses))


class Trainable(nn.Module):
    """The student and everything in the step that has a gradient, as one forward pass.

    DistributedDataParallel and FSDP thus see which trained parameters are used in it.
    """

    def __init__(
        self,
        student: nn.Module,
        features: FeatureLoss | None,
        logits: LogitLoss | None,
        criterion: Criterion,
        weights: tuple[float, float, float],
        clock: LossClock | None,
    ) -> None:
        super().__init__()
        self.student, self.features, self.logits, self.criterion = student, features, logits, criterion
        self.weights, self.clock = weights, clock
        self.ramp = 1.0  # factor of the logit loss

    def no_weight_decay(self) -> set[str]:
        student: Any = self.student
        names = student.no_weight_decay() if hasattr(student, "no_weight_decay") else ()
        return {f"student.{name}" for name in names}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return the groups of timm's layer-wise learning rates; other modules count as the student's last layer."""
        student: Any = self.student
        own = group_parameters(student, student.group_matcher(coarse=coarse), reverse=True)
        last = max(own.values())
        return lambda name: own.get(name.removeprefix("student."), last)

    def forward(
        self, images: Tensor, target: Tensor, teachers: list[Any], teacher_logits: Tensor | None
    ) -> dict[str, Tensor]:
        students: list[Any] = []
        if self.features is None:
            output = self.student(images)
        else:
            with self.features.watch(self.student, self.features.student_layers) as captured:
                output = self.student(images)
                students = list(captured)
        # In training, a distilled DeiT returns the logits of its class token and of its distillation token.
        logits, distilled = output if isinstance(output, tuple) else (output, output)
        task_weight, weight, logit_weight = self.weights
        with _training(task_weight):
            task_loss = self.criterion(logits, target)
        parts = {"task_loss": task_loss}
        compared: list[Any] = [students, distilled if self.logits is not None else None]
        if self.clock is not None and (self.features is not None or self.logits is not None):
            compared = _clocked(self.clock, compared)
        students, distilled = compared
        losses = []
        if self.features is not None:
            with _training(weight):
                loss, terms = self.features(students, teachers)
            parts |= {f"{self.features.name}_loss": loss} | terms
            losses += [weight * loss] if weight else []
        if self.logits is not None and teacher_logits is not None:
            with _training(logit_weight):
                loss = self.logits(distilled, teacher_logits, target)
            parts[f"{self.logits.name}_loss"] = loss
            losses += [self.ramp * logit_weight * loss] if logit_weight else []
        total = [task_weight * task_loss] if task_weight else []
        if losses:
            total.append(sum(losses[1:], losses[0]))
            if self.clock is not None:
                self.clock.stop(total[-1])
        return {
            "loss": sum(total[1:], total[0]),
            "output": logits.detach(),
            **{name: part.detach() for name, part in parts.items()},
        }


class DistillationTask(TrainingTask):
    """A step of distillation: a classification loss, a loss between layers and a loss between logits, each optional.

        L = task_weight * criterion(logits, target) + weight * features + logit_weight * logit loss

    The input is normalised for the student; the teacher receives it in its own normalisation, as in timm's tasks. The
    teacher is frozen, stays in eval mode with fused attention on, and runs without gradients. A part with weight 0 is
    reported but has no effect on training.

    All tasks have these arguments:
        student: the model to train, (B, 3, H, W) -> (B, classes).
        teacher: a model with the same classes if logits are compared; None if nothing is compared.
        criterion: loss of (logits, target); cross-entropy by default.
        task_weight, weight, logit_weight: factors of the three parts.
        logits: "soft", "hard", "dkd", "nkd" or None: the loss between logits, on the distillation token's where the
            student has one.
        logit_options: arguments of that loss in fastkd.losses.
        logit_ramp_epochs: epochs over which logit_weight rises from 0, in a loop that calls set_epoch.
        student_layers, teacher_layers: layers to compare, as in fastkd.capture; None for the task's own choice.
        img_size: side of the images in pixels, or (height, width); None for the student's.
        clock: measures the time spent in the losses between the networks.
        process_group: group whose images are related by losses that span images; None for this process's images.

    Raises:
        InputError: arguments that cannot work with these networks.
    """

    defaults: ClassVar[dict[str, Any]] = {}  # of arguments for which a method has a value of its own

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        features: FeatureLoss | None = None,
        *,
        criterion: Criterion | None = None,
        task_weight: float = 1.0,
        weight: float = 1.0,
        logits: str | None = None,
        logit_weight: float = 1.0,
        logit_options: Mapping[str, Any] | None = None,
        logit_ramp_epochs: int = 0,
        clock: LossClock | None = None,
        process_group: distributed.Group = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        super().__init__(
            device=next(student.parameters()).device if device is None else device, dtype=dtype, verbose=verbose
        )
        logit_loss = None if logits is None else LogitLoss(logits, **(logit_options or {}))
        if teacher is None and (features is not None or logit_loss is not None):
            raise InputError(f"--teacher: {type(self).__name__} needs one to learn from")
        own, theirs = (getattr(model, "num_classes", None) for model in (student, teacher))
        if logit_loss is not None and own != theirs and None not in (own, theirs):
            raise InputError(
                f"--teacher: logits={logits!r} compares the classes of both networks, the student has {own}, the "
                f"teacher {theirs}"
            )
        if not (task_weight or (features is not None and weight) or (logit_loss is not None and logit_weight)):
            raise InputError("task_weight: all parts of the loss have weight 0, nothing would be trained")
        distilled: Any = getattr(student, "set_distilled_training", None)
        if distilled is not None:
            distilled(logit_loss is not None)
        if teacher is not None:
            teacher.requires_grad_(False).eval()
            for module in teacher.modules():
                if hasattr(module, "fused_attn"):
                    setattr(module, "fused_attn", True)  # noqa: B010  no attribute that nn.Module declares
        criterion = nn.CrossEntropyLoss() if criterion is None else criterion
        weights = (float(task_weight), float(weight), float(logit_weight))
        features = features if features is None else features.to(self.device)
        self.trainable_module: nn.Module = Trainable(student, features, logit_loss, criterion, weights, clock)
        self.teacher, self.logit_ramp_epochs, self.process_group = teacher, logit_ramp_epochs, process_group
        scale, shift = renormalisation(student, teacher)
        self.same_normalisation = bool((scale == 1).all() and (shift == 0).all())
        self.register_buffer("scale", scale.to(self.device, self.dtype), persistent=False)
        self.register_buffer("shift", shift.to(self.device, self.dtype), persistent=False)

    @property
    def trainable(self) -> Trainable:
        """Return the trainable module without its wrappers (DistributedDataParallel, torch.compile)."""
        module: Trainable = unwrap_model(self.trainable_module)
        return module

    @property
    def network(self) -> nn.Module:
        """Return the student as it is evaluated and exported."""
        return self.trainable.student

    @property
    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the student and of the losses."""
        return [p for p in self.trainable_module.parameters() if p.requires_grad]

    @property
    def matched(self) -> list[tuple[str, str]]:
        """Return the compared pairs (student layer, teacher layer)."""
        features = self.trainable.features
        return [] if features is None else list(zip(features.student_layers, features.teacher_layers, strict=True))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the stage, from 0, for weights that change with it."""
        self.trainable.ramp = min(epoch / self.logit_ramp_epochs, 1.0) if self.logit_ramp_epochs else 1.0

    def train(self, mode: bool = True) -> "DistillationTask":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def prepare_distributed(self, device_ids: list[int] | None = None, **ddp_kwargs: Any) -> "DistillationTask":
        """Wrap the trainable module in DistributedDataParallel; the frozen teacher is not wrapped."""
        ddp_kwargs.setdefault("process_group", self.process_group)
        # Without a loss on logits the student's end gets no gradient; nor do parameters of a loss with weight 0.
        task_weight, weight, logit_weight = self.trainable.weights
        to_the_end = task_weight or (self.trainable.logits is not None and logit_weight)
        ddp_kwargs.setdefault("find_unused_parameters", not (to_the_end and weight))
        trained = self.trainable_parameters
        group = ddp_kwargs["process_group"]
        all_bytes = dist.get_world_size(group) * sum(p.numel() * p.itemsize for p in trained)
        at_once = all_bytes <= distributed.SMALL and all(p.device.type == "cpu" for p in trained)
        if at_once:
            ddp_kwargs.setdefault("gradient_as_bucket_view", True)
            ddp_kwargs.setdefault("bucket_cap_mb", 25)  # PyTorch's own, for the first bucket too: one message
        ddp = nn.parallel.DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        if at_once:
            from fastkd.train.ranks import mean_at_once  # missing if PyTorch was built without distributed support

            ddp.register_comm_hook(group, mean_at_once)
        self.trainable_module = ddp
        return self

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile both networks in place, so that the names of their weights stay. The losses are kernels already.

        Call it before either network runs, because PyTorch ignores hooks that are added after compilation. For the same
        reason, everything compiled earlier, with the hooks of another stage, is discarded.
        """
        torch.compiler.reset()
        self.network.compile(backend=backend, mode=mode, **compile_kwargs)
        if self.teacher is not None:
            self.teacher.compile(backend=backend, mode=mode, **compile_kwargs)
        return self.network

    def setup_ema(self, **kwargs: Any) -> nn.Module:
        """Create a moving average of the student only; the losses' parameters are not needed after training."""
        self.trainable_module_ema = ModelEmaV3(self.network, **kwargs)
        return self.trainable_module_ema

    def update_ema(self, step: int | None = None) -> None:
        if self.has_ema():
            self.trainable_module_ema.update(self.network, step=step)

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        if ema or module is not None:
            return super().get_eval_model(module=module, ema=ema)
        return self.network

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Return the parameters to clip; exclude_head omits the student's last two, as timm does."""
        head = {id(p) for p in list(self.network.parameters())[-2:]} if exclude_head else set()
        return [p for p in self.trainable_module.parameters() if id(p) not in head]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the parameters of the loss between layers, if it has any."""
        features = self.trainable.features
        state = {} if ema or features is None else features.state_dict()
        return {"features": state} if state else {}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        features = self.trainable.features
        if state and features is not None and not ema:
            features.load_state_dict(state["features"], strict=strict)

    def forward(  # timm's names
        self,
        input: Tensor,  # noqa: A002
        target: Tensor,
        *,
        teacher_logits: Tensor | None = None,
        teacher_tokens: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the loss, the output (detached logits) and, for logging, each detached part by its name.

        Args:
            input: (B, 3, H, W), in the student's normalisation.
            target: (B,) classes or (B, C) mixed labels, as the criterion takes them.
            teacher_logits: (B, C) cached logits; the teacher does not run if nothing else of it is needed.
            teacher_tokens: by layer, the cached tokens (B, N, D) that the losses compare.
        """
        teachers: list[Any] = []
        features = self.trainable.features
        if features is not None and teacher_tokens is not None:
            teachers = [teacher_tokens[name] for name in features.teacher_layers]
        elif features is not None:
            if teacher_logits is not None:
                raise ValueError("teacher_logits replace the teacher only where no layers are compared")
            with features.watch(self._frozen, features.teacher_layers) as captured:
                teacher_logits = self._run_teacher(input)
                teachers = list(captured)
        elif self.trainable.logits is not None and teacher_logits is None:
            teacher_logits = self._run_teacher(input)
        result: dict[str, Tensor] = self.trainable_module(input, target, teachers, teacher_logits)
        return result

    @property
    def _frozen(self) -> nn.Module:
        assert self.teacher is not None
        return self.teacher

    @torch.no_grad()
    def _run_teacher(self, images: Tensor) -> Tensor:
        logits: Tensor = self._frozen(images if self.same_normalisation else images * self.scale + self.shift)
        return logits


def _training(weight: float) -> AbstractContextManager[object]:
    """Detach a part that is only reported."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0)


def renormalisation(student: nn.Module, teacher: nn.Module | None) -> tuple[Tensor, Tensor]:
    """Return (scale, shift), each (1, 3, 1, 1): x * scale + shift is in the teacher's normalisation.

    A model without timm's pretrained_cfg is assumed to have the other's normalisation.
    """
    own, theirs = (getattr(unwrap_model(model), "pretrained_cfg", None) for model in (student, teacher))
    if own is None or theirs is None:
        return torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    mean_s, std_s, mean_t, std_t = (
        torch.tensor(cfg[key], dtype=torch.float64).view(1, -1, 1, 1)
        for cfg in (own, theirs)
        for key in ("mean", "std")
    )
    return std_s / std_t, (mean_s - mean_t) / std_t


def _clocked(clock: LossClock, inputs: list[Any]) -> list[Any]:
    """Return the inputs with their tensors replaced by the clock's views."""
    views = iter(clock.start([x for x in tree_leaves(inputs) if isinstance(x, Tensor)]))
    clocked: list[Any] = tree_map_only(Tensor, lambda _: next(views), inputs)
    return clocked
