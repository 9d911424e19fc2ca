"""Loaders of training and validation batches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from .. import DataError, InputError
from ..options import Size, sides
from ..ranks import ALONE, Ranks
from .folders import Data, Digits, size_of
from .images import Images, seed_all
from .sampler import Batches
from .streams import Stream, check_shards


class Loader:
    """Loader of normalised batches on the device, by timm's PrefetchLoader; an epoch can start at any batch."""

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
        passes: int = 1,
        upright: bool = True,
    ) -> None:
        self.batches: Batches | None = None
        self.images: Images | Stream
        self.device = device
        self._again = partial(
            Loader, source, transform, config, batch_size=batch_size, workers=workers, device=device, ranks=ranks,
            seed=seed, upright=upright,
        )  # fmt: skip
        # No persistent workers, since the workers of three networks would stay alive.
        common: dict[str, Any] = {
            "num_workers": workers,
            "pin_memory": device.type == "cuda",
            "collate_fn": fast_collate,
        }
        if isinstance(source, IterableDataset):
            for option, value in (("--aug-repeats", repeats), ("--epoch-repeats", passes)):
                if value > 1:
                    raise InputError(f"{option}: needs data with random access, such as a folder or hfds/")
            if workers < 1:
                raise InputError("--workers: data that is read in order needs 1 at least; without, its order goes on")
            self.images = Stream(source, transform, seed, ranks, workers, batch_size, upright)
            if shuffle:
                check_shards(self.images)
            loader = DataLoader(self.images, batch_size=batch_size, drop_last=shuffle, **common)
        else:
            self.images = Images(source, transform, seed, upright)
            self.batches = Batches(len(source), batch_size, ranks, seed if shuffle else None, repeats, passes)
            loader = DataLoader(self.images, batch_sampler=self.batches, **common)
        self.seed, self.rank = seed, ranks.rank
        self._loader = PrefetchLoader(loader, mean=config["mean"], std=config["std"], device=device)

    def __len__(self) -> int:
        return len(self.batches if self.batches is not None else self._loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch from `start` on; without random access, earlier ones are read and dropped."""
        if self.batches is not None:
            self.batches.epoch, self.batches.start = epoch, start
            return self._load(0)
        assert isinstance(self.images, Stream)
        self.images.epoch = epoch
        self.images.source.set_epoch(epoch)
        return self._load(start)

    def _load(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self.images, Stream):
            seed_all(self.seed, self.images.epoch, self.rank)  # the workers start now and draw their seeds
        try:
            with worker_errors():
                yield from islice(self._loader, start, None)
        except DataError as error:  # the message of a worker's error includes its traceback
            raise DataError(str(error).rpartition(f"{DataError.__name__}: ")[2].strip()) from error

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def in_order(self) -> "Loader":
        """Return a loader of the same images, each once, in their order."""
        return self._again(shuffle=False)


@contextmanager
def worker_errors() -> Iterator[None]:
    """Turn the death of a loader's process into an error of one line.

    PyTorch raises it in a handler of SIGCHLD, so at any line that runs while a loader is open: whatever reads from one
    runs in this context as a whole.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DataError(
            f"a process that loads images has ended ({' '.join(str(error).split())}), perhaps for lack of memory; "
            "fewer --workers need less"
        ) from error


def create_loaders(
    data: Data,
    model: nn.Module,
    *,
    img_size: Size,
    batch_size: int,
    augment: bool,
    workers: int,
    device: torch.device,
    augmentation: dict[str, Any] | None = None,
    ranks: Ranks = ALONE,
    val_ranks: Ranks | None = None,
    seed: int = 0,
    repeats: int = 1,
    passes: int = 1,
    upright: bool = True,
) -> tuple[Loader, Loader]:
    """Return loaders for training and validation with the normalisation of the model's pretrained_cfg.

    `val_ranks` share the validation images.
    """
    size = size_of(data.train)
    if size * passes < batch_size * ranks.world:
        each = "" if ranks.world == 1 else f" on {ranks.world} processes"
        raise InputError(f"--batch-size: {batch_size}{each} exceeds the {size} training images")
    config = resolve_model_data_config(model)
    options = {key: config[key] for key in ("interpolation", "mean", "std")}
    height, width = sides(img_size)
    options |= {"input_size": (3, height, width), "use_prefetcher": True}
    ratio = (0.75 * width / height, width / height / 0.75)  # a square's would be stretched
    try:
        own = options | ({} if height == width else {"ratio": ratio}) | data.augmentation | (augmentation or {})
        training = create_transform(is_training=True, no_aug=not augment, **own)
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f"--augment-arg: timm's create_transform refuses them: {error}") from error
    crop_pct = 1.0 if isinstance(data.val, Digits) else config["crop_pct"]
    common: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "device": device, "seed": seed}
    common["upright"] = upright
    return (
        Loader(data.train, training, config, ranks=ranks, shuffle=True, repeats=repeats, passes=passes, **common),
        Loader(
            data.val,
            create_transform(crop_pct=crop_pct, **options),
            config,
            ranks=ranks if val_ranks is None else val_ranks,
            shuffle=False,
            **common,
        ),
    )
