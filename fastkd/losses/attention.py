"""Modules over attention maps."""

from collections.abc import Sequence

from torch import Tensor

from fastkd import functional as F
from fastkd.losses._fixed import FixedLoss
from fastkd.ops import _checks as check
from fastkd.ops._dispatch import Backend
from fastkd.ops.attention import Divergence, Heads, Reduction


class AttentionLoss(FixedLoss):
    """fastkd.attention_loss with its options fixed: loss(q_student, k_student, q_teacher, k_teacher) -> scalar.

    The defaults are MiniLM's (arXiv:2002.10957): KL(teacher ‖ student), mean over images, heads and queries. On q, k
    and again on v, v it is TinyMIM's loss (arXiv:2301.01296); with "score_mse", TinyBERT's (arXiv:1909.10351).
    """

    shown = ("divergence", "temperature", "heads", "reduction")

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
        super().__init__(
            divergence=divergence, scale_student=scale_student, scale_teacher=scale_teacher, temperature=temperature,
            is_causal=is_causal, heads=heads, query_slice=query_slice, reduction=reduction, backend=backend,
        )  # fmt: skip

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
            q_student, k_student, q_teacher, k_teacher, key_mask=key_mask, query_mask=query_mask,
            bias_student=bias_student, bias_teacher=bias_teacher, **self.options,
        )  # fmt: skip


class QKVRelationLoss(FixedLoss):
    """fastkd.qkv_relation_loss with its options fixed: loss((q, k, v), (q, k, v)) -> scalar, tensors (B, N, D).

    The default relations are MiniLMv2's (arXiv:2012.15828); TinyMIM and CIKD take ("qk", "vv").
    """

    shown = ("relations", "relation_heads")

    def __init__(
        self,
        *,
        relations: Sequence[str] = ("qq", "kk", "vv"),
        relation_heads: int,
        weights: Sequence[float] | None = None,
        backend: Backend = "auto",
    ) -> None:
        check.sequence("relations", relations, "pairs such as 'qk'")
        super().__init__(relations=tuple(relations), relation_heads=relation_heads, weights=weights, backend=backend)

    def forward(
        self,
        student: tuple[Tensor, Tensor, Tensor],
        teacher: tuple[Tensor, Tensor, Tensor],
        *,
        key_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
    ) -> Tensor:
        return F.qkv_relation_loss(student, teacher, key_mask=key_mask, query_mask=query_mask, **self.options)
