"""Teacher and student from timm's registry: creation, weights, matched layers; refuses what cannot work."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models import get_pretrained_cfg, load_checkpoint
from timm.utils import unwrap_model
from torch import nn

from fastkd import capture

from . import InputError

Counts = list[tuple[str, int]]  # layer, tokens
MAX_LAYERS = 8  # the first four and the last four, as Hao et al.


def create_model(
    role: str, name: str, args: dict[str, Any], *, num_classes: int, img_size: int | None, pretrained: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """The timm model and the arguments with which timm.create_model makes it again. `role` is the option's name."""
    if not timm.is_model(name.partition(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise InputError(f"--{role}: timm has no model {name!r}" + (f"; near it: {', '.join(near)}" if near else ""))
    args = {"num_classes": num_classes, **args}
    if img_size is not None and getattr(get_pretrained_cfg(name), "fixed_input_size", False):
        args.setdefault("img_size", img_size)
    try:
        return timm.create_model(name, pretrained=pretrained, **args), args
    except Exception as error:  # whatever a model's constructor or a download says
        raise InputError(f"--{role}: timm cannot make {name} with {args}: {first_line(error)}") from error


def load_weights(role: str, model: nn.Module, name: str, path: str) -> None:
    """Loads a checkpoint as timm reads it; it must fit exactly."""
    if not Path(path).is_file():
        raise InputError(f"--{role}-checkpoint: {path} is not a file")
    try:
        load_checkpoint(model, path)
    except Exception as error:  # safetensors, pickle and load_state_dict each have their own
        detail = " ".join(str(error).split())[:300]
        raise InputError(f"--{role}-checkpoint: {path} does not fit {name}: {detail}") from error


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """timm's facts about a model: input size, mean, std, classes of the pretrained head."""
    return cast(dict[str, Any], unwrap_model(model).pretrained_cfg)


def match_layers(
    student: nn.Module,
    teacher: nn.Module,
    student_layers: Sequence[str] | None,
    teacher_layers: Sequence[str] | None,
    img_size: int,
) -> tuple[list[str], list[str]]:
    """Names of the layers to match: the given ones or the default ones, tried on one blank image.

    By default, of each network's blocks (a CNN's stages) with as many tokens as blocks of the other have: the first
    four and the last four, fewer where either has fewer.

    Raises:
        InputError: an unknown layer, layers that do not pair up, or token grids that differ.
    """
    own = _token_counts("student", student, student_layers, img_size)
    theirs = _token_counts("teacher", teacher, teacher_layers, img_size)
    if student_layers is None or teacher_layers is None:
        own, theirs = _default_pairs(own, theirs, student_layers, teacher_layers)
    if len(own) != len(theirs):
        raise InputError(
            f"--student-layers and --teacher-layers must pair up, got {len(own)} and {len(theirs)}: "
            f"{_listed(own)} and {_listed(theirs)}"
        )
    for (s, n_s), (t, n_t) in zip(own, theirs, strict=True):
        if n_s != n_t:
            raise _grids_differ(f"student layer {s} has {n_s} tokens, teacher layer {t} has {n_t}", img_size)
    return [name for name, _ in own], [name for name, _ in theirs]


def _default_pairs(
    own: Counts, theirs: Counts, student_layers: Sequence[str] | None, teacher_layers: Sequence[str] | None
) -> tuple[Counts, Counts]:
    def of_grid(counts: Counts, n: int) -> Counts:
        return [(name, count) for name, count in counts if count == n]

    shared = sorted({n for _, n in own} & {n for _, n in theirs})
    if not shared:
        raise _grids_differ(f"the student has {_listed(own)}, the teacher {_listed(theirs)}")
    n = max(shared, key=lambda n: min(len(of_grid(own, n)), len(of_grid(theirs, n))))
    if student_layers is None:
        own = of_grid(own, n)
    if teacher_layers is None:
        theirs = of_grid(theirs, n)
    given = student_layers or teacher_layers
    count = len(given) if given else min(MAX_LAYERS, len(own), len(theirs))
    return (_ends(own, count) if student_layers is None else own), (
        _ends(theirs, count) if teacher_layers is None else theirs
    )


def _ends(counts: Counts, count: int) -> Counts:
    """The first and the last `count` / 2, the odd one from the end."""
    return counts if count >= len(counts) else counts[: count // 2] + counts[len(counts) - (count + 1) // 2 :]


def _token_counts(role: str, model: nn.Module, layers: Sequence[str] | None, img_size: int) -> Counts:
    """(name, number of tokens) of the layers, of all blocks for None."""
    names = capture.block_names(model) if layers is None else list(layers)
    was_training = model.training
    device = next(model.parameters()).device
    try:
        with torch.no_grad(), capture.tokens(model.eval(), names) as tokens:
            try:
                model(torch.zeros(1, 3, img_size, img_size, device=device))
            except Exception as error:  # each architecture words its own refusal
                raise InputError(f"--img-size: the {role} refuses {img_size} px: {first_line(error)}") from error
            return [(name, x.shape[1]) for name, x in zip(names, tokens, strict=True)]
    except InputError:
        raise
    except (ValueError, RuntimeError) as error:
        raise InputError(f"--{role}-layers: {first_line(error)}") from error
    finally:
        model.train(was_training)


def _listed(counts: Counts) -> str:
    return ", ".join(f"{name} ({n} tokens)" for name, n in counts)


def _grids_differ(detail: str, img_size: int | None = None) -> InputError:
    at = "" if img_size is None else f" at {img_size} px"
    return InputError(f"--teacher-layers: token grids of student and teacher must agree{at}: {detail}")


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
