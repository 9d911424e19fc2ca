"""DearKD, first stage: early features of a CNN."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.losses._tokens import check_tokens, squared_error, token_grid
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

    def forward(
        self,
        students: Tensor | Sequence[Tensor],
        teachers: Tensor | Sequence[Tensor],
        *,
        grid: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
    ) -> Tensor:
        """The sum over layers of the element means.

        Args:
            students: per layer patch tokens (B, N, Ds), row-major on their grid; one tensor for one layer.
            teachers: per layer the CNN's map (B, C, h, w) of the same images. Constants.
            grid: (h, w) of the students' tokens, or one per layer; None for the grid whose shape is nearest to
                the teacher's map.

        Returns:
            Scalar, float32 (float64 if an input is).

        Raises:
            TypeError: not floating-point tensors.
            ValueError: another number of layers, shapes that do not fit or are empty, N that is no such grid, a map
                that is no square and has no grid of N tokens near it, devices that differ, a teacher that requires a
                gradient.
        """
        students, teachers = check.layers("students", students), check.layers("teachers", teachers)
        layers = len(self.aligners)
        if len(students) != layers or len(teachers) != layers:
            raise ValueError(
                f"students and teachers must have {layers} layers each, got {len(students)} and {len(teachers)}"
            )
        grids = _grids(grid, layers)
        terms = []
        for i, (aligner, s, t) in enumerate(zip(self.aligners, students, teachers, strict=True)):
            Ds, C = self.student_dims[i], self.teacher_dims[i]
            check_tokens(f"students[{i}]", s, (None, None, Ds), f"(B, N, {Ds})")
            B, N, _ = s.shape
            check_tokens(f"teachers[{i}]", t, (B, C, None, None), f"({B}, {C}, h, w)")
            check.same_device(**{f"students[{i}]": s, f"teachers[{i}]": t})
            check.constant(f"teachers[{i}]", t)
            name = f"students[{i}]"
            h, w = token_grid(name, N, grids[i] or _shaped_as(name, t.shape[2], t.shape[3], N))
            x = aligner(savable(s).to(next(aligner.parameters()).dtype)).mT.reshape(B, C, h, w)
            if t.shape[2:] != (h, w):
                x = nn.functional.interpolate(x, t.shape[2:], mode="bilinear", align_corners=False)
            else:
                x = x.contiguous()  # PyTorch's compiled gradient of mse_loss is wrong about mixed layouts
            terms.append(squared_error(x, t, "mean"))
        return torch.stack(terms).sum()


def _grids(grid: Any, layers: int) -> list[tuple[int, int] | None]:
    """Return the grid of each layer, from one for all of them or a list of grids."""
    if grid is None:
        return [None] * layers
    check.sequence("grid", grid, "two ints (h, w), or of one such pair per layer")
    if grid and all(isinstance(x, int) for x in grid):
        return [grid] * layers
    if len(grid) != layers:
        raise ValueError(f"grid must be (h, w) or a list of one per layer, got {grid!r} for {layers} layers")
    return list(grid)


def _shaped_as(name: str, h: int, w: int, N: int) -> tuple[int, int] | None:
    """Return the grid of N tokens whose shape is nearest to h x w; None, a square, for a square map.

    Raises:
        ValueError: no grid is near the map's shape, that is at most 1.5 times wider or narrower.
    """
    if h == w:
        return None
    low = [(a, N // a) for a in range(1, check.root(N) + 1) if N % a == 0]
    errors = {(a, b): abs(math.log(b * h / (a * w))) for a, b in [*low, *((b, a) for a, b in low)]}
    best = min(errors, key=errors.__getitem__)
    if errors[best] >= math.log(1.5):
        raise ValueError(
            f"{name} has {N} tokens, which form no grid of about the shape of the teacher's map, ({h}, {w}); "
            "give grid=(h, w)"
        )
    return best
