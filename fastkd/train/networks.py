"""Networks by one argument, as `fastkd eval`, `look` and `export` take it: a run's folder, a file, a timm model."""

import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn

from . import InputError, settings
from .checkpoint import saved_as
from .data import Data, open_data
from .job import CONFIG, FILE_OF, saved_settings
from .models import create_model, input_size, load_weights
from .options import Size, near, option, read_size
from .parser import Parser, add_options, read_file
from .settings import FOLDER, Settings

T = TypeVar("T", bound="Opening")
RUN_GROUPS = (settings.Data, settings.Optimisation, settings.Hardware)


@dataclass(frozen=True, kw_only=True)
class Opening:
    """The option that the three commands share."""

    model: str | None = option("timm model of a file of weights that does not name it.", None, shown="the file's")


def network_parser(
    usage: str, text: str, own: type[Opening], inputs: Collection[str], nargs: str | None = None
) -> Parser:
    """Return a parser of networks, of the options of `own`, and of the run's options that are named in `inputs`."""
    parser = Parser(usage=usage, description=text)
    parser.add_argument(
        "source", metavar="RUN_OR_MODEL", nargs=nargs, help="Folder of a run, file of weights, or timm model."
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of options by name; the command line overrides it.")
    add_options(parser, own)
    shown = lambda name: f"the run's, else {getattr(FOLDER, name)}"  # noqa: E731
    add_options(parser, *RUN_GROUPS, shown=shown, only=inputs)
    return parser


def split(given: dict[str, Any], own: type[T], inputs: Collection[str]) -> tuple[Any, T, dict[str, Any]]:
    """Return what to open, the command's own options, and the options of a run, those of --config included.

    Raises:
        InputError: the file cannot be read, or has an option that the command has not.
    """
    names = {item.name for item in dataclasses.fields(cast(Any, own))}
    given = dict(given)
    if (file := given.pop("config", None)) is not None:
        given = read_file(file, own, *RUN_GROUPS, only={*names, *inputs}) | given
    rest = {key: value for key, value in given.items() if key not in names and key != "source"}
    return given["source"], own(**{key: value for key, value in given.items() if key in names}), rest


class Source(NamedTuple):
    """A network that has not been built yet."""

    label: str
    model: str
    args: dict[str, Any]
    file: Path | None  # None: timm's pretrained weights
    run: Path | None  # folder of the run that it belongs to

    @property
    def config(self) -> dict[str, Any]:
        """Return the values that its run has derived, such as classes and matched layers; {} without a run."""
        return {} if self.run is None else json.loads((self.run / "config.json").read_text(encoding="utf-8"))

    def settings(self, given: dict[str, Any]) -> Settings:
        """Return its run's settings, or those of a folder, updated by the given ones; data of one's own comes alone."""
        if self.run is None:
            return dataclasses.replace(FOLDER, **given)
        before = saved_settings(str(self.run), "RUN_OR_MODEL")
        if self.label != "teacher":  # validation has the batches of the first stage
            before = dataclasses.replace(before, batch_size=cast(int, settings.stages(before)[0].batch_size))
        if "data" in given:
            before = dataclasses.replace(before, data_root=None, num_classes=None, val_split=FOLDER.val_split)
        return dataclasses.replace(before, **given)

    def data(self, options: Settings, whole: bool = False) -> Data:
        """Return the data whose validation images are meant; `whole`: all images of a folder without val/.

        Raises:
            InputError: the classes are not the run's.
        """
        splits = options.val_split, options.val_split
        more: dict[str, Any] = {"root": options.data_root, "splits": splits, "num_classes": options.num_classes}
        more["class_map"] = options.class_map
        data = open_data(options.data, None if whole else options.val_fraction, **more)
        classes = self.config.get("classes", data.classes)
        if classes != data.classes:
            differing = sorted({*classes} ^ {*data.classes})[:10] or "their order"
            raise InputError(f"--data: the classes of {options.data} are not the run's: {differing}")
        return data

    def size(self, options: Settings, network: nn.Module) -> Size:
        """Return the size of the images in pixels."""
        return self.given_size(options) or input_size(network)

    def given_size(self, options: Settings) -> Size | None:
        """Return the size that the options or the run have."""
        return options.img_size or read_size(self.config.get("img_size"))

    def load(self, options: Settings, device: torch.device | None = None) -> nn.Module:
        """Return the network with its weights, frozen and in eval mode.

        Raises:
            InputError: timm cannot make it, or the weights do not fit.
        """
        own = getattr(get_pretrained_cfg(self.model, allow_unregistered=True), "num_classes", None)
        classes = self.args.get("num_classes") or options.num_classes or own or 1000
        size: dict[str, Any] = {"num_classes": classes, "img_size": self.given_size(options)}
        try:
            network, _ = create_model("model", self.model, self.args, pretrained=self.file is None, **size)
            if self.file is not None:
                load_weights("model", network, self.model, str(self.file))
        except InputError as error:
            raise InputError(f"{self.file or self.label}: {str(error).partition(': ')[2]}") from error
        if options.channels_last:
            network = network.to(memory_format=torch.channels_last)
        return network.to(device).eval().requires_grad_(False)


def sources(name: str, model: str | None = None) -> list[Source]:
    """Return the networks of a run (teacher, student alone, student distilled), or that of a file or of timm.

    Args:
        model: timm model of a file that does not name it.

    Raises:
        InputError: no such thing, or a run without weights.
    """
    path = Path(name)
    if path.is_file():
        named, args = saved_as(path) or (None, {})
        if model is None and named is None:
            raise InputError(f"{name}: the file does not name its timm model; give --model")
        run = path.parent if (path.parent / CONFIG).is_file() else None
        return [Source(path.stem, str(model or named), args if model in (None, named) else {}, path, run)]
    if path.is_dir():
        return _of_run(path)
    if ":" not in name and not timm.is_model(name.partition(".")[0]):
        raise InputError(f"{name} is no run, no file and no timm model{near(name, timm.list_models())}")
    return [Source(name, name, {}, None, None)]


def _of_run(run: Path) -> list[Source]:
    options = saved_settings(str(run), "RUN_OR_MODEL")
    files = {label: run / f"{stem}.safetensors" for label, stem in FILE_OF.items()}
    found = [Source(label, *(saved_as(file) or ("", {})), file, run) for label, file in files.items() if file.is_file()]
    if not found:
        raise InputError(f"{run} holds no weights yet")
    if found[0].label != "teacher" and (options.teacher_checkpoint or options.teacher_pretrained):
        given = None if options.teacher_checkpoint is None else Path(options.teacher_checkpoint)
        args = json.loads((run / "config.json").read_text(encoding="utf-8"))["teacher_args"]
        found.insert(0, Source("teacher", str(options.teacher), args, given, run))
    return found
