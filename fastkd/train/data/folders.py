"""Datasets from folders: which images train, which validate, and which are left out."""

import copy
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from .. import InputError
from .images import as_rgb

TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("val", "valid", "validation", "eval", "evaluation")
NOT_DECODED = ("BUFR", "GRIB", "HDF5", "MPEG")  # Pillow recognises these formats but has no decoder


class Data(NamedTuple):
    classes: list[str]
    train: Dataset
    val: Dataset
    augmentation: dict[str, Any]  # arguments of timm's create_transform
    notes: tuple[str, ...] = ()  # lines about files that are not used

    @property
    def in_order(self) -> bool:
        """Return whether any of the data has no random access."""
        return isinstance(self.train, IterableDataset) or isinstance(self.val, IterableDataset)


class Digits(Dataset):
    """scikit-learn's 8 x 8 handwritten digits as RGB images; the first half is for training, the second for validation.

    The halves come from different writers, as in scikit-learn's own example, and are harder than a random split.
    """

    def __init__(self, train: bool) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        half = len(digits.target) // 2
        rows = slice(None, half) if train else slice(half, None)
        self.images = [
            Image.fromarray(image).convert("RGB") for image in (digits.images[rows] * (255 / 16)).astype("uint8")
        ]
        self.targets = digits.target[rows].tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index], self.targets[index]


class ClassFolders(ReaderImageFolder):
    """timm reader of a folder: a class is the first folder under the root, however deep its images lie.

    Every suffix that Pillow decodes counts. Hidden files and folders and `__MACOSX` hold no images.

    Classes are numbered in natural order ("2" before "10"), as by timm's own reader.

    Attributes:
        samples: (path, class) in natural order of the paths.
        outside, others: paths of images outside the class folders, and of files in them that are no images.
    """

    def __init__(self, root: Path) -> None:
        Reader.__init__(self)  # the folder reader would search by its own rule
        self.root = str(root)
        formats = {suffix: name for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
        suffixes = {suffix for suffix, name in formats.items() if name not in NOT_DECODED}
        inside: list[tuple[str, str]] = []
        self.outside: list[str] = []
        self.others: list[str] = []
        for path in sorted(_files(self.root), key=natural_key):
            first, *rest = os.path.relpath(path, self.root).split(os.sep)
            if os.path.splitext(path)[1].lower() not in suffixes:
                self.others += [path] if rest else []
            elif rest:
                inside.append((path, first))
            else:
                self.outside.append(path)
        names = sorted({name for _, name in inside}, key=natural_key)
        if unfit := [name for name in names if printable(name) != name or "\n" in name]:
            raise InputError(f"--data: the name of a class must be one line of UTF-8, got {printable(unfit[0])!r}")
        self.class_to_idx = {name: number for number, name in enumerate(names)}
        self.samples = [(path, self.class_to_idx[name]) for path, name in inside]


def renumber(reader: ClassFolders, path: str) -> None:
    """Number the classes as a file of timm's --class-map does, which has a class per line.

    Raises:
        InputError: the file cannot be read, or does not name each class of the folder once.
    """
    names = list(reader.class_to_idx)
    try:
        if not path.endswith(".txt"):  # timm would also unpickle
            raise ValueError("needs a file .txt")
        order = load_class_map(path)
    except Exception as error:  # timm asserts that there is such a file
        raise InputError(f"--class-map: {path} cannot be read: {error}") from error
    if sorted(order) != sorted(names) or sorted(order.values()) != [*range(len(names))]:
        differing = listed(sorted(set(order) ^ set(names)))
        raise InputError(f"--class-map: {path} must name each class of {reader.root} once; check {differing or order}")
    reader.class_to_idx = dict(sorted(order.items(), key=lambda item: item[1]))
    reader.samples = [(file, order[names[target]]) for file, target in reader.samples]


def _files(root: str) -> Iterator[str]:
    for folder, folders, files in os.walk(root, followlinks=True):
        place = os.path.realpath(folder)
        # A link to a folder above would repeat its images without end, in this class.
        above = {place, *map(str, Path(place).parents)}
        folders[:] = [
            name for name in folders
            if not is_hidden(name) and os.path.realpath(os.path.join(folder, name)) not in above
        ]  # fmt: skip
        yield from (os.path.join(folder, name) for name in files if not is_hidden(name))


def is_hidden(name: str) -> bool:
    """Return whether a name is hidden; `._*` are AppleDouble files, and `__MACOSX` holds them in archives."""
    return name.startswith(".") or name == "__MACOSX"


def printable(name: str) -> str:
    """Return the name of a file with escapes in place of bytes that are no UTF-8, which no stream would take."""
    return name.encode("utf-8", "backslashreplace").decode()


def listed(names: Iterable[str], most: int = 3) -> str:
    """Return the first names, and the number of the others."""
    names = list(map(printable, names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def size_of(part: Dataset) -> int:
    """Return the number of images; len() of sequential data is rounded to full batches of this process's workers."""
    known = getattr(getattr(part, "reader", None), "num_samples", None)
    return len(part) if known is None else known  # type: ignore[arg-type]


def find_unreadable(data: Data) -> list[str]:
    """Decode all image files of a folder, on all cores. Return the error of each one that cannot be decoded."""
    paths = [path for part in (data.train, data.val) if isinstance(part, ImageDataset) for path, _ in _samples(part)]

    def fault(path: str) -> str | None:
        try:
            with Image.open(path) as image:
                as_rgb(image)
        except Exception as error:  # Pillow passes on any error of its decoders
            return f"{path} cannot be read as an image ({printable(str(error))})"
        return None

    with ThreadPoolExecutor() as pool:
        faults = tqdm(pool.map(fault, paths), "checking images", len(paths), leave=False, disable=None)
        return [found for found in faults if found]


def leave_out(data: Data, faults: list[str], limit: int) -> None:
    """Remove the unreadable files from the data.

    Raises:
        InputError: there are more than the limit, or a class has no readable file.
    """
    if len(faults) > limit:
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise InputError(f"--data: {printable(faults[0])}{more}; --skip-images {len(faults)} leaves out as many")
    for part in (data.train, data.val) if faults else ():
        if isinstance(part, ImageDataset):
            names = list(part.reader.class_to_idx)
            before = {target for _, target in _samples(part)}
            part.reader.samples = [
                (path, target)
                for path, target in _samples(part)
                if not any(fault.startswith(f"{path} cannot") for fault in faults)
            ]
            if bare := sorted(before - {target for _, target in part.reader.samples}):
                raise InputError(f"--data: the class {names[bare[0]]} has no readable image; {faults[0]}")


def take_share(data: Data, fraction: float, seed: int) -> None:
    """Keep a stratified share of the training images, drawn by the seed.

    Raises:
        InputError: the data can only be read in sequence, or the share lacks a class.
    """
    from sklearn.model_selection import train_test_split

    if fraction == 1:
        return
    train = data.train
    if not isinstance(train, Digits | ImageDataset):
        raise InputError("--train-fraction: needs a folder of images, or digits")
    targets = train.targets if isinstance(train, Digits) else [target for _, target in _samples(train)]
    _check_enough(data.classes, targets, "--train-fraction")
    try:
        kept, _ = train_test_split(range(len(targets)), train_size=fraction, stratify=targets, random_state=seed)
    except ValueError as error:
        raise InputError(f"--train-fraction: {fraction} of {len(targets)} images: {error}") from error
    kept = sorted(kept)
    if isinstance(train, Digits):
        train.images, train.targets = [train.images[i] for i in kept], [targets[i] for i in kept]
    else:
        train.reader.samples = [train.reader.samples[i] for i in kept]


def check_classes(data: str, classes: int, given: int | None) -> None:
    if given not in (None, classes):
        raise InputError(f"--num-classes: {data} has {classes}, got {given}")


def _samples(dataset: ImageDataset) -> list[tuple[str, int]]:
    return getattr(dataset.reader, "samples", [])


def sub_folder(root: Path, names: tuple[str, ...]) -> Path | None:
    """Return the folder of a split: it has class folders, unlike a class of the same name with images in it."""
    return next((root / name for name in names if _folders(root / name)), None)


def _folders(root: Path) -> list[str]:
    paths = root.iterdir() if root.is_dir() else ()
    return sorted(path.name for path in paths if path.is_dir() and not is_hidden(path.name))


def folder(root: Path) -> ImageDataset:
    reader = ClassFolders(root)
    if not reader.samples:
        outside = f"; its {len(reader.outside)} images lie outside" if reader.outside else ""
        raise InputError(f"--data: {root} holds no images in class folders; it needs a sub-folder per class{outside}")
    if empty := sorted(set(_folders(root)) - reader.class_to_idx.keys()):
        raise InputError(f"--data: class folders of {root} without images: {', '.join(empty)}")
    return ImageDataset(str(root), reader=reader)


def notes(folder: Path, *parts: ImageDataset) -> tuple[str, ...]:
    """Return a line about each kind of files that are not used."""
    notes = []
    for kind, why in (("outside", "outside the class folders"), ("others", "that Pillow does not know as images")):
        if paths := [*dict.fromkeys(path for part in parts for path in getattr(part.reader, kind))]:
            notes.append(f"left out: {len(paths)} {why} ({listed(paths)})")
    roots = {Path(part.reader.root).name for part in parts if Path(part.reader.root) != folder}
    if roots and (unread := [name for name in _folders(folder) if name not in roots]):
        notes.append(f"not read: {listed(str(folder / name) for name in unread)}")
    return tuple(notes)


def _check_enough(classes: Sequence[str], targets: Sequence[int], option: str) -> None:
    """Check that each class can be divided."""
    counts = Counter(targets)
    if few := [name for number, name in enumerate(classes) if counts[number] < 2]:
        raise InputError(f"{option}: a class needs 2 images at least to be divided; fewer has {listed(few)}")


def split(train: ImageDataset, val_fraction: float) -> ImageDataset:
    """Move a stratified share of the training images to a validation set and return it."""
    from sklearn.model_selection import train_test_split

    samples, names = train.reader.samples, list(train.reader.class_to_idx)
    _check_enough(names, [target for _, target in samples], "--val-fraction")
    val = ImageDataset(train.reader.root, reader=copy.copy(train.reader))
    try:
        train.reader.samples, val.reader.samples = train_test_split(
            samples, test_size=val_fraction, stratify=[target for _, target in samples], random_state=0
        )
    except ValueError as error:
        raise InputError(
            f"--val-fraction: {val_fraction} of {len(samples)} images cannot be set apart: {error}"
        ) from error
    return val
