"""Losses of logits (B, C): soft targets, decoupled and normalised distillation, the competition of ADI."""

import torch
from torch import Tensor


def _float(*tensors: Tensor) -> tuple[Tensor, ...]:
    acc = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return tuple(x.to(acc) for x in tensors)


def _without(z: Tensor, label: Tensor) -> Tensor:
    """The C - 1 logits of the other classes."""
    i = torch.arange(z.shape[1] - 1, device=z.device)
    return z.gather(1, i + (i >= label[:, None]))


def soft_target_loss(student: Tensor, teacher: Tensor, *, temperature: float, reduction: str = "batchmean") -> Tensor:
    """T² Σ_c q (log q - log p) with p, q the softmax of student/T and teacher/T; arguments as in fastkd."""
    s, t = _float(student, teacher)
    log_p, log_q = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    terms = temperature**2 * log_q.exp() * (log_q - log_p)
    if reduction == "none":
        return terms.sum(-1)
    return terms.mean() if reduction == "mean" else terms.sum() / (len(s) if reduction == "batchmean" else 1)


def dkd_loss(
    student: Tensor, teacher: Tensor, label: Tensor | int, *, alpha: float, beta: float, temperature: float
) -> Tensor:
    """T²/B Σ_b ( α KL(target | rest) + β KL(among the rest) ); arguments as in fastkd.dkd_loss."""
    s, t = _float(student, teacher)
    label = torch.as_tensor(label, device=s.device).expand(len(s)).long()

    def logs(z: Tensor) -> tuple[Tensor, Tensor]:
        z = z / temperature
        others, target = _without(z, label), z.gather(1, label[:, None])
        binary = torch.cat([target, others.logsumexp(-1, keepdim=True)], -1)
        return binary.log_softmax(-1), others.log_softmax(-1)

    (binary_s, others_s), (binary_t, others_t) = logs(s), logs(t)
    tckd = (binary_t.exp() * (binary_t - binary_s)).sum()
    nckd = (others_t.exp() * (others_t - others_s)).sum()
    return temperature**2 / len(s) * (alpha * tckd + beta * nckd)


def nkd_loss(student: Tensor, teacher: Tensor, label: Tensor | int, *, gamma: float, temperature: float) -> Tensor:
    """-1/B Σ_b ( t_y log s_y + γ T² Σ_{i≠y} t'_i log s'_i ); arguments as in fastkd.nkd_loss."""
    s, t = _float(student, teacher)
    label = torch.as_tensor(label, device=s.device)
    label = label.argmax(1) if label.ndim == 2 else label.expand(len(s)).long()
    y = label[:, None]
    target = t.softmax(-1).gather(1, y) * s.log_softmax(-1).gather(1, y)
    others_s, others_t = _without(s, label) / temperature, _without(t, label) / temperature
    others = others_t.softmax(-1) * others_s.log_softmax(-1)
    return -(target.sum() + gamma * temperature**2 * others.sum()) / len(s)


def competition_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 3.0) -> Tensor:
    """1 - clamp(J, 0, 1), J = 1/2B Σ ( KL(M‖P) + KL(M‖Q) ), M = (P + Q)/2, each of P, Q, M clamped to [0.01, 0.99]."""
    s, t = _float(student_logits, teacher_logits)
    p, q = (s / temperature).softmax(-1), (t / temperature).softmax(-1)
    p, q, m = (x.clamp(0.01, 0.99) for x in (p, q, (p + q) / 2))
    j = (m * (m.log() - p.log()) + m * (m.log() - q.log())).sum() / (2 * len(s))
    return 1 - j.clamp(0, 1)
