"""Modules over relation maps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastkd import functional as F
from fastkd.functional.relation import Terms, manifold_layers
from fastkd.losses._fixed import FixedLoss
from fastkd.ops import _checks as check
from fastkd.ops._dispatch import Backend
from fastkd.ops.relation import Algorithm, ManifoldCall, Rectify, ReturnTerms, Scope

if TYPE_CHECKING:
    from fastkd.distributed import Group


class RelationLoss(FixedLoss):
    """fastkd.relation_loss with its options fixed: loss(student (B, N, Ds), teacher (B, N, Dt)) -> scalar.

    process_group: relate the images of all its ranks (fastkd.distributed); None, those of this process.
    """

    shown = ("scope", "normalize", "rectify")

    def __init__(
        self,
        *,
        scope: Scope = "intra",
        normalize: bool = True,
        rectify: Rectify = "none",
        eps: float = 1e-12,
        algorithm: Algorithm = "auto",
        backend: Backend = "auto",
        process_group: "Group" = None,
    ) -> None:
        super().__init__(
            scope=scope, normalize=normalize, rectify=rectify, eps=eps, algorithm=algorithm, backend=backend
        )
        self.process_group = process_group

    def forward(self, student: Tensor, teacher: Tensor, *, index: Tensor | None = None) -> Tensor:
        return F.relation_loss(student, teacher, index=index, group=self.process_group, **self.options)


class ManifoldLoss(FixedLoss):
    """Fine-grained manifold distillation over matched layers: Hao et al. 2022 (arXiv:2107.01378).

        L = 1/L Σ_l ( intra L_intra + inter L_inter + random L_random ),  the weights of the official code

    Args:
        intra, inter, random: weights of the three terms.
        num_samples: K rows of the random term, drawn anew for each layer and call unless they are given.
        backend: "auto", "eager", "native" or "triton".
        process_group: relate the images of all its ranks (fastkd.distributed; torch.distributed.group.WORLD for all,
            which is None before init_process_group); None, those of this process.

    Raises:
        TypeError, ValueError: a weight or number out of its range.
    """

    shown = ("intra", "inter", "random", "num_samples")

    def __init__(
        self,
        *,
        intra: float = 4.0,
        inter: float = 0.1,
        random: float = 0.2,
        num_samples: int = 192,
        backend: Backend = "auto",
        process_group: "Group" = None,
    ) -> None:
        for name, weight in (("intra", intra), ("inter", inter), ("random", random)):
            check.number(name, weight, low=0)
        check.positive_int("num_samples", num_samples)
        super().__init__(intra=intra, inter=inter, random=random, num_samples=num_samples, backend=backend)
        self.process_group = process_group

    def forward(
        self,
        students: Tensor | Sequence[Tensor],
        teachers: Tensor | Sequence[Tensor],
        *,
        index: Tensor | None = None,
        indices: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
        return_terms: ReturnTerms = False,
    ) -> Tensor | tuple[Tensor, Terms]:
        """Mean of fastkd.manifold_loss over layers.

        Args:
            students: per matched layer the student's tokens (B, N, Ds); one tensor for one layer.
            teachers: per matched layer the teacher's tokens (B, N, Dt).
            index: rows (K,) of the random term, one draw for all layers; or indices: per layer the rows (K,).
            generator: source of the draws (not under torch.compile).
            return_terms: also give the layer means of the unweighted (intra, inter, random), each differentiable by
                itself; "detached" gives them as values to log, at no cost.

        Raises:
            ValueError: no layer, lists of unequal length, or both index and indices.
            TypeError, ValueError, RuntimeError: as fastkd.manifold_loss.
        """
        if self.process_group is None:
            students, teachers = check.layers("students", students), check.layers("teachers", teachers)
        students, teachers = check.unchecked_layers(students), check.unchecked_layers(teachers)
        if index is not None:
            if indices is not None:
                raise ValueError("index is one draw for all layers and indices are one for each: give one of them")
            indices = [index] * len(students)
        call = ManifoldCall(
            students, teachers, generator=generator, indices=indices, return_terms=return_terms, **self.options
        )
        return manifold_layers(call, self.process_group)
