"""Optimisation of one batch of images. One rule: a step never waits for a value on the device."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.utils import unwrap_model
from torch import Tensor, nn

from fastkd import capture
from fastkd.functional import bn_stat_loss, competition_loss, image_prior, intra_divergence_loss

from .. import DivergedError
from ..loop import AMP_DTYPES
from ..options import Size, as_size, pixels, sides
from .presets import Phase, Preset

LOOK_EVERY = 50  # steps between checks of the loss, each of which waits for a GPU
Report = Callable[[dict[str, float]], None]


class Batch(NamedTuple):
    """Finished images, and the network's outputs for them."""

    images: Tensor  # (B, 3, H, W) uint8, on the CPU
    labels: Tensor  # (B,)
    probabilities: Tensor  # (B,) the network's probabilities of the labels
    terms: dict[str, float]  # unweighted terms of the step that was kept; total is their weighted sum


class _Headed(nn.Module):
    """A timm model that returns logits and pooled features in one pass."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.network.forward_features(x)
        return self.network.forward_head(features), self.network.forward_head(features, pre_logits=True)


class Inverter:
    """Optimiser of images that have the classes and batch-norm statistics that a network was trained on.

        L = ce CE(teacher(x), y) + bn BN(x) + priors(x) + competition (1 - JS(student, teacher)) + intra ID(features)

    DeepInversion (Yin et al. 2020, arXiv:1912.08795): Adam on the pixels, from noise; each step rolls the batch by a
    few pixels, and may mirror it. The images of the lowest total loss so far are kept, across all phases.

    Args:
        network: a timm model with batch norm; frozen and put into eval mode.
        preset: schedule and weights.
        img_size: side of the images in pixels, or (height, width).
        amp: "none", "bf16" or "fp16": precision of the networks' passes. Images and losses stay in float32.
        student: the competing model, which receives full-sized images in its own normalisation.

    Raises:
        ValueError: no batch norm, one without running statistics, or a batch that has no variance there, where `bn`
            is not 0; sizes that do not divide; a competition without a student.
    """

    def __init__(
        self, network: nn.Module, preset: Preset, *, img_size: Size, amp: str = "none", student: nn.Module | None = None
    ) -> None:
        if preset.competition > 0 and student is None:
            raise ValueError("a competition needs a student")
        for phase in preset.phases:
            if any(side % (phase.pool * preset.cell) for side in sides(img_size)):
                raise ValueError(f"{pixels(img_size)} px cannot be divided by pool {phase.pool} x cell {preset.cell}")
        if preset.bn > 0:
            pool = max((phase.pool for phase in preset.phases), default=1)
            height, width = (side // pool for side in sides(img_size))
            batch = min(2, preset.batch_size)
            blank = torch.zeros(batch, 3, height, width, device=next(network.parameters()).device)
            with capture.bn_inputs(network.eval()) as bn:  # refuses what has no statistics
                network(blank)
                for name, x in zip(bn.names, bn.inputs, strict=True):
                    if x[:, 0].numel() < 2:
                        side = pixels(as_size((height, width)))
                        raise ValueError(f"{name} gets one element per channel at {side} px; needs a batch of 2 images")
            self.fused = _can_fuse(network, blank)
            self.layer_weights: list[float] | None = [preset.first_bn] + [1.0] * (len(bn.names) - 1)
        else:
            self.layer_weights = None
        self.headed = _Headed(network.eval().requires_grad_(False))
        self.student = None if student is None else student.eval().requires_grad_(False)
        self.preset, self.sides = preset, sides(img_size)
        self.device = next(network.parameters()).device
        self.autocast = torch.autocast(self.device.type, AMP_DTYPES[amp], enabled=amp != "none")
        self.scaled = amp == "fp16"
        self.mean, self.std = normalisation(network, self.device)
        if student is not None:
            mean, std = normalisation(student, self.device)
            self.to_student = self.std / std, (self.mean - mean) / std
        # The optimised pixels are normalised like the network's input; grey pixels use the mean over its channels.
        self.leaf_mean = self.mean.mean(1, keepdim=True) if preset.grey else self.mean
        self.leaf_std = self.std.mean(1, keepdim=True) if preset.grey else self.std

    @property
    def steps(self) -> int:
        """Return the number of steps of a batch."""
        return sum(phase.steps for phase in self.preset.phases)

    def synthesise(self, labels: Tensor, *, seed: int = 0, report: Report = lambda _: None) -> Batch:
        """Make one image per label.

        Args:
            labels: (B,) classes of the network.
            seed: the same seed gives the same images.
            report: called after each step; from time to time with the terms of the loss, otherwise with none.

        Raises:
            DivergedError: the loss is not finite; the message names the first layer concerned.
        """
        generator = torch.Generator().manual_seed(seed)
        labels = labels.to(self.device)
        leaf_sides = [side // self.preset.cell for side in self.sides]
        shape = (len(labels), 1 if self.preset.grey else 3, *leaf_sides)
        leaf = (self.preset.noise * torch.randn(shape, generator=generator)).to(self.device).requires_grad_()
        best = _Best(leaf)
        for number, phase in enumerate(self.preset.phases):
            self._run(number, phase, leaf, labels, generator, best, report)
        terms = {name: float(value) for name, value in best.terms.items()}
        return self._finish(best.leaf, labels, terms)

    def _run(
        self,
        number: int,
        phase: Phase,
        leaf: Tensor,
        labels: Tensor,
        generator: torch.Generator,
        best: "_Best",
        report: Report,
    ) -> None:
        black, white = (0 - self.leaf_mean) / self.leaf_std, (1 - self.leaf_mean) / self.leaf_std
        optimizer = torch.optim.Adam([leaf], lr=self.preset.lr, betas=self.preset.betas)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.scaled)
        for step in range(phase.steps):
            optimizer.param_groups[0]["lr"] = self.preset.lr * self._rate(step, phase.steps)
            view = self._view(leaf, phase, generator)
            with self.autocast:
                terms = self._terms(view, phase.pool, labels)
            optimizer.zero_grad()
            scaler.scale(terms["total"]).backward()
            best.see(leaf, view, terms)
            scaler.step(optimizer)
            scaler.update()
            if self.preset.clamp:
                with torch.no_grad():
                    leaf.copy_(leaf.maximum(black).minimum(white))
            shown: dict[str, float] = {}
            if (step + 1) % LOOK_EVERY == 0 or step + 1 == phase.steps:
                shown = {name: float(value.detach()) for name, value in terms.items()}
                if bool(best.failed):
                    self._explain(number, step, best.suspect, shown)
            report(shown)

    def _rate(self, step: int, steps: int) -> float:
        """Return DeepInversion's factor of the learning rate: linear up to 1, then a cosine down to 0."""
        warmup = min(self.preset.warmup_steps, steps // 2)
        if step < warmup:
            return (step + 1) / warmup
        if self.preset.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    def _render(self, leaf: Tensor) -> Tensor:
        """Return the network's input for the optimised pixels."""
        x = leaf
        if self.preset.cell > 1:
            x = F.interpolate(x, size=self.sides, mode="bicubic", align_corners=False)
        return (x * self.leaf_std + self.leaf_mean - self.mean) / self.std if self.preset.grey else x

    def _view(self, leaf: Tensor, phase: Phase, generator: torch.Generator) -> Tensor:
        """Return the images as the network sees them in this step: pooled, shifted, perhaps mirrored."""
        x = self._render(leaf)
        if phase.pool > 1:
            x = F.avg_pool2d(x, phase.pool)
        if phase.jitter:
            rows, columns = torch.randint(-phase.jitter, phase.jitter + 1, (2,), generator=generator).tolist()
            x = x.roll((rows, columns), (2, 3))
        if self.preset.flip and torch.rand((), generator=generator) < 0.5:
            x = x.flip(3)
        return x

    def _terms(self, x: Tensor, pool: int, labels: Tensor) -> dict[str, Tensor]:
        """Return each unweighted term of the loss, and their weighted total."""
        preset, terms, parts = self.preset, {}, []

        def add(name: str, weight: float, value: Tensor) -> None:
            terms[name] = value.detach()
            parts.append(weight * value)

        if self.layer_weights is None:
            logits, features = self.headed(x)
        else:
            with capture.bn_inputs(self.headed, fused=self.fused) as bn:
                logits, features = self.headed(x)
                statistics = (bn.inputs, bn.running_means, bn.running_vars)
                value = bn_stat_loss(*statistics, layer_weights=self.layer_weights, moments=bn.moments)
                add("bn", preset.bn, value)
        logits = logits.float()
        add("cross_entropy", preset.cross_entropy, F.cross_entropy(logits, labels))
        if preset.tv_l1 or preset.tv_l2 or preset.l2:
            weights: dict[str, Any] = {"tv_l1": preset.tv_l1, "tv_l2": preset.tv_l2, "l2": preset.l2}
            add("prior", 1.0, image_prior(x, **weights, l2_per_image=preset.l2_per_image))
        if preset.competition > 0 and self.student is not None:
            whole = F.interpolate(x, scale_factor=pool, mode="bilinear", align_corners=False) if pool > 1 else x
            scale, shift = self.to_student
            own = self.student(whole * scale + shift).float()
            add("competition", preset.competition, competition_loss(own, logits, temperature=preset.temperature))
        if preset.intra > 0:
            margins: dict[str, Any] = {"spread_margin": preset.spread_margin, "boundary_margin": preset.boundary_margin}
            add("intra", preset.intra, intra_divergence_loss(features.float(), labels, **margins))
        return {"total": torch.stack(parts).sum(), **terms}

    @torch.no_grad()
    def _finish(self, leaf: Tensor, labels: Tensor, terms: dict[str, float]) -> Batch:
        pixels = ((self._render(leaf) * self.std + self.mean).clamp(0, 1) * 255).round()
        with self.autocast:
            logits, _ = self.headed((pixels / 255 - self.mean) / self.std)
        probabilities = logits.float().softmax(1).gather(1, labels[:, None])[:, 0]
        return Batch(pixels.to("cpu", torch.uint8), labels.cpu(), probabilities.cpu(), terms)

    @torch.no_grad()
    def _explain(self, phase: int, step: int, x: Tensor, terms: dict[str, float]) -> None:
        """Raise DivergedError and name the first layer that is not finite."""
        where = "the logits are the first that is not"
        if not x.isfinite().all():
            where = "a gradient was not, and with it the images"
        elif self.layer_weights is not None:
            with self.autocast, capture.bn_inputs(self.headed.network) as bn:
                self.headed.network(x)
                names = bn.not_finite()
            where = f"what enters {names[0]} is the first that is not" if names else where
        parts = ", ".join(f"{key} {value:g}" for key, value in terms.items())
        raise DivergedError(f"the loss is not finite by phase {phase + 1}, step {step + 1}: {parts}; {where}")


def _can_fuse(network: nn.Module, x: Tensor) -> bool:
    """Return whether all batch norms of the network can compute their statistics while they normalise."""
    try:
        with capture.bn_inputs(network, fused=True):
            network(x)
    except ValueError:
        return False
    return True


class _Best:
    """The images of the lowest total so far, and those of the first non-finite total, kept on the device."""

    def __init__(self, leaf: Tensor) -> None:
        self.leaf = leaf.detach().clone()
        self.total = torch.full((), torch.inf, device=leaf.device)
        self.terms: dict[str, Tensor] = {}
        self.failed = torch.zeros((), dtype=torch.bool, device=leaf.device)
        self.suspect = leaf.detach()

    @torch.no_grad()
    def see(self, leaf: Tensor, view: Tensor, terms: dict[str, Tensor]) -> None:
        total = terms["total"].detach()
        better = total < self.total  # false for NaN
        self.total = torch.where(better, total, self.total)
        self.leaf = torch.where(better, leaf, self.leaf)
        self.terms = {name: torch.where(better, x, self.terms.get(name, x)) for name, x in terms.items()}
        self.suspect = torch.where(self.failed, self.suspect, view) if self.suspect.shape == view.shape else view
        self.failed = self.failed | ~total.isfinite()


def normalisation(model: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (mean, std), each (1, 3, 1, 1), of a timm model's input."""
    cfg = unwrap_model(model).pretrained_cfg
    mean, std = (torch.tensor(cfg[key], dtype=torch.float32, device=device).view(1, 3, 1, 1) for key in ("mean", "std"))
    return mean, std
