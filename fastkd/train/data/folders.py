"""Datasets from folders: which images train, which validate, and which are left out."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from .. import InputError
from .images import as_rgb

TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("val", "valid", "validation", "eval", "evaluation")


class Data(NamedTuple):
    classes: list[str]
    train: Dataset
    val: Dataset
    augmentation: dict[str, Any]  # arguments of timm's create_transform

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
            return f"{path} cannot be read as an image ({error})"
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
        raise InputError(f"--data: {faults[0]}{more}; --skip-images {len(faults)} leaves out as many")
    for part in (data.train, data.val) if faults else ():
        if isinstance(part, ImageDataset):
            before = {target for _, target in _samples(part)}
            part.reader.samples = [
                (path, target)
                for path, target in _samples(part)
                if not any(fault.startswith(f"{path} cannot") for fault in faults)
            ]
            if before - {target for _, target in part.reader.samples}:
                raise InputError(f"--data: a class has no readable image; {faults[0]}")


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
    try:
        kept, _ = train_test_split(range(len(targets)), train_size=fraction, stratify=targets, random_state=seed)
    except ValueError as error:
        raise InputError(f"--train-fraction: {fraction} of {len(targets)} images: {error}") from error
    kept = sorted(kept)
    if isinstance(train, Digits):
        train.images, train.targets = [train.images[i] for i in kept], [targets[i] for i in kept]
    else:
        train.reader.samples = [train.reader.samples[i] for i in kept]


def _check_classes(data: str, classes: int, given: int | None) -> None:
    if given not in (None, classes):
        raise InputError(f"--num-classes: {data} has {classes}, got {given}")


def _samples(dataset: ImageDataset) -> list[tuple[str, int]]:
    return getattr(dataset.reader, "samples", [])


def _sub_folder(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _folder(root: Path) -> ImageDataset:
    try:
        dataset = ImageDataset(str(root))
    except RuntimeError as error:
        raise InputError(f"--data: {root} holds no images; it needs a sub-folder of them per class") from error
    # timm's reader skips a folder without images, so its class would silently be missing.
    with_images = {Path(path).relative_to(root).parts[0] for path, _ in dataset.reader.samples}
    folders = {path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if empty := sorted(folders - with_images):
        raise InputError(f"--data: class folders of {root} without images: {', '.join(empty)}")
    return dataset


def _split(train: ImageDataset, val_fraction: float) -> ImageDataset:
    """Move a stratified share of the training images to a validation set and return it."""
    from sklearn.model_selection import train_test_split

    samples = train.reader.samples
    val = ImageDataset(train.reader.root)
    try:
        train.reader.samples, val.reader.samples = train_test_split(
            samples, test_size=val_fraction, stratify=[target for _, target in samples], random_state=0
        )
    except ValueError as error:
        raise InputError(
            f"--val-fraction: {val_fraction} of {len(samples)} images cannot be set apart: {error}"
        ) from error
    return val
