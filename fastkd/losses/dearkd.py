"""DearKD, first stage: early features of a CNN."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastkd.losses._tokens import check_tokens, grid_side, squared_error
from fastkd.ops import _checks as check
from fastkd.ops._autograd import savable


class EarlyDistillationLoss(nn.Module):
    """First stage of DearKD (Chen et al. 2022, arXiv:2204.12997): early transformer tokens imitate early CNN maps.

        L = Σ_l mean( (A_l(s_l) - t_l)² ),  A_l: LayerNorm, GELU, Linear (Ds -> C), bilinear resize of the token grid

    Our reading: no code was released, and the aligner's make-up and the layers' weights are not established.

    Args:
        student_dims: per layer the width Ds of the student's tokens; one int for one layer.
        teacher_dims: per layer the channels C of the teacher's map.

    Raises:
        TypeError: widths that are not ints.
        ValueError: no layer, lists of unequal length, a width < 1.
    """

    def __init__(self, student_dims: int | Sequence[int], teacher_dims: int | Sequence[int]) -> None:
        super().__init__()
        dims = {"student_dims": student_dims, "teacher_dims": teacher_dims}
        for name, widths in dims.items():
            if not isinstance(widths, int):
                check.sequence(name, widths, "ints, one per layer, or an int")
        self.student_dims, self.teacher_dims = ([x] if isinstance(x, int) else list(x) for x in dims.values())
        if len(self.student_dims) != len(self.teacher_dims) or not self.student_dims:
            raise ValueError(
                "student_dims and teacher_dims must match layer by layer, "
                f"got {len(self.student_dims)} and {len(self.teacher_dims)} layers"
            )
        for i, (Ds, C) in enumerate(zip(self.student_dims, self.teacher_dims, strict=True)):
            check.positive_int(f"student_dims[{i}]", Ds)
            check.positive_int(f"teacher_dims[{i}]", C)
        self.aligners = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(Ds), nn.GELU(), nn.Linear(Ds, C))
            for Ds, C in zip(self.student_dims, self.teacher_dims, strict=True)
        )

    def forward(self, students: Tensor | Sequence[Tensor], teachers: Tensor | Sequence[Tensor]) -> Tensor:
        """The sum over layers of the element means.

        Args:
            students: per layer patch tokens (B, N, Ds), row-major on a square grid; one tensor for one layer.
            teachers: per layer the CNN's map (B, C, h, w) of the same images. Constants.

        Returns:
            Scalar, float32 (float64 if an input is).

        Raises:
            TypeError: not floating-point tensors.
            ValueError: another number of layers, shapes that do not fit or are empty, N that is no square, devices that
                differ, a teacher that requires a gradient.
        """
        students, teachers = check.layers("students", students), check.layers("teachers", teachers)
        layers = len(self.aligners)
        if len(students) != layers or len(teachers) != layers:
            raise ValueError(
                f"students and teachers must have {layers} layers each, got {len(students)} and {len(teachers)}"
            )
        terms = []
        for i, (aligner, s, t) in enumerate(zip(self.aligners, students, teachers, strict=True)):
            Ds, C = self.student_dims[i], self.teacher_dims[i]
            check_tokens(f"students[{i}]", s, (None, None, Ds), f"(B, N, {Ds})")
            B, N, _ = s.shape
            check_tokens(f"teachers[{i}]", t, (B, C, None, None), f"({B}, {C}, h, w)")
            check.same_device(**{f"students[{i}]": s, f"teachers[{i}]": t})
            check.constant(f"teachers[{i}]", t)
            side = grid_side(f"students[{i}]", N)
            x = aligner(savable(s).to(next(aligner.parameters()).dtype)).mT.reshape(B, C, side, side)
            if t.shape[2:] != (side, side):
                x = nn.functional.interpolate(x, t.shape[2:], mode="bilinear", align_corners=False)
            terms.append(squared_error(x, t, "mean"))
        return torch.stack(terms).sum()
