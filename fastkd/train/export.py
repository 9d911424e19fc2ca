"""`fastkd export`: a network as ONNX, as a torch.export program, or as a folder in timm's Hugging Face layout."""

import shutil
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from . import InputError
from .checkpoint import replacing
from .models import first_line, pretrained_cfg
from .networks import Opening, Source, network_parser, sources, split
from .options import option, sides
from .parser import Parser

EXPORT = """Write a network in formats that other programs load; each is loaded again and compared on a batch.

RUN_OR_MODEL is the folder of a run (its student), a file of weights or a timm model with its pretrained weights. Inputs
are normalised images (batch, 3, side, side) with any batch size; outputs are logits.
"""


INPUTS = {"img_size", "num_classes"}


@dataclass(frozen=True, kw_only=True)
class Export(Opening):
    onnx: str | None = option("ONNX file, compared in onnxruntime.", None, metavar="FILE", shown="none")
    torch_export: str | None = option("File of torch.export.", None, metavar="FILE.pt2", shown="none")
    hf: str | None = option("Folder for timm.create_model('local-dir:FOLDER').", None, metavar="FOLDER", shown="none")
    overwrite: bool = option("Replace files that exist.", False, shown="no")


def parser() -> Parser:
    """Return the parser of `fastkd export`."""
    return network_parser("fastkd export RUN_OR_MODEL [OPTION ...]", EXPORT, Export, INPUTS)


@torch.no_grad()
def run(given: dict[str, Any]) -> None:
    """Run `fastkd export` with the options that were given."""
    name, own, given = split(given, Export, INPUTS)
    wanted = {flag: Path(value) for flag in ("onnx", "torch_export", "hf") if (value := getattr(own, flag)) is not None}
    if not wanted:
        raise InputError("--onnx, --torch-export, --hf: give one at least")
    for flag, path in wanted.items():
        if path.exists() and (not own.overwrite or path.is_dir() != (flag == "hf")):
            raise InputError(f"--{flag.replace('_', '-')}: {path} exists; name another, or give --overwrite")
        if not path.absolute().parent.is_dir():
            raise InputError(f"--{flag.replace('_', '-')}: the folder {path.parent} does not exist")
    missing = [package for package in ("onnx", "onnxscript", "onnxruntime") if find_spec(package) is None]
    if own.onnx is not None and missing:
        raise InputError(f"--onnx: {missing[0]} is missing; install it with: pip install 'fastkd[export]'")
    source = sources(name, own.model)[-1]
    settings = source.settings(given)
    network = source.load(settings)
    size, cfg = source.size(settings, network), pretrained_cfg(network)
    images = torch.randn(3, 3, *sides(size), generator=torch.Generator().manual_seed(0))
    print(f"network       {source.model}{f' from {source.file}' if source.file else ''}")
    height, width = sides(size)
    print(f"input         (batch, 3, {height}, {width}), normalised by mean {cfg['mean']}, std {cfg['std']}")
    writers = {"onnx": _onnx, "torch_export": _program, "hf": _folder}
    for flag, path in wanted.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = writers[flag](network, images, path, source)
        except OSError as error:
            raise InputError(f"--{flag.replace('_', '-')}: {path} cannot be written: {error.strerror}") from error
        except Exception as error:  # exporters raise any error for a network that they cannot trace
            raise InputError(f"--{flag.replace('_', '-')}: {source.model}: {first_line(error)}") from error
        print(f"{flag.replace('_', '-'):<13} {path}, off by {found:.1e} of the largest logit")


def _program(network: nn.Module, images: Tensor, path: Path, _: Source) -> float:
    with replacing(path) as partial, partial.open("w+b") as file:
        torch.export.save(_traced(network, images), file)
        file.seek(0)
        return _compare(torch.export.load(file).module()(images), network(images))


def _onnx(network: nn.Module, images: Tensor, path: Path, _: Source) -> float:
    import onnxruntime

    with replacing(path) as partial:
        names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
        torch.onnx.export(_traced(network, images), f=partial, external_data=False, verbose=False, **names)
        session = onnxruntime.InferenceSession(partial, providers=["CPUExecutionProvider"])
        return _compare(torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), network(images))


def _folder(network: nn.Module, images: Tensor, path: Path, source: Source) -> float:
    classes = source.config.get("classes")
    config = {"label_names": classes} if classes else None
    partial = path.with_name(f".{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_for_hf(network, str(partial), config, source.args, safe_serialization=True)
        found = _compare(timm.create_model(f"local-dir:{partial}", pretrained=True).eval()(images), network(images))
        shutil.rmtree(path, ignore_errors=True)
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return found


def _traced(network: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """Return the program of the network for batches of any size, traced with two of the images."""
    return torch.export.export(network, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _compare(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest logit.

    Raises:
        ValueError: it is more than rounding explains.
    """
    off = float((found - expected).abs().max() / expected.abs().max())
    if not off < 1e-3:
        raise ValueError(f"the written network's logits are off by {off:.1e} of the largest")
    return off
