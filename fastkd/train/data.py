"""Images and labels, read by timm. One rule: a sample is a function of seed, epoch and index, whoever loads it."""

import copy
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_transform, resolve_model_data_config
from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from tqdm import tqdm

from . import DataError, InputError
from .inversion.store import check_folder
from .ranks import ALONE, Ranks

TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("val", "valid", "validation", "eval", "evaluation")
READERS = ("hfds", "hfids", "tfds", "wds", "torch")  # timm's, as NAME/...
RETRIES = 10  # unreadable images in a row


def seed_all(*key: int) -> None:
    """Seeds the generators of Python, NumPy and PyTorch by all of the key; equal keys, equal draws."""
    random.seed(" ".join(map(str, key)))
    np.random.seed(random.getrandbits(32))  # noqa: NPY002  timm and torchvision draw from the global one
    # torch.manual_seed takes 0.1 ms of each sample to note where it was called, for GPUs that are not in use.
    torch.default_generator.manual_seed(random.getrandbits(63))
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(random.getrandbits(63))


class Data(NamedTuple):
    classes: list[str]
    train: Dataset
    val: Dataset
    augmentation: dict[str, Any]  # arguments of timm's create_transform

    @property
    def in_order(self) -> bool:
        """Whether one of them has no random access."""
        return isinstance(self.train, IterableDataset) or isinstance(self.val, IterableDataset)


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

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index], self.targets[index]


def open_data(
    data: str,
    val_fraction: float,
    *,
    root: str | None = None,
    splits: tuple[str, str] = ("train", "validation"),
    num_classes: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> Data:
    """The training and validation images of `digits`, of a folder, or of a timm data set such as hfds/NAME.

    A folder holds one sub-folder per class, or train/ and val/ with those; without a val/ a stratified share of
    the images is set apart, the same in each run.

    Raises:
        InputError: no such folder, no images, fewer than two classes, a class missing; a reader that is not there.
    """
    if data == "digits":
        augmentation = {"scale": (0.7, 1.0), "ratio": (0.9, 1.1), "hflip": 0.0, "color_jitter": None}
        _check_classes(data, 10, num_classes)
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
    train = _folder(_sub_folder(folder, TRAIN_FOLDERS) or folder)
    classes = train.reader.class_to_idx
    if len(classes) < 2:
        raise InputError(f"--data: {data} needs a sub-folder per class, two at least, got {len(classes)}")
    _check_classes(data, len(classes), num_classes)
    held_out = _sub_folder(folder, VAL_FOLDERS)
    if held_out is None:
        val = _split(train, val_fraction)
    else:
        val = _folder(held_out)
        if set(val.reader.class_to_idx) != set(classes):
            differing = sorted(set(val.reader.class_to_idx) ^ set(classes))
            raise InputError(f"--data: training and validation folders need the same classes, one lacks {differing}")
    return Data(list(classes), train, val, {})


def _timm_data(
    name: str, root: str | None, splits: tuple[str, str], num_classes: int | None, batch_size: int, seed: int
) -> Data:
    common: dict[str, Any] = {"root": root, "batch_size": batch_size, "seed": seed}
    if not name.lower().startswith("tfds/"):  # that one decodes by itself
        common["input_img_mode"] = ""  # as_rgb converts, not Pillow
    try:
        train = create_dataset(name, split=splits[0], is_training=True, **common)
        val = create_dataset(name, split=splits[1], **common)
    except (Exception, SystemExit) as error:  # each reader's own, down to a missing package
        raise InputError(f"--data: timm cannot open {name}: {' '.join(str(error).split())[:300]}") from error
    for part in (train, val):  # timm goes on without them
        local = [path for path in shards(part) if "://" not in path and "pipe:" not in path]
        if missing := [path for path in local if not Path(path).is_file()]:
            raise InputError(f"--data: {name} lacks {len(missing)} of its {len(shards(part))} shards: {missing[0]}")
    known = getattr(getattr(train, "reader", train), "class_to_idx", None) or {}
    classes = num_classes or len(known)
    if classes < 2:
        raise InputError(f"--num-classes: {name} does not say how many it has; give it")
    if known:
        _check_classes(name, len(known), classes)
    return Data(list(map(str, known)) or [str(i) for i in range(classes)], train, val, {})


def shards(part: Dataset) -> list[str]:
    """The files of a WebDataset; none for other data."""
    reader: Any = getattr(part, "reader", None)
    if type(reader).__name__ != "ReaderWds":
        return []
    return [os.path.join(reader.root, name) for name in reader.split_info.filenames]  # or addresses


def size_of(part: Dataset) -> int:
    """How many images. Of data that is read in order len() is rounded to whole batches of this process's workers."""
    known = getattr(getattr(part, "reader", None), "num_samples", None)
    return len(part) if known is None else known  # type: ignore[arg-type]


def as_rgb(image: Image.Image) -> Image.Image:
    """8 bits a channel; of 16 the upper 8, as Pillow reads 16-bit colours. 16-bit grey it would cut off at 255.

    Raises:
        ValueError: pixels of 32 bits, of which nothing tells what is white.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers, mode {image.mode}; it needs 8 or 16 bits")
    return image.convert("RGB")


def find_unreadable(data: Data) -> list[str]:
    """What ails each image file of a folder that cannot be decoded; all are tried, on all cores."""
    paths = [path for part in (data.train, data.val) if isinstance(part, ImageDataset) for path, _ in _samples(part)]

    def fault(path: str) -> str | None:
        try:
            with Image.open(path) as image:
                as_rgb(image)
        except Exception as error:  # Pillow raises what its decoders do
            return f"{path} cannot be read as an image ({error})"
        return None

    with ThreadPoolExecutor() as pool:
        faults = tqdm(pool.map(fault, paths), "checking images", len(paths), leave=False, disable=None)
        return [found for found in faults if found]


def leave_out(data: Data, faults: list[str], limit: int) -> None:
    """Takes the unreadable files out of the data.

    Raises:
        InputError: more of them than the limit, or a class that has no others.
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
    """Leaves a stratified share of the training images, drawn by the seed.

    Raises:
        InputError: data that can only be read in order, or a share without an image of each class.
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


class Images(Dataset):
    """The images of a timm data set, transformed; an unreadable one is marked and replaced by the next."""

    def __init__(self, source: Any, transform: Callable[[Image.Image], Any], seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self.unreadable = torch.zeros(len(source), dtype=torch.bool).share_memory_()  # the workers' marks too

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Any, int]:
        epoch, index, copy = key
        image, target = self._load(index)
        seed_all(self.seed, epoch, index, *([copy] if copy else []))
        return self.transform(image), target

    def faults(self) -> list[str]:
        """Names of the images that could not be read so far."""
        return [self._name(index) for index in self.unreadable.nonzero().flatten().tolist()]

    def _load(self, index: int) -> tuple[Image.Image, int]:
        for i in range(index, index + RETRIES):
            try:
                return self._open(i % len(self))
            except Exception:  # noqa: PERF203  Pillow raises what its decoders do
                self.unreadable[i % len(self)] = True
        raise DataError(f"{RETRIES} images in a row cannot be read, from {self._name(index)} on")

    def _open(self, index: int) -> tuple[Image.Image, int]:
        if not isinstance(self.source, ImageDataset):
            image, target = self.source[index]
        else:
            file, target = self.source.reader[index][:2]
            image = Image.open(file)
        return as_rgb(image), int(target)

    def _name(self, index: int) -> str:
        if isinstance(self.source, ImageDataset):
            return str(self.source.filename(index, absolute=True))
        return f"image {index}"


class Stream(IterableDataset):
    """The same for data that can only be read in order."""

    def __init__(
        self, source: Any, transform: Callable[[Image.Image], Any], seed: int, ranks: Ranks, workers: int, batch: int
    ) -> None:
        self.source, self.transform, self.seed, self.epoch = source, transform, seed, 0
        self.ranks, self.workers, self.batch = ranks, workers, batch
        self.source.transform = None

    def __len__(self) -> int:
        self.reader()
        return len(self.source)

    def reader(self) -> Any:
        """timm's, which stages and networks share, told for whom it reads; it rounds a worker's images to batches."""
        reader = self.source.reader
        reader.batch_size = self.batch
        reader.dist_rank, reader.dist_num_replicas = self.ranks
        reader.set_loader_cfg(num_workers=self.workers)
        return reader

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        worker = get_worker_info()
        samples = self._samples()
        for number in count():
            try:
                image, target = next(samples)
                image = as_rgb(image)
            except StopIteration:
                return
            except Exception as error:  # each reader's own, such as more workers than shards
                raise DataError(f"--data: {' '.join(str(error).split())}") from error
            seed_all(self.seed, self.epoch, self.ranks.rank, worker.id if worker else 0, number)
            yield self.transform(image), int(target)

    def _samples(self) -> Iterator[tuple[Image.Image, Any]]:
        reader = self.reader()
        if not reader.is_training:
            # With its share dealt out timm is told that it is alone: else it repeats and leaves out images, to give
            # every process as many.
            reader._lazy_init()
            reader.dist_num_replicas = 1
        yield from self.source


def check_shards(stream: Stream) -> None:
    """That each process that loads images to train on has a shard; TensorFlow Datasets are cut where they are too few.

    Raises:
        InputError: fewer of them.
    """
    reader, world, workers = stream.reader(), stream.ranks.world, stream.workers
    files = shards(stream.source)
    has = len(files) // world if files else workers
    if type(reader).__name__ == "ReaderHfids":
        alike = copy.copy(reader)
        alike.is_training, alike.num_workers = False, 1  # else it refuses or warns in words of its own
        alike._lazy_init()
        has = alike.ds.num_shards
    if has < workers:
        raise InputError(f"--workers: {workers} need a shard each to train on, a process gets {has}")


class Batches(Sampler[list[tuple[int, int, int]]]):
    """Keys (epoch, index, copy) of one rank's batches. Batch k of all ranks together is a slice of the epoch's order.

    Args:
        repeats: an image follows itself so many times, each copy with its own augmentation and, where there are as
            many, on its own rank; an epoch stays as long and has the fewer images (DeiT's repeated augmentation).
    """

    def __init__(self, size: int, batch_size: int, ranks: Ranks, seed: int | None, repeats: int = 1) -> None:
        self.size, self.batch_size, self.ranks, self.seed = size, batch_size, ranks, seed  # no seed: in order, all
        self.repeats = repeats
        self.epoch, self.start = 0, 0
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        whole = self.batch_size * self.ranks.world
        return self.size // whole if self.seed is not None else -(-self.size // whole)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for number in range(self.start, len(self)):
            copies = [position % self.repeats for position in self._positions(number)]
            if indices := self.indices(self.epoch, number):
                yield [(self.epoch, index, copy) for index, copy in zip(indices, copies, strict=True)]

    def indices(self, epoch: int, number: int) -> list[int]:
        ordered = self._ordered(epoch)
        return [ordered[position // self.repeats] for position in self._positions(number)]

    def _positions(self, number: int) -> range:
        """Of the batch's images, with their copies, in the epoch's order."""
        first = number * self.ranks.world * self.batch_size
        if self.repeats > 1:
            return range(first + self.ranks.rank, first + self.ranks.world * self.batch_size, self.ranks.world)
        first += self.ranks.rank * self.batch_size
        return range(min(first, self.size), min(first + self.batch_size, self.size))

    def _ordered(self, epoch: int) -> Sequence[int]:
        if self.seed is None:
            return range(self.size)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed((self.seed * 100_003 + epoch) % 2**63)
            self._order = epoch, torch.randperm(self.size, generator=generator).tolist()
        return self._order[1]


class Loader:
    """Batches on the device, normalised, by timm's PrefetchLoader; any epoch can start at any batch."""

    def __init__(
        self,
        source: Any,
        transform: Callable[[Image.Image], Any],
        config: dict[str, Any],
        *,
        batch_size: int,
        workers: int,
        device: torch.device,
        ranks: Ranks,
        seed: int,
        shuffle: bool,
        repeats: int = 1,
    ) -> None:
        self.batches: Batches | None = None
        self.images: Images | Stream
        self.device = device
        self._again = partial(
            Loader,
            source,
            transform,
            config,
            batch_size=batch_size,
            workers=workers,
            device=device,
            ranks=ranks,
            seed=seed,
        )
        # No persistent workers: those of three networks would all stay.
        common: dict[str, Any] = {
            "num_workers": workers,
            "pin_memory": device.type == "cuda",
            "collate_fn": fast_collate,
        }
        if isinstance(source, IterableDataset):
            if repeats > 1:
                raise InputError("--aug-repeats: needs data with random access, such as a folder or hfds/")
            if workers < 1:
                raise InputError("--workers: data that is read in order needs 1 at least; without, its order goes on")
            self.images = Stream(source, transform, seed, ranks, workers, batch_size)
            if shuffle:
                check_shards(self.images)
            loader = DataLoader(self.images, batch_size=batch_size, drop_last=shuffle, **common)
        else:
            self.images = Images(source, transform, seed)
            self.batches = Batches(len(source), batch_size, ranks, seed if shuffle else None, repeats)
            loader = DataLoader(self.images, batch_sampler=self.batches, **common)
        self.seed, self.rank = seed, ranks.rank
        self._loader = PrefetchLoader(loader, mean=config["mean"], std=config["std"], device=device)

    def __len__(self) -> int:
        return len(self.batches if self.batches is not None else self._loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of that epoch from `start` on; without random access those before are read and dropped."""
        if self.batches is not None:
            self.batches.epoch, self.batches.start = epoch, start
            return self._load(0)
        assert isinstance(self.images, Stream)
        self.images.epoch = epoch
        self.images.source.set_epoch(epoch)
        return self._load(start)

    def _load(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self.images, Stream):
            seed_all(self.seed, self.images.epoch, self.rank)  # the workers, which start now, draw their seeds
        try:
            yield from islice(self._loader, start, None)
        except DataError as error:  # a worker's comes with its traceback
            raise DataError(str(error).rpartition(f"{DataError.__name__}: ")[2].strip()) from error

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def in_order(self) -> "Loader":
        """The same images, each once, in their order."""
        return self._again(shuffle=False)


def create_loaders(
    data: Data,
    model: nn.Module,
    *,
    img_size: int,
    batch_size: int,
    augment: bool,
    workers: int,
    device: torch.device,
    augmentation: dict[str, Any] | None = None,
    ranks: Ranks = ALONE,
    val_ranks: Ranks | None = None,
    seed: int = 0,
    repeats: int = 1,
) -> tuple[Loader, Loader]:
    """Loaders for training and validation, normalised as the model's pretrained_cfg says; `val_ranks` share the
    validation images."""
    size = size_of(data.train)
    if size < batch_size * ranks.world:
        each = "" if ranks.world == 1 else f" on {ranks.world} processes"
        raise InputError(f"--batch-size: {batch_size}{each} exceeds the {size} training images")
    config = resolve_model_data_config(model)
    options = {key: config[key] for key in ("interpolation", "mean", "std")}
    options |= {"input_size": (3, img_size, img_size), "use_prefetcher": True}
    try:
        own = options | data.augmentation | (augmentation or {})
        training = create_transform(is_training=True, no_aug=not augment, **own)
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f"--augment-arg: timm's create_transform refuses them: {error}") from error
    crop_pct = 1.0 if isinstance(data.val, Digits) else config["crop_pct"]
    common: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "device": device, "seed": seed}
    return (
        Loader(data.train, training, config, ranks=ranks, shuffle=True, repeats=repeats, **common),
        Loader(
            data.val,
            create_transform(crop_pct=crop_pct, **options),
            config,
            ranks=ranks if val_ranks is None else val_ranks,
            shuffle=False,
            **common,
        ),
    )


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
    # timm's reader passes over a folder without images: its class would be missing without a word.
    with_images = {Path(path).relative_to(root).parts[0] for path, _ in dataset.reader.samples}
    folders = {path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if empty := sorted(folders - with_images):
        raise InputError(f"--data: class folders of {root} without images: {', '.join(empty)}")
    return dataset


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
