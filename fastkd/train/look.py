"""`fastkd look`: relation and attention maps of a patch in several networks, side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from timm.data import ImageDataset, create_transform
from torch import Tensor, nn

from fastkd import capture

from . import InputError
from .checkpoint import replacing
from .data import as_rgb
from .models import Layer, first_line, grid_of, pretrained_cfg, probe
from .networks import Opening, Source, network_parser, sources, split
from .options import BadValueError, Size, as_size, option, sides
from .parser import Parser
from .prepare import choose_device
from .settings import Settings

LOOK = """Draw what the losses compare: for a patch of each image, its relation to all patches and its attention.

A RUN_OR_MODEL is the folder of a run, whose teacher, student alone and student distilled are drawn side by side, a file
of weights, or a timm model. The relation is the cosine between the patch's token and every other patch's token of a
layer; the attention is the mean over the layer's heads, without class tokens, as a share of its largest value.
"""
INPUTS = {"img_size", "num_classes", "device"}


def cells(value: Any) -> tuple[tuple[int, int], ...]:
    """Return (row, column) pairs of a text such as "3,4 0,7"."""
    try:
        pairs = [part.split(",") for part in value.split()] if isinstance(value, str) else value
        return tuple((int(row), int(column)) for row, column in pairs)
    except (ValueError, TypeError) as error:
        raise BadValueError(f"needs ROW,COLUMN pairs, got {value!r}") from error


@dataclass(frozen=True, kw_only=True)
class Look(Opening):
    images: str | None = option("Folder of images.", None, metavar="FOLDER", shown="the run's validation images")
    out: str = option("Picture to write.", "look.png", metavar="FILE.png", shown="look.png")
    count: int = option("Number of images.", 3, least=1, shown="3")
    patches: tuple[tuple[int, int], ...] | None = option(
        "Patches to compare with the others, from the top left 0,0.", None, metavar="'ROW,COLUMN ...'", read=cells,
        shown="in each image the patch of most contrast",
    )  # fmt: skip
    layer: str | None = option(
        "Name or number of the layer.", None, shown="the last that the run matched, else the last"
    )


def parser() -> Parser:
    """Return the parser of `fastkd look`."""
    return network_parser("fastkd look RUN_OR_MODEL ... [OPTION ...]", LOOK, Look, INPUTS, "+")


@torch.no_grad()
def run(given: dict[str, Any]) -> None:
    """Run `fastkd look` with the options that were given."""
    names, own, given = split(given, Look, INPUTS)
    if Path(own.out).suffix != ".png" or not Path(own.out).absolute().parent.is_dir():
        raise InputError(f"--out: needs a file .png in a folder that exists, got {own.out}")
    found = [source for name in names for source in sources(name, own.model)]
    settings = [source.settings(given) for source in found]
    device = choose_device(settings[0])
    networks = [source.load(options, device) for source, options in zip(found, settings, strict=True)]
    size = found[0].size(settings[0], networks[0])
    pixels = torch.stack([_pixels(image, size) for image in pictures(own, found[0], settings[0])]).to(device)
    columns = {}
    for source, network in zip(found, networks, strict=True):
        label = source.label if source.label not in columns else f"{source.run or source.file}: {source.label}"
        columns[label] = maps(network, pixels, own.layer if own.layer is not None else matched(source))
    h, w = next(iter(columns.values()))[0].shape[1:3]
    if wrong := [(row, column) for row, column in own.patches or () if not (0 <= row < h and 0 <= column < w)]:
        raise InputError(f"--patches: {wrong[0]} is not one of the {h} x {w} patches")
    try:
        draw(Path(own.out), pixels.cpu(), columns, own.patches)
    except OSError as error:
        raise InputError(f"--out: {own.out} cannot be written: {error.strerror or error}") from error
    print(f"networks    {', '.join(f'{label} ({layer})' for label, (_, _, layer) in columns.items())}")
    print(f"picture     {own.out}")


def pictures(own: Look, source: Source, settings: Settings) -> list[Image.Image]:
    """Return images of a folder, or of the run's validation images, spread over their order."""
    part: Any
    if own.images is None:
        if source.run is None:
            raise InputError("--images: needs a folder, because the network belongs to no run")
        part = source.data(settings).val
    else:
        try:
            part = ImageDataset(own.images)
        except RuntimeError as error:
            raise InputError(f"--images: {own.images} is no folder of images") from error
    try:
        return [as_rgb(part[int((i + 0.5) * len(part) / own.count)][0]) for i in range(own.count)]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"--images: {first_line(error)}") from error


def _pixels(image: Image.Image, size: Size) -> Tensor:
    """Return the middle of an image, (3, height, width) from 0 to 1."""
    made: Tensor = create_transform((3, *sides(size)), crop_pct=1.0, interpolation="bicubic", normalize=False)(image)
    return made.float() / 255


def matched(source: Source) -> str | int:
    """Return the last layer of the network that its run has compared, else the last one."""
    pairs = [pair for stage in source.config.get("matched", []) for pair in stage]
    return pairs[-1][source.label == "teacher"] if pairs else -1


def maps(network: nn.Module, pixels: Tensor, layer: str | int) -> tuple[Tensor, Tensor | None, str]:
    """Return relations and attention, both (images, h, w, h, w) from a patch to all patches, and the layer's name.

    A network without attention maps over the whole image, such as a CNN or a Swin, has None in their place.
    """
    mean, std = (pixels.new_tensor(pretrained_cfg(network)[key]).view(3, 1, 1) for key in ("mean", "std"))
    size = as_size(tuple(pixels.shape[-2:]))
    images, layer = (pixels - mean) / std, int(layer) if str(layer).lstrip("-").isdecimal() else layer
    try:
        probe("model", network, [layer], size)
    except InputError as error:
        raise InputError(str(error).replace("--model-layers", "--layer")) from error
    with capture.tokens(network, [layer]) as captured:
        network(images)
        tokens = nn.functional.normalize(captured[0].float(), dim=2)
        name = captured.names[0]
    relations, attention = tokens @ tokens.mT, None
    count = tokens.shape[1]
    try:
        grid = grid_of(network, Layer(name, count, tokens.shape[2]), size)
    except InputError as error:
        raise InputError(f"--layer: {error}") from error
    try:
        with capture.qkv(network, [layer if name in capture.block_names(network) else -1]) as heads:
            network(images)
            q, k, scale = heads[0].q.float(), heads[0].k.float(), heads[0].scale
        if q.shape[0] == len(pixels) and q.shape[2] >= count:
            attention = (q @ k.mT * scale + (0 if heads[0].bias is None else heads[0].bias)).softmax(-1).mean(1)
            attention = attention[:, -count:, -count:].cpu().unflatten(2, grid).unflatten(1, grid)
    except (TypeError, ValueError, RuntimeError):  # qkv's refusal of what has no such maps
        pass
    return relations.cpu().unflatten(2, grid).unflatten(1, grid), attention, name


def draw(
    path: Path,
    pixels: Tensor,
    columns: dict[str, tuple[Tensor, Tensor | None, str]],
    patches: tuple[tuple[int, int], ...] | None,
) -> None:
    """Draw a row for each image and patch: the image, the relations of each network, the attention of those with one.

    Below a relation map stands its mean absolute difference from the first network's, if their grids agree.
    """
    h, w = next(iter(columns.values()))[0].shape[1:3]
    wide = pixels.shape[3] / pixels.shape[2]
    rows = [(i, patch) for i, image in enumerate(pixels) for patch in patches or [_contrast(image, (h, w))]]
    drawn = [("relation", label, relations) for label, (relations, _, _) in columns.items()]
    drawn += [("attention", label, seen) for label, (_, seen, _) in columns.items() if seen is not None]
    width, height = 1.7 * max(wide, 1), 1.7 / min(wide, 1) + 0.2
    size = (width * (1 + len(drawn)) + 0.9, height * len(rows) + 0.4)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots(len(rows), 1 + len(drawn), squeeze=False)
    style: dict[str, Any] = {"extent": (0, wide, 1, 0), "cmap": "magma", "vmin": 0, "vmax": 1}
    for (i, (row, column)), line in zip(rows, axes, strict=True):
        line[0].imshow(pixels[i].permute(1, 2, 0), extent=(0, wide, 1, 0), interpolation="nearest")
        first = drawn[0][2][i, row, column]
        for ax, (kind, _, found) in zip(line[1:], drawn, strict=True):
            y, x = int((row + 0.5) * found.shape[1] / h), int((column + 0.5) * found.shape[2] / w)
            shown = found[i, y, x]
            ax.imshow(shown if kind == "relation" else shown / shown.max(), **style)
            if kind == "relation" and ax is not line[1] and shown.shape == first.shape:
                ax.set_xlabel(f"{(shown - first).abs().mean():.2f} from {drawn[0][1]}", fontsize=8, parse_math=False)
        for ax in line:
            ax.set(xticks=[], yticks=[], xlim=(0, wide), ylim=(1, 0), aspect="equal")
            corner = column / w * wide, row / h
            ax.add_patch(Rectangle(corner, wide / w, 1 / h, fill=False, color="#19d3c5", lw=1.8))
    axes[0][0].set_title("image and\nmarked patch", fontsize=9)
    for ax, (kind, label, _) in zip(axes[0][1:], drawn, strict=True):
        ax.set_title(f"{kind}\n{label}", fontsize=9, parse_math=False)
    bar = figure.colorbar(axes[0][1].images[0], ax=axes, fraction=0.02, pad=0.01, ticks=[0, 0.5, 1])
    bar.set_label("relation: cosine to the marked patch\nattention: share of its largest value", fontsize=8)
    with replacing(path) as partial:
        figure.savefig(partial, format="png")


def _contrast(image: Tensor, grid: tuple[int, int]) -> tuple[int, int]:
    """Return the (row, column) of the patch in which the pixels differ most."""
    blocks = nn.functional.adaptive_avg_pool2d(image, grid)
    spread = nn.functional.adaptive_avg_pool2d(image.square(), grid) - blocks.square()
    return divmod(int(spread.mean(0).argmax()), grid[1])
