"""Losses of logits (B, C): soft targets, decoupled and normalised distillation, the competition of ADI."""

import torch
from torch import Tensor

NEVER = float("-inf")


def _float(*tensors: Tensor) -> tuple[Tensor, ...]:
    acc = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return tuple(x.to(acc) for x in tensors)


def _without(z: Tensor, label: Tensor) -> Tensor:
    """The C - 1 logits of the other classes."""
    i = torch.arange(z.shape[1] - 1, device=z.device)
    return z.gather(1, i + (i >= label[:, None]))


def _log_softmax(z: Tensor) -> Tensor:
    """Rows that are all -inf stay so, with gradient 0."""
    has_class = (z != NEVER).any(-1, keepdim=True)
    return torch.where(has_class, torch.where(has_class, z, 0).log_softmax(-1), NEVER)


def _logsumexp(z: Tensor) -> Tensor:
    has_class = (z != NEVER).any(-1, keepdim=True)
    return torch.where(has_class, torch.where(has_class, z, 0).logsumexp(-1, keepdim=True), NEVER)


def _cross_entropy(log_q: Tensor, log_p: Tensor) -> Tensor:
    """-q log p, with 0 log 0 = 0."""
    q = log_q.exp()
    return -q * torch.where(q == 0, 0, log_p)


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """q (log q - log p), with 0 log 0 = 0."""
    q = log_q.exp()
    return q * torch.where(q == 0, 0, log_q - log_p)


def _reduced(rows: Tensor, reduction: str) -> Tensor:
    return {"none": rows, "mean": rows.mean(), "sum": rows.sum()}[reduction]


def soft_target_loss(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, reduction: str = "batchmean"
) -> Tensor:
    """T² Σ_c q (log q - log p) with p, q the softmax of student/T and teacher/T; arguments as in fastkd."""
    s, t = _float(student, teacher)
    log_p, log_q = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    terms = temperature**2 * _kl(log_q, log_p)
    if reduction == "none":
        return terms.sum(-1)
    return terms.mean() if reduction == "mean" else terms.sum() / (len(s) if reduction == "batchmean" else 1)


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    label: Tensor | int,
    *,
    alpha: float = 1.0,
    beta: float = 4.0,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """T²/B Σ_b ( α KL(target | rest) + β KL(among the rest) ); arguments as in fastkd.dkd_loss."""
    s, t = _float(student, teacher)
    label = torch.as_tensor(label, device=s.device).expand(len(s)).long()

    def logs(z: Tensor) -> tuple[Tensor, Tensor]:
        z = z / temperature
        others, target = _without(z, label), z.gather(1, label[:, None])
        binary = torch.cat([target, _logsumexp(others)], -1)
        return binary.log_softmax(-1), _log_softmax(others)

    (binary_s, others_s), (binary_t, others_t) = logs(s), logs(t)
    terms = ((alpha, _kl(binary_t, binary_s)), (beta, _kl(others_t, others_s)))
    rows = torch.stack([w * kl.sum(-1) if w else torch.zeros_like(s[:, 0]) for w, kl in terms]).sum(0)
    return _reduced(temperature**2 * rows, reduction)


def nkd_loss(
    student: Tensor,
    teacher: Tensor,
    label: Tensor | int,
    *,
    gamma: float = 1.0,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """-1/B Σ_b ( t_y log s_y + γ T² Σ_{i≠y} t'_i log s'_i ); arguments as in fastkd.nkd_loss."""
    s, t = _float(student, teacher)
    label = torch.as_tensor(label, device=s.device)
    label = label.argmax(1) if label.ndim == 2 else label.expand(len(s)).long()
    y = label[:, None]
    rows = _cross_entropy(t.log_softmax(-1).gather(1, y), s.log_softmax(-1).gather(1, y)).sum(-1)
    if gamma:
        others_s, others_t = (_log_softmax(_without(z, label) / temperature) for z in (s, t))
        rows = rows + gamma * temperature**2 * _cross_entropy(others_t, others_s).sum(-1)
    return _reduced(rows, reduction)


def competition_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 3.0, reduction: str = "mean"
) -> Tensor:
    """1 - clamp(J, 0, 1), J = 1/2B Σ ( KL(M‖P) + KL(M‖Q) ), M = (P + Q)/2, each of P, Q, M clamped to [0.01, 0.99]."""
    s, t = _float(student_logits, teacher_logits)
    p, q = (s / temperature).softmax(-1), (t / temperature).softmax(-1)
    p, q, m = (x.clamp(0.01, 0.99) for x in (p, q, (p + q) / 2))
    j = (m * (m.log() - p.log()) + m * (m.log() - q.log())).sum(-1) / 2
    return 1 - (j if reduction == "none" else j.mean().clamp(0, 1))
