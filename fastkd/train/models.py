"""Teacher and student from timm's registry: creation, weights and matched layers, with checks of all of them."""

import copy
import difflib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
from timm.models import get_pretrained_cfg, load_model_config_from_hf, parse_model_name
from timm.utils import unwrap_model
from torch import nn

from fastkd import capture

from . import (
    InputError,
    mhca,  # noqa: F401  timm then knows its models
)
from .options import Size, as_size, pixels, sides
from .weights import TransformersTeacher, use_cache_offline
from .weights import load_weights as load_weights

MAX_LAYERS = 8  # the first four and the last four, as in Hao et al.


class Layer(NamedTuple):
    """Number and width of a layer's output tokens, without class tokens."""

    name: str
    tokens: int
    width: int


def grid_of(model: nn.Module, layer: Layer, img_size: Size) -> tuple[int, int]:
    """Return (h, w) of a layer's tokens: the model's patches, or a stride that is the same in both directions.

    Raises:
        InputError: the tokens are no such grid of the image.
    """
    height, width = sides(img_size)
    patches: Any = getattr(getattr(unwrap_model(model), "patch_embed", None), "dynamic_feat_size", None)
    side = math.isqrt(layer.tokens)
    candidates = [patches((height, width))] if patches is not None else []
    candidates += [(side, side)] if height == width else []
    for stride in range(1, max(height, width) + 1) if height != width else ():
        candidates += [(height // stride, width // stride), (-(-height // stride), -(-width // stride))]
    for h, w in candidates:
        if h * w == layer.tokens:
            return h, w
    wanted = "a square grid of tokens" if height == width else f"a grid of tokens on {height} x {width} px"
    raise InputError(f"{layer.name} needs {wanted}, got {layer.tokens} tokens")


def create_model(
    role: str, name: str, args: dict[str, Any], *, num_classes: int, img_size: Size | None, pretrained: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the timm model and the arguments that recreate it. `role` is the name of the option.

    `hf-hub:OWNER/NAME` and `local-dir:FOLDER` name timm models too; a teacher's folder may hold a transformers model.
    """
    for key in args.keys() & {"checkpoint_path", "pretrained"}:
        raise InputError(f"--{role}-arg: {key} is an option of its own, --{role}-{key.partition('_')[0]}")
    if role == "student" and args.get("num_classes", num_classes) != num_classes:
        raise InputError(f"--student-arg: num_classes must be {num_classes}, got {args['num_classes']!r}")
    online = True
    try:
        source, place = parse_model_name(name)
        config: dict[str, Any] = {"architecture": place}
        if source == "local-dir":
            config = json.loads((Path(place) / "config.json").read_text(encoding="utf-8"))
        elif source is None and not timm.is_model(place.partition(".")[0]):
            near = difflib.get_close_matches(name, timm.list_models(), n=3)
            raise InputError(f"timm has no model {name!r}" + (f"; near it: {', '.join(near)}" if near else ""))
        elif pretrained or source == "hf-hub":
            online = use_cache_offline()
            config = config if source is None else {"architecture": load_model_config_from_hf(place)[1]}
        if "model_type" in config:
            if role != "teacher" or not pretrained or args:
                raise InputError(f"{name} holds a transformers model, which can only be a teacher --teacher-pretrained")
            teacher = TransformersTeacher(place)
            return teacher, {"num_classes": teacher.num_classes}
        args = {"num_classes": num_classes, **args}
        if img_size is not None and getattr(get_pretrained_cfg(config["architecture"]), "fixed_input_size", False):
            args.setdefault("img_size", img_size)
        return timm.create_model(name, pretrained=pretrained, **args), args
    except InputError as error:
        raise InputError(f"--{role}: {error}") from error
    except Exception as error:  # constructors and downloads raise any error
        reason = first_line(error)
        if not online:
            reason = (
                f"its weights are not in the cache, and the hub cannot be reached; or give --{role}-checkpoint FILE"
            )
        raise InputError(f"--{role}: timm cannot make {name} with {args}: {reason}") from error


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """Return timm's configuration of a model: input size, mean, std, classes of the pretrained head."""
    return cast(dict[str, Any], unwrap_model(model).pretrained_cfg)


def input_size(model: nn.Module) -> Size:
    """Return the model's input size in pixels: that of its patch embedding, else that of its pretrained weights.

    Raises:
        InputError: the model has neither.
    """
    size = getattr(getattr(unwrap_model(model), "patch_embed", None), "img_size", None)
    if size is not None:
        return as_size(tuple(size))
    if not hasattr(unwrap_model(model), "pretrained_cfg"):
        raise InputError(f"--img-size: {type(model).__name__} does not tell the size of its images; give it")
    return as_size(pretrained_cfg(model)["input_size"][1:])


def copy_at(model: nn.Module, img_size: Size) -> nn.Module:
    """Return a copy of the model for images of another size, with timm's resized position embeddings."""
    copied: Any = copy.deepcopy(model)
    if hasattr(copied, "set_input_size"):
        copied.set_input_size(img_size=sides(img_size))
    return cast(nn.Module, copied)


def uncovered(model: nn.Module | None, img_size: Size) -> str | None:
    """Return what the patches of a transformer leave out of the image, if anything."""
    embed: Any = getattr(unwrap_model(model), "patch_embed", None) if model is not None else None
    patch = getattr(embed, "patch_size", None)
    if patch is None or getattr(embed, "dynamic_img_pad", False):
        return None
    seen = [side // p * p for side, p in zip(sides(img_size), patch, strict=True)]
    if tuple(seen) == sides(img_size):
        return None
    return f"{seen[0]} x {seen[1]} of {pixels(img_size)} px are seen by the patches of {patch[0]} x {patch[1]} px"


def check_one_image(role: str, model: nn.Module, img_size: Size) -> None:
    """Check that the model can be trained on batches of one image; a batch norm needs a variance within each channel.

    Raises:
        InputError: the model cannot be trained on batches of one image.
    """
    first = next(model.parameters())
    try:
        with torch.no_grad():
            copy.deepcopy(model).train()(torch.zeros(1, 3, *sides(img_size), device=first.device, dtype=first.dtype))
    except ValueError as error:
        reason = first_line(error)
        raise InputError(f"--batch-size: the {role} cannot be trained on 1 image at a time: {reason}") from error


def match_layers(
    student: nn.Module,
    teacher: nn.Module,
    student_layers: Sequence[int | str] | None,
    teacher_layers: Sequence[int | str] | None,
    img_size: Size,
    *,
    interpolate: bool = False,
) -> tuple[list[Layer], list[Layer]]:
    """Return the layers to match, given or default, after a pass of one blank image.

    The default layers are the first four and the last four (fewer if either network has fewer) of the blocks, or stages
    of a CNN, that have as many tokens as blocks of the other network. With `interpolate`, grids may differ; if no block
    has as many tokens as one of the other network, those of the nearest grids are considered.

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
    return own, theirs


def check_pairs(own: Sequence[Layer], theirs: Sequence[Layer]) -> None:
    if len(own) != len(theirs):
        raise InputError(
            f"--student-layers and --teacher-layers must pair up, got {len(own)} and {len(theirs)}: "
            f"{_listed(own)} and {_listed(theirs)}"
        )


def check_grids(own: Sequence[Layer], theirs: Sequence[Layer], img_size: Size) -> None:
    for s, t in zip(own, theirs, strict=True):
        if s.tokens != t.tokens:
            detail = f"student layer {s.name} has {s.tokens} tokens, teacher layer {t.name} has {t.tokens}"
            raise _grids_differ(detail, img_size)


def layers_of(role: str, model: nn.Module, names: Sequence[int | str] | None, img_size: Size) -> list[Layer]:
    """Return the named layers, or all blocks for None, with their shapes for one blank image."""
    captured = probe(role, model, capture.block_names(model) if names is None else names, img_size)
    return [Layer(name, x.shape[1], x.shape[2]) for name, x in captured]


def probe(
    role: str,
    model: nn.Module,
    names: Sequence[int | str],
    img_size: Size,
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
                model(torch.zeros(1, 3, *sides(img_size), device=first.device, dtype=first.dtype))
            except Exception as error:  # the error differs between architectures
                raise InputError(
                    f"--img-size: the {role} refuses {pixels(img_size)} px: {first_line(error)}"
                ) from error
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
    common grid, the student's layers of the grid nearest to one of the teacher's, and the teacher's of that grid.

    Raises:
        InputError: there is no common grid, and not `interpolate`.
    """

    def of_grid(layers: list[Layer], n: int) -> list[Layer]:
        return [layer for layer in layers if layer.tokens == n]

    shared = {layer.tokens for layer in own} & {layer.tokens for layer in theirs}
    if not shared:
        if interpolate:
            pairs = [(one.tokens, other.tokens) for one in own for other in theirs]
            s, t = min(pairs, key=lambda pair: (abs(math.log(pair[0] / pair[1])), pair))
            return of_grid(own, s), of_grid(theirs, t)
        raise _grids_differ(f"the student has {_listed(own)}, the teacher {_listed(theirs)}")

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


def _grids_differ(detail: str, img_size: Size | None = None) -> InputError:
    at = "" if img_size is None else f" at {pixels(img_size)} px"
    return InputError(
        f"--teacher-layers: token grids of student and teacher must agree{at}: {detail}; name layers that agree, take "
        "an image size at which they do, or resize the teacher's (--task-arg interpolate=True of manifold and vitkd; "
        "fastkd.functional.resize_tokens)"
    )


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
