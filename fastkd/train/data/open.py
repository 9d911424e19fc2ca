"""Open what --data names: digits, a folder, or a timm dataset."""

import os
from pathlib import Path
from typing import Any

from timm.data import create_dataset

from .. import InputError
from ..inversion.store import check_folder
from . import folders
from .folders import TRAIN_FOLDERS, VAL_FOLDERS, Data, Digits
from .streams import shards

READERS = ("hfds", "hfids", "tfds", "wds", "torch")  # timm's, as NAME/...


def open_data(
    data: str,
    val_fraction: float | None,
    *,
    root: str | None = None,
    splits: tuple[str, str] = ("train", "validation"),
    num_classes: int | None = None,
    class_map: str | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> Data:
    """Return the training and validation images of `digits`, of a folder, or of a timm dataset such as hfds/NAME.

    A folder has one sub-folder per class, or train/ and val/ with such sub-folders (ClassFolders). Without val/, a
    stratified share of the images, the same in each run, is used for validation; with val_fraction=None all are.
    `class_map` is a file with a class per line, in the order of their numbers.

    Raises:
        InputError: no such folder, no images, fewer than two classes, a missing class, or a reader not installed.
    """
    if class_map is not None and not Path(data).is_dir():
        raise InputError(f"--class-map: is for a folder of images, and {data} has its own order of classes")
    if data == "digits":
        augmentation = {"scale": (0.7, 1.0), "ratio": (0.9, 1.1), "hflip": 0.0, "color_jitter": None}
        folders.check_classes(data, 10, num_classes)
        return Data([str(digit) for digit in range(10)], Digits(True), Digits(False), augmentation)
    folder = Path(data)
    if not folder.is_dir() and data.partition("/")[0].lower() in READERS:
        return _timm_data(data, root, splits, num_classes, batch_size, seed)
    if not folder.is_dir():
        raise InputError(
            f"--data: {data} is not a folder; it needs one with a sub-folder of images per class, or one of timm's "
            f"data sets, {'/..., '.join(READERS)}/..."
        )
    check_folder(folder)
    train = folders.folder(folders.sub_folder(folder, TRAIN_FOLDERS) or folder)
    classes = train.reader.class_to_idx
    if len(classes) < 2:
        raise InputError(
            f"--data: {data} needs a sub-folder per class, two at least, got {len(classes)}: {', '.join(classes)}"
        )
    folders.check_classes(data, len(classes), num_classes)
    held_out = folders.sub_folder(folder, VAL_FOLDERS)
    if held_out is None:
        val = train if val_fraction is None else folders.split(train, val_fraction)
    else:
        val = folders.folder(held_out)
        if set(val.reader.class_to_idx) != set(classes):
            differing = sorted(set(val.reader.class_to_idx) ^ set(classes))
            raise InputError(f"--data: training and validation folders need the same classes, one lacks {differing}")
    if class_map is not None:
        for part in (train, val):
            folders.renumber(part.reader, class_map)
    return Data(list(train.reader.class_to_idx), train, val, {}, folders.notes(folder, train, val))


def _timm_data(
    name: str, root: str | None, splits: tuple[str, str], num_classes: int | None, batch_size: int, seed: int
) -> Data:
    common: dict[str, Any] = {"root": root, "batch_size": batch_size, "seed": seed}
    if not name.lower().startswith("tfds/"):  # this reader decodes by itself
        common["input_img_mode"] = ""  # as_rgb converts instead of Pillow
    try:
        train = create_dataset(name, split=splits[0], is_training=True, **common)
        val = create_dataset(name, split=splits[1], **common)
    except (Exception, SystemExit) as error:  # readers raise different errors, for example for a missing package
        raise InputError(f"--data: timm cannot open {name}: {' '.join(str(error).split())[:300]}") from error
    for part, split in ((train, splits[0]), (val, splits[1])):  # timm would continue without them
        if "tar" not in split and ".." not in split:  # else the user names the shards, and not a file of the data set
            _check_inside(name, getattr(getattr(part, "reader", None), "root", ""), shards(part))
        local = [path for path in shards(part) if "://" not in path and "pipe:" not in path]
        if missing := [path for path in local if not Path(path).is_file()]:
            raise InputError(f"--data: {name} lacks {len(missing)} of its {len(shards(part))} shards: {missing[0]}")
    known = getattr(getattr(train, "reader", train), "class_to_idx", None) or {}
    classes = num_classes or len(known)
    if classes < 2:
        raise InputError(f"--num-classes: {name} does not say how many it has; give it")
    if known:
        folders.check_classes(name, len(known), classes)
    return Data(list(map(str, known)) or [str(i) for i in range(classes)], train, val, {})


def _check_inside(name: str, root: str, paths: list[str]) -> None:
    """Raises:
    InputError: a data set's own list of shards has a command for a shell, an address, or a path out of its folder.
    """
    for path in paths:
        shard = os.path.relpath(path, root)
        if ":" in path.removeprefix(root) or shard.startswith(os.pardir) or not path.startswith(root):
            raise InputError(f"--data: the _info.json of {name} names a shard outside the folder {root}: {shard}")
