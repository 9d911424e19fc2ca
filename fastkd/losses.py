"""The losses as modules, with the papers' defaults: weights, layers and reductions."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import distributed
from fastkd import functional as F
from fastkd._precision import accumulator
from fastkd.ops import _checks as check
from fastkd.ops._dispatch import Backend
from fastkd.ops.attention import Divergence, Heads, Reduction
from fastkd.ops.logits import LogitReduction
from fastkd.ops.moments import Distance, Moments, bn_stat_loss_and_moments
from fastkd.ops.relation import Algorithm, Rectify, Scope, manifold_layers


class RelationLoss(nn.Module):
    """fastkd.relation_loss with its options fixed: loss(student (B, N, Ds), teacher (B, N, Dt)) -> scalar.

    process_group: relate the images of all its ranks (fastkd.distributed); None, those of this process.
    """

    def __init__(
        self,
        *,
        scope: Scope = "intra",
        normalize: bool = True,
        rectify: Rectify = "none",
        eps: float = 1e-12,
        algorithm: Algorithm = "auto",
        backend: Backend = "auto",
        process_group: distributed.Group = None,
    ) -> None:
        super().__init__()
        self.scope, self.normalize, self.rectify, self.eps = scope, normalize, rectify, eps
        self.algorithm, self.backend, self.process_group = algorithm, backend, process_group

    def extra_repr(self) -> str:
        return f"scope={self.scope!r}, normalize={self.normalize}, rectify={self.rectify!r}"

    def forward(self, student: Tensor, teacher: Tensor, *, index: Tensor | None = None) -> Tensor:
        options: dict[str, Any] = {
            "scope": self.scope,
            "index": index,
            "normalize": self.normalize,
            "rectify": self.rectify,
            "eps": self.eps,
            "algorithm": self.algorithm,
            "backend": self.backend,
        }
        if self.process_group is not None:
            return distributed.relation_loss(student, teacher, group=self.process_group, **options)
        return F.relation_loss(student, teacher, **options)


class ManifoldLoss(nn.Module):
    """Fine-grained manifold distillation over matched layers: Hao et al. 2022 (arXiv:2107.01378).

        L = 1/L Σ_l ( intra L_intra + inter L_inter + random L_random ),  the weights of the official code

    Args:
        intra, inter, random: weights of the three terms.
        num_samples: K rows of the random term, drawn anew for each layer and call.
        backend: "auto", "eager", "native" or "triton".
        process_group: relate the images of all its ranks (fastkd.distributed; torch.distributed.group.WORLD for all,
            which is None before init_process_group); None, those of this process.

    Raises:
        TypeError, ValueError: a weight or number out of its range.
    """

    def __init__(
        self,
        *,
        intra: float = 4.0,
        inter: float = 0.1,
        random: float = 0.2,
        num_samples: int = 192,
        backend: Backend = "auto",
        process_group: distributed.Group = None,
    ) -> None:
        super().__init__()
        for name, weight in (("intra", intra), ("inter", inter), ("random", random)):
            check.number(name, weight, low=0)
        check.positive_int("num_samples", num_samples)
        self.intra, self.inter, self.random = intra, inter, random
        self.num_samples, self.backend, self.process_group = num_samples, backend, process_group

    def extra_repr(self) -> str:
        return f"intra={self.intra}, inter={self.inter}, random={self.random}, num_samples={self.num_samples}"

    def forward(
        self,
        students: Tensor | Sequence[Tensor],
        teachers: Tensor | Sequence[Tensor],
        *,
        indices: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
        return_terms: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Mean of fastkd.manifold_loss over layers.

        Args:
            students: per matched layer the student's tokens (B, N, Ds); one tensor for one layer.
            teachers: per matched layer the teacher's tokens (B, N, Dt).
            indices: per layer the rows (K,) of the random term, instead of a draw.
            generator: source of the draws (not under torch.compile).
            return_terms: also give the layer means of the unweighted (intra, inter, random).

        Raises:
            ValueError: no layer, or lists of unequal length.
            TypeError, ValueError, RuntimeError: as fastkd.manifold_loss.
        """
        students = [students] if isinstance(students, Tensor) else list(students)
        teachers = [teachers] if isinstance(teachers, Tensor) else list(teachers)
        options: dict[str, Any] = {
            "intra": self.intra,
            "inter": self.inter,
            "random": self.random,
            "num_samples": self.num_samples,
            "generator": generator,
            "indices": indices,
            "return_terms": return_terms,
            "backend": self.backend,
        }
        if distributed.spans_ranks(self.process_group):
            return distributed.manifold_layers(students, teachers, group=self.process_group, **options)
        loss, terms = manifold_layers(students, teachers, **options)
        return (loss, terms) if return_terms else loss


class AttentionLoss(nn.Module):
    """fastkd.attention_loss with its options fixed: loss(q_student, k_student, q_teacher, k_teacher) -> scalar.

    The defaults are MiniLM's (arXiv:2002.10957): KL(teacher ‖ student), mean over images, heads and queries. On q, k
    and again on v, v it is TinyMIM's loss (arXiv:2301.01296); with "score_mse", TinyBERT's (arXiv:1909.10351).
    """

    def __init__(
        self,
        *,
        divergence: Divergence = "kl",
        scale_student: float | None = None,
        scale_teacher: float | None = None,
        temperature: float = 1.0,
        is_causal: bool = False,
        heads: Heads = "match",
        query_slice: slice | None = None,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.divergence, self.temperature, self.is_causal = divergence, temperature, is_causal
        self.scale_student, self.scale_teacher = scale_student, scale_teacher
        self.heads, self.query_slice, self.reduction, self.backend = heads, query_slice, reduction, backend

    def extra_repr(self) -> str:
        return (
            f"divergence={self.divergence!r}, temperature={self.temperature}, heads={self.heads!r}, "
            f"reduction={self.reduction!r}"
        )

    def forward(
        self,
        q_student: Tensor,
        k_student: Tensor,
        q_teacher: Tensor,
        k_teacher: Tensor,
        *,
        key_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        bias_student: Tensor | None = None,
        bias_teacher: Tensor | None = None,
    ) -> Tensor:
        return F.attention_loss(
            q_student,
            k_student,
            q_teacher,
            k_teacher,
            divergence=self.divergence,
            scale_student=self.scale_student,
            scale_teacher=self.scale_teacher,
            temperature=self.temperature,
            is_causal=self.is_causal,
            key_mask=key_mask,
            query_mask=query_mask,
            bias_student=bias_student,
            bias_teacher=bias_teacher,
            heads=self.heads,
            query_slice=self.query_slice,
            reduction=self.reduction,
            backend=self.backend,
        )


class QKVRelationLoss(nn.Module):
    """fastkd.qkv_relation_loss with its options fixed: loss((q, k, v), (q, k, v)) -> scalar, tensors (B, N, D).

    The default relations are MiniLMv2's (arXiv:2012.15828); TinyMIM and CIKD take ("qk", "vv").
    """

    def __init__(
        self,
        *,
        relations: Sequence[str] = ("qq", "kk", "vv"),
        relation_heads: int,
        weights: Sequence[float] | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.relations, self.relation_heads = tuple(relations), relation_heads
        self.weights, self.backend = weights, backend

    def extra_repr(self) -> str:
        return f"relations={self.relations}, relation_heads={self.relation_heads}"

    def forward(
        self,
        student: tuple[Tensor, Tensor, Tensor],
        teacher: tuple[Tensor, Tensor, Tensor],
        *,
        key_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
    ) -> Tensor:
        return F.qkv_relation_loss(
            student,
            teacher,
            relations=self.relations,
            relation_heads=self.relation_heads,
            weights=self.weights,
            key_mask=key_mask,
            query_mask=query_mask,
            backend=self.backend,
        )


class BatchNormStatLoss(nn.Module):
    """fastkd.bn_stat_loss with its options fixed, and with the moving average of Fast-Datafree kept for it.

    With momentum m the first call compares the batch's own statistics, later ones (1 - m) batch + m average; what was
    compared is then the new average (Fast-Datafree, arXiv:2112.06253), from the same moments, as buffers.

    Args:
        distance: "l2" (DeepInversion), "mse" (GDFQ) or "image" (ZeroQ).
        layer_weights: per layer a weight; None is 1 each. [10, 1, 1, ...] is DeepInversion's first-layer multiplier.
        momentum: m in [0, 1); not with "image", whose statistics belong to single images.
        backend: "auto", "eager", "native" or "triton".
        process_group: take the statistics of the images of all its ranks (fastkd.distributed); None, of this process's.

    Raises:
        TypeError: momentum is not a Python number.
        ValueError: an unknown distance, momentum outside [0, 1) or together with "image".
    """

    ema_mean: Tensor | None
    ema_var: Tensor | None

    def __init__(
        self,
        *,
        distance: Distance = "l2",
        layer_weights: Sequence[float] | None = None,
        momentum: float | None = None,
        backend: Backend = "auto",
        process_group: distributed.Group = None,
    ) -> None:
        super().__init__()
        check.one_of("distance", distance, ("l2", "mse", "image"))
        if momentum is not None:
            check.number("momentum", momentum, low=0)
            if momentum >= 1:
                raise ValueError(f"momentum must be below 1, got {momentum}")
            if distance == "image":
                raise ValueError('momentum averages batch statistics: use distance "l2" or "mse", got "image"')
        self.distance, self.layer_weights = distance, layer_weights
        self.momentum, self.backend, self.process_group = momentum, backend, process_group
        # All layers' channels end to end, once there has been a call to average.
        self.register_buffer("ema_mean", None)
        self.register_buffer("ema_var", None)

    def extra_repr(self) -> str:
        return f"distance={self.distance!r}, layer_weights={self.layer_weights}, momentum={self.momentum}"

    def forward(
        self,
        inputs: Sequence[Tensor],
        running_means: Sequence[Tensor],
        running_vars: Sequence[Tensor],
        *,
        moments: Sequence[Moments] | None = None,
        update: bool = True,
    ) -> Tensor:
        """fastkd.bn_stat_loss of these layers; the same ones at every call if there is a momentum.

        Args:
            inputs: per layer the BatchNorm input (B, C, ...). Differentiable.
            running_means, running_vars: per layer (C,). Constants.
            moments: per layer (mean, biased var) of its input, where they are known
                (capture.bn_inputs(model, fused=True)). Differentiable.
            update: False leaves the average as it is (Fast-Datafree: several steps, then one update).

        Raises:
            TypeError, ValueError, RuntimeError: as fastkd.bn_stat_loss; channels that are not those of the average.
        """
        momentum, ema = None, None
        if self.momentum and self.ema_mean is not None and self.ema_var is not None:
            channels = [x.shape[1] for x in inputs]
            fits = sum(channels) == len(self.ema_mean)
            if not fits and self.process_group is None:
                raise ValueError(
                    f"inputs must have the {len(self.ema_mean)} channels of the moving average, got {sum(channels)}"
                )
            # One that does not fit is refused below, where the other ranks learn of it.
            average = (self.ema_mean, self.ema_var)
            mean_ema, var_ema = (x.split(channels) if fits else (x,) for x in average)
            momentum, ema = self.momentum, (mean_ema, var_ema)
        options = (self.distance, self.layer_weights, momentum, ema, moments, self.backend)
        compared = (inputs, running_means, running_vars, *options)
        if self.process_group is None:
            loss, mean, var = bn_stat_loss_and_moments(*compared)
        else:
            loss, mean, var = distributed.bn_stat_loss_and_global_moments(*compared, self.process_group)
        if self.momentum and update:
            with torch.no_grad():
                if self.ema_mean is None or self.ema_var is None:
                    self.ema_mean, self.ema_var = mean.clone(), var.clone()
                else:
                    self.ema_mean.copy_(mean)
                    self.ema_var.copy_(var)
        return loss

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("ema_mean", "ema_var"):
            stored, own = state_dict.get(prefix + name), getattr(self, name)
            if stored is not None and (own is None or own.shape != stored.shape):
                setattr(self, name, torch.empty_like(stored))
        super()._load_from_state_dict(state_dict, prefix, *args)


class IntraDivergenceLoss(nn.Module):
    """fastkd.intra_divergence_loss, in our formulation, with its margins fixed.

    loss(features (B, D), labels (B,)) -> scalar.

    Args:
        spread_margin: m₁ >= 0, beyond which images of a class are not pushed further apart.
        boundary_margin: m₂ >= 0, kept between a class's radius and the nearest other class.
        process_group: compare the images of all its ranks (fastkd.distributed); None, those of this process.
    """

    def __init__(
        self, *, spread_margin: float, boundary_margin: float, process_group: distributed.Group = None
    ) -> None:
        super().__init__()
        check.number("spread_margin", spread_margin, low=0)
        check.number("boundary_margin", boundary_margin, low=0)
        self.spread_margin, self.boundary_margin = spread_margin, boundary_margin
        self.process_group = process_group

    def extra_repr(self) -> str:
        return f"spread_margin={self.spread_margin}, boundary_margin={self.boundary_margin}"

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        margins: dict[str, Any] = {"spread_margin": self.spread_margin, "boundary_margin": self.boundary_margin}
        if self.process_group is not None:
            return distributed.intra_divergence_loss(features, labels, group=self.process_group, **margins)
        return F.intra_divergence_loss(features, labels, **margins)


class SoftTargetLoss(nn.Module):
    """fastkd.soft_target_loss with its options fixed: loss(student (B, C), teacher (B, C)) -> scalar.

    Args:
        temperature: T > 0; 1 as manifold distillation has it.
        reduction: "batchmean", "mean" (DeiT's division by B C), "sum" or "none".
    """

    def __init__(self, *, temperature: float = 1.0, reduction: LogitReduction = "batchmean") -> None:
        super().__init__()
        check.number("temperature", temperature, low=0, open_low=True)
        check.one_of("reduction", reduction, ("batchmean", "mean", "sum", "none"))
        self.temperature, self.reduction = temperature, reduction

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}"

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.soft_target_loss(student, teacher, temperature=self.temperature, reduction=self.reduction)


class DKDLoss(nn.Module):
    """fastkd.dkd_loss with its options fixed: loss(student (B, C), teacher (B, C), label (B,)) -> scalar.

    Args:
        alpha, beta, temperature: 1, 4 and 1, as CIKD has them (on ImageNet without it 1, 0.5 and 1 are used).
    """

    def __init__(self, *, alpha: float = 1.0, beta: float = 4.0, temperature: float = 1.0) -> None:
        super().__init__()
        check.number("alpha", alpha, low=0)
        check.number("beta", beta, low=0)
        check.number("temperature", temperature, low=0, open_low=True)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}"

    def forward(self, student: Tensor, teacher: Tensor, label: Tensor | int) -> Tensor:
        return F.dkd_loss(student, teacher, label, alpha=self.alpha, beta=self.beta, temperature=self.temperature)


class NKDLoss(nn.Module):
    """fastkd.nkd_loss with its options fixed: loss(student (B, C), teacher (B, C), label (B,) or (B, C)) -> scalar.

    Args:
        gamma, temperature: 1 and 1, the code's for DeiT (ResNet on ImageNet 1.5, 1; CIFAR-100 3.5, 3).
    """

    def __init__(self, *, gamma: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        check.number("gamma", gamma, low=0)
        check.number("temperature", temperature, low=0, open_low=True)
        self.gamma, self.temperature = gamma, temperature

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, temperature={self.temperature}"

    def forward(self, student: Tensor, teacher: Tensor, label: Tensor | int) -> Tensor:
        return F.nkd_loss(student, teacher, label, gamma=self.gamma, temperature=self.temperature)


def _grid_side(name: str, N: int) -> int:
    side = math.isqrt(N)
    if side * side != N:
        raise ValueError(f"{name} must hold a square grid of tokens, without class or register tokens, got N = {N}")
    return side


def _check_tokens(name: str, x: Tensor, shape: tuple[int | None, ...], wanted: str) -> None:
    check.tensor(name, x, len(shape), wanted)
    check.not_empty(name, x)
    if any(want is not None and want != got for want, got in zip(shape, x.shape, strict=True)):
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(x.shape)}")


def _squared_error(x: Tensor, y: Tensor, reduction: str) -> Tensor:
    """In float32 or better; keeps nothing for backward but its two inputs."""
    acc = accumulator(x, y)
    return nn.functional.mse_loss(x.to(acc), y.to(acc), reduction=reduction)


class ViTKDLoss(nn.Module):
    """ViTKD: Yang et al. 2022 (arXiv:2209.02432): mimic the shallow layers, generate the deep one; its code's
    reductions.

        L = α/B Σ_l ‖W_l s_l - t_l‖²  +  β/(λB) ‖m ⊙ (G(m ? token : W s) - t)‖²

    with l the two low layers, m the masked tokens, G two 3x3 convolutions around a ReLU over the grid of tokens. The
    sum runs over tokens and channels, so the weights go with N and the teacher's width. The mappings W are identities
    where the widths agree. Parameters carry the names of the official code and are discarded after training.

    Args:
        student_dim, teacher_dim: widths Ds, Dt.
        alpha, beta: weights >= 0.
        mask_ratio: λ in (0, 1]; N - floor(N (1 - λ)) tokens of each image are masked.

    Raises:
        TypeError, ValueError: a width, weight or ratio out of these ranges.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        alpha: float = 3e-5,
        beta: float = 3e-6,
        mask_ratio: float = 0.5,
    ) -> None:
        super().__init__()
        check.positive_int("student_dim", student_dim)
        check.positive_int("teacher_dim", teacher_dim)
        check.number("alpha", alpha, low=0)
        check.number("beta", beta, low=0)
        check.number("mask_ratio", mask_ratio, low=0, open_low=True)
        if mask_ratio > 1:
            raise ValueError(f"mask_ratio must be at most 1, got {mask_ratio}")
        self.student_dim, self.teacher_dim = student_dim, teacher_dim
        self.alpha, self.beta, self.mask_ratio = alpha, beta, mask_ratio

        def mapping() -> nn.Module:
            return nn.Identity() if student_dim == teacher_dim else nn.Linear(student_dim, teacher_dim)

        self.align2 = nn.ModuleList([mapping(), mapping()])
        self.align = mapping()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, teacher_dim))
        self.generation = nn.Sequential(
            nn.Conv2d(teacher_dim, teacher_dim, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(teacher_dim, teacher_dim, 3, padding=1),
        )

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, mask_ratio={self.mask_ratio}"

    def draw_mask(self, B: int, N: int, *, generator: torch.Generator | None = None) -> Tensor:
        """(B, N) bool, True = masked: the same number in every image, drawn where the generator or module lives."""
        device = self.mask_token.device if generator is None else generator.device
        order = torch.rand(B, N, generator=generator, device=device).argsort(1)
        mask = torch.ones(B, N, dtype=torch.bool, device=device)
        return mask.scatter(1, order[:, : int(N * (1 - self.mask_ratio))], False)

    def forward(
        self,
        low_student: Tensor,
        low_teacher: Tensor,
        high_student: Tensor,
        high_teacher: Tensor,
        mask: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        return_terms: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss; patch tokens only, row-major on a square grid.

        Args:
            low_student, low_teacher: (B, 2, N, Ds), (B, 2, N, Dt) tokens after the first two blocks.
            high_student, high_teacher: (B, N, Ds), (B, N, Dt) tokens after the final norm.
            mask: (B, N), nonzero = masked; drawn if None. On the device of the tokens, or moved there.
            generator: source of the draw (not under torch.compile); torch's default generator if None.
            return_terms: also give the two weighted terms (mimicking, generation).

        Returns:
            Scalar, float32 (float64 if an input is), or (scalar, (mimicking, generation)).

        Raises:
            TypeError: not floating-point tensors, a mask that is no tensor.
            ValueError: shapes that do not fit or are empty, N that is no square, devices that differ, a teacher that
                requires a gradient.
        """
        _check_tokens("high_student", high_student, (None, None, self.student_dim), f"(B, N, {self.student_dim})")
        B, N, _ = high_student.shape
        Ds, Dt = self.student_dim, self.teacher_dim
        _check_tokens("low_student", low_student, (B, 2, N, Ds), f"({B}, 2, {N}, {Ds})")
        _check_tokens("low_teacher", low_teacher, (B, 2, N, Dt), f"({B}, 2, {N}, {Dt})")
        _check_tokens("high_teacher", high_teacher, (B, N, Dt), f"({B}, {N}, {Dt})")
        check.same_device(
            high_student=high_student, low_student=low_student, low_teacher=low_teacher, high_teacher=high_teacher
        )
        check.constant("low_teacher", low_teacher)
        check.constant("high_teacher", high_teacher)
        side = _grid_side("high_student", N)
        if mask is None:
            mask = self.draw_mask(B, N, generator=generator)
        elif not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
        elif mask.shape != (B, N):
            raise ValueError(f"mask must have shape ({B}, {N}), got {tuple(mask.shape)}")
        masked = (mask.to(high_student.device, non_blocking=True) != 0)[..., None]

        dtype = self.mask_token.dtype
        mimic = torch.stack(
            [
                _squared_error(align(low_student[:, i].to(dtype)), low_teacher[:, i], "sum")
                for i, align in enumerate(self.align2)
            ]
        ).sum()
        x = torch.where(masked, self.mask_token, self.align(high_student.to(dtype)))
        x = self.generation(x.mT.reshape(B, Dt, side, side)).flatten(2).mT
        generate = _squared_error(x.masked_fill(~masked, 0), high_teacher.masked_fill(~masked, 0), "sum")
        # Divided by λ, not by the share that was really masked.
        terms = (self.alpha / B * mimic, self.beta / (self.mask_ratio * B) * generate)
        loss = terms[0] + terms[1]
        return (loss, terms) if return_terms else loss


class EarlyDistillationLoss(nn.Module):
    """First stage of DearKD (Chen et al. 2022, arXiv:2204.12997): early transformer tokens imitate early CNN maps.

        L = Σ_l mean( (A_l(s_l) - t_l)² ),  A_l: LayerNorm, GELU, Linear (Ds -> C), bilinear resize of the token grid

    Our reading: no code was released, and the aligner's make-up and the layers' weights are not established.

    Args:
        student_dims: per layer the width Ds of the student's tokens; one int for one layer.
        teacher_dims: per layer the channels C of the teacher's map.

    Raises:
        TypeError: widths that are not ints.
        ValueError: no layer, lists of unequal length, a width < 1.
    """

    def __init__(self, student_dims: int | Sequence[int], teacher_dims: int | Sequence[int]) -> None:
        super().__init__()
        self.student_dims = [student_dims] if isinstance(student_dims, int) else list(student_dims)
        self.teacher_dims = [teacher_dims] if isinstance(teacher_dims, int) else list(teacher_dims)
        if len(self.student_dims) != len(self.teacher_dims) or not self.student_dims:
            raise ValueError(
                "student_dims and teacher_dims must match layer by layer, "
                f"got {len(self.student_dims)} and {len(self.teacher_dims)} layers"
            )
        for i, (Ds, C) in enumerate(zip(self.student_dims, self.teacher_dims, strict=True)):
            check.positive_int(f"student_dims[{i}]", Ds)
            check.positive_int(f"teacher_dims[{i}]", C)
        self.aligners = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(Ds), nn.GELU(), nn.Linear(Ds, C))
            for Ds, C in zip(self.student_dims, self.teacher_dims, strict=True)
        )

    def forward(self, students: Tensor | Sequence[Tensor], teachers: Tensor | Sequence[Tensor]) -> Tensor:
        """The sum over layers of the element means.

        Args:
            students: per layer patch tokens (B, N, Ds), row-major on a square grid; one tensor for one layer.
            teachers: per layer the CNN's map (B, C, h, w) of the same images. Constants.

        Returns:
            Scalar, float32 (float64 if an input is).

        Raises:
            TypeError: not floating-point tensors.
            ValueError: another number of layers, shapes that do not fit or are empty, N that is no square, devices that
                differ, a teacher that requires a gradient.
        """
        students = [students] if isinstance(students, Tensor) else list(students)
        teachers = [teachers] if isinstance(teachers, Tensor) else list(teachers)
        layers = len(self.aligners)
        if len(students) != layers or len(teachers) != layers:
            raise ValueError(
                f"students and teachers must have {layers} layers each, got {len(students)} and {len(teachers)}"
            )
        terms = []
        for i, (aligner, s, t) in enumerate(zip(self.aligners, students, teachers, strict=True)):
            Ds, C = self.student_dims[i], self.teacher_dims[i]
            _check_tokens(f"students[{i}]", s, (None, None, Ds), f"(B, N, {Ds})")
            B, N, _ = s.shape
            _check_tokens(f"teachers[{i}]", t, (B, C, None, None), f"({B}, {C}, h, w)")
            check.same_device(**{f"students[{i}]": s, f"teachers[{i}]": t})
            check.constant(f"teachers[{i}]", t)
            side = _grid_side(f"students[{i}]", N)
            x = aligner(s.to(next(aligner.parameters()).dtype)).mT.reshape(B, C, side, side)
            if t.shape[2:] != (side, side):
                x = nn.functional.interpolate(x, t.shape[2:], mode="bilinear", align_corners=False)
            terms.append(_squared_error(x, t, "mean"))
        return torch.stack(terms).sum()
