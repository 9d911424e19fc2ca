"""Images for the study, from what scikit-learn, scikit-image and matplotlib install, as class folders of PNG files."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image

from fastkd.train.data import Digits

PHOTOS = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
    "gravel.png", "ihc.png", "hubble_deep_field.jpg", "moon.png", "motorcycle_left.png", "page.png", "retina.jpg",
    "rocket.jpg", "text.png", "china.jpg", "flower.jpg", "grace_hopper.jpg",
)  # fmt: skip
TILE, BLOCK, FLAT, MOST = 32, 2, 4.0, 60  # pixels, tiles, standard deviation in grey levels, tiles of a class

Sample = tuple[str, str, Image.Image]  # (train or val, class, image)


def digits() -> Iterator[Sample]:
    """Yield scikit-learn's handwritten digits at 16 x 16 px; those of `val` are by other writers."""
    for part, source in (("train", Digits(True)), ("val", Digits(False))):
        for image, target in zip(source.images, source.targets, strict=True):
            yield part, str(target), image.convert("L").resize((16, 16), Image.Resampling.BICUBIC)


def patches() -> Iterator[Sample]:
    """Yield grey tiles of 32 x 32 px of 20 pictures; the class is the picture.

    A picture is divided into blocks of 2 x 2 tiles like a chessboard: `train` has the white ones, `val` the black ones,
    so no pixel is in both. Nearly constant tiles are left out. Of larger pictures 60 tiles, evenly spread, are taken.
    """
    import skimage  # type: ignore[import-not-found,unused-ignore]
    import sklearn.datasets

    shipped = (
        Path(skimage.__file__).parent / "data",
        Path(sklearn.datasets.__file__).parent / "images",
        Path(mpl.get_data_path()) / "sample_data",
    )
    for name in PHOTOS:
        path = next(folder / name for folder in shipped if (folder / name).is_file())
        pixels = np.asarray(Image.open(path).convert("L"))
        parts: tuple[list[np.ndarray], list[np.ndarray]] = [], []
        for row in range(pixels.shape[0] // TILE):
            for column in range(pixels.shape[1] // TILE):
                tile = pixels[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
                if tile.std() >= FLAT:
                    parts[(row // BLOCK + column // BLOCK) % 2].append(tile)
        for part, tiles in zip(("train", "val"), parts, strict=True):
            for index in np.unique(np.linspace(0, len(tiles) - 1, MOST).astype(int)):
                yield part, path.stem, Image.fromarray(tiles[index])


SETS = {"digits": digits, "patches": patches}


def write(name: str, folder: Path) -> Path:
    """Write the images of a set as folder/train/CLASS/NUMBER.png and folder/val/CLASS/NUMBER.png, once."""
    if not folder.is_dir():
        partial = folder.with_name(f".{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        for number, (part, label, image) in enumerate(SETS[name]()):
            path = partial / part / label / f"{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        partial.rename(folder)
    return folder
