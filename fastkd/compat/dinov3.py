"""The Gram loss of DINOv3."""

from torch import Tensor, nn

from fastkd import functional as F
from fastkd._precision import accumulator
from fastkd.ops import _checks as check


class GramLoss(nn.Module):
    """DINOv3's Gram loss under the name and signature of its code (dinov3/loss/gram_loss.py).

    Args:
        apply_norm: relate unit vectors.
        img_level: accepted and unused, as in the original: forward's argument of the same name decides.
        remove_neg: clamp negative similarities of both networks to 0.
        remove_only_teacher_neg: clamp those of the teacher alone.

    Raises:
        ValueError: both remove_neg and remove_only_teacher_neg.
    """

    def __init__(
        self,
        apply_norm: bool = True,
        img_level: bool = True,
        remove_neg: bool = True,
        remove_only_teacher_neg: bool = False,
    ) -> None:
        super().__init__()
        if remove_neg and remove_only_teacher_neg:
            raise ValueError("remove_neg and remove_only_teacher_neg exclude each other")
        self.apply_norm, self.remove_neg = apply_norm, remove_neg
        self.remove_only_teacher_neg = remove_only_teacher_neg

    def forward(self, output_feats: Tensor, target_feats: Tensor, img_level: bool = True) -> Tensor:
        """Mean squared difference of the Gram matrices, per image or over the whole batch.

        Args:
            output_feats: (B, N, D) student tokens; (n, D) too if not img_level, as for masked tokens. Differentiable.
            target_feats: (B, N, D') teacher tokens; (n, D') too if not img_level, also for a student (B, N, D) with
                n = B N. A constant: where the original would differentiate it, an error.
            img_level: one map per image, else one over the batch.

        Returns:
            Scalar, float32 (float64 if an input is); NaN for a set without tokens, as in the original.

        Raises:
            ValueError: shapes that do not fit, or target_feats that requires a gradient.
        """
        if not img_level:
            output_feats, target_feats = (x.flatten(0, -2)[None] for x in (output_feats, target_feats))
        if output_feats.shape[:2].numel() == 0 and output_feats.shape[:2] == target_feats.shape[:2]:
            check.constant("target_feats", target_feats)
            return output_feats.to(accumulator(output_feats, target_feats)).mean()
        return F.relation_loss(
            output_feats,
            target_feats,
            normalize=self.apply_norm,
            rectify="both" if self.remove_neg else "teacher" if self.remove_only_teacher_neg else "none",
        )
