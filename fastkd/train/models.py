"""Teacher and student from timm's registry: creation, weights and matched layers, with checks of all of them."""

import copy
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
from timm.models import get_pretrained_cfg, load_checkpoint
from timm.utils import unwrap_model
from torch import nn

from fastkd import capture

from . import (
    InputError,
    mhca,  # noqa: F401  timm then knows its models
)

MAX_LAYERS = 8  # the first four and the last four, as in Hao et al.


class Layer(NamedTuple):
    """Number and width of a layer's output tokens, without class tokens."""

    name: str
    tokens: int
    width: int


def create_model(
    role: str, name: str, args: dict[str, Any], *, num_classes: int, img_size: int | None, pretrained: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the timm model and the arguments that recreate it. `role` is the name of the option."""
    if not timm.is_model(name.partition(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise InputError(f"--{role}: timm has no model {name!r}" + (f"; near it: {', '.join(near)}" if near else ""))
    if role == "student" and args.get("num_classes", num_classes) != num_classes:
        raise InputError(f"--student-arg: num_classes must be {num_classes}, got {args['num_classes']!r}")
    args = {"num_classes": num_classes, **args}
    if img_size is not None and getattr(get_pretrained_cfg(name), "fixed_input_size", False):
        args.setdefault("img_size", img_size)
    try:
        return timm.create_model(name, pretrained=pretrained, **args), args
    except Exception as error:  # constructors and downloads raise any error
        raise InputError(f"--{role}: timm cannot make {name} with {args}: {first_line(error)}") from error


def load_weights(role: str, model: nn.Module, name: str, path: str) -> None:
    """Load a checkpoint in any format that timm reads; it must fit exactly."""
    if not Path(path).is_file():
        raise InputError(f"--{role}-checkpoint: {path} is not a file")
    try:
        load_checkpoint(model, path)
    except Exception as error:  # safetensors, pickle and load_state_dict each have their own
        detail = " ".join(str(error).split())[:300]
        raise InputError(f"--{role}-checkpoint: {path} does not fit {name}: {detail}") from error


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """Return timm's configuration of a model: input size, mean, std, classes of the pretrained head."""
    return cast(dict[str, Any], unwrap_model(model).pretrained_cfg)


def input_size(model: nn.Module) -> int:
    """Return the model's input side in pixels: that of its patch embedding, else that of its pretrained weights.

    Raises:
        InputError: the model has neither.
    """
    size = getattr(getattr(unwrap_model(model), "patch_embed", None), "img_size", None)
    if size is not None:
        return int(size[0])
    if not hasattr(unwrap_model(model), "pretrained_cfg"):
        raise InputError(f"--img-size: {type(model).__name__} does not tell the size of its images; give it")
    return int(pretrained_cfg(model)["input_size"][-1])


def check_one_image(role: str, model: nn.Module, img_size: int) -> None:
    """Check that the model can be trained on batches of one image; a batch norm needs a variance within each channel.

    Raises:
        InputError: the model cannot be trained on batches of one image.
    """
    first = next(model.parameters())
    try:
        with torch.no_grad():
            copy.deepcopy(model).train()(torch.zeros(1, 3, img_size, img_size, device=first.device, dtype=first.dtype))
    except ValueError as error:
        reason = first_line(error)
        raise InputError(f"--batch-size: the {role} cannot be trained on 1 image at a time: {reason}") from error


def match_layers(
    student: nn.Module,
    teacher: nn.Module,
    student_layers: Sequence[int | str] | None,
    teacher_layers: Sequence[int | str] | None,
    img_size: int,
    *,
    interpolate: bool = False,
) -> tuple[list[str], list[str]]:
    """Return the names of the layers to match, given or default, after a pass of one blank image.

    The default layers are the first four and the last four (fewer if either network has fewer) of the blocks, or stages
    of a CNN, that have as many tokens as blocks of the other network. With `interpolate`, grids may differ; if no block
    has as many tokens as one of the other network, all blocks are considered.

    Raises:
        InputError: an unknown layer, layers that do not pair up, or token grids that differ.
    """
    own = layers_of("student", student, student_layers, img_size)
    theirs = layers_of("teacher", teacher, teacher_layers, img_size)
    if student_layers is None or teacher_layers is None:
        own, theirs = _default_pairs(own, theirs, student_layers, teacher_layers, interpolate)
    check_pairs(own, theirs)
    if not interpolate:
        check_grids(own, theirs, img_size)
    return [layer.name for layer in own], [layer.name for layer in theirs]


def check_pairs(own: Sequence[Layer], theirs: Sequence[Layer]) -> None:
    if len(own) != len(theirs):
        raise InputError(
            f"--student-layers and --teacher-layers must pair up, got {len(own)} and {len(theirs)}: "
            f"{_listed(own)} and {_listed(theirs)}"
        )


def check_grids(own: Sequence[Layer], theirs: Sequence[Layer], img_size: int) -> None:
    for s, t in zip(own, theirs, strict=True):
        if s.tokens != t.tokens:
            detail = f"student layer {s.name} has {s.tokens} tokens, teacher layer {t.name} has {t.tokens}"
            raise _grids_differ(detail, img_size)


def layers_of(role: str, model: nn.Module, names: Sequence[int | str] | None, img_size: int) -> list[Layer]:
    """Return the named layers, or all blocks for None, with their shapes for one blank image."""
    captured = probe(role, model, capture.block_names(model) if names is None else names, img_size)
    return [Layer(name, x.shape[1], x.shape[2]) for name, x in captured]


def probe(
    role: str,
    model: nn.Module,
    names: Sequence[int | str],
    img_size: int,
    watch: Callable[[nn.Module, Sequence[int | str]], Any] = capture.tokens,
) -> list[tuple[str, Any]]:
    """Return (name, value captured by `watch`) of each layer for one blank image.

    Raises:
        InputError: an unknown layer, one that cannot be captured, or an image size that the model rejects.
    """
    modes = {module: module.training for module in model.modules()}
    first = next(model.parameters())
    try:
        with torch.no_grad(), watch(model.eval(), names) as captured:
            try:
                model(torch.zeros(1, 3, img_size, img_size, device=first.device, dtype=first.dtype))
            except Exception as error:  # the error differs between architectures
                raise InputError(f"--img-size: the {role} refuses {img_size} px: {first_line(error)}") from error
            return list(zip(captured.names, captured, strict=True))
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"--{role}-layers: {first_line(error)}") from error
    finally:
        for module, training in modes.items():
            module.training = training


def alike(own: list[Layer], theirs: list[Layer], interpolate: bool) -> tuple[list[Layer], list[Layer]]:
    """Return the layers of both networks that have the same token grid.

    If several grids match, the one shared by most layers is used, and the coarsest of those. With `interpolate` and no
    common grid, all layers are returned.

    Raises:
        InputError: there is no common grid, and not `interpolate`.
    """
    shared = {layer.tokens for layer in own} & {layer.tokens for layer in theirs}
    if not shared:
        if interpolate:
            return own, theirs
        raise _grids_differ(f"the student has {_listed(own)}, the teacher {_listed(theirs)}")

    def of_grid(layers: list[Layer], n: int) -> list[Layer]:
        return [layer for layer in layers if layer.tokens == n]

    best = max(sorted(shared), key=lambda n: min(len(of_grid(own, n)), len(of_grid(theirs, n))))
    return of_grid(own, best), of_grid(theirs, best)


def _default_pairs(
    own: list[Layer],
    theirs: list[Layer],
    student_layers: Sequence[int | str] | None,
    teacher_layers: Sequence[int | str] | None,
    interpolate: bool,
) -> tuple[list[Layer], list[Layer]]:
    own_alike, theirs_alike = alike(own, theirs, interpolate)
    given = student_layers or teacher_layers
    count = len(given) if given else min(MAX_LAYERS, len(own_alike), len(theirs_alike))
    return (
        _ends(own_alike, count) if student_layers is None else own,
        _ends(theirs_alike, count) if teacher_layers is None else theirs,
    )


def _ends(layers: list[Layer], count: int) -> list[Layer]:
    """Return the first and the last `count` / 2 layers; an odd one is taken from the end."""
    return layers if count >= len(layers) else layers[: count // 2] + layers[len(layers) - (count + 1) // 2 :]


def _listed(layers: Sequence[Layer]) -> str:
    return ", ".join(f"{layer.name} ({layer.tokens} tokens)" for layer in layers)


def _grids_differ(detail: str, img_size: int | None = None) -> InputError:
    at = "" if img_size is None else f" at {img_size} px"
    return InputError(
        f"--teacher-layers: token grids of student and teacher must agree{at}: {detail}; name layers that agree, take "
        "an image size at which they do, or resize the teacher's (interpolate=True of the tasks manifold and vitkd, "
        "fastkd.functional.resize_tokens)"
    )


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
