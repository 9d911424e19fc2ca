"""Losses of logits (B, C), accurate at extreme values and near a match.

All have kernels. A divergence of two softmaxes has the digits that the logits have wherever the rows of the two lie.
"""

from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from fastkd._precision import accumulator
from fastkd.ops import _checks as check
from fastkd.ops._autograd import distinct, refuse_double_backward, refuse_transforms, savable, scaled, wants_grad
from fastkd.ops._dispatch import Backend, call, resolve

LogitReduction = Literal["batchmean", "mean", "sum", "none"]
RowReduction = Literal["mean", "sum", "none"]


def check_pair(student: Tensor, teacher: Tensor, names: tuple[str, str], temperature: float) -> None:
    for name, x in zip(names, (student, teacher), strict=True):
        check.tensor(name, x, 2, "(B, C)")
        check.not_empty(name, x)
    if student.shape != teacher.shape:
        raise ValueError(
            f"{' and '.join(names)} must have the same shape, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    check.same_device(**dict(zip(names, (student, teacher), strict=True)))
    check.temperature(temperature)


def _target(label: Tensor | int, like: Tensor, mixed: bool) -> Tensor:
    """Return class indices (B, 1) on the device of `like`; a mixed label counts as its largest entry."""
    B, C = like.shape
    if C < 2:
        raise ValueError(f"student must have at least 2 classes, a target and others, got {tuple(like.shape)}")
    if not isinstance(label, Tensor):
        if isinstance(label, bool) or not isinstance(label, int):
            raise TypeError(f"label must be an integer tensor or an int, got {type(label).__name__}")
        if not 0 <= label < C:
            raise ValueError(f"label must lie in [0, C = {C}), got {label}")
        return torch.full((B, 1), label, device=like.device)
    if mixed and label.shape == (B, C):
        check.dense("label", label)
        return check.moved("label", label, like.device).argmax(1, keepdim=True)  # a new tensor
    check.integers("label", label)
    if label.shape != (B,):
        raise ValueError(f"label must have shape ({B},){f' or ({B}, {C})' if mixed else ''}, got {tuple(label.shape)}")
    label = check.moved("label", savable(label), like.device).to(torch.int64)
    torch._assert_async(((label >= 0) & (label < C)).all(), f"label must lie in [0, C = {C})")
    return label[:, None]


class _Rows(torch.autograd.Function):
    """A factor times the losses of rows (B,) or times their sum, of an operator that gives each row's gradient too."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None,
        impl: Backend,
        op: str,
        options: tuple[float, ...],
        with_grad: bool,
        factor: float,
        is_sum: bool,
        function: str,
    ) -> Tensor:
        rows, dstudent = call(impl, op, student, teacher, target, *options, with_grad)
        ctx.save_for_backward(dstudent)
        ctx.dtype, ctx.factor, ctx.function = student.dtype, factor, function
        # A graph serves all factors, a batch of 1 image among them.
        rows = rows if not torch.compiler.is_compiling() and factor == 1 else rows * factor
        return cast(Tensor, rows.sum() if is_sum else rows)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward(ctx.function)
        (dstudent,) = ctx.saved_tensors
        dloss = dloss * ctx.factor
        dstudent = scaled(dstudent, dloss[:, None] if dloss.ndim else dloss, ctx.dtype)
        return dstudent, None, None, None, None, None, None, None, None, None


class _Competition(torch.autograd.Function):
    """1 - J of the rows (B,), or 1 - clamp(J, 0, 1) of their mean."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        impl: Backend,
        temperature: float,
        is_mean: bool,
        of_student: bool,
        of_teacher: bool,
    ) -> Tensor:
        ctx.wanted, ctx.dtypes = (of_student, of_teacher), (student.dtype, teacher.dtype)
        j, dstudent, dteacher = call(impl, "competition", student, teacher, temperature, [of_student, of_teacher])
        rows: Tensor = j
        if not is_mean:
            ctx.save_for_backward(rows.new_full((len(rows), 1), -1.0), dstudent, dteacher)
            return 1 - rows
        mean = rows.mean()
        slope = ((mean >= 0) & (mean <= 1)).to(mean.dtype) / -len(rows)
        ctx.save_for_backward(slope, dstudent, dteacher)
        return 1 - mean.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("competition_loss")
        slope, *stored = ctx.saved_tensors
        by_row = slope * (dloss[:, None] if slope.ndim else dloss)
        dstudent, dteacher = (
            scaled(gradient, by_row, dtype) if is_wanted else None
            for is_wanted, gradient, dtype in zip(ctx.wanted, stored, ctx.dtypes, strict=True)
        )
        return dstudent, dteacher, None, None, None, None, None


class _SoftCrossEntropy(torch.autograd.Function):
    """(B,) cross-entropies -Σ_c q_c log p_c of softmaxes at T. A class that both networks switched off adds nothing.

    The one copy of the student's logits becomes log p, then p, then the gradient p - q.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        acc = accumulator(student, teacher)
        q = (teacher.to(acc) / temperature).softmax(1)
        z = (student.to(acc) / temperature).log_softmax(1).clamp_min_(torch.finfo(acc).min)  # 0 log 0 = 0
        loss = (q * z).sum(1).neg_()
        ctx.save_for_backward(z.exp_().sub_(q))
        ctx.temperature, ctx.dtype = temperature, student.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("soft_target_loss")
        (dstudent,) = ctx.saved_tensors
        return scaled(dstudent, dloss[:, None] / ctx.temperature, ctx.dtype), None, None


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return (B,) cross-entropies of logits (B, C). The caller checks the arguments.

    Their gradients are those of soft_target_loss.
    """
    refuse_transforms("soft_target_loss")
    return cast(Tensor, _SoftCrossEntropy.apply(*distinct(student, teacher), temperature))


class _CrossEntropy(torch.autograd.Function):
    """(B,) cross-entropies -Σ_c q_c log p_c = log Σ_c e^z_c - Σ_c q_c z_c, with z = student less its maximum.

    q has the K classes of an index (B, K), and the rest of 1 spread over the others. The one copy of the logits becomes
    z, then e^z, then the gradient p - q. A class of probability 0 adds nothing, whatever its logit.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, q: Tensor, index: Tensor) -> Tensor:
        z = student.to(q.dtype) - student.amax(1, keepdim=True).to(q.dtype)
        rest = (1 - q.sum(1, keepdim=True)) / (z.shape[1] - q.shape[1])
        q = q - rest
        of_index = (q * z.gather(1, index)).masked_fill_(q == 0, 0).sum(1)
        of_rest = (rest * z.sum(1, keepdim=True)).masked_fill_(rest == 0, 0).squeeze(1)
        total = z.exp_().sum(1, keepdim=True)
        loss = total.log().squeeze(1) - of_index - of_rest
        z.mul_(1 / total).sub_(rest).scatter_add_(1, index, -q)
        ctx.save_for_backward(z)
        ctx.dtype = student.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("soft_target_loss")
        (dstudent,) = ctx.saved_tensors
        return scaled(dstudent, dloss[:, None], ctx.dtype), None, None


def cross_entropy(student: Tensor, q: Tensor, index: Tensor) -> Tensor:
    """Return (B,) cross-entropies of logits (B, C) with the probabilities (B, K) of the K classes at an index (B, K).

    The caller checks the arguments. q is in float32 or better. Their gradients are those of soft_target_loss.
    """
    refuse_transforms("soft_target_loss")
    return cast(Tensor, _CrossEntropy.apply(*distinct(student, q, index)))


def _rows(
    function: str,
    backend: Backend,
    op: str,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    options: tuple[float, ...],
    factor: float,
    is_sum: bool,
) -> Tensor:
    impl = resolve(backend, op, student, teacher)
    options_of_all = (impl, op, options, wants_grad(student), factor, is_sum, function)
    return cast(Tensor, _Rows.apply(*distinct(student, teacher, target), *options_of_all))


def soft_target_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    reduction: LogitReduction = "batchmean",
    backend: Backend = "auto",
) -> Tensor:
    """Soft targets: Hinton et al. 2015 (arXiv:1503.02531), with its T².

        L = T²/B Σ_b KL( softmax(teacher/T) ‖ softmax(student/T) )

    Args:
        student: (B, C) logits, float64 | float32 | bfloat16 | float16. Differentiable.
        teacher: (B, C), its dtype may differ. A constant.
        temperature: T, 1e-6 to 1e6.
        reduction: "batchmean" divides by B, "mean" by B C (DeiT's code), "sum" by nothing; "none" gives (B,).
        backend: "auto", "eager", "native" or "triton".

    Returns:
        Scalar or (B,), float32 (float64 if an input is).

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that differ or are empty, devices that differ, a temperature outside [1e-6, 1e6], an unknown
            reduction, a teacher that requires a gradient.
        RuntimeError: the named backend cannot run here; differentiated twice; under vmap or torch.func.
    """
    check_pair(student, teacher, ("student", "teacher"), temperature)
    check.one_of("reduction", reduction, ("batchmean", "mean", "sum", "none"))
    check.constant("teacher", teacher)
    refuse_transforms("soft_target_loss")
    divisor = {"batchmean": student.shape[0], "mean": student.numel()}.get(reduction, 1)
    options, factor = (0.0, 1.0, temperature), temperature**2 / divisor
    return _rows(
        "soft_target_loss", backend, "softmax_kl", student, teacher, None, options, factor, reduction != "none"
    )


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    label: Tensor | int,
    *,
    alpha: float = 1.0,
    beta: float = 4.0,
    temperature: float = 1.0,
    reduction: RowReduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """Decoupled distillation: Zhao et al. 2022 (arXiv:2203.08679), the reductions of its code.

        L = T²/B Σ_b ( α KL( (q_y, 1 - q_y) ‖ (p_y, 1 - p_y) ) + β KL( q' ‖ p' ) )

    with p, q the softmax of student/T, teacher/T and p', q' that of the C - 1 classes beside the label y. The code
    lowers the target's logit by 1000 instead of removing it: the same while no logit leads the rest by hundreds. A
    teacher that has switched all other classes off (-inf) has no q': its second term is 0. A student that has done so
    where the teacher has not costs infinitely much.

    Args:
        student: (B, C) logits, C >= 2, float64 | float32 | bfloat16 | float16. Differentiable.
        teacher: (B, C), its dtype may differ. A constant.
        label: (B,) class indices, or one int for all. On the device of student, or moved there.
        alpha, beta: weights >= 0 of the two terms; 1 and 4 as CIKD has them (on ImageNet without it 1 and 0.5).
        temperature: T, 1e-6 to 1e6.
        reduction: "mean" over images, "sum", or "none", which gives (B,).
        backend: "auto", "eager", "native" or "triton".

    Returns:
        Scalar or (B,), float32 (float64 if an input is).

    Raises:
        TypeError: not floating-point tensors, label not of integers.
        ValueError: shapes that do not fit or are empty, fewer than 2 classes, devices that differ, a temperature
            outside [1e-6, 1e6], a weight < 0, an int label outside [0, C), an unknown reduction, a teacher that
            requires a gradient.
        RuntimeError: the named backend cannot run here; a label out of range; differentiated twice; under vmap or
            torch.func.
    """
    check_pair(student, teacher, ("student", "teacher"), temperature)
    check.number("alpha", alpha, low=0)
    check.number("beta", beta, low=0)
    check.one_of("reduction", reduction, get_args(RowReduction))
    check.constant("teacher", teacher)
    refuse_transforms("dkd_loss")
    target = _target(label, student, mixed=False).squeeze(1)
    options, factor = (alpha, beta, temperature), temperature**2 / (len(student) if reduction == "mean" else 1)
    return _rows("dkd_loss", backend, "softmax_kl", student, teacher, target, options, factor, reduction != "none")


def nkd_loss(
    student: Tensor,
    teacher: Tensor,
    label: Tensor | int,
    *,
    gamma: float = 1.0,
    temperature: float = 1.0,
    reduction: RowReduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """Normalised distillation: Yang et al. 2023 (arXiv:2303.13005), as its code has it since October 2023.

        L = -1/B Σ_b ( q_y log p_y + γ T² Σ_{i≠y} q'_i log p'_i )

    with p, q the softmax of student and teacher and p', q' that of the C - 1 classes beside the label y, at T. A
    cross-entropy: it does not vanish where student = teacher. A teacher that has switched all other classes off (-inf)
    has no q': its second term is 0. A student that has done so where the teacher has not costs infinitely much.

    Args:
        student: (B, C) logits, C >= 2, float64 | float32 | bfloat16 | float16. Differentiable.
        teacher: (B, C), its dtype may differ. A constant.
        label: (B,) class indices, (B, C) mixed labels, whose largest entry counts, or one int for all. On the device
            of student, or moved there.
        gamma: weight >= 0 of the other classes; 1 as the code has it for DeiT (ResNet on ImageNet 1.5).
        temperature: T, 1e-6 to 1e6, of the other classes alone.
        reduction: "mean" over images, "sum", or "none", which gives (B,).
        backend: "auto", "eager", "native" or "triton".

    Returns:
        Scalar or (B,), float32 (float64 if an input is).

    Raises:
        TypeError, ValueError, RuntimeError: as dkd_loss.
    """
    check_pair(student, teacher, ("student", "teacher"), temperature)
    check.number("gamma", gamma, low=0)
    check.one_of("reduction", reduction, get_args(RowReduction))
    check.constant("teacher", teacher)
    refuse_transforms("nkd_loss")
    target = _target(label, student, mixed=True).squeeze(1)
    options, factor = (gamma, temperature), 1 / len(student) if reduction == "mean" else 1.0
    return _rows("nkd_loss", backend, "nkd", student, teacher, target, options, factor, reduction != "none")


def competition_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 3.0,
    reduction: Literal["mean", "none"] = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """Adaptive DeepInversion's competition of student and teacher (Yin et al. 2020, arXiv:1912.08795), as coded.

        L = 1 - clamp(J, 0, 1),  J = 1/2B Σ_b ( KL(M ‖ P) + KL(M ‖ Q) ),  M = (P + Q)/2

    with P, Q the softmax of student/T, teacher/T and each of P, Q, M clamped to [0.01, 0.99] and not renormalised: the
    divergences run the other way round than Jensen-Shannon's, J lies between slightly below 0 and 1.7, and a clamped
    probability, like a J outside [0, 1], has gradient 0.

    Args:
        student_logits, teacher_logits: (B, C), float64 | float32 | bfloat16 | float16. Both differentiable: detach one
            to leave it out.
        temperature: T, 1e-6 to 1e6.
        reduction: "mean" is the loss above; "none" gives 1 - J of each image (B,), whose mean the loss clamps.
        backend: "auto", "eager", "native" or "triton".

    Returns:
        Scalar or (B,), float32 (float64 if an input is).

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes that differ or are empty, devices that differ, a temperature outside [1e-6, 1e6], an unknown
            reduction.
        RuntimeError: the named backend cannot run here; differentiated twice; under vmap or torch.func.
    """
    check_pair(student_logits, teacher_logits, ("student_logits", "teacher_logits"), temperature)
    check.one_of("reduction", reduction, ("mean", "none"))
    refuse_transforms("competition_loss")
    if torch.compiler.is_compiling():  # a graph has one number for an operator, and a symbol for a division
        acc = accumulator(student_logits, teacher_logits)
        student_logits, teacher_logits = (z.to(acc) / temperature for z in (student_logits, teacher_logits))
        temperature = 1.0
    impl = resolve(backend, "competition", student_logits, teacher_logits)
    wanted = wants_grad(student_logits), wants_grad(teacher_logits)
    tensors = distinct(student_logits, teacher_logits)
    return cast(Tensor, _Competition.apply(*tensors, impl, temperature, reduction == "mean", *wanted))
