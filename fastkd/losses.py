"""The losses as modules, with the papers' defaults: weights, layers and reductions."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastkd import functional as F
from fastkd.ops._dispatch import Backend
from fastkd.ops.relation import Algorithm, Rectify, Scope


class RelationLoss(nn.Module):
    """fastkd.relation_loss with its options fixed: loss(student (B, N, Ds), teacher (B, N, Dt)) -> scalar."""

    def __init__(
        self,
        *,
        scope: Scope = "intra",
        normalize: bool = True,
        rectify: Rectify = "none",
        eps: float = 1e-12,
        algorithm: Algorithm = "auto",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.scope, self.normalize, self.rectify, self.eps = scope, normalize, rectify, eps
        self.algorithm, self.backend = algorithm, backend

    def extra_repr(self) -> str:
        return f"scope={self.scope!r}, normalize={self.normalize}, rectify={self.rectify!r}"

    def forward(self, student: Tensor, teacher: Tensor, *, index: Tensor | None = None) -> Tensor:
        return F.relation_loss(
            student,
            teacher,
            scope=self.scope,
            index=index,
            normalize=self.normalize,
            rectify=self.rectify,
            eps=self.eps,
            algorithm=self.algorithm,
            backend=self.backend,
        )


class ManifoldLoss(nn.Module):
    """Fine-grained manifold distillation over matched layers: Hao et al. 2022 (arXiv:2107.01378).

        L = 1/L Σ_l ( intra L_intra + inter L_inter + random L_random ),  the weights of the official code

    Args:
        intra, inter, random: weights of the three terms.
        num_samples: K rows of the random term, drawn anew for each layer and call.
        backend: "auto", "eager", "native" or "triton".
    """

    def __init__(
        self,
        *,
        intra: float = 4.0,
        inter: float = 0.1,
        random: float = 0.2,
        num_samples: int = 192,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.intra, self.inter, self.random = intra, inter, random
        self.num_samples, self.backend = num_samples, backend

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
        if len(students) != len(teachers) or not students:
            raise ValueError(
                f"students and teachers must match layer by layer, got {len(students)} and {len(teachers)} layers"
            )
        if indices is not None and len(indices) != len(students):
            raise ValueError(f"indices must have one tensor per layer, got {len(indices)} for {len(students)} layers")
        losses, terms = [], []
        for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
            result = F.manifold_loss(
                s,
                t,
                intra=self.intra,
                inter=self.inter,
                random=self.random,
                num_samples=self.num_samples,
                generator=generator,
                index=None if indices is None else indices[i],
                return_terms=return_terms,
                backend=self.backend,
            )
            losses.append(result[0] if return_terms else result)
            if return_terms:
                terms.append(result[1])
        loss = torch.stack(losses).mean()
        if not return_terms:
            return loss
        intra, inter, random = (torch.stack(column).mean() for column in zip(*terms, strict=True))
        return loss, (intra, inter, random)
