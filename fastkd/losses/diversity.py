"""The module that spreads the features of a class."""

from torch import Tensor, nn

from fastkd import functional as F
from fastkd.distributed import Group
from fastkd.ops import _checks as check


class IntraDivergenceLoss(nn.Module):
    """fastkd.intra_divergence_loss, in our formulation, with its margins fixed.

    loss(features (B, D), labels (B,)) -> scalar.

    Args:
        spread_margin: m₁ >= 0, beyond which images of a class are not pushed further apart.
        boundary_margin: m₂ >= 0, kept between a class's radius and the nearest other class.
        process_group: compare the images of all its ranks (fastkd.distributed); None, those of this process.
    """

    def __init__(self, *, spread_margin: float, boundary_margin: float, process_group: Group = None) -> None:
        super().__init__()
        check.number("spread_margin", spread_margin, low=0)
        check.number("boundary_margin", boundary_margin, low=0)
        self.spread_margin, self.boundary_margin = spread_margin, boundary_margin
        self.process_group = process_group

    def extra_repr(self) -> str:
        return f"spread_margin={self.spread_margin}, boundary_margin={self.boundary_margin}"

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return F.intra_divergence_loss(
            features,
            labels,
            spread_margin=self.spread_margin,
            boundary_margin=self.boundary_margin,
            group=self.process_group,
        )
