"""The module that spreads the features of a class."""

from typing import TYPE_CHECKING

from torch import Tensor

from fastkd import functional as F
from fastkd.losses._fixed import FixedLoss
from fastkd.ops import _checks as check

if TYPE_CHECKING:
    from fastkd.distributed import Group


class IntraDivergenceLoss(FixedLoss):
    """fastkd.intra_divergence_loss, in our formulation, with its margins fixed.

    loss(features (B, D), labels (B,)) -> scalar.

    Args:
        spread_margin: m₁ >= 0, beyond which images of a class are not pushed further apart.
        boundary_margin: m₂ >= 0, kept between a class's radius and the nearest other class.
        process_group: compare the images of all its ranks (fastkd.distributed); None, those of this process.
    """

    shown = ("spread_margin", "boundary_margin")

    def __init__(self, *, spread_margin: float, boundary_margin: float, process_group: "Group" = None) -> None:
        check.number("spread_margin", spread_margin, low=0)
        check.number("boundary_margin", boundary_margin, low=0)
        super().__init__(spread_margin=spread_margin, boundary_margin=boundary_margin)
        self.process_group = process_group

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return F.intra_divergence_loss(features, labels, group=self.process_group, **self.options)
