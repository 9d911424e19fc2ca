"""Signatures that people already call, so that a migration is one changed import."""

from torch import Tensor, nn

from fastkd import functional as F


def layer_mf_loss(F_s: Tensor, F_t: Tensor, K: int, *, index: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms of Hao et al. 2022 under the name and signature of their code (losses.py, layer_mf_loss).

    Args:
        F_s: (B, N, Ds) student tokens. Differentiable.
        F_t: (B, N, Dt) teacher tokens. A constant.
        K: rows of the random term; all of them where K > B*N.
        index: (K,) int64 rows to take instead of drawing them (not in the original).

    Returns:
        (patch, sample, rand): the intra, inter and random terms, unweighted element means.

    Raises:
        ValueError: as fastkd.manifold_loss; a teacher that requires a gradient; token counts that differ
            (the original slices and silently relates the wrong tokens when only the teacher has a class token).
    """
    _, terms = F.manifold_loss(F_s, F_t, num_samples=K, index=index, return_terms=True)
    return terms


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
            output_feats: (B, N, D) student tokens; (B*N, D) too if not img_level. Differentiable.
            target_feats: (B, N, D') teacher tokens. A constant: where the original would differentiate it, an error.
            img_level: one map per image, else one over the batch.

        Raises:
            ValueError: shapes that do not fit, or target_feats that requires a gradient.
        """
        if not img_level and output_feats.ndim == 2 and target_feats.ndim == 2:
            output_feats, target_feats = output_feats.unsqueeze(0), target_feats.unsqueeze(0)
        return F.relation_loss(
            output_feats,
            target_feats,
            scope="intra" if img_level else "batch",
            normalize=self.apply_norm,
            rectify="both" if self.remove_neg else "teacher" if self.remove_only_teacher_neg else "none",
        )
