"""Images and labels: scikit-learn's digits or a folder, read by timm; checked before anything else happens."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import ImageDataset, create_loader, resolve_model_data_config
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from . import InputError

TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("val", "valid", "validation", "eval", "evaluation")


class Data(NamedTuple):
    classes: list[str]
    train: Dataset
    val: Dataset
    augmentation: dict[str, Any]  # arguments of timm's create_loader


class Digits(Dataset):
    """scikit-learn's 8 x 8 handwritten digits as RGB images: the first half to train, the second to validate.

    The halves come from different writers, as in scikit-learn's own example: a harder split than a random one.
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
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        return (image if self.transform is None else self.transform(image)), self.targets[index]


def open_data(data: str, val_fraction: float) -> Data:
    """The training and validation images of `digits` or of a folder.

    A folder holds one sub-folder per class, or train/ and val/ with those; without a val/ a stratified share of
    the images is set apart, the same in each run.

    Raises:
        InputError: no such folder, no images, fewer than two classes, a class missing.
    """
    if data == "digits":
        augmentation = {"scale": (0.7, 1.0), "ratio": (0.9, 1.1), "hflip": 0.0, "color_jitter": None}
        return Data([str(digit) for digit in range(10)], Digits(True), Digits(False), augmentation)
    root = Path(data)
    if not root.is_dir():
        raise InputError(f"--data: {data} is not a folder; it needs one with a sub-folder of images per class")
    train = _folder(_sub_folder(root, TRAIN_FOLDERS) or root)
    classes = train.reader.class_to_idx
    if len(classes) < 2:
        raise InputError(f"--data: {data} needs a sub-folder per class, two at least, got {len(classes)}")
    held_out = _sub_folder(root, VAL_FOLDERS)
    if held_out is None:
        val = _split(train, val_fraction)
    else:
        val = _folder(held_out)
        if set(val.reader.class_to_idx) != set(classes):
            differing = sorted(set(val.reader.class_to_idx) ^ set(classes))
            raise InputError(f"--data: training and validation folders need the same classes, one lacks {differing}")
    return Data(list(classes), train, val, {})


def check_images(data: Data) -> None:
    """Decodes every image of a folder, on all cores.

    Raises:
        InputError: a file that is not an image or not a whole one.
    """
    paths = [
        path for part in (data.train, data.val) if isinstance(part, ImageDataset) for path, _ in part.reader.samples
    ]

    def fault(path: str) -> str | None:
        try:
            with Image.open(path) as image:
                image.load()
        except Exception as error:  # Pillow raises what its decoders do
            return f"{path} cannot be read as an image ({error})"
        return None

    with ThreadPoolExecutor() as pool:
        faults = tqdm(pool.map(fault, paths), "checking images", len(paths), leave=False, disable=None)
        first = next((found for found in faults if found), None)
        pool.shutdown(cancel_futures=True)
    if first:
        raise InputError(f"--data: {first}")


def create_loaders(
    data: Data, model: nn.Module, *, img_size: int, batch_size: int, augment: bool, workers: int, device: torch.device
) -> tuple[Any, Any]:
    """timm's loaders for training and validation, normalised as the model's pretrained_cfg says."""
    if len(data.train) < batch_size:  # type: ignore[arg-type]
        raise InputError(f"--batch-size: {batch_size} exceeds the {len(data.train)} training images")  # type: ignore[arg-type]
    config = resolve_model_data_config(model)
    options = {key: config[key] for key in ("interpolation", "mean", "std")} | {
        "input_size": (3, img_size, img_size),
        "batch_size": batch_size,
        "num_workers": workers,
        "device": device,
        "pin_memory": device.type == "cuda",
        "persistent_workers": False,  # new ones each epoch draw the same augmentation for each network
    }
    # create_loader puts its transform into the dataset.
    train_set, val_set = copy.copy(data.train), copy.copy(data.val)
    train = create_loader(train_set, is_training=True, no_aug=not augment, **options, **data.augmentation)
    crop_pct = 1.0 if isinstance(data.val, Digits) else config["crop_pct"]
    return train, create_loader(val_set, crop_pct=crop_pct, **options)


def _sub_folder(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _folder(root: Path) -> ImageDataset:
    try:
        return ImageDataset(str(root))
    except RuntimeError as error:
        raise InputError(f"--data: {root} holds no images; it needs a sub-folder of them per class") from error


def _split(train: ImageDataset, val_fraction: float) -> ImageDataset:
    """Moves a stratified share of the training images into the validation set that it returns."""
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
