"""Modules over attention maps."""

from collections.abc import Sequence

from torch import Tensor, nn

from fastkd import functional as F
from fastkd.ops import _checks as check
from fastkd.ops._dispatch import Backend
from fastkd.ops.attention import Divergence, Heads, Reduction


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
        check.sequence("relations", relations, "pairs such as 'qk'")
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
