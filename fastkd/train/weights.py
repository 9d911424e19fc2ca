"""Weights as people have them: checkpoints of several frameworks, folders of transformers models, hubs out of reach."""

import inspect
import json
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from timm.models import load_checkpoint, load_state_dict
from timm.utils import unwrap_model
from torch import Tensor, nn

from . import InputError, tell

Tensors = dict[str, Tensor]
RECIPE = (
    "holds pickled objects, and loading those would run code of the file; where you trust it, make weights of it: "
    'python -c "import torch, safetensors.torch as s; s.save_model(torch.load(%r, weights_only=False), %r)"'
)


def load_weights(role: str, model: nn.Module, name: str, path: str, *, new_head: bool = False) -> None:
    """Load a checkpoint in any format that timm reads; it must fit exactly, below whatever prefix its names have.

    Weights that fit only after timm's own conversion for the architecture, such as other position embeddings, are
    converted. With `new_head`, a head with other classes, or none, leaves the model's new one.

    Raises:
        InputError: no such file, or weights of another network.
    """
    option = f"--{role}-checkpoint"
    if not Path(path).is_file():
        raise InputError(f"{option}: {path} is not a file")
    try:
        if Path(path).suffix in (".npz", ".npy"):
            load_checkpoint(model, path, weights_only=True)
        else:
            _load(option, model, load_state_dict(path, weights_only=True), new_head)
    except InputError:
        raise
    except Exception as error:  # safetensors, pickle and load_state_dict each have their own
        detail = " ".join(str(error).split())
        if "weights_only" in detail:
            raise InputError(f"{option}: {path} {RECIPE % (path, Path(path).stem + '.safetensors')}") from error
        raise InputError(f"{option}: {path} does not fit {name}: {detail[:300]}") from error


def _load(option: str, model: nn.Module, tensors: Tensors, new_head: bool) -> None:
    own = model.state_dict()
    tensors = _below_prefix(option, tensors, own)
    convert: Any = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None and not _fits(tensors, own):
        with suppress(Exception):  # conversions raise any error for weights that they are not for
            converted = convert(dict(tensors), model)
            tensors = converted if _fits(converted, own, missing=_head(model)) else tensors
    without = {key: x for key, x in tensors.items() if key not in _head(model)}
    if new_head and not _fits(tensors, own) and _fits(without, own, missing=_head(model)):
        tell(f"{option}: the head is new, with {cast(Any, model).num_classes} classes")
        tensors = {**own, **without}
    if any(".embeddings." in f".{key}" for key in tensors):
        raise InputError(
            f"{option}: has the names of a transformers model; give its folder, --teacher local-dir:FOLDER"
        )
    missing = own.keys() - tensors.keys()
    if missing and missing <= _head(model):
        raise InputError(f"{option}: has no head ({', '.join(sorted(missing))}); load it by num_classes=0 of the model")
    model.load_state_dict(tensors)


def _below_prefix(option: str, tensors: Tensors, own: Tensors) -> Tensors:
    """Return the weights below the prefix under which they have the names of most of the model's."""
    found: Counter[str] = Counter()
    for key in tensors:
        parts = key.split(".")
        start = next((i for i in range(len(parts)) if ".".join(parts[i:]) in own), None)
        if start is not None:
            found["".join(f"{part}." for part in parts[:start])] += 1
    ranked = [(prefix, count) for prefix, count in found.most_common(2) if 2 * count > len(own)]
    if len(ranked) == 2 and ranked[0][1] == ranked[1][1]:
        raise InputError(f"{option}: holds several networks, below {ranked[0][0]!r} and {ranked[1][0]!r}; save one")
    prefix = ranked[0][0] if ranked else ""
    if rest := [key for key in tensors if not key.startswith(prefix)]:
        tell(f"{option}: took the weights below {prefix!r}, left out {len(rest)}, such as {rest[0]}")
    return {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}


def _fits(tensors: Tensors, own: Tensors, missing: frozenset[str] = frozenset()) -> bool:
    alike = all(key in own and x.shape == own[key].shape for key, x in tensors.items() if key not in missing)
    return alike and own.keys() - tensors.keys() <= missing


def _head(model: nn.Module) -> frozenset[str]:
    """Return the names of the classifier's weights."""
    layers = getattr(unwrap_model(model), "pretrained_cfg", {}).get("classifier") or ()
    layers = (layers,) if isinstance(layers, str) else layers
    return frozenset(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))


def use_cache_offline() -> bool:
    """Let the hub read its cache alone if it cannot be reached in 3 seconds; it would retry for the most of a minute.

    Returns:
        Whether the hub can be reached.
    """
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=3)
    except Exception:  # of whatever library carries the request
        constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE


class TransformersTeacher(nn.Module):
    """A vision model of transformers (ViT, DINOv2, DINOv3, SigLIP, ...) from a folder, (B, 3, H, W) -> logits.

    A model without a classifier has num_classes 0 and returns its pooled features.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

        config = AutoConfig.from_pretrained(folder)
        self.classifies = any("ForImageClassification" in name for name in config.architectures or ())
        kind: Any = AutoModelForImageClassification if self.classifies else AutoModel
        network = kind.from_pretrained(folder)
        self.network = network if self.classifies else getattr(network, "vision_model", network)
        self.num_classes = config.num_labels if self.classifies else 0
        accepted = inspect.signature(self.network.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}
        file = Path(folder) / "preprocessor_config.json"
        images = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        size = getattr(config, "vision_config", config).image_size
        self.pretrained_cfg = {
            "input_size": (3, size, size),
            "num_classes": self.num_classes,
            "mean": tuple(images.get("image_mean", (0.5, 0.5, 0.5))),
            "std": tuple(images.get("image_std", (0.5, 0.5, 0.5))),
        }

    def forward(self, x: Tensor) -> Tensor:
        output = self.network(x, **self.options)
        pooled = getattr(output, "pooler_output", None)
        return output.logits if self.classifies else output.last_hidden_state.mean(1) if pooled is None else pooled
