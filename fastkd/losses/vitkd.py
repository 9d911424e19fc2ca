"""ViTKD: mimicking in early layers, masked generation in the last."""

import torch
from torch import Tensor, nn

from fastkd.losses._tokens import check_tokens, squared_error, token_grid
from fastkd.ops import _checks as check
from fastkd.ops._autograd import savable


class ViTKDLoss(nn.Module):
    """ViTKD: Yang et al. 2022 (arXiv:2209.02432): mimic the shallow layers, generate the deep one; its code's
    reductions.

        L = α/B Σ_l ‖W_l s_l - t_l‖²  +  β/(λB) ‖m ⊙ (G(m ? token : W s) - t)‖²

    with l the two low layers, m the masked tokens, G two 3x3 convolutions around a ReLU over the grid of tokens. The
    sum runs over tokens and channels, so the weights go with N and the teacher's width. The mappings W are identities
    where the widths agree. Parameters carry the names of the official code and are discarded after training.

    Args:
        student_dim, teacher_dim: widths Ds, Dt.
        alpha, beta: weights >= 0.
        mask_ratio: λ in (0, 1]; N - floor(N (1 - λ)) tokens of each image are masked.

    Raises:
        TypeError, ValueError: a width, weight or ratio out of these ranges.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        alpha: float = 3e-5,
        beta: float = 3e-6,
        mask_ratio: float = 0.5,
    ) -> None:
        super().__init__()
        check.positive_int("student_dim", student_dim)
        check.positive_int("teacher_dim", teacher_dim)
        check.number("alpha", alpha, low=0)
        check.number("beta", beta, low=0)
        check.number("mask_ratio", mask_ratio, low=0, open_low=True)
        if mask_ratio > 1:
            raise ValueError(f"mask_ratio must be at most 1, got {mask_ratio}")
        self.student_dim, self.teacher_dim = student_dim, teacher_dim
        self.alpha, self.beta, self.mask_ratio = alpha, beta, mask_ratio

        def mapping() -> nn.Module:
            return nn.Identity() if student_dim == teacher_dim else nn.Linear(student_dim, teacher_dim)

        self.align2 = nn.ModuleList([mapping(), mapping()])
        self.align = mapping()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, teacher_dim))
        self.generation = nn.Sequential(
            nn.Conv2d(teacher_dim, teacher_dim, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(teacher_dim, teacher_dim, 3, padding=1),
        )

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, mask_ratio={self.mask_ratio}"

    def draw_mask(self, B: int, N: int, *, generator: torch.Generator | None = None) -> Tensor:
        """(B, N) bool, True = masked: the same number in every image, drawn where the generator or module lives."""
        device = self.mask_token.device if generator is None else generator.device
        order = torch.rand(B, N, generator=generator, device=device).argsort(1)
        mask = torch.ones(B, N, dtype=torch.bool, device=device)
        return mask.scatter(1, order[:, : int(N * (1 - self.mask_ratio))], False)

    def forward(
        self,
        low_student: Tensor,
        low_teacher: Tensor,
        high_student: Tensor,
        high_teacher: Tensor,
        mask: Tensor | None = None,
        *,
        grid: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
        return_terms: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss; patch tokens only, row-major on their grid.

        Args:
            low_student, low_teacher: (B, 2, N, Ds), (B, 2, N, Dt) tokens after the first two blocks.
            high_student, high_teacher: (B, N, Ds), (B, N, Dt) tokens after the final norm.
            mask: (B, N), nonzero = masked; drawn if None. On the device of the tokens, or moved there.
            grid: (h, w) of the tokens; None for a square.
            generator: source of the draw (not under torch.compile); torch's default generator if None.
            return_terms: also give the two weighted terms (mimicking, generation).

        Returns:
            Scalar, float32 (float64 if an input is), or (scalar, (mimicking, generation)).

        Raises:
            TypeError: not floating-point tensors, a mask that is no tensor, a generator that is none.
            ValueError: shapes that do not fit or are empty, N that is not the grid (None: no square), devices that
                differ, a teacher that requires a gradient.
        """
        check_tokens("high_student", high_student, (None, None, self.student_dim), f"(B, N, {self.student_dim})")
        check.source(generator)
        check.flag("return_terms", return_terms)
        B, N, _ = high_student.shape
        Ds, Dt = self.student_dim, self.teacher_dim
        check_tokens("low_student", low_student, (B, 2, N, Ds), f"({B}, 2, {N}, {Ds})")
        check_tokens("low_teacher", low_teacher, (B, 2, N, Dt), f"({B}, 2, {N}, {Dt})")
        check_tokens("high_teacher", high_teacher, (B, N, Dt), f"({B}, {N}, {Dt})")
        check.same_device(
            high_student=high_student, low_student=low_student, low_teacher=low_teacher, high_teacher=high_teacher
        )
        check.constant("low_teacher", low_teacher)
        check.constant("high_teacher", high_teacher)
        h, w = token_grid("high_student", N, grid)
        if mask is None:
            mask = self.draw_mask(B, N, generator=generator)
        elif not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
        elif mask.shape != (B, N):
            raise ValueError(f"mask must have shape ({B}, {N}), got {tuple(mask.shape)}")
        check.dense("mask", mask)
        masked = (check.moved("mask", mask, high_student.device) != 0)[..., None]

        dtype = self.mask_token.dtype
        low_student, high_student = savable(low_student), savable(high_student)
        mimic = torch.stack(
            [
                squared_error(align(low_student[:, i].to(dtype)), low_teacher[:, i], "sum")
                for i, align in enumerate(self.align2)
            ]
        ).sum()
        x = torch.where(masked, self.mask_token, self.align(high_student.to(dtype)))
        x = x.unflatten(1, (h, w)).permute(0, 3, 1, 2)  # channels-last as it is, which convolutions take
        x = self.generation(x).flatten(2).mT
        generate = squared_error(x.masked_fill(~masked, 0), high_teacher.masked_fill(~masked, 0), "sum")
        # Divided by λ, not by the share that was really masked.
        terms = (self.alpha / B * mimic, self.beta / (self.mask_ratio * B) * generate)
        loss = terms[0] + terms[1]
        return (loss, terms) if return_terms else loss
